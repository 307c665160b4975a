#pragma once

#include "block/block.h"
#include "grokcurv/subspace.h"

namespace grokcurv::block {

// A range of one vector, chunk by chunk in shared memory: there it is read once from memory for however many rows of
// the basis. `wide` is true if all vectors are aligned to whole quads.
template <class T, bool wide>
struct SplitRange {
  static constexpr bool any_threads = true;
  static constexpr int threads = 256, resident = 4;
  static constexpr int ahead = 2;  // quads of a thread that are on their way at once

  using C = Compute<T>;

  SubspaceSplit task;  // its table on the device
  Ranges ranges;
  double* partials;  // (vectors, 1 + basis.count, ranges)

  template <class Block>
  GROKCURV_BLOCK void operator()(Block& block) const {
    // Vectors of the same range are neighbours, so that they find its part of the basis in the cache.
    const Index vector = block.index() % task.vectors, range = block.index() / task.vectors;
    const Span all = ranges[range];
    const T* v = static_cast<const T*>(task.v) + vector * task.size;
    double* column = partials + vector * (1 + task.basis.count) * ranges.count + range;
    double* room = block.shared();
    double* kept = room + block.threads();

    double norm2[1] = {};
    for (Index start = all.start; start < all.stop; start += chunk) {
      const Span here = Span{start, start + chunk} & all;
      const int length = static_cast<int>(here.length()), apart = quad * block.threads();
      GROKCURV_ROLLED
      for (int i = quad * block.thread(); i < length; i += ahead * apart) {
        if (length - i >= (ahead - 1) * apart + quad) {
          take<true>(v + start + i, apart, length - i, kept + i / quad, norm2[0]);
        } else {
          take<false>(v + start + i, apart, length - i, kept + i / quad, norm2[0]);
        }
      }
      const auto row = [&](int j) {
        return Projection<C>{task.basis[j], task.basis.values.of<C>(vector) + task.basis.shift(j)};
      };
      const double* const x[1] = {kept};
      project(block, 1, static_cast<int>(task.basis.count), row, here, x, room,
              Totals{column + ranges.count, ranges.count, 0}, start == all.start);
    }
    // Nobody reads `room` any more: `project` ends with a barrier.
    sum_over_block(block, norm2, room, column, ranges.count);
  }

  // Some quads of a thread, `apart` from each other, of which `left` coordinates are there.
  template <bool whole>
  static GROKCURV_BLOCK void take(const T* v, int apart, int left, double* place, double& norm2) {
    Quad<T> q[ahead];
    load<wide, whole>(q, v, apart, left);
    GROKCURV_UNROLL
    for (int k = 0; k < ahead; ++k) {
      if (!whole && left <= k * apart) break;
      Quad<double> x;
      GROKCURV_UNROLL
      for (int e = 0; e < quad; ++e) {
        x.value[e] = widen(q[k].value[e]);
        norm2 = fma(x.value[e], x.value[e], norm2);
      }
      keep(x, place + k * apart / quad);
    }
  }
};

template <class Device>
void subspace_split(Device& device, const SubspaceSplit& given) {
  SubspaceSplit task = given;
  task.basis = upload(device, given.basis);
  const Ranges ranges = ranges_of(task.size, chunk);
  const Index columns = 1 + task.basis.count;
  double* partials = device.workspace.take(task.vectors * columns * ranges.count);
  double* norm2 = task.norm2 != nullptr ? task.norm2 : device.workspace.take(task.vectors);
  with_type(task.type, [&]<class T>() {
    with_flag(aligned<T>(task.v, task.vectors, task.size), [&](auto flag) {
      using Body = SplitRange<T, flag>;
      device.launch(task.vectors * ranges.count, Body::threads + chunk, Body{task, ranges, partials});
    });
  });
  fold(device, {partials,
                task.vectors,
                columns,
                ranges.count,
                {{norm2, 1}, {task.coefficients, task.basis.count}, {nullptr, 0}}});
}

// A chunk of one vector. A coordinate takes its terms in the order of the basis. It is the business of one thread, from
// reading to writing back, so that no barrier is needed and g is filtered in place. Products and sums are rounded one
// by one, without fma, so that the bits are the CPU's. `wide` is true if all vectors are aligned to whole quads. Rows
// of the basis begin anywhere: they are read one by one where they are not aligned.
template <class T, bool wide>
struct FilterChunk {
  static constexpr bool any_threads = true;
  static constexpr int threads = 256, resident = 4;
  static constexpr int ahead = 2;  // quads of a thread that are on their way at once
  using C = Compute<T>;

  SubspaceFilter task;  // its table on the device

  template <class Block>
  GROKCURV_BLOCK void operator()(Block& block) const {
    const Index vector = block.index() % task.vectors, start = block.index() / task.vectors * chunk;
    const Span here = Span{start, start + chunk} & Span{0, task.size};
    const int length = static_cast<int>(here.length()), apart = quad * block.threads();
    const int count = static_cast<int>(task.basis.count);
    T* g = static_cast<T*>(task.g) + vector * task.size + start;
    // Most chunks meet no row, as a warp sees by looking at 32 of them at once.
    bool any = false;
    for (int begin = 0; begin < count && !any; begin += warp) {
      any = block.warp_first(meets(begin + block.thread() % warp, here)) < warp;
    }
    if (any) {
      for (int from = 0; from < length; from += ahead * apart) add_rows(block, vector, here, from, g);
      return;
    }
    GROKCURV_ROLLED
    for (int i = quad * block.thread(); i < length; i += ahead * apart) {
      if (length - i >= (ahead - 1) * apart + quad) {
        scale<true>(g + i, apart, length - i);
      } else {
        scale<false>(g + i, apart, length - i);
      }
    }
  }

  GROKCURV_BLOCK bool meets(int j, Span here) const {
    return j < task.basis.count && (task.basis[j] & here).length() > 0;
  }

  // Quads of a thread that meet no row.
  template <bool whole>
  GROKCURV_BLOCK void scale(T* g, int apart, int left) const {
    Quad<T> q[ahead];
    load<wide, whole>(q, g, apart, left);
    GROKCURV_UNROLL
    for (int k = 0; k < ahead; ++k) {
      GROKCURV_UNROLL
      for (int e = 0; e < quad; ++e) q[k].value[e] = narrow<T>((1.0 - task.strength) * widen(q[k].value[e]));
    }
    store<wide, whole>(q, g, apart, left);
  }

  // The quads of all threads from `from` on, counted from the start of the chunk, where g is. All threads of a warp
  // look for the rows that meet these, even one that has no coordinates left.
  template <class Block>
  GROKCURV_BLOCK void add_rows(Block& block, Index vector, Span here, int from, T* g) const {
    const int lane = block.thread() % warp, apart = quad * block.threads(), first = from + quad * block.thread();
    const int left = static_cast<int>(here.length()) - first;
    Quad<T> q[ahead];
    load<wide, false>(q, g + first, apart, left);
    double x[ahead][quad];
    GROKCURV_UNROLL
    for (int k = 0; k < ahead; ++k) {
      GROKCURV_UNROLL
      for (int e = 0; e < quad; ++e) x[k][e] = (1.0 - task.strength) * widen(q[k].value[e]);
    }
    const Span pass = Span{here.start + from, here.start + from + ahead * apart} & here;
    for (int begin = 0; begin < task.basis.count; begin += warp) {
      bool waits = meets(begin + lane, pass);
      for (int next = block.warp_first(waits); next < warp; next = block.warp_first(waits)) {
        waits = waits && lane != next;
        const int j = begin + next;
        const Span both = task.basis[j] & pass;
        const C* values = task.basis.values.of<C>(vector) + task.basis.shift(j) + here.start;
        const double weight = task.strength * task.coefficients[vector * task.basis.count + j];
        GROKCURV_UNROLL
        for (int k = 0; k < ahead; ++k) {
          add_row(values, first + k * apart, static_cast<int>(both.start - here.start),
                  static_cast<int>(both.stop - here.start), weight, x[k]);
        }
      }
    }
    GROKCURV_UNROLL
    for (int k = 0; k < ahead; ++k) {
      GROKCURV_UNROLL
      for (int e = 0; e < quad; ++e) q[k].value[e] = narrow<T>(x[k][e]);
    }
    store<wide, false>(q, g + first, apart, left);
  }

  // Of the quad at i, what lies outside of the row takes nothing, not even a zero.
  static GROKCURV_BLOCK void add_row(const C* values, int i, int begin, int end, double weight, double (&x)[quad]) {
    if (begin <= i && i + quad <= end && reinterpret_cast<std::uintptr_t>(values + i) % alignof(Quad<C>) == 0) {
      const Quad<C> row = load<true>(values + i, quad);
      GROKCURV_UNROLL
      for (int e = 0; e < quad; ++e) x[e] += weight * static_cast<double>(row.value[e]);
    } else {
      GROKCURV_UNROLL
      for (int e = 0; e < quad; ++e) {
        if (begin <= i + e && i + e < end) x[e] += weight * static_cast<double>(values[i + e]);
      }
    }
  }
};

template <class Device>
void subspace_filter(Device& device, const SubspaceFilter& given) {
  SubspaceFilter task = given;
  task.basis = upload(device, given.basis);
  with_type(task.type, [&]<class T>() {
    with_flag(aligned<T>(task.g, task.vectors, task.size),
              [&](auto flag) { device.launch(task.vectors * chunks(task.size), 0, FilterChunk<T, flag>{task}); });
  });
}

}  // namespace grokcurv::block
