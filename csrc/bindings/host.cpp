// grokcurv._host: the kernels of grokcurv._cuda on the CPU, for tests. `where` says nothing.

#include "host/kernels.h"

#define GROKCURV_CORE host
#include "bindings/kernels.h"

PYBIND11_MODULE(_host, m) {
  m.def(
      "set_order", [](std::uint64_t seed, int threads, Index skipped) { host::order = {seed, threads, skipped}; },
      py::arg("seed") = 0, py::arg("threads") = 0, py::arg("skipped") = -1);
  define_kernels(m);
}
