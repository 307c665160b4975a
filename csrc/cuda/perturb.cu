#include "block/perturb.h"

#include "cuda/device.cuh"

GROKCURV_BY_LAUNCHES(Perturb, perturb, grokcurv::cuda)
