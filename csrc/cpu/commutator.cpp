#include "grokcurv/commutator.h"

#include "cpu/chunks.h"

namespace grokcurv::cpu::GROKCURV_ISA {

namespace {

// The sums of one chunk, eight coordinates at a time; T is the type of the vectors.
template <class T, bool bracket, bool with_theta>
struct Accumulator {
  static constexpr Index columns = commutator_sums(with_theta);

  Lanes eta;    // the step, or its square in a bracket
  Lanes eta_c;  // the step in the compute type
  Lanes sum[columns] = {};

  GROKCURV_INLINE explicit Accumulator(double step)
      : eta(Lanes::filled(bracket ? step * step : step)), eta_c(Lanes::filled(step).template rounded<Compute<T>>()) {}

  // Takes the next coordinates and returns their delta.
  GROKCURV_INLINE Lanes add(Lanes g_a, Lanes g_b, Lanes a2, Lanes b2, Lanes theta) {
    const Lanes change_a = bracket ? a2 : a2 - g_a;
    const Lanes change_b = bracket ? b2 : b2 - g_b;
    const Lanes delta = eta * (bracket ? change_b - change_a : change_a - change_b);
    sum[0] += g_a * g_a;
    sum[1] += g_b * g_b;
    sum[2] += g_a * g_b;
    sum[3] += delta * delta;
    sum[4] += change_a * change_a;
    sum[5] += change_b * change_b;
    if constexpr (with_theta) {
      const Lanes r = (direct(theta, g_a, b2) - direct(theta, g_b, a2)).template rounded<T>();
      const Lanes q_a = stored(theta, g_a) - (theta - eta * g_a);
      const Lanes q_b = stored(theta, g_b) - (theta - eta * g_b);
      sum[6] += r * r;
      sum[7] += (r - delta) * (r - delta);
      sum[8] += q_a * q_a;
      sum[9] += q_b * q_b;
    }
    return delta;
  }

 private:
  // One operation on floats, done in double and rounded to float, is rounded as the float operation is (53 >= 2 * 24 +
  // 2 bits); so these are the operations of the vectors' own type.
  GROKCURV_INLINE Lanes product(Lanes g) const { return (eta_c * g).template rounded<Compute<T>>(); }
  GROKCURV_INLINE Lanes stored(Lanes theta, Lanes g) const { return (theta - product(g)).template rounded<T>(); }
  GROKCURV_INLINE Lanes step(Lanes theta, Lanes g) const {
    return (theta - product(g).template rounded<T>()).template rounded<T>();
  }
  GROKCURV_INLINE Lanes direct(Lanes theta, Lanes first, Lanes second) const {
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
  for (; i + lanes <= n; i += lanes) {
    const Lanes point = with_theta ? Lanes::load(theta + i) : Lanes{};
    const Lanes next =
        accumulator.add(Lanes::load(g_a + i), Lanes::load(g_b + i), Lanes::load(a2 + i), Lanes::load(b2 + i), point);
    if (stores_delta) next.store(delta + i);
  }
  if (const Index rest = n - i; rest > 0) {
    const auto tail = [&](const T* x) { return Lanes::load(x + i, rest); };
    const Lanes point = with_theta ? tail(theta) : Lanes{};
    double last[lanes];
    accumulator.add(tail(g_a), tail(g_b), tail(a2), tail(b2), point).store(last);
    std::memcpy(delta + i, last, static_cast<std::size_t>(rest) * sizeof(double));
  }

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
