#pragma once

#include "grokcurv/vectors.h"

namespace grokcurv {

// The `leading` largest eigenvalues, descending, of each symmetric matrix, and their eigenvectors as columns, each with
// its entry of largest magnitude positive. Only upper triangles are read. A pair that cannot be trusted is NaN: all
// pairs of a matrix that is not finite, and, where subspace iteration is used, a pair that did not converge or whose
// eigenvalue is negative (a negative eigenvalue found there need not lead).
struct Eigh {
  Index matrices, size, leading;
  const double* a;    // (matrices, size, size)
  double* values;     // (matrices, leading)
  double* vectors;    // (matrices, size, leading)
  double* workspace;  // (matrices, eigh_workspace(size, leading))
};

// Rows that the subspace iteration carries; 0 where all rows are rotated at once (Jacobi).
[[gnu::always_inline]] constexpr Index eigh_block(Index size, Index leading) {
  const Index block = 2 * leading + 8;
  return size > 128 && 2 * block < size ? block : 0;
}

[[gnu::always_inline]] constexpr Index eigh_workspace(Index size, Index leading) {
  const Index block = eigh_block(size, leading);
  return block == 0 ? 2 * size * size : size * size + 3 * block * size + 2 * block * block;
}

namespace cpu {
void eigh(const Eigh& task, int threads);
}

}  // namespace grokcurv
