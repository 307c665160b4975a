#include "grokcurv/subspace.h"

#include "cpu/chunks.h"

namespace grokcurv::cpu::GROKCURV_ISA {

namespace {

template <class T>
void split(const SubspaceSplit& task, int threads) {
  const Index columns = 1 + task.basis.count;
  const Index count = chunks(task.size);

#pragma omp parallel for num_threads(threads)
  for (Index n = 0; n < count * task.vectors; ++n) {
    const Index c = n / task.vectors, vector = n % task.vectors;
    const Span here = nth_chunk(c, task.size);
    const T* v = static_cast<const T*>(task.v) + vector * task.size + here.start;
    double x[chunk];
    for (Index i = 0; i < here.length(); ++i) x[i] = widen(v[i]);
    double* partials = task.workspace + (vector * count + c) * columns;
    partials[0] = dot(x, x, here.length());
    dot_rows<Compute<T>>(task.basis, here, x, partials + 1);
  }

  for (Index vector = 0; vector < task.vectors; ++vector) {
    const double* partials = task.workspace + vector * count * columns;
    fold(partials, count, columns, 1, task.norm2 + vector);
    fold(partials + 1, count, columns, task.basis.count, task.coefficients + vector * task.basis.count);
  }
}

template <class T>
void filter(const SubspaceFilter& task, int threads) {
  using C = Compute<T>;
  const C* values = static_cast<const C*>(task.basis.values);

#pragma omp parallel for num_threads(threads)
  for (Index n = 0; n < chunks(task.size) * task.vectors; ++n) {
    const Index vector = n % task.vectors;
    const Span here = nth_chunk(n / task.vectors, task.size);
    T* g = static_cast<T*>(task.g) + vector * task.size + here.start;
    double x[chunk];
    for (Index i = 0; i < here.length(); ++i) x[i] = (1.0 - task.strength) * widen(g[i]);
    for (Index j = 0; j < task.basis.count; ++j) {
      const Index* row = task.basis.rows + 3 * j;
      const Span both = Span{row[0], row[0] + row[1]} & here;
      if (both.length() == 0) continue;
      const double weight = task.strength * task.coefficients[vector * task.basis.count + j];
      const C* b = values + row[2] + (both.start - row[0]);
      double* to = x + (both.start - here.start);
      for (Index i = 0; i < both.length(); ++i) to[i] += weight * widen(b[i]);
    }
    for (Index i = 0; i < here.length(); ++i) g[i] = narrow<T>(x[i]);
  }
}

}  // namespace

void subspace_split(const SubspaceSplit& task, int threads) {
  with_type(task.type, [&](auto* t) { split<std::remove_pointer_t<decltype(t)>>(task, threads); });
}

void subspace_filter(const SubspaceFilter& task, int threads) {
  with_type(task.type, [&](auto* t) { filter<std::remove_pointer_t<decltype(t)>>(task, threads); });
}

}  // namespace grokcurv::cpu::GROKCURV_ISA
