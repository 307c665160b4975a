#include "block/rotate.h"

#include "cuda/device.cuh"

namespace grokcurv::cuda {

Index rotate_workspace(const Rotate& task, Stream) {
  Device device;
  block::rotate(device, task);
  return device.workspace.used();
}

void rotate(const Rotate& task, Stream stream) {
  Device device(task.workspace, stream);
  block::rotate(device, task);
}

}  // namespace grokcurv::cuda
