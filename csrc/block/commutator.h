#pragma once

#include "block/block.h"
#include "grokcurv/commutator.h"

namespace grokcurv::block {

// A range of one vector, chunk by chunk: sums stay in the registers of the threads, a chunk of deltas in shared memory
// for those who read them.
//
// `bracket` is true where a2 and b2 are products with Hessians, false where they are gradients after a step.
// `with_theta` is true where theta is there: four more sums, and registers for fewer blocks.
// `wide` is true if all vectors that are read or written are aligned to whole quads.
//
// A thread takes the same coordinates in the same order whichever they are, so `wide` has no say in the bits.
template <class T, bool bracket, bool with_theta, bool wide>
struct CommutatorRange {
  static constexpr bool any_threads = true;
  static constexpr int threads = 256;
  static constexpr int resident = sizeof(T) < 8 ? (with_theta ? 2 : 4) : (with_theta ? 1 : 2);
  static constexpr int sums = commutator_sums(with_theta);
  using C = Compute<T>;

  Commutator task;  // its tables on the device
  Ranges ranges;
  double* partials;  // (vectors, columns, ranges)

  template <class Block>
  GROKCURV_BLOCK void operator()(Block& block) const {
    // Blocks that run at the same time have a range in common: what vectors share, such as theta and the basis, is in
    // the cache.
    const Index vector = block.index() % task.vectors, range = block.index() / task.vectors;
    const Span all = ranges[range];
    const double eta = task.eta[vector];
    double* column = partials + vector * commutator_columns(task) * ranges.count + range;
    double* room = block.shared();
    double* deltas = room + sums * (block.threads() / warp);
    // True if there are rows or segments, which read deltas of other threads: the same for the whole block. Otherwise
    // the block has no shared memory for deltas, and no barrier but that of its last sums.
    const bool projects = task.basis.count + task.segments.count > 0;

    double sum[sums] = {};
    for (Index start = all.start; start < all.stop; start += chunk) {
      const Span here = Span{start, start + chunk} & all;
      for (Index i = here.start + quad * block.thread(); i < here.stop; i += quad * block.threads()) {
        const Index at = vector * task.size + i, left = here.stop - i;
        const Quad<T> g_a = load<wide>(static_cast<const T*>(task.g_a) + at, left);
        const Quad<T> g_b = load<wide>(static_cast<const T*>(task.g_b) + at, left);
        const Quad<T> a2 = load<wide>(static_cast<const T*>(task.a2) + at, left);
        const Quad<T> b2 = load<wide>(static_cast<const T*>(task.b2) + at, left);
        Quad<T> theta{};
        if constexpr (with_theta) theta = load<wide>(task.theta.of<T>(vector) + i, left);
        Quad<C> kept;
        GROKCURV_UNROLL
        for (Index e = 0; e < quad; ++e) {
          const double delta = add(g_a.value[e], g_b.value[e], a2.value[e], b2.value[e], theta.value[e], eta, sum);
          kept.value[e] = static_cast<C>(delta);
          if (projects && e < left) deltas[i - start + e] = delta;
        }
        if (task.delta != nullptr) store<wide>(kept, static_cast<C*>(task.delta) + at, left);
      }
      if (projects) {
        // Every thread has written its deltas before any reads those of others.
        block.sync();
        project<C>(block, task.basis, task.segments, vector, here, deltas, column + sums * ranges.count, ranges.count,
                   start == all.start);
        // Every warp has read them before the next chunk is written over them.
        block.sync();
      }
    }
    // `room` lies in front of the deltas and nobody has used it, so that this needs no barrier of its own before.
    sum_over_block(block, sum, room, column, ranges.count);
  }

  // Adds the terms of one coordinate to the sums and returns its delta. A coordinate of zeros adds zeros.
  static GROKCURV_BLOCK double add(T g_a, T g_b, T a2, T b2, T theta, double eta, double (&sum)[sums]) {
    const double a = widen(g_a), b = widen(g_b);
    const double change_a = bracket ? widen(a2) : widen(a2) - a;
    const double change_b = bracket ? widen(b2) : widen(b2) - b;
    const double delta = bracket ? eta * eta * (change_b - change_a) : eta * (change_a - change_b);
    sum[0] = fma(a, a, sum[0]);
    sum[1] = fma(b, b, sum[1]);
    sum[2] = fma(a, b, sum[2]);
    sum[3] = fma(delta, delta, sum[3]);
    sum[4] = fma(change_a, change_a, sum[4]);
    sum[5] = fma(change_b, change_b, sum[5]);
    // What PyTorch would store after two steps in either order, and after one; q_a is for a point as the kernel
    // `perturb` makes it, where the product is rounded to the compute type alone.
    if constexpr (with_theta) {
      const C step = static_cast<C>(eta), point = static_cast<C>(widen(theta));
      const C product_a = step * static_cast<C>(a), product_b = step * static_cast<C>(b);
      const C ab = moved(moved(point, product_a), step * static_cast<C>(widen(b2)));
      const C ba = moved(moved(point, product_b), step * static_cast<C>(widen(a2)));
      const double r = widen(narrow<T>(ab - ba));
      const double q_a = widen(narrow<T>(point - product_a)) - (widen(theta) - eta * a);
      const double q_b = widen(narrow<T>(point - product_b)) - (widen(theta) - eta * b);
      sum[6] = fma(r, r, sum[6]);
      sum[7] = fma(r - delta, r - delta, sum[7]);
      sum[8] = fma(q_a, q_a, sum[8]);
      sum[9] = fma(q_b, q_b, sum[9]);
    }
    return delta;
  }

  // point - product, as PyTorch rounds them: both to the type of the vectors.
  static GROKCURV_BLOCK C moved(C point, C product) {
    const C rounded = static_cast<C>(widen(narrow<T>(product)));
    return static_cast<C>(widen(narrow<T>(point - rounded)));
  }
};

template <class Device>
void commutator(Device& device, const Commutator& given) {
  Commutator task = given;
  task.basis = upload(device, given.basis);
  task.segments = upload(device, given.segments);
  const Ranges ranges = ranges_of(task.size, chunk);
  const Index columns = commutator_columns(task), projections = task.basis.count + task.segments.count;
  double* partials = device.workspace.take(task.vectors * columns * ranges.count);

  with_type(task.type, [&]<class T>() {
    const auto fits = [&](const void* x) { return aligned<T>(x, task.vectors, task.size); };
    // One vector out of line, and all are read one by one.
    const bool wide = fits(task.g_a) && fits(task.g_b) && fits(task.a2) && fits(task.b2) &&
                      aligned<T>(task.theta.data, task.vectors, task.theta.stride) &&
                      (task.delta == nullptr || aligned<Compute<T>>(task.delta, task.vectors, task.size));
    with_flag(wide, [&](auto flag) {
      const auto launch = [&](auto body) {
        const Index shared = body.sums * (body.threads / warp) + (projections > 0 ? chunk : 0);
        device.launch(task.vectors * ranges.count, shared, body);
      };
      if (task.bracket) {
        launch(CommutatorRange<T, true, false, flag>{task, ranges, partials});
      } else if (task.theta.data == nullptr) {
        launch(CommutatorRange<T, false, false, flag>{task, ranges, partials});
      } else {
        launch(CommutatorRange<T, false, true, flag>{task, ranges, partials});
      }
    });
  });
  fold(device, {partials,
                task.vectors,
                columns,
                ranges.count,
                {{task.sums, columns - projections},
                 {task.coefficients, task.basis.count},
                 {task.energies, task.segments.count}}});
}

}  // namespace grokcurv::block
