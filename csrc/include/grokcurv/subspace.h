#pragma once

#include "grokcurv/vectors.h"

namespace grokcurv {

// norm2[i] = |v[i]|^2 and coefficients[i][j] = basis[j] . v[i].
struct SubspaceSplit {
  Type type;
  Index vectors, size;
  const void* v;  // (vectors, size)
  Basis basis;
  double* norm2;         // (vectors), or null
  double* coefficients;  // (vectors, basis.count)
  double* workspace = nullptr;
};

// g[i] <- (1 - strength) g[i] + strength sum_j coefficients[i][j] basis[j], formed in double and rounded once.
struct SubspaceFilter {
  Type type;
  Index vectors, size;
  void* g;  // (vectors, size)
  Basis basis;
  const double* coefficients;  // (vectors, basis.count)
  double strength;
  double* workspace = nullptr;
};

namespace cpu {
GROKCURV_INLINE Index subspace_split_workspace(const SubspaceSplit& task, int) {
  return task.vectors * chunks(task.size) * (1 + task.basis.count);
}
// What a thread keeps of a row of the basis, in doubles.
constexpr Index filter_term = 2;

GROKCURV_INLINE Index subspace_filter_workspace(const SubspaceFilter& task, int threads) {
  return threads * task.basis.count * filter_term;
}
}  // namespace cpu

}  // namespace grokcurv
