#include "emulator/kernels.h"

#include "block/commutator.h"
#include "block/draw.h"
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
  Device(nullptr, 0).launch(1, 0, BarrierForSome{});
}

}  // namespace grokcurv::emulator

GROKCURV_EACH_KERNEL(GROKCURV_BY_LAUNCHES, grokcurv::emulator)
