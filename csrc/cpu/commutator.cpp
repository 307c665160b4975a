#include "grokcurv/commutator.h"

#include "cpu/chunks.h"

namespace grokcurv::cpu::GROKCURV_ISA {

namespace {

// The sums of one chunk, eight coordinates at a time; T is the type of the vectors.
template <class T, bool bracket, bool with_theta>
struct Accumulator {
  static constexpr Index columns = commutator_sums(with_theta);

  Lanes eta;         // the step, or its square in a bracket
  Compute<T> eta_c;  // the step in the compute type
  Lanes sum[columns] = {};

  GROKCURV_INLINE explicit Accumulator(double step)
      : eta(Lanes::filled(bracket ? step * step : step)), eta_c(static_cast<Compute<T>>(step)) {}

  // Takes the next coordinates and returns their delta.
  GROKCURV_INLINE Lanes add(Lanes g_a, Lanes g_b, Lanes a2, Lanes b2) {
    const Lanes change_a = bracket ? a2 : a2 - g_a;
    const Lanes change_b = bracket ? b2 : b2 - g_b;
    const Lanes delta = eta * (bracket ? change_b - change_a : change_a - change_b);
    sum[0] = add_product<T, T>(sum[0], g_a, g_a);
    sum[1] = add_product<T, T>(sum[1], g_b, g_b);
    sum[2] = add_product<T, T>(sum[2], g_a, g_b);
    sum[3] += delta * delta;
    sum[4] += change_a * change_a;
    sum[5] += change_b * change_b;
    return delta;
  }

  // Takes what rounding does to the same coordinates, whose wide numbers come from memory once more: taken from a
  // register of floats they would have to be moved there.
  GROKCURV_INLINE void add_rounding(Lanes delta, Own<T> g_a, Own<T> g_b, Own<T> a2, Own<T> b2, Own<T> theta,
                                    Lanes wide_a, Lanes wide_b, Lanes wide_theta) {
    const Lanes r = widened(rounded<T>(direct(theta, g_a, b2) - direct(theta, g_b, a2)));
    const Lanes q_a = widened(stored(theta, g_a)) - (wide_theta - eta * wide_a);
    const Lanes q_b = widened(stored(theta, g_b)) - (wide_theta - eta * wide_b);
    sum[6] = add_product<T, T>(sum[6], r, r);
    sum[7] += (r - delta) * (r - delta);
    sum[8] += q_a * q_a;
    sum[9] += q_b * q_b;
  }

 private:
  GROKCURV_INLINE Own<T> product(Own<T> g) const { return rounded<Compute<T>>(Own<T>::filled(eta_c) * g); }
  GROKCURV_INLINE Own<T> stored(Own<T> theta, Own<T> g) const { return rounded<T>(theta - product(g)); }
  GROKCURV_INLINE Own<T> step(Own<T> theta, Own<T> g) const { return rounded<T>(theta - rounded<T>(product(g))); }
  GROKCURV_INLINE Own<T> direct(Own<T> theta, Own<T> first, Own<T> second) const {
    return step(step(theta, first), second);
  }
};

// One chunk of one vector: its partial sums in the order of the columns, and its delta.
template <class T, bool bracket, bool with_theta>
void run_chunk(const Commutator& task, Span here, Index vector, double* partials) {
  using C = Compute<T>;
  const Index n = here.length();
  const auto at = [&](const void* x) { return static_cast<const T*>(x) + vector * task.size + here.start; };
  const T *g_a = at(task.g_a), *g_b = at(task.g_b), *a2 = at(task.a2), *b2 = at(task.b2);
  const T* theta = with_theta ? task.theta.of<T>(vector) + here.start : nullptr;

  Accumulator<T, bracket, with_theta> accumulator(task.eta[vector]);
  // A chunk of deltas fills the first cache, so they are stored only for those who read them.
  const bool stores_delta = task.basis.count > 0 || task.segments.count > 0 || task.delta != nullptr;
  double delta[chunk];
  Index i = 0;
  const auto add = [&](Index rest) __attribute__((always_inline)) {  // or the sums would leave the registers
    const auto wide = [&](const T* x) { return Lanes::load(x + i, rest); };
    const auto own = [&](const T* x) { return Own<T>::load(x + i, rest); };
    const Lanes a = wide(g_a), b = wide(g_b), next = accumulator.add(a, b, wide(a2), wide(b2));
    if constexpr (with_theta) {
      accumulator.add_rounding(next, own(g_a), own(g_b), own(a2), own(b2), own(theta), a, b, wide(theta));
    }
    if (stores_delta) next.store(delta + i, rest);
  };
  for (; i + lanes <= n; i += lanes) add(lanes);
  if (i < n) add(n - i);

#pragma GCC unroll 10  // constant subscripts keep the sums in registers
  for (Index j = 0; j < accumulator.columns; ++j) partials[j] = accumulator.sum[j].fold();
  partials += accumulator.columns;
  dot_rows<C>(task.basis, vector, here, delta, partials);
  partials += task.basis.count;
  for (Index s = 0; s < task.segments.count; ++s) {
    const Span both = task.segments[s] & here;
    partials[s] = 0.0;
    if (both.length() == 0) continue;
    const double* x = delta + (both.start - here.start);
    partials[s] = dot(x, x, both.length());
  }
  if (task.delta != nullptr) {
    C* out = static_cast<C*>(task.delta) + vector * task.size + here.start;
    for (Index j = 0; j < n; ++j) out[j] = static_cast<C>(delta[j]);
  }
}

template <class T, bool bracket, bool with_theta>
void run(const Commutator& task, int threads) {
  const Index columns = commutator_columns(task), count = chunks(task.size);
  for_each_chunk(task.size, task.vectors, threads, [&](Span here, Index vector) {
    double* partials = task.workspace + (vector * count + here.start / chunk) * columns;
    run_chunk<T, bracket, with_theta>(task, here, vector, partials);
  });
  fold(task.workspace, task.vectors, count,
       {{task.sums, commutator_sums(with_theta)},
        {task.coefficients, task.basis.count},
        {task.energies, task.segments.count}});
}

}  // namespace

void commutator(const Commutator& task, int threads) {
  with_type(task.type, [&]<class T>() {
    const bool with_theta = task.theta.data != nullptr;
    const auto kernel = task.bracket ? run<T, true, false> : with_theta ? run<T, false, true> : run<T, false, false>;
    kernel(task, threads);
  });
}

}  // namespace grokcurv::cpu::GROKCURV_ISA
