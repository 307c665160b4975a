#include "block/eigh.h"

#include "cuda/device.cuh"

GROKCURV_BY_LAUNCHES(Eigh, eigh, grokcurv::cuda)
