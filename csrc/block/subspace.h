#pragma once

#include "block/block.h"
#include "grokcurv/subspace.h"

namespace grokcurv::block {

// A range of one vector, chunk by chunk in shared memory: there it is read once from memory for however many rows of
// the basis, each of which a warp takes as a whole.
template <class T>
struct SplitRange {
  static constexpr bool any_threads = true;
  static constexpr int threads = 256, resident = 4;

  SubspaceSplit task;  // its table on the device
  Ranges ranges;
  double* partials;  // (vectors, 1 + basis.count, ranges)

  template <class Block>
  GROKCURV_BLOCK void operator()(Block& block) const {
    // Vectors of the same range are neighbours, so that they find its part of the basis in the cache.
    const Index vector = block.index() % task.vectors, range = block.index() / task.vectors;
    const Span all = ranges[range];
    const T* v = static_cast<const T*>(task.v) + vector * task.size;
    double* column = partials + vector * (1 + task.basis.count) * ranges.count + range;
    double* room = block.shared();
    double* x = room + block.threads() / warp;

    double norm2[1] = {};
    for (Index start = all.start; start < all.stop; start += chunk) {
      const Span here = Span{start, start + chunk} & all;
      const int length = static_cast<int>(here.length());
      for (int i = block.thread(); i < length; i += block.threads()) {
        const double x_i = widen(v[start + i]);
        norm2[0] = fma(x_i, x_i, norm2[0]);
        x[i] = x_i;
      }
      // A row reads coordinates that all threads have put there.
      block.sync();
      project<Compute<T>>(block, task.basis, Segments{}, vector, here, x, column + ranges.count, ranges.count,
                          start == all.start);
      // Without this, the next chunk would be written over what a slower warp still reads.
      block.sync();
    }
    sum_over_block(block, norm2, room, column, ranges.count);
  }
};

template <class Device>
void subspace_split(Device& device, const SubspaceSplit& given) {
  SubspaceSplit task = given;
  task.basis = upload(device, given.basis);
  const Ranges ranges = ranges_of(task.size, chunk);
  const Index columns = 1 + task.basis.count;
  double* partials = device.workspace.take(task.vectors * columns * ranges.count);
  with_type(task.type, [&]<class T>() {
    using Body = SplitRange<T>;
    device.launch(task.vectors * ranges.count, Body::threads / warp + chunk, Body{task, ranges, partials});
  });
  fold(device, {partials,
                task.vectors,
                columns,
                ranges.count,
                {{task.norm2, 1}, {task.coefficients, task.basis.count}, {nullptr, 0}}});
}

// A chunk of one vector. A coordinate takes its terms in the order of the basis. It is the business of one thread, from
// reading to writing back, so that no barrier is needed and g is filtered in place. Products and sums are rounded one
// by one, without fma, so that the bits are the CPU's. `wide` is true if all vectors are aligned to whole quads. Rows
// of the basis are read one by one: they begin anywhere.
template <class T, bool wide>
struct FilterChunk {
  static constexpr bool any_threads = true;
  static constexpr int threads = 256, resident = 4;

  SubspaceFilter task;  // its table on the device

  template <class Block>
  GROKCURV_BLOCK void operator()(Block& block) const {
    const Index vector = block.index() % task.vectors, start = block.index() / task.vectors * chunk;
    const Span here = Span{start, start + chunk} & Span{0, task.size};
    const double* coefficients = task.coefficients + vector * task.basis.count;
    const auto* values = task.basis.values.of<Compute<T>>(vector);
    T* g = static_cast<T*>(task.g) + vector * task.size;
    for (Index i = here.start + quad * block.thread(); i < here.stop; i += quad * block.threads()) {
      Quad<T> q = load<wide>(g + i, here.stop - i);
      double x[quad];
      GROKCURV_UNROLL
      for (Index e = 0; e < quad; ++e) x[e] = (1.0 - task.strength) * widen(q.value[e]);
      for (Index j = 0; j < task.basis.count; ++j) {
        const Index* row = task.basis.rows + 3 * j;
        const Index place = i - row[0];  // of the quad in the row
        // A row that misses all four is skipped; of one that meets some, the others take nothing, not even a zero.
        if (place <= -quad || place >= row[1]) continue;
        const double weight = task.strength * coefficients[j];
        GROKCURV_UNROLL
        for (Index e = 0; e < quad; ++e) {
          if (place + e >= 0 && place + e < row[1]) x[e] += weight * static_cast<double>(values[row[2] + place + e]);
        }
      }
      GROKCURV_UNROLL
      for (Index e = 0; e < quad; ++e) q.value[e] = narrow<T>(x[e]);
      store<wide>(q, g + i, here.stop - i);
    }
  }
};

template <class Device>
void subspace_filter(Device& device, const SubspaceFilter& given) {
  SubspaceFilter task = given;
  task.basis = upload(device, given.basis);
  with_type(task.type, [&]<class T>() {
    with_flag(aligned<T>(task.g, task.vectors, task.size),
              [&](auto flag) { device.launch(task.vectors * chunks(task.size), 0, FilterChunk<T, flag>{task}); });
  });
}

}  // namespace grokcurv::block
