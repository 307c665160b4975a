#pragma once

#include <utility>

#include "block/block.h"
#include "grokcurv/gram.h"

namespace grokcurv::block {

// A range of the coordinates of a segment, for some rows of x and of y, or, where `triangle`, rows of x beside
// themselves: 16 by 8 entries for each of x_tiles by y_tiles. The warps of a block take 16 columns by turns, and leave
// the products to the tensor cores. A thread has a quad of some rows, one of every eight that follow each other, and
// this is its part of the cores' tiles: of x or of y, they are the same. So threads exchange nothing, and no warp waits
// for another, but for the sums of the four in the end. Quads come to places of the thread's own in shared memory,
// asynchronously: many are on their way, and none of them takes a register.
//
// The order of a sum: of 16 columns those of each residue modulo 4 in turn, one after the other; then the next 16 of
// the warp; the four warps; the ranges. Whatever the other rows are, and whichever tile has the entry, so that its bits
// know nothing of them.
//
// Rows that are not there are zeros. `centred`: about an origin.
template <class T, int x_tiles, int y_tiles, bool triangle, bool centred>
struct GramRange {
  static constexpr int threads = 128, warps = threads / warp, resident = triangle ? 4 : 2;
  static constexpr Index step = 1024;  // ranges are whole multiples of it

  static constexpr int x_side = 16 * x_tiles, y_side = 8 * y_tiles, columns = 16;
  static constexpr int x_rows = triangle ? 0 : x_side / 8, y_rows = y_side / 8, rows = x_rows + y_rows;  // of a thread
  static constexpr int parts = sizeof(T) == 8 ? 2 + triangle : 4 + (triangle && !centred);  // of 16 columns, of a warp
  static constexpr int part_room = (rows + centred) * threads;  // in quads; the last is of the origin
  static constexpr Index staged = parts * part_room * static_cast<Index>(sizeof(Quad<T>)) / 8;
  static constexpr Index shared = staged + x_side * y_side;
  static_assert(shared <= shared_limit && (!triangle || x_side == y_side));

  Gram task;           // y is x where there is none
  const Index* spans;  // (segments, 3): start, length, number of the first range
  bool symmetric;      // true where the task has no y: what lies left of the diagonal is for GramFold to mirror
  Index squares;       // how many pairs of rows by rows there are
  bool wide;           // all rows, and all segments, begin at whole quads
  double* partials;    // (ranges, x_rows, y_rows), over all segments
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
    const T* origin = centred ? at(task.origin, 0) : nullptr;
    const Index x_left = task.x_rows - x_first - group, y_left = task.y_rows - y_first - group, apart = 8 * task.size;

    // The quad of a row in a part is `threads` quads from that of the next.
    Quad<T>* places = reinterpret_cast<Quad<T>*>(block.shared()) + block.thread();
    const auto each_row = [&](const auto& visit) {
      GROKCURV_UNROLL
      for (int r = 0; r < y_rows; ++r) visit(r, 8 * r < y_left, y_own + r * apart);
      GROKCURV_UNROLL
      for (int r = 0; r < x_rows; ++r) visit(y_rows + r, 8 * r < x_left, x_own + r * apart);
      if (centred) visit(rows, true, origin);
    };
    for (int n = 0; n < parts; ++n) {
      each_row([&](int r, bool there, const T*) {
        if (!there) places[n * part_room + r * threads] = {};
      });
    }
    // A group of copies is closed even if there is nothing to copy, so that a wait can count on one for each part.
    const auto fetch = [&](int column, int n) {
      const int left = length - column - member * quad;
      each_row([&](int r, bool there, const T* row) {
        if (!there || column >= length) return;
        Quad<T>* to = places + n * part_room + r * threads;
        if (wide && left >= quad) {
          block.copy(to, reinterpret_cast<const Quad<T>*>(row + column));
        } else {
          GROKCURV_ROLLED
          for (int e = 0; e < quad; ++e) {
            if (e < left) {
              block.copy(to->value + e, row + column + e);
            } else {
              to->value[e] = T{};
            }
          }
        }
      });
      block.commit();
    };

    double sum[x_tiles][y_tiles][4] = {};
    const auto needed = [](int i, int j) { return !triangle || j >= 2 * i; };
    constexpr int turn = warps * columns;
    for (int n = 0; n < parts - 1; ++n) fetch(own_warp * columns + n * turn, n);
    for (int column = own_warp * columns, n = 0; column < length; column += turn, n = (n + 1) % parts) {
      block.template wait<parts - 2>();
      Quad<T> own[rows + centred];
      GROKCURV_UNROLL
      for (int r = 0; r < rows + centred; ++r) own[r] = places[n * part_room + r * threads];
      GROKCURV_UNROLL
      for (int e = 0; e < quad; e += 2) {
        double x[rows][2];
        GROKCURV_UNROLL
        for (int r = 0; r < rows; ++r) {
          GROKCURV_UNROLL
          for (int h = 0; h < 2; ++h) {
            x[r][h] = widen(own[r].value[e + h]);
            if constexpr (centred) x[r][h] -= widen(own[rows].value[e + h]);
          }
        }
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
      // To where the part before was, which has been used.
      fetch(column + (parts - 1) * turn, (n + parts - 1) % parts);
    }

    // The sums of the warps in turn: the barrier keeps their order, and without it one would write over what another
    // adds to.
    double* total = block.shared() + staged;  // (x_side, y_side)
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
    // Out to the partial sums, entries beside each other, as GramFold reads them.
    const Index x_apart = swapped ? 1 : task.y_rows, y_apart = swapped ? task.x_rows : 1;
    double* out = partials + range * task.x_rows * task.y_rows;
    for (int n = block.thread(); n < x_side * y_side; n += block.threads()) {
      const Index i = x_first + n / y_side, j = y_first + n % y_side;
      if (i >= task.x_rows || j >= task.y_rows || (triangle && j < i)) continue;
      out[i * x_apart + j * y_apart] = total[n];
    }
  }
};

// Adds up the ranges of each entry, and mirrors a symmetric result. A second launch, because all blocks of the first
// have to be through. A block has 32 entries, which stand beside each other in memory: each of its warps takes every
// 32nd range, and one of them their sums in turn.
struct GramFold {
  static constexpr int threads = 1024, resident = 1, warps = threads / warp;
  static constexpr int ahead = 8;  // ranges that are on their way
  static constexpr Index shared = threads;

  Gram task;
  const Index* spans;
  Index step, blocks;  // of a segment
  bool symmetric;
  const double* partials;

  template <class Block>
  GROKCURV_BLOCK void operator()(Block& block) const {
    const Index segment = block.index() / blocks, entries = task.x_rows * task.y_rows;
    const int lane = block.thread() % warp, own_warp = block.thread() / warp;
    const Index entry = block.index() % blocks * warp + lane, i = entry / task.y_rows, j = entry % task.y_rows;
    const bool there = entry < entries && !(symmetric && j < i);
    const Index first = spans[3 * segment + 2], count = ranges_of(spans[3 * segment + 1], step).count;
    double sum = 0.0;
    for (Index range = own_warp; range < count; range += ahead * warps) {
      double next[ahead];
      GROKCURV_UNROLL
      for (int n = 0; n < ahead; ++n) {
        const bool exists = there && range + n * warps < count;
        next[n] = exists ? partials[(first + range + n * warps) * entries + entry] : 0.0;
      }
      GROKCURV_UNROLL
      for (int n = 0; n < ahead; ++n) sum += next[n];
    }
    block.shared()[block.thread()] = sum;
    // All are there; without this, what is added up may be what no warp has written yet.
    block.sync();
    if (own_warp > 0 || !there) return;
    for (int w = 1; w < warps; ++w) sum += block.shared()[w * warp + lane];
    double* out = task.out + segment * entries;
    out[entry] = sum;
    if (symmetric) out[j * task.y_rows + i] = sum;
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
  const Index blocks = divided_up(entries, warp);
  device.launch(task.segments.count * blocks, GramFold::shared,
                GramFold{task, spans, step, blocks, symmetric, partials});
}

}  // namespace grokcurv::block
