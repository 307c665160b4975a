#include "block/sketch.h"

#include "cuda/device.cuh"

namespace grokcurv::cuda {

Index sketch_workspace(const Sketch& task, Stream) {
  Device device;
  block::sketch(device, task);
  return device.workspace.used();
}

void sketch(const Sketch& task, Stream stream) {
  Device device(task.workspace, stream);
  block::sketch(device, task);
}

}  // namespace grokcurv::cuda
