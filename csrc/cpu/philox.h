#pragma once

// Random words, eight counters at once.

#include "cpu/lanes.h"
#include "grokcurv/philox.h"

namespace grokcurv::cpu::GROKCURV_ISA {

using Word = std::uint32_t;
using Words = std::uint64_t;  // two of them, or a product

// Eight words, one to a lane of 64 bits, which a product of two of them fills. The upper half of a lane means nothing.
struct WordLanes {
  typedef Words Part __attribute__((vector_size(sizeof(Register))));
  static constexpr int registers = Lanes::registers;

  Part part[registers];

  WordLanes() = default;
  GROKCURV_INLINE WordLanes(Word x) {
    for (Part& p : part) p = x - Part{};
  }
};

GROKCURV_LANEWISE(WordLanes, ^)

// Intrinsics, masked or not, for the reasons that lanes.h gives: of a product with a constant GCC 12 makes shifts and
// sums, three times as many instructions.
GROKCURV_INLINE WordLanes::Part lower_product(WordLanes::Part x, WordLanes::Part y) {
#if defined(__AVX512F__)
  return (WordLanes::Part)_mm512_maskz_mul_epu32(0xff, (__m512i)x, (__m512i)y);
#elif defined(__AVX2__)
  return (WordLanes::Part)_mm256_mul_epu32((__m256i)x, (__m256i)y);
#elif defined(__SSE2__)
  return (WordLanes::Part)_mm_mul_epu32((__m128i)x, (__m128i)y);
#else
  return (x & 0xffffffff) * (y & 0xffffffff);
#endif
}

GROKCURV_INLINE Product<WordLanes> product(WordLanes x, WordLanes y) {
  Product<WordLanes> both;
  for (int k = 0; k < WordLanes::registers; ++k) {
    both.low.part[k] = lower_product(x.part[k], y.part[k]);
    both.high.part[k] = both.low.part[k] >> 32;
  }
  return both;
}

// Those of the counters first, first + 1, ...: one to a lane, and for each four words of output.
GROKCURV_INLINE void philox_lanes(Words seed, Index first, Word step, Word purpose, Word (&out)[4][lanes]) {
  Words index[lanes], above[lanes], wide[lanes];
  for (int k = 0; k < lanes; ++k) {
    index[k] = static_cast<Words>(first + k);
    above[k] = index[k] >> 32;
  }
  WordLanes low, high;
  std::memcpy(&low, index, sizeof low);
  std::memcpy(&high, above, sizeof high);
  const RandomWords<WordLanes> words = philox<WordLanes>(seed, low, high, step, purpose);
  for (int w = 0; w < 4; ++w) {
    std::memcpy(wide, &words.word[w], sizeof wide);
    for (int k = 0; k < lanes; ++k) out[w][k] = static_cast<Word>(wide[k]);
  }
}

}  // namespace grokcurv::cpu::GROKCURV_ISA
