#pragma once

#include "block/block.h"
#include "grokcurv/rotate.h"

namespace grokcurv::block {

// How a block goes about a task: it takes some columns of all rows into shared memory, as doubles, and each thread adds
// up eight outputs on four columns. Where the rows are so many that they do not fit, a piece of the workspace holds
// them.
//
// The panel is what makes it work in place: a block has read its columns of all rows before it writes any of them, and
// no other block reads or writes these columns. The more columns, the longer the stretch of a row that is read at once;
// 32 doubles are the least, and the limits leave room for two blocks on a multiprocessor that has twice shared_limit.
struct RotatePlan {
  static constexpr int tile = 8;  // outputs of a thread; its columns are a quad
  static constexpr Index panel_limit = 64 * 1024 / sizeof(double), coefficients_limit = shared_limit - panel_limit;

  int columns;          // at a time
  int tiles;            // of outputs in a pass, as many as there are threads for
  int inputs;           // in a slab of coefficients
  bool fits;            // true if the panel lies in the block's shared memory, false if in the workspace
  bool once;            // true if one pass of one slab is all, so that a block loads coefficients once a segment
  Index column_blocks;  // over all segments

  GROKCURV_INLINE Index panel(const Rotate& task) const { return task.inputs * columns; }
  GROKCURV_INLINE int coefficients() const { return tiles * tile * inputs; }
};

template <class T, class Out>
struct RotateColumns {
  static constexpr int threads = 256, resident = 2;
  static constexpr int tile = RotatePlan::tile;

  Rotate task;
  RotatePlan plan;
  const Index* spans;  // (segments, 3): start, length, number of the first block of columns
  Out* out;
  double* panels;  // (blocks, panel) or null

  template <class Block>
  GROKCURV_BLOCK void operator()(Block& block) const {
    // A thread has every places-th column: neighbours read and write beside each other, and a quad of sums is spread
    // over the panel. Threads of the same place and another tile read the same numbers of it.
    double* coefficients = block.shared();
    double* panel = plan.fits ? coefficients + plan.coefficients() : panels + block.index() * plan.panel(task);
    const int places = plan.columns / quad;
    const int my_tile = block.thread() / places, place = block.thread() % places;

    // Blocks take turns at the columns of all segments. The number only grows, so the segment is found by going on;
    // `loaded` is the segment whose coefficients are in shared memory.
    Index segment = 0, loaded = -1;
    for (Index n = block.index(); n < plan.column_blocks; n += block.count()) {
      while (segment + 1 < task.segments.count && spans[3 * (segment + 1) + 2] <= n) ++segment;
      const Span whole{spans[3 * segment], spans[3 * segment] + spans[3 * segment + 1]};
      const Index first = whole.start + (n - spans[3 * segment + 2]) * plan.columns;
      const int width = static_cast<int>((Span{first, first + plan.columns} & whole).length());
      read_panel(block, first, width, panel);
      // Complete before it is read; and, in place, read before any thread writes its outputs over the rows.
      block.sync();

      for (Index top = 0; top < task.outputs; top += plan.tiles * tile) {
        // Sums stay in registers over all slabs, so an output has its terms in the order of the rows, as on the CPU,
        // however many passes and slabs there are.
        double sum[tile][quad] = {};
        // False for threads that are left over in this pass: they load with the others, and come to every barrier.
        const bool mine = my_tile < plan.tiles && top + my_tile * tile < task.outputs;
        for (Index i = 0; i < task.inputs; i += plan.inputs) {
          const int count = static_cast<int>(task.inputs - i < plan.inputs ? task.inputs - i : plan.inputs);
          if (!(plan.once && loaded == segment)) {
            read_coefficients(block, segment, top, i, count, coefficients);
            loaded = segment;
            // Without this, a thread would multiply by coefficients of the slab before.
            block.sync();
          }
          if (mine) {
            add(coefficients + my_tile * tile * plan.inputs, panel + i * plan.columns + place, count, places, sum);
          }
          // All have used the slab before the next is written over it. With one slab, the barrier at the end of the
          // turn does.
          if (!plan.once) block.sync();
        }
        if (mine) write(sum, top + my_tile * tile, first + place, places, width - place);
      }
      // From the panel, so of the rows as they were, whatever has been written by now.
      if (task.mean != nullptr) {
        for (int p = block.thread(); p < width; p += block.threads()) {
          double sum = 0.0;
          for (Index i = 0; i < task.inputs; ++i) sum = fma(task.weights[i], panel[i * plan.columns + p], sum);
          task.mean[first + p] += sum;
        }
      }
      // All have used the panel before the next is read over it.
      block.sync();
    }
  }

  // `width` columns from `first` on, of all rows; those beyond are zero.
  template <class Block>
  GROKCURV_BLOCK void read_panel(Block& block, Index first, int width, double* to) const {
    const int column = block.thread() % plan.columns, apart = block.threads() / plan.columns;
    const T* from = static_cast<const T*>(task.rows) + first + column;
    for (Index i = block.thread() / plan.columns; i < task.inputs; i += apart) {
      to[i * plan.columns + column] = column < width ? widen(from[i * task.size]) : 0.0;
    }
  }

  // Tile by tile, and for each of `count` inputs the eight of the tile in a row; zeros for outputs that are not there.
  template <class Block>
  GROKCURV_BLOCK void read_coefficients(Block& block, Index segment, Index top, Index first, int count,
                                        double* to) const {
    const double* from = task.coefficients + segment * task.outputs * task.inputs + first;
    for (int item = block.thread(); item < plan.coefficients(); item += block.threads()) {
      const Index j = top + item / (tile * plan.inputs) * tile + item % tile;
      const int i = item / tile % plan.inputs;
      to[item] = j < task.outputs && i < count ? from[j * task.inputs + i] : 0.0;
    }
  }

  // sum[j][e] += c[i][j] x[i][e] for `count` inputs; the columns of a thread are `places` from each other.
  GROKCURV_BLOCK void add(const double* c, const double* x, int count, int places, double (&sum)[tile][quad]) const {
    GROKCURV_ROLLED
    for (int i = 0; i < count; ++i, c += tile, x += plan.columns) {
      double x_e[quad];
      GROKCURV_UNROLL
      for (int e = 0; e < quad; ++e) x_e[e] = x[e * places];
      GROKCURV_UNROLL
      for (int half = 0; half < tile; half += quad) {
        const Quad<double> c_j = load<true>(c + half, quad);
        GROKCURV_UNROLL
        for (int j = 0; j < quad; ++j) {
          GROKCURV_UNROLL
          for (int e = 0; e < quad; ++e) sum[half + j][e] = fma(c_j.value[j], x_e[e], sum[half + j][e]);
        }
      }
    }
  }

  // Neighbours write beside each other.
  GROKCURV_BLOCK void write(const double (&sum)[tile][quad], Index first_output, Index column, int places,
                            int left) const {
    GROKCURV_UNROLL
    for (int j = 0; j < tile; ++j) {
      Out* to = out + (first_output + j) * task.size + column;
      GROKCURV_UNROLL
      for (int e = 0; e < quad; ++e) {
        if (first_output + j < task.outputs && e * places < left) to[e * places] = narrow<Out>(sum[j][e]);
      }
    }
  }
};

template <class Device>
void rotate(Device& device, const Rotate& task) {
  RotatePlan plan{};
  // As many columns as fit; at 32 the panel moves to the workspace instead, and the blocks, no more than run at once,
  // use theirs again and again.
  plan.columns = 256;
  while (plan.columns > 32 && plan.panel(task) > RotatePlan::panel_limit) plan.columns /= 2;
  plan.fits = plan.panel(task) <= RotatePlan::panel_limit;
  const Index tiles = divided_up(task.outputs, RotatePlan::tile);
  const Index at_once = RotateColumns<float, float>::threads / (plan.columns / quad);
  plan.tiles = static_cast<int>(tiles < at_once ? tiles : at_once);
  const Index slab = RotatePlan::coefficients_limit / RotatePlan::tile / (plan.tiles > 0 ? plan.tiles : 1);
  plan.inputs = static_cast<int>(task.inputs < slab ? task.inputs : slab);
  plan.once = task.outputs <= plan.tiles * RotatePlan::tile && task.inputs <= plan.inputs;

  const auto blocks_in = [&](Index length) { return divided_up(length, plan.columns); };
  const Index* spans = upload_numbered(device, task.segments, blocks_in, plan.column_blocks);
  const Index blocks = plan.column_blocks < device.resident() ? plan.column_blocks : device.resident();
  double* panels = plan.fits ? nullptr : device.workspace.take(blocks * plan.panel(task));
  const Index shared = plan.coefficients() + (plan.fits ? plan.panel(task) : 0);
  with_type(task.type, [&]<class T>() {
    using C = Compute<T>;
    if (task.out == nullptr) {
      device.launch(blocks, shared, RotateColumns<T, T>{task, plan, spans, static_cast<T*>(task.rows), panels});
    } else {
      device.launch(blocks, shared, RotateColumns<T, C>{task, plan, spans, static_cast<C*>(task.out), panels});
    }
  });
}

}  // namespace grokcurv::block
