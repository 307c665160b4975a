#pragma once

#include <cstdint>

namespace grokcurv {

using Index = std::int64_t;

// Element types of vectors. The compute type C of a type is double for float64, float for the other two.
enum class Type : int { float32 = 0, float64 = 1, bfloat16 = 2 };

// Reductions run over chunks of this many coordinates: a partial sum per chunk, folded in the order of the chunks. So
// sums do not depend on which thread took which chunk.
constexpr Index chunk = 4096;

// Always inline, like every function of these headers: they are compiled for several instruction sets, and a copy left
// to the linker could be one that the processor lacks.
[[gnu::always_inline]] constexpr Index chunks(Index size) {
  return (size + chunk - 1) / chunk;
}

// K block-sparse vectors: row j is values[offset, offset + length) on coordinates [start, start + length), zero
// elsewhere.
struct Basis {
  const void* values;  // of the compute type
  const Index* rows;   // (count, 3): start, length, offset
  Index count;
};

// Parts of the coordinates, which may overlap.
struct Segments {
  const Index* spans;  // (count, 2): start, length
  Index count;
};

}  // namespace grokcurv
