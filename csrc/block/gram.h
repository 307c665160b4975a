#pragma once

#include <utility>

#include "block/block.h"
#include "grokcurv/gram.h"

namespace grokcurv::block {

// A range of the coordinates of a segment, for some rows of x and of y, or, where `triangle`, rows of x beside
// themselves: 16 by 8 entries for each of x_tiles by y_tiles. The warps of a block take 16 columns by turns, and leave
// the products to the tensor cores. A thread loads a quad of some rows, one of every eight that follow each other, and
// this is the part that it has of the cores' tiles: of x or of y, they are the same. So nothing goes through shared
// memory, and no warp waits for another, but for the sums of the four in the end.
//
// The order of a sum: of 16 columns those of each residue modulo 4 in turn, one after the other; then the next 16 of
// the warp; the four warps; the ranges. Whatever the other rows are, and whichever tile has the entry, so that its bits
// know nothing of them.
//
// Rows that are not there are zeros. `centred`: about an origin.
template <class T, int x_tiles, int y_tiles, bool triangle, bool centred>
struct GramRange {
  static constexpr int threads = 128, warps = threads / warp, resident = triangle && !centred ? 3 : 2;
  static constexpr Index step = 1024;  // ranges are whole multiples of it

  static constexpr int x_side = 16 * x_tiles, y_side = 8 * y_tiles, columns = 16;
  static constexpr int x_rows = x_side / 8, y_rows = y_side / 8, rows = triangle ? y_rows : x_rows + y_rows;
  static constexpr int ahead = sizeof(T) == 8 ? 1 : 2;  // sixteens of columns that are on their way
  static constexpr Index shared = x_side * y_side;
  static_assert(!triangle || x_side == y_side);

  Gram task;           // y is x where there is none
  const Index* spans;  // (segments, 3): start, length, number of the first range
  bool symmetric;      // true where the task has no y: what lies left of the diagonal is for GramFold to mirror
  Index squares;       // how many pairs of rows by rows there are
  bool wide;           // all rows, and all segments, begin at whole quads
  double* partials;    // for each segment: (x_rows, y_rows, ranges)
  bool swapped;        // x and y have changed sides; partials have not

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

    // Of a symmetric result the triangles along the diagonal, or else the squares above it: one beside the second, two
    // beside the third, and so on.
    const Index square = block.index() % squares, down = divided_up(task.x_rows, x_side);
    Index x_first = square % down * x_side, y_first = square / down * y_side;
    if (triangle) {
      x_first = y_first = square * y_side;
    } else if (symmetric) {
      Index before = square, right = 1;
      for (; before >= right; ++right) before -= right;
      x_first = before * x_side;
      y_first = right * y_side;
    }

    const int own_warp = block.thread() / warp, group = block.thread() % warp / 4, member = block.thread() % 4;
    // From here on coordinates count from the first of the range.
    const int length = static_cast<int>(all.length());
    const auto at = [&](const void* vectors, Index row) {
      return static_cast<const T*>(vectors) + row * task.size + start + all.start + member * quad;
    };
    const T *x_own = at(task.x, x_first + group), *y_own = at(task.y, y_first + group);
    const Index x_left = task.x_rows - x_first - group, y_left = task.y_rows - y_first - group, apart = 8 * task.size;
    const T* origin = at(task.origin, 0);

    // The last is of the origin.
    const auto fetch = [&](int column, Quad<T>(&held)[rows + 1]) {
      const auto read = [&](auto whole) {
        constexpr bool at_once = decltype(whole)::value;
        const int left = at_once ? quad : length - column - member * quad;
        GROKCURV_UNROLL
        for (int r = 0; r < y_rows; ++r) {
          if (8 * r < y_left) held[r] = load<at_once>(y_own + r * apart + column, left);
        }
        GROKCURV_UNROLL
        for (int r = 0; r < rows - y_rows; ++r) {
          if (8 * r < x_left) held[y_rows + r] = load<at_once>(x_own + r * apart + column, left);
        }
        if (centred) held[rows] = load<at_once>(origin + column, left);
      };
      if (column >= length) return;
      if (wide && column + columns <= length) {
        read(std::true_type{});
      } else {
        read(std::false_type{});
      }
    };

    double sum[x_tiles][y_tiles][4] = {};
    const auto needed = [](int i, int j) { return !triangle || j >= 2 * i; };
    Quad<T> held[ahead][rows + 1] = {};
    GROKCURV_UNROLL
    for (int n = 0; n < ahead; ++n) fetch((n * warps + own_warp) * columns, held[n]);
    for (int first = own_warp * columns; first < length; first += ahead * warps * columns) {
      GROKCURV_UNROLL
      for (int n = 0; n < ahead; ++n) {
        const int column = first + n * warps * columns;
        if (column >= length) break;
        GROKCURV_UNROLL
        for (int e = 0; e < quad; e += 2) {
          double x[rows][2];
          GROKCURV_UNROLL
          for (int r = 0; r < rows; ++r) {
            GROKCURV_UNROLL
            for (int h = 0; h < 2; ++h) x[r][h] = widen(held[n][r].value[e + h]);
          }
          if (centred) {
            GROKCURV_UNROLL
            for (int r = 0; r < rows; ++r) {
              GROKCURV_UNROLL
              for (int h = 0; h < 2; ++h) x[r][h] -= widen(held[n][rows].value[e + h]);
            }
          }
          if (e + 2 == quad) fetch(column + ahead * warps * columns, held[n]);
          double a[x_tiles][4], b[y_tiles][2];
          GROKCURV_UNROLL
          for (int i = 0; i < x_tiles; ++i) {
            GROKCURV_UNROLL
            for (int k = 0; k < 4; ++k) a[i][k] = x[(triangle ? 0 : y_rows) + 2 * i + k % 2][k / 2];
          }
          GROKCURV_UNROLL
          for (int j = 0; j < y_tiles; ++j) {
            GROKCURV_UNROLL
            for (int h = 0; h < 2; ++h) b[j][h] = x[j][h];
          }
          block.template warp_multiply<8>(a, b, sum, needed);
        }
      }
    }

    // The sums of the warps in turn: the barrier keeps their order, and without it one would write over what another
    // adds to.
    double* total = block.shared();  // (x_side, y_side)
    for (int w = 0; w < warps; ++w) {
      if (own_warp == w) {
        GROKCURV_UNROLL
        for (int i = 0; i < x_tiles; ++i) {
          GROKCURV_UNROLL
          for (int j = 0; j < y_tiles; ++j) {
            GROKCURV_UNROLL
            for (int e = 0; e < 4; ++e) {
              double* to = total + (16 * i + 8 * (e / 2) + group) * y_side + 8 * j + 2 * member + e % 2;
              if (needed(i, j)) *to = w == 0 ? sum[i][j][e] : *to + sum[i][j][e];
            }
          }
        }
      }
      block.sync();
    }
    // Out to the partial sums, ranges beside each other, as GramFold reads them.
    const Index x_apart = swapped ? 1 : task.y_rows, y_apart = swapped ? task.x_rows : 1;
    double* out = partials + first_range * task.x_rows * task.y_rows + (range - first_range);
    for (int n = block.thread(); n < x_side * y_side; n += block.threads()) {
      const Index i = x_first + n / y_side, j = y_first + n % y_side;
      if (i >= task.x_rows || j >= task.y_rows || (triangle && j < i)) continue;
      out[(i * x_apart + j * y_apart) * ranges.count] = total[n];
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
  const Index step = GramRange<float, 2, 4, true, true>::step, entries = task.x_rows * task.y_rows;
  Index ranges = 0;
  const auto ranges_in = [&](Index length) { return ranges_of(length, step).count; };
  const Index* spans = upload_numbered(device, task.segments, ranges_in, ranges);
  double* partials = device.workspace.take(ranges * entries);
  with_type(task.type, [&]<class T>() {
    bool wide = aligned<T>(task.x, task.x_rows, task.size) && aligned<T>(task.y, task.y_rows, task.size) &&
                aligned<T>(task.origin, 1, task.size);
    for (Index s = 0; s < task.segments.count; ++s) wide = wide && task.segments[s].start % quad == 0;
    with_flag(task.origin != nullptr, [&](auto centred) {
      constexpr bool about = decltype(centred)::value;
      using Triangle = GramRange<T, 2, 4, true, about>;
      using Square = GramRange<T, 2, 4, false, about>;
      using Few = GramRange<T, 4, 1, false, about>;  // rows of y
      const auto launch = [&]<class Body>(Index squares, const Gram& sides, bool swapped) {
        device.launch(ranges * squares, Body::shared, Body{sides, spans, symmetric, squares, wide, partials, swapped});
      };
      const Index right = divided_up(task.y_rows, Square::y_side);
      if (symmetric) {
        launch.template operator()<Triangle>(right, task, false);
        launch.template operator()<Square>(right * (right - 1) / 2, task, false);
      } else if (task.x_rows > Few::y_side && task.y_rows > Few::y_side) {
        launch.template operator()<Square>(divided_up(task.x_rows, Square::x_side) * right, task, false);
      } else {
        Gram sides = task;
        const bool swapped = task.x_rows < task.y_rows;
        if (swapped) {
          std::swap(sides.x, sides.y);
          std::swap(sides.x_rows, sides.y_rows);
        }
        const Index down = divided_up(sides.x_rows, Few::x_side);
        launch.template operator()<Few>(down * divided_up(sides.y_rows, Few::y_side), sides, swapped);
      }
    });
  });
  device.launch(divided_up(task.segments.count * entries, GramFold::threads / warp), 0,
                GramFold{task, spans, step, symmetric, partials});
}

}  // namespace grokcurv::block
