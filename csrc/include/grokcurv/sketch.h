#pragma once

#include "grokcurv/philox.h"

namespace grokcurv {

// Count sketches out[i] = Omega x[i], with nothing of Omega stored. Coordinate c = start + p lies in block c / outputs
// at place c % outputs and is added, with a random sign, to output (place + shift of the block) % outputs.
//
// Signs and shifts are the words of Philox (grokcurv/philox.h), keyed by the seed, on counters (index low, index high,
// 0, purpose):
//   purpose 0: bit k of the 128, the lowest of the first word first, is set where coordinate 128 index + k is negated;
//   purpose 1: word k, modulo outputs, is the shift of block 4 index + k.
//
// grokcurv.reference.sketch says what such a sketch keeps of inner products, and proves it.
struct Sketch {
  Type type;
  Index vectors, size, outputs;  // outputs is a power of two, 64 to 2^20
  std::uint64_t seed;
  Index start;
  const void* x;  // (vectors, size)
  double* out;    // (vectors, outputs)
  double* workspace = nullptr;
};

// The coordinates are cut into ranges, each with sums of its own that are folded in order: how, depends on P, start and
// the number of outputs alone. There is at least one, which is empty where there are no coordinates. A range begins at
// a multiple of the blocks and of the 128 signs of a counter.
struct SketchRanges {
  Index first, length, count;  // range r is [first + r length, first + (r + 1) length), but for what lies outside of x
};

GROKCURV_INLINE constexpr SketchRanges sketch_ranges(Index size, Index outputs, Index start) {
  constexpr Index most = 64;
  const Index step = outputs < 128 ? 128 : outputs;
  // So long that setting the sums to zero and folding them costs little beside reading the range.
  const Index least = 32 * step < 65536 ? 65536 : 32 * step;
  const Index first = start - start % step;
  const Index span = start - first + size;
  const Index share = (span / most / step + 1) * step;
  const Index length = share < least ? least : share;
  return {first, length, span == 0 ? 1 : (span - 1) / length + 1};
}

// The sums of the ranges but the first, which sums into the result: in doubles.
GROKCURV_INLINE Index sketch_sums(const Sketch& task) {
  return (sketch_ranges(task.size, task.outputs, task.start).count - 1) * task.vectors * task.outputs;
}

namespace cpu {
GROKCURV_INLINE Index sketch_workspace(const Sketch& task, int) {
  return sketch_sums(task);
}
}  // namespace cpu

}  // namespace grokcurv
