#include "block/gram.h"

#include "cuda/device.cuh"

namespace grokcurv::cuda {

Index gram_workspace(const Gram& task, Stream) {
  Device device;
  block::gram(device, task);
  return device.workspace.used();
}

void gram(const Gram& task, Stream stream) {
  Device device(task.workspace, stream);
  block::gram(device, task);
}

}  // namespace grokcurv::cuda
