#include "grokcurv/perturb.h"

#include "cpu/chunks.h"

namespace grokcurv::cpu::GROKCURV_ISA {

namespace {

template <class T>
void run(const Perturb& task, int threads) {
  using C = Compute<T>;
  const T* theta = static_cast<const T*>(task.theta);
  const Index count = chunks(task.size);

  // All vectors of a chunk in turn, so that theta is read from memory once.
#pragma omp parallel for num_threads(threads)
  for (Index n = 0; n < count * task.vectors; ++n) {
    const Span here = nth_chunk(n / task.vectors, task.size);
    const Index vector = n % task.vectors;
    const T* direction = static_cast<const T*>(task.directions) + vector * task.size;
    T* out = static_cast<T*>(task.out) + vector * task.size;
    const C eta = static_cast<C>(task.eta[vector]);
    for (Index i = here.start; i < here.stop; ++i) {
      const C step = eta * static_cast<C>(widen(direction[i]));
      out[i] = narrow<T>(static_cast<C>(widen(theta[i])) - step);
    }
  }
}

}  // namespace

void perturb(const Perturb& task, int threads) {
  with_type(task.type, [&](auto* t) { run<std::remove_pointer_t<decltype(t)>>(task, threads); });
}

}  // namespace grokcurv::cpu::GROKCURV_ISA
