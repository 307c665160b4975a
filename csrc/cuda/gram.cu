#include "block/gram.h"

#include "cuda/device.cuh"

GROKCURV_BY_LAUNCHES(Gram, gram, grokcurv::cuda)
