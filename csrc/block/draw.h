#pragma once

#include "block/block.h"
#include "grokcurv/draw.h"

namespace grokcurv::block {

// Four entries of one run a thread: the words of a counter, or of two where an entry takes two words.
// `wide`: a run's entries are aligned to whole quads.
template <bool wide>
struct DrawEntries {
  static constexpr int threads = 256, resident = 4;
  static constexpr Index piece = quad * threads;  // entries of a block

  Draw task;

  template <class Block>
  GROKCURV_BLOCK void operator()(Block& block) const {
    const Index pieces = divided_up(task.rows, piece), r = block.index() / pieces;
    const Index i = block.index() % pieces * piece + quad * block.thread();
    if (i >= task.rows) return;
    const DrawRun run(task, r);
    const auto index = static_cast<std::uint64_t>(i);
    Quad<Index> entries;
    if (run.n == 0) {
      GROKCURV_UNROLL
      for (int e = 0; e < quad; e += 2) {
        const auto words = run.words(index / 2 + e / 2, 0);
        entries.value[e] = DrawRun::bits(words, 0);
        entries.value[e + 1] = DrawRun::bits(words, 1);
      }
    } else {
      const auto words = run.words(index / 4, 0);
      GROKCURV_UNROLL
      for (int e = 0; e < quad; ++e) entries.value[e] = run.below(index / 4, e, words.word[e]);
    }
    store<wide>(entries, task.out + r * task.rows + i, task.rows - i);
  }
};

template <class Device>
void draw(Device& device, const Draw& task) {
  with_flag(aligned<Index>(task.out, task.runs, task.rows), [&](auto flag) {
    using Body = DrawEntries<flag>;
    device.launch(task.runs * divided_up(task.rows, Body::piece), 0, Body{task});
  });
}

}  // namespace grokcurv::block
