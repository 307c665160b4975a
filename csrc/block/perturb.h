#pragma once

#include "block/block.h"
#include "grokcurv/perturb.h"

namespace grokcurv::block {

// A chunk of all vectors where they share theta, which is so read once; else of one vector, so that there are blocks
// enough.
// `wide` is true if theta, all directions and all results are aligned to whole quads: for the whole task, or not at
// all.
template <class T, bool wide, bool shared>
struct PerturbChunk {
  static constexpr bool any_threads = true;
  static constexpr int threads = 256, resident = 4;

  Perturb task;

  template <class Block>
  GROKCURV_BLOCK void operator()(Block& block) const {
    using C = Compute<T>;
    const Index thetas = shared ? 1 : task.vectors;
    const Index first = block.index() % thetas, start = block.index() / thetas * chunk, left = task.size - start;
    for (Index i = quad * block.thread(); i < chunk && i < left; i += quad * block.threads()) {
      const Quad<T> theta = load<wide>(task.theta.of<T>(first) + start + i, left - i);
      // A thread keeps its four coordinates of theta in registers while the directions go by. No thread reads what
      // another writes, so there is no barrier.
      for (Index vector = first; vector < task.vectors; vector += thetas) {
        const Index at = vector * task.size + start + i;
        const Quad<T> direction = load<wide>(static_cast<const T*>(task.directions) + at, left - i);
        const C eta = static_cast<C>(task.eta[vector]);
        Quad<T> out;
        GROKCURV_UNROLL
        for (Index e = 0; e < quad; ++e) {
          // Two roundings in the compute type, as in PyTorch and on the CPU: an fma would have one.
          const C step = eta * static_cast<C>(widen(direction.value[e]));
          out.value[e] = narrow<T>(static_cast<C>(widen(theta.value[e])) - step);
        }
        store<wide>(out, static_cast<T*>(task.out) + at, left - i);
      }
    }
  }
};

template <class Device>
void perturb(Device& device, const Perturb& task) {
  if (task.vectors == 0) return;
  with_type(task.type, [&]<class T>() {
    const bool wide = aligned<T>(task.theta.data, task.vectors, task.theta.stride) &&
                      aligned<T>(task.directions, task.vectors, task.size) &&
                      aligned<T>(task.out, task.vectors, task.size);
    const bool shared = task.theta.stride == 0;
    const Index blocks = chunks(task.size) * (shared ? 1 : task.vectors);
    with_flag(wide, [&](auto is_wide) {
      with_flag(shared, [&](auto is_shared) { device.launch(blocks, 0, PerturbChunk<T, is_wide, is_shared>{task}); });
    });
  });
}

}  // namespace grokcurv::block
