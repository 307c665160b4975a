#pragma once

#include "grokcurv/vectors.h"

namespace grokcurv {

// The `leading` largest eigenvalues, descending, of each symmetric matrix, and their eigenvectors as columns, each with
// its entry of largest magnitude positive. Only upper triangles are read. A matrix that is not finite, or on which
// Jacobi rotations do not come to rest, yields NaN.
struct Eigh {
  Index matrices, size, leading;
  const double* a;    // (matrices, size, size)
  double* values;     // (matrices, leading)
  double* vectors;    // (matrices, size, leading)
  double* workspace;  // (matrices, eigh_workspace(size))
};

// Rows that a subspace iteration for the leading pairs carries; 0 where rotating the whole matrix costs no more.
[[gnu::always_inline]] constexpr Index eigh_block(Index size, Index leading) {
  const Index block = 2 * leading + 8;
  return 4 * block < size ? block : 0;
}

// In doubles: room for the matrix and its eigenvectors, which also serves the iteration (3 block size + 2 block^2 <
// size^2).
[[gnu::always_inline]] constexpr Index eigh_workspace(Index size) {
  return 2 * size * size;
}

namespace cpu {
void eigh(const Eigh& task, int threads);
}

}  // namespace grokcurv
