// grokcurv._cpu: the kernels on the CPU. `where` is the number of threads.

#include "cpu/isa.h"

#define GROKCURV_CORE cpu
#include "bindings/kernels.h"

PYBIND11_MODULE(_cpu, m) {
  m.attr("COMPILER") = GROKCURV_COMPILER;
  m.attr("FLAGS") = GROKCURV_FLAGS;
  m.attr("BUILD_TYPE") = GROKCURV_BUILD_TYPE;
#ifdef _OPENMP
  m.attr("OPENMP") = _OPENMP;
#else
  m.attr("OPENMP") = 0;
#endif
  m.attr("ISA") = cpu::chosen_isa();
  py::dict isas;
  for (const cpu::Isa& isa : cpu::compiled_isas()) isas[isa.name.c_str()] = isa.runs_here;
  m.attr("ISAS") = isas;
  define_kernels(m);
}
