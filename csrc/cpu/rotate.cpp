#include "grokcurv/rotate.h"

#include "cpu/chunks.h"
#include "cpu/threads.h"

namespace grokcurv::cpu::GROKCURV_ISA {

namespace {

// A tile is this many outputs on eight coordinates: its sums fill twelve registers, which leaves four of the sixteen
// that most instruction sets have; the plainest needs four for the coordinates and one more. A sum takes its terms in
// the order of the rows, whatever the tile is.
constexpr int tile = Lanes::registers == 4 ? 2 : 12 / Lanes::registers;

// The processor follows fewer streams by itself than there are rows, so each is asked for this far ahead.
constexpr Index ahead = 128;

// What a thread works on: a block of coordinates of all rows, widened, as panels of (inputs, 8) so that the innermost
// loop reads one after another. It is read in full before any output is written, which may lie upon the rows.
template <class T>
void widen_block(const Rotate& task, Span here, Index stop, double* panels) {
  for (Index i = 0; i < task.inputs; ++i) {
    const T* from = static_cast<const T*>(task.rows) + i * task.size + here.start;
    if (here.stop + ahead <= stop) {
      for (Index p = 0; p < rotate_block; p += 64 / sizeof(T)) __builtin_prefetch(from + ahead + p, 0, 2);
    }
    for (Index p = 0; p < here.length(); p += lanes) {
      const Index n = here.length() - p;
      const Lanes x = n >= lanes ? Lanes::load(from + p) : Lanes::load(from + p, n);
      x.store(panels + p * task.inputs + i * lanes);
    }
  }
}

// Gives out(r, sum_i coefficients[r][i] x[i]) for R rows of coefficients and one panel.
template <int R, class Out>
GROKCURV_INLINE void combine(const double* coefficients, const double* x, Index inputs, const Out& out) {
  Lanes sums[R] = {};
  for (Index i = 0; i < inputs; ++i) {
    const Lanes row = Lanes::load(x + i * lanes);
#pragma GCC unroll 12  // constant subscripts keep the sums in registers
    for (int r = 0; r < R; ++r) sums[r] += Lanes::filled(coefficients[r * inputs + i]) * row;
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) out(r, sums[r]);
}

// The outputs from `first` on, on one panel: tiles of R rows, and what is left in smaller ones.
template <int R, class Out>
GROKCURV_INLINE void combine_rows(const Rotate& task, const double* coefficients, const double* x, Span here, Out* out,
                                  Index first) {
  for (; first + R <= task.outputs; first += R) {
    combine<R>(coefficients + first * task.inputs, x, task.inputs,
               [&](int r, Lanes sum) { sum.store(out + (first + r) * task.size + here.start, here.length()); });
  }
  if constexpr (R > 1) combine_rows<R / 2>(task, coefficients, x, here, out, first);
}

void add_mean(const Rotate& task, const double* x, Span here) {
  double* mean = task.mean + here.start;
  combine<1>(task.weights, x, task.inputs,
             [&](int, Lanes sum) { (Lanes::load(mean, here.length()) + sum).store(mean, here.length()); });
}

template <class T, class Out>
void run(const Rotate& task, Out* out, int threads) {
#pragma omp parallel num_threads(threads)
  {
    double* panels = task.workspace + thread_number() * rotate_workspace_per_thread(task.inputs);
    for (Index s = 0; s < task.segments.count; ++s) {
      const Span all = task.segments[s];
      const double* coefficients = task.coefficients + s * task.outputs * task.inputs;
#pragma omp for schedule(static) nowait
      for (Index first = all.start; first < all.stop; first += rotate_block) {
        const Span block = Span{first, first + rotate_block} & all;
        widen_block<T>(task, block, all.stop, panels);
        for (Index p = 0; p < block.length(); p += lanes) {
          const Span here = Span{block.start + p, block.start + p + lanes} & block;
          const double* x = panels + p * task.inputs;
          combine_rows<tile>(task, coefficients, x, here, out, 0);
          if (task.mean != nullptr) add_mean(task, x, here);
        }
      }
    }
  }
}

}  // namespace

void rotate(const Rotate& task, int threads) {
  with_type(task.type, [&]<class T>() {
    if (task.out == nullptr) {
      run<T>(task, static_cast<T*>(task.rows), threads);
    } else {
      run<T>(task, static_cast<Compute<T>*>(task.out), threads);
    }
  });
}

}  // namespace grokcurv::cpu::GROKCURV_ISA
