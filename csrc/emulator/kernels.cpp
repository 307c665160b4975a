#include "emulator/kernels.h"

#include "block/commutator.h"
#include "block/eigh.h"
#include "block/gram.h"
#include "block/perturb.h"
#include "block/rotate.h"
#include "block/sketch.h"
#include "block/subspace.h"
#include "emulator/device.h"

namespace grokcurv::emulator {

namespace {

struct BarrierForSome {
  static constexpr int threads = 64, resident = 1;

  template <class Block>
  void operator()(Block& block) const {
    if (block.thread() < 40) block.sync();
  }
};

}  // namespace

void barrier_for_some() {
  Device(nullptr).launch(1, 0, BarrierForSome{});
}

#define GROKCURV_DEFINE(Task, kernel)                 \
  Index kernel##_workspace(const Task& task, Where) { \
    Device device;                                    \
    block::kernel(device, task);                      \
    return device.workspace.used();                   \
  }                                                   \
  void kernel(const Task& task, Where) {              \
    Device device(task.workspace);                    \
    block::kernel(device, task);                      \
  }
GROKCURV_DEFINE(Perturb, perturb)
GROKCURV_DEFINE(Commutator, commutator)
GROKCURV_DEFINE(SubspaceSplit, subspace_split)
GROKCURV_DEFINE(SubspaceFilter, subspace_filter)
GROKCURV_DEFINE(Gram, gram)
GROKCURV_DEFINE(Eigh, eigh)
GROKCURV_DEFINE(Rotate, rotate)
GROKCURV_DEFINE(Sketch, sketch)
#undef GROKCURV_DEFINE

}  // namespace grokcurv::emulator
