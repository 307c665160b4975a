#include "grokcurv/subspace.h"

#include "cpu/chunks.h"

namespace grokcurv::cpu::GROKCURV_ISA {

namespace {

template <class T>
void split(const SubspaceSplit& task, int threads) {
  const Index columns = 1 + task.basis.count;
  const Index count = chunks(task.size);

  for_each_chunk(task.size, task.vectors, threads, [&](Span here, Index vector) {
    const T* v = static_cast<const T*>(task.v) + vector * task.size + here.start;
    double* partials = task.workspace + (vector * count + here.start / chunk) * columns;
    partials[0] = dot(v, v, here.length());
    dot_rows<Compute<T>>(task.basis, vector, here, v, partials + 1);
  });
  fold(task.workspace, task.vectors, count, {{task.norm2, 1}, {task.coefficients, task.basis.count}});
}

template <class T>
void filter(const SubspaceFilter& task, int threads) {
  using C = Compute<T>;
  for_each_chunk(task.size, task.vectors, threads, [&](Span here, Index vector) {
    T* g = static_cast<T*>(task.g) + vector * task.size + here.start;
    const C* values = task.basis.values.of<C>(vector);
    double x[chunk];
    for (Index i = 0; i < here.length(); ++i) x[i] = (1.0 - task.strength) * widen(g[i]);
    for (Index j = 0; j < task.basis.count; ++j) {
      const Span both = task.basis[j] & here;
      if (both.length() == 0) continue;
      const double weight = task.strength * task.coefficients[vector * task.basis.count + j];
      const C* b = values + (both.start + task.basis.shift(j));
      double* to = x + (both.start - here.start);
      for (Index i = 0; i < both.length(); ++i) to[i] += weight * widen(b[i]);
    }
    for (Index i = 0; i < here.length(); ++i) g[i] = narrow<T>(x[i]);
  });
}

}  // namespace

void subspace_split(const SubspaceSplit& task, int threads) {
  with_type(task.type, [&]<class T>() { split<T>(task, threads); });
}

void subspace_filter(const SubspaceFilter& task, int threads) {
  with_type(task.type, [&]<class T>() { filter<T>(task, threads); });
}

}  // namespace grokcurv::cpu::GROKCURV_ISA
