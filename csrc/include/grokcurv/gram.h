#pragma once

#include "grokcurv/vectors.h"

namespace grokcurv {

// out[s][i][j] = (x[i] - origin) . (y[j] - origin) over segment s. How an entry is summed depends on its segment alone,
// so its bits do not depend on which other rows are in the call. Without y the result is x beside x, symmetric.
struct Gram {
  Type type;
  Index x_rows, y_rows, size;
  const void* x;       // (x_rows, size)
  const void* y;       // (y_rows, size) or null: then y_rows = x_rows
  const void* origin;  // (size) or null: zero
  Segments segments;
  double* out;  // (segments.count, x_rows, y_rows)
  double* workspace = nullptr;
};

namespace cpu {
// The order of a sum, counted from the start of the segment: eight lanes within a block of coordinates, blocks in order
// within a range, ranges in order.
constexpr Index gram_block = 256;
constexpr Index gram_range = 8192;

// This many rows or fewer, on one side, are kept over a slab of coordinates while those of the other side stream past.
constexpr Index gram_few = 4;
constexpr Index gram_slab = 2048;

// In doubles, for each thread: one block of all rows, or one slab of few and of the origin; and the sums over a range.
// Both have room for the rows of zeros that fill a register tile.
GROKCURV_INLINE constexpr Index gram_workspace_per_thread(Index x_rows, Index y_rows) {
  const Index x = x_rows + gram_few, y = y_rows + gram_few;
  return (x + y) * gram_block + (gram_few + 1) * gram_slab + (x * y + 7) / 8 * 8;
}

GROKCURV_INLINE Index gram_workspace(const Gram& task, int threads) {
  return threads * gram_workspace_per_thread(task.x_rows, task.y_rows);
}
}  // namespace cpu

}  // namespace grokcurv
