#pragma once

#include "block/block.h"
#include "grokcurv/sketch.h"

namespace grokcurv::block {

// x, negated if the highest bit of `sign` is set.
GROKCURV_BLOCK double with_sign(double x, std::uint32_t sign) {
  std::uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits ^= std::uint64_t{sign & 0x80000000} << 32;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

// A range of one vector, for up to 1024 outputs. An output takes one coordinate from each block of the range: it reads
// where the CPU's kernel writes, in the same order.
//
// Reading where the CPU writes: a shift turns a block of coordinates as a whole, so for each output there is exactly
// one coordinate in each block. Sums stay in registers, no two threads write to one place, and the blocks come in their
// order, so the bits are the CPU's without an atomic.
//
// Where a coordinate lies is counted from the first of its batch of blocks: that fits into 32 bits.
template <class T>
struct SketchRange {
  using Words = RandomWords<std::uint32_t>;
  static constexpr int threads = 256, resident = 4;
  static constexpr int width = 1024;
  static constexpr int batch = 32;  // blocks of the range for which numbers are drawn together
  static constexpr int together = 8;
  static constexpr int counters = width / 128 + 1;  // of signs that so many outputs in a row can meet in a block
  static constexpr Index shared = (batch * sizeof(unsigned) + batch * counters * sizeof(Words)) / sizeof(double);

  Sketch task;
  SketchRanges ranges;
  double* partials;  // (ranges - 1, vectors, outputs)

  template <class Block>
  GROKCURV_BLOCK void operator()(Block& block) const {
    const Index across = divided_up(task.outputs, width);
    const Index vector = block.index() / across % task.vectors, range = block.index() / across / task.vectors;
    const Span all = Span{ranges.first + range * ranges.length, ranges.first + (range + 1) * ranges.length} &
                     Span{0, task.start + task.size};
    const auto outputs = static_cast<unsigned>(task.outputs);
    const unsigned first_output = static_cast<unsigned>(block.index() % across) * width;
    const unsigned in_block = outputs < 128 ? 1 : outputs / 128;  // counters of signs in a block, or what holds it
    const T* x = static_cast<const T*>(task.x) + vector * task.size;
    double* z = (range == 0 ? task.out : partials + (range - 1) * task.vectors * task.outputs) + vector * task.outputs;

    // For each block of a batch the place of the first output's coordinate, and the signs from its counter on.
    auto* places = reinterpret_cast<unsigned*>(block.shared());
    auto* signs = reinterpret_cast<Words*>(places + batch);
    // Both cost more to draw than to use, so those of a batch are drawn by all threads for all. The outputs of this
    // block meet at most `counters` counters of signs in one block of coordinates, for they lie in a row, turned.
    double sum[width / threads] = {};
    for (Index first = all.start / task.outputs; first * task.outputs < all.stop; first += batch) {
      for (int b = block.thread(); b < batch; b += block.threads()) {
        const Words words = philox<std::uint32_t>(task.seed, static_cast<std::uint64_t>(first + b) / 4, 0, 1);
        const std::uint32_t two[2] = {(first + b) & 1 ? words.word[1] : words.word[0],
                                      (first + b) & 1 ? words.word[3] : words.word[2]};
        places[b] = (first_output - ((first + b) & 2 ? two[1] : two[0])) & (outputs - 1);
      }
      // Which signs are needed depends on the shifts, which other threads have drawn.
      block.sync();
      for (int item = block.thread(); item < batch * counters; item += block.threads()) {
        const int b = item / counters;
        const unsigned c = (places[b] / 128 + item % counters) & (in_block - 1);
        Words words =
            philox<std::uint32_t>(task.seed, static_cast<std::uint64_t>((first + b) * task.outputs / 128 + c), 0, 0);
        // Half a counter is a block of 64: a circle of two words.
        if (outputs < 128) {
          const bool second = (first + b) & 1;
          words.word[0] = second ? words.word[2] : words.word[0];
          words.word[1] = second ? words.word[3] : words.word[1];
          words.word[2] = words.word[0];
          words.word[3] = words.word[1];
        }
        signs[item] = words;
      }
      // Signs are used by other threads than those that drew them.
      block.sync();
      // Of the batch, the coordinates from `begin` to `end` are in x: that at i is x[origin + i].
      const Index origin = first * task.outputs - task.start, left = all.stop - first * task.outputs;
      const unsigned size = batch * outputs;
      const unsigned begin = origin < 0 ? static_cast<unsigned>(-origin) : 0;
      const unsigned end = left < size ? static_cast<unsigned>(left) : size;
      GROKCURV_UNROLL
      for (int k = 0; k < width / threads; ++k) {
        const unsigned o = block.thread() + k * threads;
        if (o >= outputs) continue;
        if (begin == 0 && end == size) {
          take<true>(o, x, origin, begin, end, places, signs, sum[k]);
        } else {
          take<false>(o, x, origin, begin, end, places, signs, sum[k]);
        }
      }
      // Without this a fast thread would draw the next batch over the one that others still use.
      block.sync();
    }
    GROKCURV_UNROLL
    for (int k = 0; k < width / threads; ++k) {
      const unsigned o = block.thread() + k * threads;
      if (o < outputs) z[first_output + o] = sum[k];
    }
  }

  // Takes the coordinates of output o of this block from a batch, `together` of which are read before the first is
  // added. `whole`: all are in x.
  template <bool whole>
  GROKCURV_BLOCK void take(unsigned o, const T* x, Index origin, unsigned begin, unsigned end, const unsigned* places,
                           const Words* signs, double& sum) const {
    const auto outputs = static_cast<unsigned>(task.outputs);
    const T* all = whole ? x + origin : x;  // where x does not cover the batch, this place may be before its first
    const auto* words = reinterpret_cast<const std::uint32_t*>(signs);
    GROKCURV_ROLLED
    for (int first = 0; first < batch; first += together) {
      T taken[together];
      std::uint32_t sign[together];
      GROKCURV_UNROLL
      for (int b = 0; b < together; ++b) {
        const unsigned place = places[first + b], i = (first + b) * outputs + ((place + o) & (outputs - 1));
        if constexpr (whole) {
          taken[b] = all[i];
        } else {
          // What lies outside of x, at either end, is zero, which no sign and no sum minds.
          taken[b] = begin <= i && i < end ? x[origin + i] : T{};
        }
        // Signs begin with the counter of the first output's coordinate, and go round with the block.
        const unsigned bit = place % 128 + o;
        sign[b] = words[(first + b) * counters * 4 + bit / 32] << (31 - bit % 32);
      }
      GROKCURV_UNROLL
      for (int b = 0; b < together; ++b) sum += with_sign(widen(taken[b]), sign[b]);
    }
  }
};

// Adds the ranges to the first in turn, an output a thread, as the CPU's kernel does: in the order of the ranges. The
// first has summed into the result itself, so that a task of one range needs no second launch.
struct SketchFold {
  static constexpr int threads = 256, resident = 4;

  double* out;
  const double* partials;
  Index size, ranges;

  template <class Block>
  GROKCURV_BLOCK void operator()(Block& block) const {
    const Index i = block.index() * block.threads() + block.thread();
    if (i >= size) return;
    double sum = out[i];
    for (Index r = 0; r + 1 < ranges; ++r) sum += partials[r * size + i];
    out[i] = sum;
  }
};

template <class Device>
void sketch(Device& device, const Sketch& task) {
  const SketchRanges ranges = sketch_ranges(task.size, task.outputs, task.start);
  const Index sums = task.vectors * task.outputs;
  double* partials = device.workspace.take(sketch_sums(task));
  with_type(task.type, [&]<class T>() {
    using Body = SketchRange<T>;
    const Index blocks = divided_up(task.outputs, Body::width) * task.vectors * ranges.count;
    device.launch(blocks, Body::shared, Body{task, ranges, partials});
  });
  if (ranges.count > 1) {
    device.launch(divided_up(sums, SketchFold::threads), 0, SketchFold{task.out, partials, sums, ranges.count});
  }
}

}  // namespace grokcurv::block
