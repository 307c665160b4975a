#pragma once

namespace grokcurv::cuda {

// As CUDA numbers them, 13000 for 13.0: what the kernels were built with, and what the driver here is good for; 0
// without a driver.
int runtime_version();
int driver_version();

// How many kernels there are, one that several sources have once for each.
int kernel_count();

// Loads every kernel on the current device. A capture must not be the first to need one.
void preload();

}  // namespace grokcurv::cuda
