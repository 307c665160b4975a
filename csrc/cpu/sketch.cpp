#include "grokcurv/sketch.h"

#include "cpu/chunks.h"
#include "cpu/philox.h"

namespace grokcurv::cpu::GROKCURV_ISA {

namespace {

// The signs and shifts of a piece, drawn once for all vectors. A piece is long beside the outputs where that can be, so
// that the sums of one vector stay in the cache.
constexpr Index piece = 1 << 17;
constexpr Index signs_at_once = 128 * lanes, shifts_at_once = 4 * lanes;

struct Draws {
  Words signs[piece / 64 + 1];  // one more than there are, to be read by halves
  Word shifts[piece / 64 + 2 * shifts_at_once];
  Index first, first_block;  // the coordinate of the first sign, the block of the first shift

  // `here` begins at a multiple of 128.
  void draw(Words seed, Span here, Index outputs) {
    Word words[4][lanes];
    first = here.start;
    Words* sign = signs;
    for (Index c = here.start; c < here.stop; c += signs_at_once) {
      philox_lanes(seed, c / 128, 0, 0, words);
      for (int k = 0; k < lanes; ++k) {
        *sign++ = words[0][k] | Words{words[1][k]} << 32;
        *sign++ = words[2][k] | Words{words[3][k]} << 32;
      }
    }
    *sign = 0;
    first_block = here.start / outputs / 4 * 4;
    Word* shift = shifts;
    for (Index block = first_block; block * outputs < here.stop; block += shifts_at_once) {
      philox_lanes(seed, block / 4, 0, 1, words);
      for (int k = 0; k < lanes; ++k) {
        for (int w = 0; w < 4; ++w) *shift++ = words[w][k];
      }
    }
  }

  // 64 signs from coordinate c on, its own in the lowest bit.
  GROKCURV_INLINE Words signs_from(Index c) const {
    const Index word = (c - first) / 64;
    const int bit = static_cast<int>((c - first) % 64);
    return bit == 0 ? signs[word] : signs[word] >> bit | signs[word + 1] << (64 - bit);
  }

  GROKCURV_INLINE Index shift(Index block) const { return shifts[block - first_block]; }
};

// x with lane k negated where bit first + k, below 32, is set. Floats are negated before they are widened: there are
// half as many registers of them.
template <class Eight>
GROKCURV_INLINE Eight negated(Eight x, Word bits, int first = 0) {
  using Number = std::conditional_t<std::is_same_v<Eight, Lanes>, Words, Word>;
  typedef Number Bits __attribute__((vector_size(sizeof(Eight) / Eight::registers)));
  constexpr int width = sizeof(Bits) / sizeof(Number), highest = 8 * sizeof(Number) - 1;
  for (int r = 0; r < Eight::registers; ++r) {
    Bits left;
    for (int k = 0; k < width; ++k) left[k] = static_cast<Number>(highest - first - r * width - k);
    const Bits sign = ((bits - Bits{}) << left) & (Number{1} << highest);
    x.part[r] = reinterpret_cast<typename Eight::Part>(reinterpret_cast<Bits>(x.part[r]) ^ sign);
  }
  return x;
}

GROKCURV_INLINE double negated(double x, Words bits) {
  return bits & 1 ? -x : x;
}

// The sums come and go through the same cache, and the processor alone does not ask for the vector early enough.
constexpr Index ahead = 1024;

// z[i] += +-x[i] for n coordinates in a row, the first of which is c; `left` of them follow in memory, n included.
template <class T>
GROKCURV_INLINE void add_run(const Draws& draws, Index c, const T* x, Index n, Index left, double* z) {
  Index i = 0;
  // One by one to where z is aligned: it is read and written, x only read.
  for (; i < n && reinterpret_cast<std::uintptr_t>(z + i) % 64 != 0; ++i) {
    z[i] += negated(widen(x[i]), draws.signs_from(c + i));
  }
  for (; i + 64 <= n; i += 64) {
    if (i + ahead + 64 <= left) {
      for (Index k = 0; k < 64; k += 64 / sizeof(T)) __builtin_prefetch(x + i + ahead + k, 0, 2);
    }
    const Words signs = draws.signs_from(c + i);
#pragma GCC unroll 8
    for (int k = 0; k < 64; k += lanes) {
      const Own<T> from = negated(Own<T>::load(x + i + k, lanes), static_cast<Word>(signs >> (k & 32)), k % 32);
      (Lanes::load(z + i + k) + widened(from)).store(z + i + k);
    }
  }
  for (; i + lanes <= n; i += lanes) {
    const Own<T> from = negated(Own<T>::load(x + i, lanes), static_cast<Word>(draws.signs_from(c + i)));
    (Lanes::load(z + i) + widened(from)).store(z + i);
  }
  for (; i < n; ++i) z[i] += negated(widen(x[i]), draws.signs_from(c + i));
}

// z += the sketch of one vector's coordinates of `here`; x[0] is the first of them, and `left` follow in memory.
template <class T>
void add_piece(const Draws& draws, Span here, Index outputs, const T* x, Index left, double* z) {
  for (Index c = here.start; c < here.stop;) {
    const Index block = c / outputs;
    const Index to = (c + draws.shift(block)) & (outputs - 1);
    const Index stop = (block + 1) * outputs < here.stop ? (block + 1) * outputs : here.stop;
    const Index n = stop - c < outputs - to ? stop - c : outputs - to;
    add_run(draws, c, x + (c - here.start), n, left - (c - here.start), z + to);
    c += n;
  }
}

template <class T>
void run(const Sketch& task, int threads) {
  const T* x = static_cast<const T*>(task.x);
  const SketchRanges ranges = sketch_ranges(task.size, task.outputs, task.start);
  const Index sums = task.vectors * task.outputs;
  const Span all{task.start, task.start + task.size};

#pragma omp parallel num_threads(threads)
  {
    Draws draws;
#pragma omp for schedule(dynamic)
    for (Index r = 0; r < ranges.count; ++r) {
      double* z = r == 0 ? task.out : task.workspace + (r - 1) * sums;
      for (Index i = 0; i < sums; ++i) z[i] = 0.0;
      const Span range{ranges.first + r * ranges.length, ranges.first + (r + 1) * ranges.length};
      for (Index c = range.start; c < range.stop; c += piece) {
        const Span drawn = Span{c, c + piece} & range & Span{range.start, all.stop};
        const Span here = drawn & all;
        if (here.length() == 0) continue;
        draws.draw(task.seed, drawn, task.outputs);
        for (Index i = 0; i < task.vectors; ++i) {
          const Index p = here.start - task.start;
          add_piece(draws, here, task.outputs, x + i * task.size + p, task.size - p, z + i * task.outputs);
        }
      }
    }
#pragma omp for schedule(static)
    for (Index first = 0; first < sums; first += chunk) {
      const Span here = Span{first, first + chunk} & Span{0, sums};
      for (Index r = 0; r + 1 < ranges.count; ++r) {
        const double* z = task.workspace + r * sums;
        for (Index i = here.start; i < here.stop; ++i) task.out[i] += z[i];
      }
    }
  }
}

}  // namespace

void sketch(const Sketch& task, int threads) {
  with_type(task.type, [&]<class T>() { run<T>(task, threads); });
}

}  // namespace grokcurv::cpu::GROKCURV_ISA
