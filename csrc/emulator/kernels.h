#pragma once

// The kernels as the emulator runs them.

#include "grokcurv/kernels.h"

namespace grokcurv {

namespace emulator {

using Where = Index;

// A mistake to be found: of the 64 threads of a block, 40 come to its barrier.
void barrier_for_some();

}  // namespace emulator

GROKCURV_EACH_KERNEL(GROKCURV_PROMISE, emulator)

}  // namespace grokcurv
