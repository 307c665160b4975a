#include "block/draw.h"

#include "cuda/device.cuh"

GROKCURV_BY_LAUNCHES(Draw, draw, grokcurv::cuda)
