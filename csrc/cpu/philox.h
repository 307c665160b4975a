#pragma once

// Random words, eight counters at once.

#include "cpu/lanes.h"
#include "grokcurv/philox.h"

namespace grokcurv::cpu::GROKCURV_ISA {

using Word = std::uint32_t;
using Words = std::uint64_t;  // two of them, or a product

// Those of the counters first, first + 1, ...: one to a lane, and for each four words of output.
GROKCURV_INLINE void philox_lanes(Words seed, Index first, Word step, Word purpose, Word (&out)[4][lanes]) {
  for (int k = 0; k < lanes; ++k) {
    const RandomWords<Words> words = philox<Words>(seed, static_cast<Words>(first + k), step, purpose);
    for (int w = 0; w < 4; ++w) out[w][k] = static_cast<Word>(words.word[w]);
  }
}

}  // namespace grokcurv::cpu::GROKCURV_ISA
