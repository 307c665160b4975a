#include "block/sketch.h"

#include "cuda/device.cuh"

GROKCURV_BY_LAUNCHES(Sketch, sketch, grokcurv::cuda)
