#include "block/commutator.h"

#include "cuda/device.cuh"

namespace grokcurv::cuda {

Index commutator_workspace(const Commutator& task, Stream) {
  Device device;
  block::commutator(device, task);
  return device.workspace.used();
}

void commutator(const Commutator& task, Stream stream) {
  Device device(task.workspace, stream);
  block::commutator(device, task);
}

}  // namespace grokcurv::cuda
