#include "block/eigh.h"

#include "cuda/device.cuh"

namespace grokcurv::cuda {

Index eigh_workspace(const Eigh& task, Stream) {
  Device device;
  block::eigh(device, task);
  return device.workspace.used();
}

void eigh(const Eigh& task, Stream stream) {
  Device device(task.workspace, stream);
  block::eigh(device, task);
}

}  // namespace grokcurv::cuda
