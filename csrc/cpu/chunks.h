#pragma once

// What the drivers share: chunks of the coordinates, sums over a chunk held as doubles, and the fold of partial sums.

#include "cpu/lanes.h"

namespace grokcurv::cpu::GROKCURV_ISA {

GROKCURV_INLINE Span nth_chunk(Index n, Index size) {
  return Span{n * chunk, (n + 1) * chunk} & Span{0, size};
}

// sums[j] = basis[j] . x over the coordinates of the chunk, which x[0], x[1], ... hold.
template <class C>
GROKCURV_INLINE void dot_rows(const Basis& basis, Span here, const double* x, double* sums) {
  const C* values = static_cast<const C*>(basis.values);
  for (Index j = 0; j < basis.count; ++j) {
    const Index* row = basis.rows + 3 * j;
    const Span both = Span{row[0], row[0] + row[1]} & here;
    sums[j] = 0.0;
    if (both.length() == 0) continue;
    sums[j] = dot(x + (both.start - here.start), values + row[2] + (both.start - row[0]), both.length());
  }
}

// out[j] = sum over chunks of partials[chunk][j], for columns of a partial that is `stride` wide.
inline void fold(const double* partials, Index count, Index stride, Index columns, double* out) {
  for (Index j = 0; j < columns; ++j) out[j] = 0.0;
  for (Index c = 0; c < count; ++c) {
    for (Index j = 0; j < columns; ++j) out[j] += partials[c * stride + j];
  }
}

}  // namespace grokcurv::cpu::GROKCURV_ISA
