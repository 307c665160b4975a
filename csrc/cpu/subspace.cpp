#include "grokcurv/subspace.h"

#include "cpu/chunks.h"
#include "cpu/threads.h"

namespace grokcurv::cpu::GROKCURV_ISA {

namespace {

template <class T>
void split(const SubspaceSplit& task, int threads) {
  const Index norms = task.norm2 != nullptr, columns = norms + task.basis.count;
  const Index count = chunks(task.size);

  for_each_chunk(task.size, task.vectors, threads, [&](Span here, Index vector) {
    const T* v = static_cast<const T*>(task.v) + vector * task.size + here.start;
    double* partials = task.workspace + (vector * count + here.start / chunk) * columns;
    if (norms != 0) partials[0] = dot(v, v, here.length());
    dot_rows<Compute<T>>(task.basis, vector, here, v, partials + norms);
  });
  fold(task.workspace, task.vectors, count, {{task.norm2, norms}, {task.coefficients, task.basis.count}});
}

// weight values[i] for coordinate i.
template <class C>
struct Term {
  const C* values;
  double weight;
};

// A stretch of coordinates that meet the same rows of the basis at a time: they are read, take their terms in the order
// of the rows, and are written, without leaving the registers.
template <class T>
void filter(const SubspaceFilter& task, int threads) {
  using C = Compute<T>;
  static_assert(sizeof(Term<C>) == filter_term * sizeof(double));
  for_each_chunk(task.size, task.vectors, threads, [&](Span here, Index vector) {
    T* g = static_cast<T*>(task.g) + vector * task.size;
    Term<C>* const terms = reinterpret_cast<Term<C>*>(task.workspace) + thread_number() * task.basis.count;
    for (Span left = here; left.length() > 0;) {
      Span alike = left;
      Term<C>* end = terms;
      for (Index j = 0; j < task.basis.count; ++j) {
        const Span row = task.basis[j];
        const Index next = row.start > left.start ? row.start : row.stop;
        if (next <= left.start) continue;
        alike.stop = next < alike.stop ? next : alike.stop;
        if (next == row.start) continue;
        *end++ = {task.basis.values.of<C>(vector) + task.basis.shift(j),
                  task.strength * task.coefficients[vector * task.basis.count + j]};
      }
      Index i = alike.start;
      const auto next = [&](Index n) __attribute__((always_inline)) {
        Lanes x = Lanes::filled(1.0 - task.strength) * Lanes::load(g + i, n);
        for (const Term<C>* term = terms; term < end; ++term) {
          x += Lanes::filled(term->weight) * Lanes::load(term->values + i, n);
        }
        x.store(g + i, n);
      };
      for (; i + lanes <= alike.stop; i += lanes) next(lanes);
      if (i < alike.stop) next(alike.stop - i);
      left.start = alike.stop;
    }
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
