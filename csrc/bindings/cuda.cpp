// grokcurv._cuda: the kernels on NVIDIA GPUs. `where` is a stream of the current device.

#include <string>

#include "cuda/driver.h"

#define GROKCURV_CORE cuda
#include "bindings/kernels.h"

PYBIND11_MODULE(_cuda, m) {
  m.attr("COMPILER") = GROKCURV_COMPILER;
  m.attr("ARCHITECTURES") = GROKCURV_ARCHITECTURES;
  m.attr("RUNTIME") = cuda::runtime_version();
  m.attr("KERNELS") = cuda::kernel_count();
  m.def("driver", &cuda::driver_version);
  m.def("preload", &cuda::preload);
  define_kernels(m);
}
