#pragma once

#include "block/block.h"
#include "grokcurv/sketch.h"

namespace grokcurv::block {

// A range of one vector, for up to 1024 outputs. An output takes one coordinate from each block of the range: it reads
// where the CPU's kernel writes, in the same order.
//
// Reading where the CPU writes: a shift turns a block of coordinates as a whole, so for each output there is exactly
// one coordinate in each block. Sums stay in registers, no two threads write to one place, and the blocks come in their
// order, so the bits are the CPU's without an atomic.
template <class T>
struct SketchRange {
  using Words = RandomWords<std::uint32_t>;
  static constexpr int threads = 256, resident = 2;
  static constexpr Index width = 1024;
  static constexpr Index batch = 32;  // blocks of the range for which numbers are drawn together
  static constexpr Index together = 8;
  static constexpr Index counters = width / 128 + 1;  // of signs that so many outputs in a row can meet in a block
  static constexpr Index shared = batch + batch * counters * sizeof(Words) / sizeof(double);

  Sketch task;
  SketchRanges ranges;
  double* partials;  // (ranges - 1, vectors, outputs)

  template <class Block>
  GROKCURV_BLOCK void operator()(Block& block) const {
    const Index outputs = task.outputs, across = divided_up(outputs, width);
    const Index first_output = block.index() % across * width, vector = block.index() / across % task.vectors;
    const Index range = block.index() / across / task.vectors;
    const Span all = Span{ranges.first + range * ranges.length, ranges.first + (range + 1) * ranges.length} &
                     Span{0, task.start + task.size};
    const Index wide = outputs < width ? outputs : width;
    const Index in_block = outputs < 128 ? 1 : outputs / 128;  // counters of signs in a block, or what holds it
    const T* x = static_cast<const T*>(task.x) + vector * task.size;
    double* z = (range == 0 ? task.out : partials + (range - 1) * task.vectors * outputs) + vector * outputs;

    auto* shifts = reinterpret_cast<Index*>(block.shared());
    auto* signs = reinterpret_cast<Words*>(block.shared() + batch);
    // Shifts and signs cost more to draw than to use, so a batch of them is drawn by all threads for all. The outputs
    // of this block meet at most `counters` counters of signs in one block of coordinates, for they lie in a row,
    // turned.
    double sum[width / threads] = {};
    for (Index first = all.start / outputs; first * outputs < all.stop; first += batch) {
      for (Index b = block.thread(); b < batch; b += block.threads()) {
        const Words words = philox<std::uint32_t>(task.seed, static_cast<std::uint64_t>(first + b) / 4, 0, 1);
        const std::uint32_t two[2] = {(first + b) & 1 ? words.word[1] : words.word[0],
                                      (first + b) & 1 ? words.word[3] : words.word[2]};
        shifts[b] = ((first + b) & 2 ? two[1] : two[0]) & (outputs - 1);
      }
      // Which signs are needed depends on the shifts, which other threads have drawn.
      block.sync();
      for (Index item = block.thread(); item < batch * counters; item += block.threads()) {
        const Index b = item / counters, c = (first_counter(first_output, shifts[b]) + item % counters) % in_block;
        signs[item] =
            philox<std::uint32_t>(task.seed, static_cast<std::uint64_t>((first + b) * outputs / 128 + c), 0, 0);
      }
      // Signs are used by other threads than those that drew them.
      block.sync();
      GROKCURV_UNROLL
      for (int k = 0; k < width / threads; ++k) {
        const Index o = block.thread() + k * threads;
        if (o >= wide) continue;
        for (Index b = 0; b < batch; b += together)
          add(first + b, first_output, o, all.stop, x, shifts + b, signs + b * counters, sum[k]);
      }
      // Without this a fast thread would draw the next batch over the one that others still use.
      block.sync();
    }
    GROKCURV_UNROLL
    for (int k = 0; k < width / threads; ++k) {
      const Index o = block.thread() + k * threads;
      if (o < wide) z[first_output + o] = sum[k];
    }
  }

  // Takes the coordinates of one output from some blocks in a row: all are read before the first is added.
  GROKCURV_BLOCK void add(Index first, Index first_output, Index o, Index stop, const T* x, const Index* shifts,
                          const Words* signs, double& sum) const {
    T taken[together];
    bool negative[together];
    GROKCURV_UNROLL
    for (Index b = 0; b < together; ++b) {
      const Index place = (first_output + o - shifts[b]) & (task.outputs - 1);
      const Index c = (first + b) * task.outputs + place;
      // What lies outside of x, at either end, is zero, which no sign and no sum minds.
      taken[b] = c < task.start || c >= stop ? T{} : x[c - task.start];
      // Counters are stored from that of the first output on, in a circle around the block of coordinates.
      const Index counter = place / 128 - first_counter(first_output, shifts[b]);
      const Words& words = signs[b * counters + (counter < 0 ? counter + task.outputs / 128 : counter)];
      negative[b] = words.word[c % 128 / 32] >> (c % 32) & 1;
    }
    GROKCURV_UNROLL
    for (Index b = 0; b < together; ++b) sum += negative[b] ? -widen(taken[b]) : widen(taken[b]);
  }

  // Where the coordinate of output `first_output` lies in its block, in whole counters.
  GROKCURV_BLOCK Index first_counter(Index first_output, Index shift) const {
    return ((first_output - shift) & (task.outputs - 1)) / 128;
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
