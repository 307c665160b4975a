#include "block/perturb.h"

#include "cuda/device.cuh"

namespace grokcurv::cuda {

Index perturb_workspace(const Perturb& task, Stream) {
  Device device;
  block::perturb(device, task);
  return device.workspace.used();
}

void perturb(const Perturb& task, Stream stream) {
  Device device(task.workspace, stream);
  block::perturb(device, task);
}

}  // namespace grokcurv::cuda
