#pragma once

#include "block/block.h"
#include "grokcurv/commutator.h"

namespace grokcurv::block {

// A range of one vector, or of two, chunk by chunk: sums stay in the registers of the threads, a chunk of deltas in
// shared memory for rows and segments. Two vectors share the values of the rows, which are loaded once for both; with
// theta the sums of two would not fit into registers, and the cache has to do.
//
// `bracket` is true where a2 and b2 are products with Hessians, false where they are gradients after a step.
// `with_theta` is true where theta is there: four more sums, and registers for fewer blocks.
// `projects` is true where there are rows or segments. Without any, a block has one vector, and no barrier but that of
// its last sums.
// `wide` is true if all vectors that are read or written are aligned to whole quads.
//
// A thread takes the same coordinates of a vector in the same order whichever they are, and whichever vector is beside
// it, so that neither has a say in the bits.
template <class T, bool bracket, bool with_theta, bool projects, bool wide>
struct CommutatorRange {
  static constexpr bool any_threads = true;
  static constexpr int threads = 256;
  static constexpr int resident = (with_theta || projects ? 2 : 4) / (sizeof(T) < 8 ? 1 : 2);
  static constexpr int sums = commutator_sums(with_theta);
  static constexpr int most = projects && !with_theta ? 2 : 1;  // vectors of a block
  // In front of the deltas: room for the sums of 32 rows, or of all vectors, in each warp.
  static constexpr Index room = most * (projects ? threads : sums * (threads / warp));
  using C = Compute<T>;

  Commutator task;  // its tables on the device
  Ranges ranges;
  double* partials;  // (vectors, columns, ranges)
  int beside;        // vectors of a block

  template <class Block>
  GROKCURV_BLOCK void operator()(Block& block) const {
    // Blocks that run at the same time have a range in common: what vectors share, such as theta and the basis, is in
    // the cache.
    const int together = projects ? beside : 1;
    const Index groups = divided_up(task.vectors, together), range = block.index() / groups;
    const Index vector = block.index() % groups * together;
    const int present = vector + together <= task.vectors ? together : 1;
    const Index of_vector = commutator_columns(task) * ranges.count;
    const Span all = ranges[range];
    double* column = partials + vector * of_vector + range;
    double* deltas = block.shared() + room;

    double sum[most][sums] = {};
    for (Index start = all.start; start < all.stop; start += chunk) {
      const Span here = Span{start, start + chunk} & all;
      GROKCURV_UNROLL
      for (int v = 0; v < most; ++v) {
        if (v < present) take(block, vector + v, here, deltas + v * chunk, sum[v]);
      }
      if constexpr (projects) {
        const auto entry = [&](int j) {
          if (j >= task.basis.count) return Projection<C>{task.segments[j - task.basis.count], nullptr};
          return Projection<C>{task.basis[j], task.basis.values.of<C>(vector) + task.basis.shift(j)};
        };
        // In the place of a second vector that is not there stands the first.
        const double* x[most];
        GROKCURV_UNROLL
        for (int v = 0; v < most; ++v) x[v] = deltas + (v < present ? v : 0) * chunk;
        project(block, present, static_cast<int>(task.basis.count + task.segments.count), entry, here, x,
                block.shared(), Totals{column + sums * ranges.count, ranges.count, of_vector}, start == all.start);
      }
    }
    // Nobody reads the room any more: `project` ends with a barrier.
    const int warps = block.threads() / warp;
    GROKCURV_UNROLL
    for (int v = 0; v < most; ++v) {
      if (v < present) {
        sum_over_block(block, sum[v], block.shared() + v * sums * warps, column + v * of_vector, ranges.count);
      }
    }
  }

  // The coordinates of a chunk of one vector.
  template <class Block>
  GROKCURV_BLOCK void take(Block& block, Index vector, Span here, double* deltas, double (&sum)[sums]) const {
    const double eta = task.eta[vector];
    const Index first = vector * task.size + here.start;
    const int length = static_cast<int>(here.length());
    for (int i = quad * block.thread(); i < length; i += quad * block.threads()) {
      const Index at = first + i;
      const int left = length - i;
      const Quad<T> g_a = load<wide>(static_cast<const T*>(task.g_a) + at, left);
      const Quad<T> g_b = load<wide>(static_cast<const T*>(task.g_b) + at, left);
      const Quad<T> a2 = load<wide>(static_cast<const T*>(task.a2) + at, left);
      const Quad<T> b2 = load<wide>(static_cast<const T*>(task.b2) + at, left);
      Quad<T> theta{};
      if constexpr (with_theta) theta = load<wide>(task.theta.of<T>(vector) + here.start + i, left);
      Quad<double> delta;
      GROKCURV_UNROLL
      for (Index e = 0; e < quad; ++e) {
        delta.value[e] = add(g_a.value[e], g_b.value[e], a2.value[e], b2.value[e], theta.value[e], eta, sum);
      }
      if constexpr (projects) keep(delta, deltas + i / quad);
      if (task.delta != nullptr) {
        Quad<C> rounded;
        GROKCURV_UNROLL
        for (Index e = 0; e < quad; ++e) rounded.value[e] = static_cast<C>(delta.value[e]);
        store<wide>(rounded, static_cast<C*>(task.delta) + at, left);
      }
    }
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
    with_flag(wide, [&](auto is_wide) {
      with_flag(projections > 0, [&](auto projects) {
        const auto launch = [&](auto bracket, auto with_theta) {
          using Body = CommutatorRange<T, bracket, with_theta, projects, is_wide>;
          // Vectors with values of their own have none to share. And where blocks are few, more of them are worth more:
          // even of two vectors each there should be two for every multiprocessor of a large GPU.
          const bool share = projects && task.basis.values.stride == 0 && task.vectors * ranges.count >= 512;
          const int beside = share ? Body::most : 1;
          device.launch(divided_up(task.vectors, beside) * ranges.count, Body::room + (projects ? beside * chunk : 0),
                        Body{task, ranges, partials, beside});
        };
        if (task.bracket) {
          launch(std::true_type{}, std::false_type{});
        } else if (task.theta.data == nullptr) {
          launch(std::false_type{}, std::false_type{});
        } else {
          launch(std::false_type{}, std::true_type{});
        }
      });
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
