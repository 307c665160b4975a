#pragma once

// What the drivers share: chunks of the coordinates, sums over a chunk held as doubles, and the fold of partial sums.

#include "cpu/lanes.h"

namespace grokcurv::cpu::GROKCURV_ISA {

// Calls body(chunk, vector) for all chunks of all vectors. The vectors of a chunk come in turn, so that what they
// share, such as theta and the basis, is read from memory once.
template <class Body>
void for_each_chunk(Index size, Index vectors, int threads, const Body& body) {
#pragma omp parallel for num_threads(threads)
  for (Index n = 0; n < chunks(size) * vectors; ++n) {
    const Index start = n / vectors * chunk;
    body(Span{start, start + chunk} & Span{0, size}, n % vectors);
  }
}

// sums[j] = basis[j] . x over the coordinates of the chunk of a vector, which x[0], x[1], ... hold.
template <class C, class X>
GROKCURV_INLINE void dot_rows(const Basis& basis, Index vector, Span here, const X* x, double* sums) {
  const C* values = basis.values.of<C>(vector);
  for (Index j = 0; j < basis.count; ++j) {
    const Span both = basis[j] & here;
    sums[j] = 0.0;
    if (both.length() == 0) continue;
    sums[j] = dot(x + (both.start - here.start), values + (both.start + basis.shift(j)), both.length());
  }
}

struct Output {
  double* out;  // (vectors, columns)
  Index columns;
};

// For each vector and column the sum over the chunks of partials (vectors, chunks, columns), in their order. The
// columns are those of the outputs, one beside the other.
template <int n>
void fold(const double* partials, Index vectors, Index count, const Output (&outputs)[n]) {
  Index stride = 0;
  for (const Output& output : outputs) stride += output.columns;
  for (Index vector = 0; vector < vectors; ++vector) {
    const double* from = partials + vector * count * stride;
    for (const Output& output : outputs) {
      double* out = output.out + vector * output.columns;
      for (Index j = 0; j < output.columns; ++j) out[j] = 0.0;
      for (Index c = 0; c < count; ++c) {
        for (Index j = 0; j < output.columns; ++j) out[j] += from[c * stride + j];
      }
      from += output.columns;
    }
  }
}

}  // namespace grokcurv::cpu::GROKCURV_ISA
