#pragma once

#include <cstdint>

// Always inline: these headers are compiled for several instruction sets, and a copy left to the linker could be one
// that the processor lacks. nvcc compiles them for the GPU too.
#ifdef __CUDACC__
#define GROKCURV_INLINE __host__ __device__ __forceinline__
#else
#define GROKCURV_INLINE inline __attribute__((always_inline))
#endif

namespace grokcurv {

using Index = std::int64_t;

// Element types of vectors. The compute type C of a type is double for float64, float for the other two.
enum class Type : int { float32 = 0, float64 = 1, bfloat16 = 2 };

// Reductions run over chunks of this many coordinates: a partial sum per chunk, folded in the order of the chunks. So
// sums do not depend on which thread took which chunk.
constexpr Index chunk = 4096;

GROKCURV_INLINE constexpr Index chunks(Index size) {
  return (size + chunk - 1) / chunk;
}

// Coordinates start, start + 1, ... stop - 1.
struct Span {
  Index start, stop;

  GROKCURV_INLINE Index length() const { return stop > start ? stop - start : 0; }
  GROKCURV_INLINE Span operator&(Span other) const {
    return {start > other.start ? start : other.start, stop < other.stop ? stop : other.stop};
  }
};

// Numbers that all vectors of a task share, or that each has of its own, `stride` after those of the one before.
// Shared, they have a stride of 0.
struct Strided {
  const void* data;
  Index stride;

  template <class T>
  GROKCURV_INLINE const T* of(Index vector) const {
    return static_cast<const T*>(data) + vector * stride;
  }
};

// K block-sparse vectors: row j is values[offset, offset + length) on coordinates [start, start + length), zero
// elsewhere. Vectors with values of their own have the rows in common.
struct Basis {
  Strided values;     // of the compute type
  const Index* rows;  // (count, 3): start, length, offset
  Index count;

  GROKCURV_INLINE Span operator[](Index j) const { return {rows[3 * j], rows[3 * j] + rows[3 * j + 1]}; }
  // The value at i + shift(j) is that of row j at coordinate i.
  GROKCURV_INLINE Index shift(Index j) const { return rows[3 * j + 2] - rows[3 * j]; }
};

// Parts of the coordinates, which may overlap.
struct Segments {
  const Index* spans;  // (count, 2): start, length
  Index count;

  GROKCURV_INLINE Span operator[](Index s) const { return {spans[2 * s], spans[2 * s] + spans[2 * s + 1]}; }
};

}  // namespace grokcurv
