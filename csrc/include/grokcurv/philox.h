#pragma once

#include "grokcurv/vectors.h"

namespace grokcurv {

// Four random words of 32 bits. W is what holds one while it is computed: a word, or lanes of them.
template <class W>
struct RandomWords {
  W word[4];
};

// A product of two words, which is two words long.
template <class W>
struct Product {
  W high, low;
};

GROKCURV_INLINE Product<std::uint32_t> product(std::uint32_t x, std::uint32_t y) {
  const std::uint64_t both = std::uint64_t{x} * y;
  return {static_cast<std::uint32_t>(both >> 32), static_cast<std::uint32_t>(both)};
}

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3, 2011), keyed by the seed, low
// word first, on the counter (c0, c1, c2, c3).
template <class W>
GROKCURV_INLINE RandomWords<W> philox(std::uint64_t seed, W c0, W c1, W c2, W c3) {
  std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Product<W> p0 = product(c0, 0xD2511F53), p1 = product(c2, 0xCD9E8D57);
    c0 = p1.high ^ c1 ^ k0;
    c1 = p1.low;
    c2 = p0.high ^ c3 ^ k1;
    c3 = p0.low;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// On the counter (index low, index high, step, purpose).
template <class W>
GROKCURV_INLINE RandomWords<W> philox(std::uint64_t seed, std::uint64_t index, std::uint32_t step,
                                      std::uint32_t purpose) {
  return philox<W>(seed, static_cast<std::uint32_t>(index), static_cast<std::uint32_t>(index >> 32), step, purpose);
}

}  // namespace grokcurv
