#include "grokcurv/draw.h"

#include "cpu/chunks.h"
#include "cpu/philox.h"

namespace grokcurv::cpu::GROKCURV_ISA {

namespace {

// Entries `here` of a run, of which a counter makes `each`: make(i, words, entries) turns the words of eight counters
// into the entries from i on. A chunk begins at a whole number of eights.
template <int each, class Make>
GROKCURV_INLINE void fill(const DrawRun& run, Span here, Index* out, const Make& make) {
  constexpr Index at_once = each * lanes;
  Word words[4][lanes];
  Index entries[at_once];
  for (Index i = here.start; i < here.stop; i += at_once) {
    philox_lanes(run.seed, i / each, run.step, run.purpose, words);
    make(i, words, entries);
    const Index left = here.stop - i < at_once ? here.stop - i : at_once;
    std::memcpy(out + i, entries, static_cast<std::size_t>(left) * sizeof(Index));
  }
}

void fill_bits(const DrawRun& run, Span here, Index* out) {
  fill<2>(run, here, out, [](Index, const Word(&words)[4][lanes], Index(&entries)[2 * lanes]) {
    for (int k = 0; k < lanes; ++k) {
      const RandomWords<Word> own{words[0][k], words[1][k], words[2][k], words[3][k]};
      for (int half = 0; half < 2; ++half) entries[2 * k + half] = DrawRun::bits(own, half);
    }
  });
}

void fill_below(const DrawRun& run, Span here, Index* out) {
  const Word least = run.least_accepted();
  fill<4>(run, here, out, [&](Index i, const Word(&words)[4][lanes], Index(&entries)[4 * lanes]) {
    Word again = 0;
    for (int k = 0; k < lanes; ++k) {
      for (int w = 0; w < 4; ++w) {
        const Words product = words[w][k] * run.n;
        entries[4 * k + w] = static_cast<Index>(product >> 32);
        again |= static_cast<Word>(product) < least;
      }
    }
    if (again == 0) return;
    for (int k = 0; k < lanes; ++k) {
      for (int w = 0; w < 4; ++w) {
        entries[4 * k + w] = run.below(static_cast<Words>(i / 4 + k), w, words[w][k]);
      }
    }
  });
}

}  // namespace

void draw(const Draw& task, int threads) {
  for_each_chunk(task.rows, task.runs, threads, [&](Span here, Index r) {
    const DrawRun run(task, r);
    Index* out = task.out + r * task.rows;
    run.n == 0 ? fill_bits(run, here, out) : fill_below(run, here, out);
  });
}

}  // namespace grokcurv::cpu::GROKCURV_ISA
