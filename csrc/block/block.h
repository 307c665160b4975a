#pragma once

// What block algorithms are written in. A block algorithm is a struct with a number of `threads`, a multiple of 32, and
// a call operator that every thread of a block runs; its members are its arguments. `resident` says for how many blocks
// the registers of a multiprocessor must do; `any_threads`, that fewer threads would do as well, down to two warps. The
// block that it gets offers
//
//   thread(), threads()   this thread's number, and of how many
//   index(), count()      the number of this block, and of how many
//   shared()              the block's shared memory, in doubles
//   sync()                a barrier: every thread of the block comes to it
//   warp_sum(x)           the sum over the 32 threads of a warp, each of which comes to it; all get the same bits
//   warp_max(x)           likewise the largest
//
// The last two exchange registers and order no memory: what one thread writes and another reads has a sync() between.
// csrc/cuda/device.cuh runs blocks on a GPU, csrc/emulator/device.h the same source on the CPU. Both do the arithmetic
// that is written down: products and sums are fused only where it says fma.

#include <cmath>
#include <vector>

#include "grokcurv/numbers.h"

#ifdef __CUDACC__
#define GROKCURV_BLOCK __device__ __forceinline__
#define GROKCURV_UNROLL _Pragma("unroll")    // so that an array lives in registers
#define GROKCURV_ROLLED _Pragma("unroll 1")  // so that they suffice
#else
#define GROKCURV_BLOCK inline
#define GROKCURV_UNROLL
#define GROKCURV_ROLLED
#endif

namespace grokcurv::block {

constexpr int warp = 32;

// Shared memory that every GPU since sm_80 gives a block.
constexpr Index shared_limit = 96 * 1024 / sizeof(double);

GROKCURV_INLINE constexpr Index divided_up(Index n, Index by) {
  return (n + by - 1) / by;
}

template <class Body>
constexpr bool any_threads = requires { requires Body::any_threads; };

// ------------------------------------------------------------------------------------------------ coordinates by fours

// Four coordinates in a row, the piece of a vector that a thread takes: of float32, one load of 16 bytes.
constexpr Index quad = 4;

template <class T>
struct alignas(quad * sizeof(T) < 16 ? quad * sizeof(T) : 16) Quad {
  T value[quad];
};

// Of the coordinates at x, `left` are there; those beyond read as zero. `wide`: x is aligned to whole quads.
template <bool wide, class T>
GROKCURV_BLOCK Quad<T> load(const T* x, Index left) {
  if constexpr (wide) {
    if (left >= quad) return *reinterpret_cast<const Quad<T>*>(x);
  }
  Quad<T> result;
  GROKCURV_UNROLL
  for (Index e = 0; e < quad; ++e) result.value[e] = e < left ? x[e] : T{};
  return result;
}

template <bool wide, class T>
GROKCURV_BLOCK void store(const Quad<T>& values, T* x, Index left) {
  if constexpr (wide) {
    if (left >= quad) {
      *reinterpret_cast<Quad<T>*>(x) = values;
      return;
    }
  }
  GROKCURV_UNROLL
  for (Index e = 0; e < quad; ++e) {
    if (e < left) x[e] = values.value[e];
  }
}

// Whether vectors in a row, `size` coordinates from each other, are all aligned to whole quads.
template <class T>
bool aligned(const void* x, Index vectors, Index size) {
  constexpr std::uintptr_t bytes = alignof(Quad<T>);
  const auto apart = static_cast<std::uintptr_t>(size) * sizeof(T);
  return reinterpret_cast<std::uintptr_t>(x) % bytes == 0 && (vectors <= 1 || apart % bytes == 0);
}

// Calls body(std::true_type) or body(std::false_type).
template <class Body>
void with_flag(bool flag, Body body) {
  flag ? body(std::true_type{}) : body(std::false_type{});
}

// ---------------------------------------------------------------------------------------------------------------- sums

// Sums run over ranges of the coordinates: a partial sum for each, folded in a fixed order. There are at most 1024, of
// whole steps (the last may be cut), and how long they are depends on the number of coordinates alone.
struct Ranges {
  Index size, length, count;

  GROKCURV_INLINE Span operator[](Index n) const { return Span{n * length, (n + 1) * length} & Span{0, size}; }
};

GROKCURV_INLINE constexpr Ranges ranges_of(Index size, Index step) {
  const Index length = divided_up(divided_up(size, step), 1024) * step;
  return {size, length, size == 0 ? 0 : divided_up(size, length)};
}

// out[j * stride] = the sum of sum[j] over all threads. Room for n doubles a warp.
template <int n, class Block>
GROKCURV_BLOCK void sum_over_block(Block& block, const double (&sum)[n], double* room, double* out, Index stride) {
  const int warps = block.threads() / warp;
  GROKCURV_UNROLL
  for (int j = 0; j < n; ++j) {
    const double total = block.warp_sum(sum[j]);
    if (block.thread() % warp == 0) room[j * warps + block.thread() / warp] = total;
  }
  block.sync();
  for (int j = block.thread(); j < n; j += block.threads()) {
    double total = 0.0;
    for (int w = 0; w < warps; ++w) total += room[j * warps + w];
    out[j * stride] = total;
  }
}

// The sum of partials[0], ... by one warp; every thread gets it.
template <class Block>
GROKCURV_BLOCK double sum_over_warp(Block& block, const double* partials, Index count) {
  double sum = 0.0;
  for (Index i = block.thread() % warp; i < count; i += warp) sum += partials[i];
  return block.warp_sum(sum);
}

// For each vector and column the sum over the ranges of partials (vectors, columns, ranges), a warp each. The columns
// are those of up to three outputs, one beside the other.
struct Fold {
  static constexpr int threads = 256, resident = 4;

  struct Output {
    double* out;  // (vectors, columns)
    Index columns;
  };

  const double* partials;
  Index vectors, columns, ranges;
  Output outputs[3];

  template <class Block>
  GROKCURV_BLOCK void operator()(Block& block) const {
    const Index n = (block.index() * block.threads() + block.thread()) / warp;
    if (n >= vectors * columns) return;
    const double sum = sum_over_warp(block, partials + n * ranges, ranges);
    if (block.thread() % warp != 0) return;
    const Index vector = n / columns;
    Index column = n % columns;
    for (const Output& output : outputs) {
      if (column >= 0 && column < output.columns) output.out[vector * output.columns + column] = sum;
      column -= output.columns;
    }
  }
};

template <class Device>
void fold(Device& device, const Fold& task) {
  device.launch(divided_up(task.vectors * task.columns, Fold::threads / warp), 0, task);
}

// --------------------------------------------------------------------------------------------- a basis, and segments

// totals[j * stride] = sums over the coordinates of `here`, which x[0], x[1], ... hold: of basis[j] . x, then of x^2 by
// segment; added to what is there unless `first`. A warp takes one at a time.
template <class C, class Block>
GROKCURV_BLOCK void project(Block& block, const Basis& basis, const Segments& segments, Span here, const double* x,
                            double* totals, Index stride, bool first) {
  const int lane = block.thread() % warp, warps = block.threads() / warp;
  for (Index j = block.thread() / warp; j < basis.count + segments.count; j += warps) {
    const bool is_row = j < basis.count;
    const Index* entry = is_row ? basis.rows + 3 * j : segments.spans + 2 * (j - basis.count);
    const Span both = Span{entry[0], entry[0] + entry[1]} & here;
    if (both.length() == 0 && !first) continue;
    const C* values = static_cast<const C*>(basis.values);
    const Index shift = is_row ? entry[2] - entry[0] : 0;
    double sum = 0.0;
    for (Index i = both.start + lane; i < both.stop; i += warp) {
      const double x_i = x[i - here.start];
      sum = fma(x_i, is_row ? static_cast<double>(values[i + shift]) : x_i, sum);
    }
    sum = block.warp_sum(sum);
    if (lane == 0) totals[j * stride] = first ? sum : totals[j * stride] + sum;
  }
}

// ------------------------------------------------------------------------------------------------------------- drivers

// The workspace of a task, dealt out piece by piece. Without memory behind it, it only counts.
class Workspace {
 public:
  explicit Workspace(double* memory) : memory_(memory) {}

  double* take(Index doubles) {
    double* piece = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += doubles;
    return piece;
  }
  Index used() const { return used_; }

 private:
  double* memory_;
  Index used_ = 0;
};

// Writes a piece of a table to the device. The numbers are arguments of the launch: no copy to wait for, and a captured
// graph holds them.
struct Upload {
  static constexpr bool any_threads = true;
  static constexpr int threads = 256, resident = 4;
  static constexpr Index most = 480;

  Index words[most];
  Index count;
  Index* to;

  template <class Block>
  GROKCURV_BLOCK void operator()(Block& block) const {
    for (Index i = block.thread(); i < count; i += block.threads()) to[i] = words[i];
  }
};

// A copy of a table of the host's on the device.
template <class Device>
const Index* upload(Device& device, const Index* table, Index words) {
  static_assert(sizeof(Index) == sizeof(double));
  Index* to = reinterpret_cast<Index*>(device.workspace.take(words));
  for (Index done = 0; done < words; done += Upload::most) {
    Upload piece{};
    piece.count = words - done < Upload::most ? words - done : Upload::most;
    piece.to = to + done;
    std::memcpy(piece.words, table + done, static_cast<std::size_t>(piece.count) * sizeof(Index));
    device.launch(1, 0, piece);
  }
  return to;
}

template <class Device>
Basis upload(Device& device, const Basis& basis) {
  return {basis.values, upload(device, basis.rows, 3 * basis.count), basis.count};
}

template <class Device>
Segments upload(Device& device, const Segments& segments) {
  return {upload(device, segments.spans, 2 * segments.count), segments.count};
}

}  // namespace grokcurv::block
