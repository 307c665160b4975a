#pragma once

// OpenMP where the compiler has it. Without it (AppleClang) its pragmas are ignored, and one thread does everything, in
// the order in which its results would be put together anyhow.

#ifdef _OPENMP
#include <omp.h>
#endif

#include "grokcurv/vectors.h"

namespace grokcurv::cpu {

GROKCURV_INLINE int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace grokcurv::cpu
