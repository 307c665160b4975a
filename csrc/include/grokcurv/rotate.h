#pragma once

#include "grokcurv/vectors.h"

namespace grokcurv {

// out[j] = sum_i coefficients[s][j][i] rows[i] over segment s: products and sums in float64 in the order of the rows,
// rounded once. In place, mean += sum_i weights[i] rows[i] over the segments in the same pass, of the rows as they
// were.
struct Rotate {
  Type type;
  Index inputs, outputs, size;
  void* rows;                  // (inputs, size); written to only in place
  const double* coefficients;  // (segments.count, outputs, inputs)
  Segments segments;           // disjoint; coordinates outside of them are left alone
  void* out;                   // (outputs, size) of the compute type, or null: in place, over the first rows
  double* mean;                // (size) or null
  const double* weights;       // (inputs), with mean
  double* workspace = nullptr;
};

namespace cpu {
// A thread works on this many coordinates of all rows at a time: as doubles they stay in the first cache.
constexpr Index rotate_block = 64;

GROKCURV_INLINE constexpr Index rotate_workspace_per_thread(Index inputs) {
  return inputs * rotate_block;
}

GROKCURV_INLINE Index rotate_workspace(const Rotate& task, int threads) {
  return threads * rotate_workspace_per_thread(task.inputs);
}
}  // namespace cpu

}  // namespace grokcurv
