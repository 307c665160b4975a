#pragma once

// The kernels as the emulator runs them.

#include "emulator/fibers.h"
#include "grokcurv/commutator.h"
#include "grokcurv/eigh.h"
#include "grokcurv/gram.h"
#include "grokcurv/perturb.h"
#include "grokcurv/rotate.h"
#include "grokcurv/sketch.h"
#include "grokcurv/subspace.h"

namespace grokcurv::emulator {

using Where = Index;

// A mistake to be found: of the 64 threads of a block, 40 come to its barrier.
void barrier_for_some();

#define GROKCURV_DECLARE(Task, kernel)          \
  Index kernel##_workspace(const Task&, Where); \
  void kernel(const Task&, Where);
GROKCURV_DECLARE(Perturb, perturb)
GROKCURV_DECLARE(Commutator, commutator)
GROKCURV_DECLARE(SubspaceSplit, subspace_split)
GROKCURV_DECLARE(SubspaceFilter, subspace_filter)
GROKCURV_DECLARE(Gram, gram)
GROKCURV_DECLARE(Eigh, eigh)
GROKCURV_DECLARE(Rotate, rotate)
GROKCURV_DECLARE(Sketch, sketch)
#undef GROKCURV_DECLARE

}  // namespace grokcurv::emulator
