#include "cuda/driver.h"

#include "cuda/device.cuh"

namespace grokcurv::cuda {

std::vector<const void*>& kernels() {
  static std::vector<const void*> all;
  return all;
}

int runtime_version() {
  return CUDART_VERSION;
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int kernel_count() {
  return static_cast<int>(kernels().size());
}

void preload() {
  for (const void* kernel : kernels()) {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel), "loading a kernel");
  }
}

}  // namespace grokcurv::cuda
