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
  static constexpr int ahead = 2;  // quads of a thread that are on their way at once, of each vector
  using C = Compute<T>;

  Perturb task;

  template <class Block>
  GROKCURV_BLOCK void operator()(Block& block) const {
    const Index thetas = shared ? 1 : task.vectors;
    const Index first = block.index() % thetas, start = block.index() / thetas * chunk;
    const int length = static_cast<int>((Span{start, start + chunk} & Span{0, task.size}).length());
    const int apart = quad * block.threads();
    GROKCURV_ROLLED
    for (int i = quad * block.thread(); i < length; i += ahead * apart) {
      if (length - i >= (ahead - 1) * apart + quad) {
        move_all<true>(first, start + i, apart, length - i);
      } else {
        move_all<false>(first, start + i, apart, length - i);
      }
    }
  }

  // A thread keeps its quads of theta in registers while the directions go by. No thread reads what another writes, so
  // there is no barrier.
  template <bool whole>
  GROKCURV_BLOCK void move_all(Index first, Index at, int apart, int left) const {
    Quad<T> theta[ahead];
    load<wide, whole>(theta, task.theta.of<T>(first) + at, apart, left);
    if constexpr (shared) {
      for (Index vector = 0; vector < task.vectors; ++vector) move<whole>(theta, vector, at, apart, left);
    } else {
      move<whole>(theta, first, at, apart, left);
    }
  }

  template <bool whole>
  GROKCURV_BLOCK void move(const Quad<T> (&theta)[ahead], Index vector, Index at, int apart, int left) const {
    Quad<T> quads[ahead];
    load<wide, whole>(quads, static_cast<const T*>(task.directions) + vector * task.size + at, apart, left);
    const C eta = static_cast<C>(task.eta[vector]);
    GROKCURV_UNROLL
    for (int k = 0; k < ahead; ++k) {
      GROKCURV_UNROLL
      for (int e = 0; e < quad; ++e) {
        // Two roundings in the compute type, as in PyTorch and on the CPU: an fma would have one.
        const C step = eta * static_cast<C>(widen(quads[k].value[e]));
        quads[k].value[e] = narrow<T>(static_cast<C>(widen(theta[k].value[e])) - step);
      }
    }
    store<wide, whole>(quads, static_cast<T*>(task.out) + vector * task.size + at, apart, left);
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
