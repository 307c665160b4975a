#pragma once

#include "block/block.h"
#include "grokcurv/gram.h"

namespace grokcurv::block {

// A range of the coordinates of a segment, for a square of 32 rows of x by 32 of y. Stage by stage both go to shared
// memory as doubles, where each thread adds up eight rows by four on every eighth column. The order of a sum: columns
// of a residue modulo 8 in turn, the residues in turn, then the ranges; whatever the other rows are.
//
// Why this shape: eight by four sums and the twelve numbers for them stay in registers, for two blocks on a
// multiprocessor, and a column costs six loads of 16 bytes from shared memory for 32 products. 4 by 8 such tiles make a
// square, so that all 256 threads have work only if each column has one of eight owners. Whichever thread has a tile,
// it is the same columns that are added up in the same order, so the bits of an entry know nothing of its place in the
// square, of the square, or of who else is there.
template <class T>
struct GramRange {
  static constexpr int threads = 256, resident = 2;
  static constexpr Index step = 1024;  // ranges are whole multiples of it

  static constexpr int square = 32, tile_x = 8, tile_y = 4, tiles_x = square / tile_x, tiles_y = square / tile_y;
  static constexpr int columns = 64, splits = 8;
  // A column's 32 rows lie in a row; so far apart, the threads of a warp write to different banks.
  static constexpr int stride = square + 2;
  static constexpr Index staged = columns * stride;
  static constexpr Index shared = 2 * staged;
  static_assert(tiles_x * tiles_y * splits <= threads && square * square <= shared);

  Gram task;           // y is x where there is none
  const Index* spans;  // (segments, 3): start, length, number of the first range
  bool symmetric;      // true where the task has no y: what lies left of the diagonal is for GramFold to mirror
  Index squares;       // how many pairs of 32 rows by 32 there are
  double* partials;    // for each segment: (x_rows, y_rows, ranges)

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

    // Of a symmetric result only the squares on and right of the diagonal, row by row.
    Index x_square = 0, y_square = block.index() % squares;
    const Index across = divided_up(task.y_rows, square);
    for (Index width = across; y_square >= width; ++x_square) {
      y_square -= width;
      if (symmetric) --width;
    }
    if (symmetric) y_square += x_square;
    const Index x_first = x_square * square, y_first = y_square * square;
    // True for a square whose rows of x and of y are the same: they are staged once, and the tiles left of the diagonal
    // are left out.
    const bool diagonal = symmetric && x_square == y_square;

    // The tiles that hold entries: rows of tiles from the top, of each those from the diagonal on.
    const auto tiles = [](Index rows, int of) {
      return static_cast<int>(divided_up(rows < square ? rows : square, of));
    };
    const int down = tiles(task.x_rows - x_first, tile_x), right = tiles(task.y_rows - y_first, tile_y);
    const auto skipped = [&](int i) { return diagonal ? i * tile_x / tile_y : 0; };
    // The threads are dealt out to the tiles that are there, `active` of them, and then again, each time for another
    // residue of the columns. `split` is that residue; with few tiles there are more threads than eight of each, and
    // those of a split from 8 on only help to stage.
    int active = 0;
    for (int i = 0; i < down; ++i) active += right > skipped(i) ? right - skipped(i) : 0;
    const int split = block.thread() / active;  // of the threads beyond, none
    int i_tile = 0, j_tile = block.thread() % active;
    for (; j_tile >= right - skipped(i_tile); ++i_tile) {
      if (right > skipped(i_tile)) j_tile -= right - skipped(i_tile);
    }
    const int x_at = i_tile * tile_x, y_at = (j_tile + skipped(i_tile)) * tile_y;

    double* x = block.shared();
    double* y = diagonal ? x : x + staged;
    double sum[tile_x][tile_y] = {};
    for (Index column = all.start; column < all.stop; column += columns) {
      const int width = static_cast<int>(all.stop - column < columns ? all.stop - column : columns);
      stage(block, static_cast<const T*>(task.x), x_first, task.x_rows, start + column, width, x);
      if (!diagonal) stage(block, static_cast<const T*>(task.y), y_first, task.y_rows, start + column, width, y);
      // Whole before it is read: without this, threads would add up rows that others have yet to stage.
      block.sync();
      if (split < splits) {
        for (int c = split; c < columns; c += splits) add(x + c * stride + x_at, y + c * stride + y_at, sum);
      }
      // Read before it is written over, by the next stage or, after the last one, by the total.
      block.sync();
    }

    // The eight sums of an entry are in the registers of eight threads. They go to one place in shared memory in turn,
    // not at once: the barrier keeps the order of the residues, and without it one thread would write over what another
    // adds to. Tiles that are left out have no number here, but nobody reads them.
    double* total = x;  // (32, 32)
    for (int s = 0; s < splits; ++s) {
      if (split == s) {
        GROKCURV_UNROLL
        for (int i = 0; i < tile_x; ++i) {
          GROKCURV_UNROLL
          for (int j = 0; j < tile_y; ++j) {
            double* to = total + (x_at + i) * square + y_at + j;
            *to = s == 0 ? sum[i][j] : *to + sum[i][j];
          }
        }
      }
      block.sync();
    }
    // Out to the partial sums, ranges beside each other, as GramFold reads them.
    double* out = partials + first_range * task.x_rows * task.y_rows + (range - first_range);
    for (int e = block.thread(); e < square * square; e += block.threads()) {
      const Index i = x_first + e / square, j = y_first + e % square;
      if (i < task.x_rows && j < task.y_rows && !(symmetric && j < i)) {
        out[(i * task.y_rows + j) * ranges.count] = total[e];
      }
    }
  }

  // `width` columns from coordinate p on; those beyond are zero. A thread takes four rows of a column: it reads beside
  // its neighbours and writes 16 bytes at a time.
  template <class Block>
  GROKCURV_BLOCK void stage(Block& block, const T* rows, Index first, Index count, Index p, int width,
                            double* to) const {
    const int left = static_cast<int>(count - first < square ? count - first : square);
    rows += first * task.size + p;
    for (int item = block.thread(); item < columns * square / quad; item += block.threads()) {
      const int column = item % columns, row = item / columns * quad;
      // Columns beyond are zero and stay so, with an origin too: their products add zeros, and no sum has to ask for
      // them.
      const double shift =
          task.origin != nullptr && column < width ? widen(static_cast<const T*>(task.origin)[p + column]) : 0.0;
      Quad<double> values{};
      GROKCURV_UNROLL
      for (int e = 0; e < quad; ++e) {
        if (row + e < left && column < width) values.value[e] = widen(rows[(row + e) * task.size + column]) - shift;
      }
      store<true>(values, to + column * stride + row, quad);
    }
  }

  static GROKCURV_BLOCK void add(const double* x, const double* y, double (&sum)[tile_x][tile_y]) {
    const Quad<double> x_low = load<true>(x, quad), x_high = load<true>(x + quad, quad), y_all = load<true>(y, quad);
    GROKCURV_UNROLL
    for (int i = 0; i < tile_x; ++i) {
      const double x_i = i < quad ? x_low.value[i % quad] : x_high.value[i % quad];
      GROKCURV_UNROLL
      for (int j = 0; j < tile_y; ++j) sum[i][j] = fma(x_i, y_all.value[j], sum[i][j]);
    }
  }
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
  const Index step = GramRange<float>::step, square = GramRange<float>::square;
  Index ranges = 0;
  const auto ranges_in = [&](Index length) { return ranges_of(length, step).count; };
  const Index* spans = upload_numbered(device, task.segments, ranges_in, ranges);
  double* partials = device.workspace.take(ranges * task.x_rows * task.y_rows);
  const Index down = divided_up(task.x_rows, square), across = divided_up(task.y_rows, square);
  const Index squares = symmetric ? down * (down + 1) / 2 : down * across;
  with_type(task.type, [&]<class T>() {
    using Body = GramRange<T>;
    device.launch(ranges * squares, Body::shared, Body{task, spans, symmetric, squares, partials});
  });
  const Index entries = task.segments.count * task.x_rows * task.y_rows;
  device.launch(divided_up(entries, GramFold::threads / warp), 0, GramFold{task, spans, step, symmetric, partials});
}

}  // namespace grokcurv::block
