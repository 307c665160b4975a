// grokcurv._cpu: the kernels on the CPU. `where` is the number of threads.

#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/isa.h"

#define GROKCURV_CORE cpu
#include "bindings/kernels.h"

namespace {

std::map<std::string, bool> isas() {
  std::map<std::string, bool> result;
  for (const cpu::Isa& isa : cpu::compiled_isas()) result[isa.name] = isa.runs_here;
  return result;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.attr("COMPILER") = GROKCURV_COMPILER;
  m.attr("FLAGS") = GROKCURV_FLAGS;
  m.attr("BUILD_TYPE") = GROKCURV_BUILD_TYPE;
  m.attr("OPENMP") = _OPENMP;
  m.attr("ISA") = cpu::chosen_isa();
  m.attr("ISAS") = isas();
  define_kernels(m);
}
