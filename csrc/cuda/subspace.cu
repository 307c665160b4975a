#include "block/subspace.h"

#include "cuda/device.cuh"

namespace grokcurv::cuda {

Index subspace_split_workspace(const SubspaceSplit& task, Stream) {
  Device device;
  block::subspace_split(device, task);
  return device.workspace.used();
}

void subspace_split(const SubspaceSplit& task, Stream stream) {
  Device device(task.workspace, stream);
  block::subspace_split(device, task);
}

Index subspace_filter_workspace(const SubspaceFilter& task, Stream) {
  Device device;
  block::subspace_filter(device, task);
  return device.workspace.used();
}

void subspace_filter(const SubspaceFilter& task, Stream stream) {
  Device device(task.workspace, stream);
  block::subspace_filter(device, task);
}

}  // namespace grokcurv::cuda
