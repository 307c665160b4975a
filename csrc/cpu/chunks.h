#pragma once

// What the drivers share: chunks of the coordinates, sums over a chunk held as doubles, and the fold of partial sums.

#include "cpu/lanes.h"

namespace grokcurv::cpu::GROKCURV_ISA {

struct Span {
  Index start, stop;

  GROKCURV_INLINE Index length() const { return stop > start ? stop - start : 0; }
  GROKCURV_INLINE Span operator&(Span other) const {
    return {start > other.start ? start : other.start, stop < other.stop ? stop : other.stop};
  }
};

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

// Calls body(static_cast<T*>(nullptr)) with the element type.
template <class Body>
void with_type(Type type, Body body) {
  switch (type) {
    case Type::float32:
      return body(static_cast<float*>(nullptr));
    case Type::float64:
      return body(static_cast<double*>(nullptr));
    case Type::bfloat16:
      return body(static_cast<bfloat16*>(nullptr));
  }
}

}  // namespace grokcurv::cpu::GROKCURV_ISA
