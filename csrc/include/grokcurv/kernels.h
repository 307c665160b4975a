#pragma once

// Every kernel, named once: whatever goes through all of them goes through this list.

#include "grokcurv/commutator.h"
#include "grokcurv/draw.h"
#include "grokcurv/eigh.h"
#include "grokcurv/gram.h"
#include "grokcurv/perturb.h"
#include "grokcurv/rotate.h"
#include "grokcurv/sketch.h"
#include "grokcurv/subspace.h"

// of(task, stem, core) for each kernel; what the core is, a namespace, is for the caller to say.
// clang-format off: one a line.
#define GROKCURV_EACH_KERNEL(of, core)      \
  of(Perturb, perturb, core)                \
  of(Commutator, commutator, core)          \
  of(SubspaceSplit, subspace_split, core)   \
  of(SubspaceFilter, subspace_filter, core) \
  of(Gram, gram, core)                      \
  of(Eigh, eigh, core)                      \
  of(Rotate, rotate, core)                  \
  of(Sketch, sketch, core)                  \
  of(Draw, draw, core)
// clang-format on

// Every kernel has two functions for each device: `<stem>_workspace` says how many doubles of workspace a task needs
// there, `<stem>` carries it out: on the CPU with so many threads, on a GPU by launches on a stream. All pointers of a
// task are the device's, but for tables (rows, spans), which are the host's.
#define GROKCURV_PROMISE(Task, kernel, core)               \
  namespace core {                                         \
  Index kernel##_workspace(const Task& task, Where where); \
  void kernel(const Task& task, Where where);              \
  }

namespace grokcurv {

using Stream = void*;  // cudaStream_t
namespace cpu {
using Where = int;
}
namespace cuda {
using Where = Stream;
}
GROKCURV_EACH_KERNEL(GROKCURV_PROMISE, cpu)
GROKCURV_EACH_KERNEL(GROKCURV_PROMISE, cuda)

}  // namespace grokcurv
