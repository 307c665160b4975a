#include "block/commutator.h"

#include "cuda/device.cuh"

GROKCURV_BY_LAUNCHES(Commutator, commutator, grokcurv::cuda)
