#include "block/rotate.h"

#include "cuda/device.cuh"

GROKCURV_BY_LAUNCHES(Rotate, rotate, grokcurv::cuda)
