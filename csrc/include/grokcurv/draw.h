#pragma once

#include "grokcurv/philox.h"

namespace grokcurv {

// Random integers without a state: out[r, i] is uniform on [0, n[r]), exactly. Its attempts 0, 1, ... are word i % 4 of
// Philox (grokcurv/philox.h), keyed by seeds[r], on counters (i / 4, attempt, steps[r], purpose). The high word of the
// product with n[r] is the entry, unless the low word is less than 2^32 mod n[r]: then the attempt is refused (Lemire:
// Fast random integer generation in an interval, ACM TOMACS 29, 2019). n[r] = 2^32 takes every word as it is.
//
// n[r] = 0 stands for all 64 bits: words 2 (i % 2), low, and 2 (i % 2) + 1, high, of counter (i / 2, 0, steps[r],
// purpose).
//
// Nobody has looked at numbers that are on a GPU: from one out of range come some integers, but no address and no loop
// without an end.
struct Draw {
  Index runs, rows;  // rows at most 2^33
  std::uint32_t purpose;
  const Index* seeds;  // (runs), any bits
  const Index* steps;  // (runs), 0 to 2^32 - 1
  const Index* n;      // (runs), 0 to 2^32
  Index* out;          // (runs, rows)
  double* workspace = nullptr;
};

// One run of a task.
struct DrawRun {
  std::uint64_t seed, n;
  std::uint32_t step, purpose;

  GROKCURV_INLINE DrawRun(const Draw& task, Index run)
      : seed(static_cast<std::uint64_t>(task.seeds[run])),
        n(static_cast<std::uint64_t>(task.n[run])),
        step(static_cast<std::uint32_t>(task.steps[run])),
        purpose(task.purpose) {}

  // The words of counter (index, attempt, step, purpose), index below 2^32.
  GROKCURV_INLINE RandomWords<std::uint32_t> words(std::uint64_t index, std::uint64_t attempt) const {
    return philox<std::uint32_t>(seed, attempt << 32 | index, step, purpose);
  }

  // A word whose product has a low word less than this is refused: 2^32 mod n, where n is not zero.
  GROKCURV_INLINE std::uint32_t least_accepted() const {
    return static_cast<std::uint32_t>((std::uint64_t{1} << 32) % n);
  }

  // Entry 4 index + which, less than n, from its word of the first attempt.
  GROKCURV_INLINE Index below(std::uint64_t index, int which, std::uint64_t word) const {
    std::uint64_t product = word * n;
    // What is refused is less than n, so most entries of a small n do without the division.
    if (static_cast<std::uint32_t>(product) < n) {
      const std::uint32_t least = least_accepted();
      for (std::uint64_t attempt = 1; static_cast<std::uint32_t>(product) < least; ++attempt) {
        product = words(index, attempt).word[which] * n;
      }
    }
    return static_cast<Index>(product >> 32);
  }

  // Entry 2 index + half: 64 bits.
  static GROKCURV_INLINE Index bits(const RandomWords<std::uint32_t>& words, int half) {
    return static_cast<Index>(words.word[2 * half] | std::uint64_t{words.word[2 * half + 1]} << 32);
  }
};

namespace cpu {
GROKCURV_INLINE Index draw_workspace(const Draw&, int) {
  return 0;
}
}  // namespace cpu

}  // namespace grokcurv
