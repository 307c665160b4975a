// grokcurv._emulator: the kernels of grokcurv._cuda on the CPU, for tests. `where` says nothing.

#include <pybind11/stl.h>

#include "emulator/fibers.h"
#include "emulator/kernels.h"

#define GROKCURV_CORE emulator
#include "bindings/kernels.h"

namespace {

void set_order(std::uint64_t seed, int threads, std::string skipped) {
  if (threads < 0 || threads % 32 != 0) throw std::invalid_argument("threads must be a multiple of 32");
  emulator::order = {.seed = seed, .threads = threads, .skipped = std::move(skipped), .met = {}};
}

// Those that threads came to since the order was set.
std::vector<std::string> barriers() {
  std::vector<std::string> names;
  for (const auto& barrier : emulator::order.met) names.push_back(barrier.name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_emulator, m) {
  m.def("set_order", &set_order, py::arg("seed") = 0, py::arg("threads") = 0, py::arg("skipped") = "");
  m.def("barriers", &barriers);
  m.def("barrier_for_some", &emulator::barrier_for_some);
  define_kernels(m);
}
