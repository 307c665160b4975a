#pragma once

#include "grokcurv/vectors.h"

namespace grokcurv {

// The `leading` largest eigenvalues, descending, of each symmetric matrix, and their eigenvectors as columns, each with
// its entry of largest magnitude positive. Only upper triangles are read. A matrix that is not finite, or whose pairs
// do not converge, yields NaN.
struct Eigh {
  Index matrices, size, leading;
  const double* a;  // (matrices, size, size)
  double* values;   // (matrices, leading)
  double* vectors;  // (matrices, size, leading)
  double* workspace = nullptr;
};

namespace cpu {
// Rows of matrices in the workspace are this long: whole eights, the last filled with zeros.
GROKCURV_INLINE constexpr Index eigh_stride(Index size) {
  return (size + 7) / 8 * 8;
}

// In doubles, for each matrix: the matrix, its eigenvectors, and vectors beside them.
GROKCURV_INLINE constexpr Index eigh_workspace_per_matrix(Index size) {
  return (2 * size + 12) * eigh_stride(size);
}

GROKCURV_INLINE Index eigh_workspace(const Eigh& task, int) {
  return task.matrices * eigh_workspace_per_matrix(task.size);
}
}  // namespace cpu

}  // namespace grokcurv
