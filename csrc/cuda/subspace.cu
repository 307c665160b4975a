#include "block/subspace.h"

#include "cuda/device.cuh"

GROKCURV_BY_LAUNCHES(SubspaceSplit, subspace_split, grokcurv::cuda)
GROKCURV_BY_LAUNCHES(SubspaceFilter, subspace_filter, grokcurv::cuda)
