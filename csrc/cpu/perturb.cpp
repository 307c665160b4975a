#include "grokcurv/perturb.h"

#include "cpu/chunks.h"

namespace grokcurv::cpu::GROKCURV_ISA {

namespace {

template <class T>
void run(const Perturb& task, int threads) {
  using C = Compute<T>;
  for_each_chunk(task.size, task.vectors, threads, [&](Span here, Index vector) {
    const T* theta = task.theta.of<T>(vector);
    const T* direction = static_cast<const T*>(task.directions) + vector * task.size;
    T* out = static_cast<T*>(task.out) + vector * task.size;
    const C eta = static_cast<C>(task.eta[vector]);
    for (Index i = here.start; i < here.stop; ++i) {
      const C step = eta * static_cast<C>(widen(direction[i]));
      out[i] = narrow<T>(static_cast<C>(widen(theta[i])) - step);
    }
  });
}

}  // namespace

void perturb(const Perturb& task, int threads) {
  with_type(task.type, [&]<class T>() { run<T>(task, threads); });
}

}  // namespace grokcurv::cpu::GROKCURV_ISA
