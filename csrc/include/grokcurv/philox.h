#pragma once

#include "grokcurv/vectors.h"

namespace grokcurv {

// Four random words of 32 bits. W is what holds one while it is computed: 32 bits in the registers of a GPU, 64 on a
// CPU that has a counter in each lane, where the product of two words fills the lane.
template <class W>
struct RandomWords {
  W word[4];
};

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3, 2011), keyed by the seed, low
// word first, on the counter (index low, index high, step, purpose).
template <class W>
GROKCURV_INLINE RandomWords<W> philox(std::uint64_t seed, std::uint64_t index, std::uint32_t step,
                                      std::uint32_t purpose) {
  using Word = std::uint32_t;
  W c0 = static_cast<Word>(index), c1 = static_cast<Word>(index >> 32), c2 = step, c3 = purpose;
  W k0 = static_cast<Word>(seed), k1 = static_cast<Word>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53} * c0, p1 = std::uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<Word>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<Word>(p1);
    c2 = static_cast<Word>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<Word>(p0);
    k0 = static_cast<Word>(k0 + 0x9E3779B9);
    k1 = static_cast<Word>(k1 + 0xBB67AE85);
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace grokcurv
