#pragma once

#include "block/block.h"
#include "grokcurv/gram.h"

namespace grokcurv::block {

// A range of the coordinates of a segment, for some rows of x and of y: 16 by 32, or, where `triangle`, 32 rows beside
// themselves. Chunk by chunk they go to shared memory as doubles, where each thread adds up a tile of entries on every
// 16th column. The order of a sum: columns of a residue modulo 16 in turn; residues that agree modulo 4 in turn; the
// four sums; then the ranges. Whatever the other rows are, and whichever thread has the entry, so that its bits know
// nothing of them.
//
// Why this shape: every thread has work, and eight read a column of shared memory for as many products as registers
// allow, 6.8 or 8 for 16 bytes. 16 by 32 rows are eight tiles of 8 by 8. For a triangle, rows by fours stand in a ring
// of eight: a thread multiplies its four by themselves and by the four fours that follow. So all fours meet once, but
// those that are opposite twice: each side takes the half on and right of the diagonal. That makes 544 products where
// 528 are needed.
//
// Memory is read a chunk ahead, into registers: 128 bytes of a thread are in flight while the chunk before is
// multiplied. While one block writes to shared memory, the other on the multiprocessor multiplies.
template <class T, bool triangle>
struct GramRange {
  static constexpr int threads = 128, resident = 2;
  static constexpr Index step = 1024;  // ranges are whole multiples of it

  static constexpr int x_side = triangle ? 32 : 16, y_side = 32;
  static constexpr int tile = triangle ? 4 : 8, x_tiles = x_side / tile, y_tiles = y_side / tile;
  static constexpr int turns = triangle ? y_tiles / 2 + 1 : 1;  // quads of the ring that a thread's meets
  static constexpr int members = 8, splits = threads / members;
  static constexpr int columns = (triangle ? 128 : 64) / (sizeof(T) == 8 ? 2 : 1);

  // Rows beside each other, and so far apart from those of the next column, that the threads of a warp write to
  // different banks.
  static constexpr int x_stride = x_side + 2, y_stride = y_side + 2;
  static constexpr int slices = warp / members;  // of the total, which takes the place of the last chunk
  static constexpr Index staged = columns * (triangle ? y_stride : x_stride + y_stride);
  static constexpr Index totals = slices * x_side * y_side, shared = staged > totals ? staged : totals;
  static_assert(step % columns == 0);

  Gram task;           // y is x where there is none
  const Index* spans;  // (segments, 3): start, length, number of the first range
  bool symmetric;      // true where the task has no y: what lies left of the diagonal is for GramFold to mirror
  Index squares;       // how many pairs of rows by rows there are
  bool wide;           // all rows, and all segments, begin at whole quads
  double* partials;    // for each segment: (x_rows, y_rows, ranges)

  // Rows of one side. A thread has one of them: of a chunk, quads as far apart as there are threads for a row.
  template <int side>
  struct Rows {
    static constexpr int quads = columns * side / quad / threads;
    static constexpr int stride = side == x_side ? x_stride : y_stride;

    const T* row;
    bool there;  // or else it counts as zeros
    int number, first;
    Quad<T> held[quads];

    // The threads of a warp have eight rows and of each four quads, so that they read whole sectors and write to all
    // banks.
    GROKCURV_BLOCK Rows(int thread, const void* rows, Index from, Index count, Index size)
        : number(thread % 8 + thread / warp % (side / 8) * 8),
          first((thread % warp / 8 + thread / warp / (side / 8) * 4) * quad) {
      there = from + number < count;
      row = static_cast<const T*>(rows) + (there ? from + number : from) * size;
    }

    static GROKCURV_BLOCK int at(int k) { return k * (threads / side) * quad; }

    // The chunk from coordinate p on, of which `left` coordinates are there; zeros beyond.
    GROKCURV_BLOCK void fetch(Index p, Index left, bool wide) {
      if (wide && there && left >= columns) {
        GROKCURV_UNROLL
        for (int k = 0; k < quads; ++k) held[k] = load<true>(row + p + first + at(k), quad);
      } else {
        GROKCURV_UNROLL
        for (int k = 0; k < quads; ++k) {
          held[k] = load<false>(row + p + first + at(k), there ? left - first - at(k) : 0);
        }
      }
    }

    // To shared memory, less the origin if there is one; without, not even zeros are converted and subtracted.
    GROKCURV_BLOCK void stash(const T* origin, Index p, Index left, double* to) const {
      to += first * stride + number;
      if (origin == nullptr) {
        GROKCURV_UNROLL
        for (int k = 0; k < quads; ++k) {
          GROKCURV_UNROLL
          for (int e = 0; e < quad; ++e) to[(at(k) + e) * stride] = widen(held[k].value[e]);
        }
      } else {
        GROKCURV_UNROLL
        for (int k = 0; k < quads; ++k) {
          const Quad<T> shift = load<false>(origin + p + first + at(k), left - first - at(k));
          GROKCURV_UNROLL
          for (int e = 0; e < quad; ++e) {
            to[(at(k) + e) * stride] = widen(held[k].value[e]) - widen(shift.value[e]);
          }
        }
      }
    }
  };

  template <class Block>
  GROKCURV_BLOCK void operator()(Block& block) const {
    const Index range = block.index() / squares;
    // The last segment whose first range is not after this one: of those that begin with the same range, all but the
    // last are empty. Found by halving, for there may be many.
    Index segment = 0;
    for (Index above = task.segments.count; segment + 1 < above;) {
      const Index middle = (segment + above) / 2;
      (spans[3 * middle + 2] <= range ? segment : above) = middle;
    }
    const Index start = spans[3 * segment], first_range = spans[3 * segment + 2];
    const Ranges ranges = ranges_of(spans[3 * segment + 1], step);
    const Span all = ranges[range - first_range];

    // Of a symmetric result the triangles along the diagonal, or else what lies right of them: two squares of the first
    // 32 columns beyond, four of the next, and so on.
    const Index square = block.index() % squares, down = divided_up(task.x_rows, x_side);
    Index x_first = square % down * x_side, y_first = square / down * y_side;
    if (triangle) {
      x_first = y_first = square * y_side;
    } else if (symmetric) {
      Index before = square, right = 1;
      for (; before >= 2 * right; ++right) before -= 2 * right;
      x_first = before * x_side;
      y_first = right * y_side;
    }

    Rows<y_side> y_rows(block.thread(), task.y, y_first, task.y_rows, task.size);
    Rows<x_side> x_rows(block.thread(), task.x, x_first, task.x_rows, task.size);
    double* y = block.shared();
    double* x = triangle ? y : y + columns * y_stride;
    const int member = block.thread() % members, split = block.thread() / members;
    const T* origin = static_cast<const T*>(task.origin);

    double sum[turns][tile][tile] = {};
    const auto fetch = [&](Index column) {
      y_rows.fetch(start + column, all.stop - column, wide);
      if (!triangle) x_rows.fetch(start + column, all.stop - column, wide);
    };
    fetch(all.start);
    for (Index column = all.start; column < all.stop; column += columns) {
      y_rows.stash(origin, start + column, all.stop - column, y);
      if (!triangle) x_rows.stash(origin, start + column, all.stop - column, x);
      // Whole before it is read: without this, threads would add up rows that others have yet to stage.
      block.sync();
      if (column + columns < all.stop) fetch(column + columns);
      GROKCURV_UNROLL
      for (int c = 0; c < columns; c += splits) {
        add(x + (c + split) * x_stride, y + (c + split) * y_stride, member, sum);
      }
      // Read before it is written over, by the next chunk or, after the last one, by the total.
      block.sync();
    }

    // The sums of an entry are in the registers of 16 threads, one for each residue. Those of a warp, four, go to
    // places of their own, and warps in turn: the barrier keeps their order, and without it one would write over what
    // another adds to.
    double* total = y;  // (slices, x_side, y_side)
    for (int w = 0; w < threads / warp; ++w) {
      if (block.thread() / warp == w) {
        GROKCURV_UNROLL
        for (int t = 0; t < turns; ++t) {
          GROKCURV_UNROLL
          for (int r = 0; r < tile; ++r) {
            GROKCURV_UNROLL
            for (int s = 0; s < tile; ++s) {
              // Of two that are opposite in the ring, both have the diagonal of their square.
              if (!needed(t, r, s) || (triangle && t == turns - 1 && r == s && member >= members / 2)) continue;
              const int i = place(x_tile(member), r, x_tiles), j = place(y_tile(member, t), s, y_tiles);
              const bool mirrored = triangle && j < i;
              double* to = total + (split % slices * x_side + (mirrored ? j : i)) * y_side + (mirrored ? i : j);
              *to = w == 0 ? sum[t][r][s] : *to + sum[t][r][s];
            }
          }
        }
      }
      block.sync();
    }
    // Out to the partial sums, ranges beside each other, as GramFold reads them.
    double* out = partials + first_range * task.x_rows * task.y_rows + (range - first_range);
    for (int e = block.thread(); e < x_side * y_side; e += block.threads()) {
      const Index i = x_first + e / y_side, j = y_first + e % y_side;
      if (i >= task.x_rows || j >= task.y_rows || (triangle && j < i)) continue;
      double entry = total[e];
      for (int slice = 1; slice < slices; ++slice) entry += total[slice * x_side * y_side + e];
      out[(i * task.y_rows + j) * ranges.count] = entry;
    }
  }

  // Of a side, the row that is number r of a tile: two in a row and then two of the tiles that follow, so that threads
  // with tiles beside each other read pairs beside each other, and from different banks.
  static GROKCURV_BLOCK int place(int of_tile, int r, int tiles) { return 2 * of_tile + r % 2 + r / 2 * 2 * tiles; }

  static GROKCURV_BLOCK int x_tile(int member) { return triangle ? member : member / y_tiles; }
  static GROKCURV_BLOCK int y_tile(int member, int turn) { return (member + turn) % y_tiles; }
  static GROKCURV_BLOCK constexpr bool needed(int turn, int r, int s) {
    return !triangle || (turn > 0 && turn < turns - 1) || r <= s;
  }

  static GROKCURV_BLOCK void read(const double* column, int of_tile, int tiles, double (&values)[tile]) {
    GROKCURV_UNROLL
    for (int r = 0; r < tile; r += 2) {
      const Pair pair = *reinterpret_cast<const Pair*>(column + place(of_tile, r, tiles));
      values[r] = pair.value[0];
      values[r + 1] = pair.value[1];
    }
  }

  static GROKCURV_BLOCK void add(const double* x, const double* y, int member, double (&sum)[turns][tile][tile]) {
    double x_r[tile];
    read(x, x_tile(member), x_tiles, x_r);
    GROKCURV_UNROLL
    for (int t = 0; t < turns; ++t) {
      double y_s[tile];
      read(y, y_tile(member, t), y_tiles, y_s);
      GROKCURV_UNROLL
      for (int r = 0; r < tile; ++r) {
        GROKCURV_UNROLL
        for (int s = 0; s < tile; ++s) {
          if (needed(t, r, s)) sum[t][r][s] = fma(x_r[r], y_s[s], sum[t][r][s]);
        }
      }
    }
  }

  struct alignas(16) Pair {
    double value[2];
  };
};

// Adds up the ranges of each entry, a warp each, and mirrors a symmetric result. A second launch, because all blocks of
// the first have to be through. A warp leaves as a whole: its threads have the same n.
struct GramFold {
  static constexpr int threads = 256, resident = 4;

  Gram task;
  const Index* spans;
  Index step;
  bool symmetric;
  const double* partials;

  template <class Block>
  GROKCURV_BLOCK void operator()(Block& block) const {
    const Index n = (block.index() * block.threads() + block.thread()) / warp, entries = task.x_rows * task.y_rows;
    if (n >= task.segments.count * entries) return;
    const Index segment = n / entries, i = n % entries / task.y_rows, j = n % task.y_rows;
    if (symmetric && j < i) return;
    const Index count = ranges_of(spans[3 * segment + 1], step).count;
    const double* from = partials + spans[3 * segment + 2] * entries + (i * task.y_rows + j) * count;
    const double sum = sum_over_warp(block, from, count);
    double* out = task.out + segment * entries;
    if (block.thread() % warp == 0) out[i * task.y_rows + j] = sum;
    if (symmetric && block.thread() % warp == 1) out[j * task.y_rows + i] = sum;
  }
};

template <class Device>
void gram(Device& device, const Gram& given) {
  Gram task = given;
  const bool symmetric = task.y == nullptr;
  if (symmetric) task.y = task.x;
  const Index step = GramRange<float, true>::step;
  Index ranges = 0;
  const auto ranges_in = [&](Index length) { return ranges_of(length, step).count; };
  const Index* spans = upload_numbered(device, task.segments, ranges_in, ranges);
  double* partials = device.workspace.take(ranges * task.x_rows * task.y_rows);
  with_type(task.type, [&]<class T>() {
    bool wide = aligned<T>(task.x, task.x_rows, task.size) && aligned<T>(task.y, task.y_rows, task.size);
    for (Index s = 0; s < task.segments.count; ++s) wide = wide && task.segments[s].start % quad == 0;
    using Triangle = GramRange<T, true>;
    using Square = GramRange<T, false>;
    const Index right = divided_up(task.y_rows, Square::y_side);
    const Index squares = symmetric ? right * (right - 1) : divided_up(task.x_rows, Square::x_side) * right;
    if (symmetric) {
      device.launch(ranges * right, Triangle::shared, Triangle{task, spans, symmetric, right, wide, partials});
    }
    device.launch(ranges * squares, Square::shared, Square{task, spans, symmetric, squares, wide, partials});
  });
  const Index entries = task.segments.count * task.x_rows * task.y_rows;
  device.launch(divided_up(entries, GramFold::threads / warp), 0, GramFold{task, spans, step, symmetric, partials});
}

}  // namespace grokcurv::block
