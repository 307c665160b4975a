#pragma once

#include "block/block.h"
#include "grokcurv/rotate.h"

namespace grokcurv::block {

// A block takes some columns at a time. Their rows come to shared memory part by part, a few rows each, with the
// coefficients for them, and each thread adds up sixteen outputs on a quad of columns: as doubles in registers, so that
// an output has its terms in the order of the rows, as on the CPU. 16 outputs for each of `groups` groups of threads
// are a pass; where there are more, the rows come again.
//
// While a part is multiplied, the next three are on their way: copies go past the registers, and past the end of a
// pass and of the columns, so that memory is never idle. Rows stay what they are in memory until they are multiplied:
// as doubles they would take twice the room, and nothing could be copied asynchronously. Each group has to widen them
// for itself, for 64 products a quad.
//
// This works in place: a block has all its columns of all rows in shared memory, or behind it, before it writes any of
// them, and no other block reads or writes these columns. Only if there are more passes, the first leaves the rows in a
// piece of the workspace, where the others find them. `plain` is true where that is not so, and no mean is asked for.
template <class T, class Out, int groups, bool plain>
struct RotateColumns {
  static constexpr int threads = 128, resident = 2;
  static constexpr int tile = 16, outputs = groups * tile;  // of a thread; of a pass
  static constexpr int places = threads / groups, columns = places * quad;
  static constexpr int rows = sizeof(T) == 8 ? 4 : 8, parts = 4;  // of a part; in shared memory

  static constexpr Index values_room = rows * columns * static_cast<Index>(sizeof(T)) / 8;  // in doubles
  static constexpr Index part_room = values_room + rows * outputs, shared = parts * part_room;
  static_assert(shared <= shared_limit);

  Rotate task;
  const Index* spans;   // (segments, 3): start, length, number of the first block of columns
  Index column_blocks;  // over all segments
  bool wide;            // all rows and outputs, and all segments, begin at whole quads
  Out* out;
  T* panels;  // (blocks, panel_rows(inputs), columns) or null

  static GROKCURV_INLINE constexpr Index panel_rows(Index inputs) { return divided_up(inputs, rows) * rows; }

  // Where a part stands: of which columns, of which pass, from which row on.
  struct Part {
    Index block, segment, first, top, row;
    int width;
  };

  template <class Block>
  GROKCURV_BLOCK void operator()(Block& block) const {
    const int group = block.thread() / places, place = block.thread() % places * quad;
    T* panel = plain || panels == nullptr ? nullptr : panels + block.index() * panel_rows(task.inputs) * columns;

    Part part{block.index(), 0, 0, 0, 0, 0};
    find_columns(part);
    Part ahead = part;
    for (int n = 0; n < parts - 1; ++n) {
      fetch(block, ahead, panel, block.shared() + n * part_room);
      advance(block, ahead);
    }
    double sum[tile][quad] = {}, mean[quad] = {};
    for (int n = 0; part.block < column_blocks; n = (n + 1) % parts, advance(block, part)) {
      const double* coefficients = block.shared() + n * part_room + values_room;
      const T* values = reinterpret_cast<const T*>(block.shared() + n * part_room);
      block.template wait<parts - 2>();
      // What this thread has copied is there; now what the others have, too. And all have used the part before, so that
      // another can take its place. In place, it is also what keeps rows from being written over before they are read.
      block.sync();
      fetch(block, ahead, panel, block.shared() + (n + parts - 1) % parts * part_room);
      advance(block, ahead);

      add(coefficients + group * rows * tile, values + place, sum);
      if (!plain && part.top == 0) {
        if (panel != nullptr) save(block, values, panel + part.row * columns);
        if (task.mean != nullptr && group == 0) add_mean(part, values + place, mean);
      }
      if (part.row + rows >= task.inputs) {
        write(part, part.top + group * tile, place, sum);
        if (!plain && part.top == 0 && task.mean != nullptr && group == 0) write_mean(part, place, mean);
      }
    }
  }

  // The rows in turn, then the passes, then the columns that are this block's.
  template <class Block>
  GROKCURV_BLOCK void advance(Block& block, Part& part) const {
    part.row += rows;
    if (part.row < task.inputs) return;
    part.row = 0;
    part.top += outputs;
    if (part.top < task.outputs) return;
    part.top = 0;
    part.block += block.count();
    find_columns(part);
  }

  // The number of a block of columns only grows, so the segment is found by going on.
  GROKCURV_BLOCK void find_columns(Part& part) const {
    if (part.block >= column_blocks) return;
    while (part.segment + 1 < task.segments.count && spans[3 * (part.segment + 1) + 2] <= part.block) ++part.segment;
    const Index* span = spans + 3 * part.segment;
    const Index before = (part.block - span[2]) * columns, left = span[1] - before;
    part.first = span[0] + before;
    part.width = static_cast<int>(left < columns ? left : columns);
  }

  // Starts to copy a part. Rows, columns and outputs that are not there are zeros. The group is closed even if there
  // is no part, so that a wait can count on one for each.
  template <class Block>
  GROKCURV_BLOCK void fetch(Block& block, const Part& part, const T* panel, double* to) const {
    if (part.block < column_blocks) {
      const bool again = !plain && panel != nullptr && part.top > 0;
      const Index apart = again ? columns : task.size;
      const int row = block.thread() / places, place = block.thread() % places * quad;
      const T* from = again ? panel : static_cast<const T*>(task.rows) + part.first;
      from += (part.row + row) * apart + place;
      T* values = reinterpret_cast<T*>(to) + row * columns + place;
      const bool whole = again || (wide && place + quad <= part.width);
      GROKCURV_UNROLL
      for (int i = 0; i < rows; i += groups) {
        const bool there = part.row + row + i < task.inputs;
        if (whole && there) {
          block.copy(reinterpret_cast<Quad<T>*>(values + i * columns), reinterpret_cast<const Quad<T>*>(from));
        } else {
          GROKCURV_ROLLED
          for (int e = 0; e < quad; ++e) {
            if (there && place + e < part.width) {
              block.copy(values + i * columns + e, from + e);
            } else {
              values[i * columns + e] = T{};
            }
          }
        }
        from += groups * apart;
      }

      // By groups, and for each row the sixteen of the group beside each other.
      const double* coefficients =
          task.coefficients + (part.segment * task.outputs + part.top) * task.inputs + part.row;
      GROKCURV_UNROLL
      for (int first = 0; first < rows * outputs; first += threads) {
        const int item = first + block.thread(), i = item % rows, j = item / rows;
        if (item >= rows * outputs) break;
        double* coefficient = to + values_room + (j / tile * rows + i) * tile + j % tile;
        if (part.top + j < task.outputs && part.row + i < task.inputs) {
          block.copy(coefficient, coefficients + j * task.inputs + i);
        } else {
          *coefficient = 0.0;
        }
      }
    }
    block.commit();
  }

  // sum[j][e] += c[i][j] x[i][e] for the rows of a part.
  static GROKCURV_BLOCK void add(const double* c, const T* x, double (&sum)[tile][quad]) {
    GROKCURV_UNROLL
    for (int i = 0; i < rows; ++i) {
      const Quad<T> values = load<true>(x + i * columns, quad);
      double x_e[quad];
      GROKCURV_UNROLL
      for (int e = 0; e < quad; ++e) x_e[e] = widen(values.value[e]);
      GROKCURV_UNROLL
      for (int first = 0; first < tile; first += quad) {
        const Quad<double> c_j = load<true>(c + i * tile + first, quad);
        GROKCURV_UNROLL
        for (int j = 0; j < quad; ++j) {
          GROKCURV_UNROLL
          for (int e = 0; e < quad; ++e) sum[first + j][e] = fma(c_j.value[j], x_e[e], sum[first + j][e]);
        }
      }
    }
  }

  // A thread leaves what it has copied, and will be the one to copy it again: in time, for where there is a second pass
  // in place there are more than 32 rows, and no more than three parts are on their way.
  template <class Block>
  GROKCURV_BLOCK void save(Block& block, const T* values, T* to) const {
    const int at = block.thread() / places * columns + block.thread() % places * quad;
    GROKCURV_ROLLED
    for (int i = 0; i < rows; i += groups) {
      store<true>(load<true>(values + at + i * columns, quad), to + at + i * columns, quad);
    }
  }

  GROKCURV_BLOCK void add_mean(const Part& part, const T* x, double (&mean)[quad]) const {
    GROKCURV_ROLLED
    for (int i = 0; i < rows && part.row + i < task.inputs; ++i) {
      const Quad<T> values = load<true>(x + i * columns, quad);
      const double weight = task.weights[part.row + i];
      GROKCURV_UNROLL
      for (int e = 0; e < quad; ++e) mean[e] = fma(weight, widen(values.value[e]), mean[e]);
    }
  }

  // Writes the sums of a pass and begins anew.
  GROKCURV_BLOCK void write(const Part& part, Index first_output, int place, double (&sum)[tile][quad]) const {
    Out* to = out + first_output * task.size + part.first + place;
    GROKCURV_UNROLL
    for (int j = 0; j < tile; ++j) {
      Quad<Out> values;
      GROKCURV_UNROLL
      for (int e = 0; e < quad; ++e) {
        values.value[e] = narrow<Out>(sum[j][e]);
        sum[j][e] = 0.0;
      }
      if (first_output + j < task.outputs) {
        if (wide) {
          store<true>(values, to, part.width - place);
        } else {
          store<false>(values, to, part.width - place);
        }
      }
      to += task.size;
    }
  }

  GROKCURV_BLOCK void write_mean(const Part& part, int place, double (&mean)[quad]) const {
    GROKCURV_UNROLL
    for (int e = 0; e < quad; ++e) {
      if (place + e < part.width) task.mean[part.first + place + e] += mean[e];
      mean[e] = 0.0;
    }
  }
};

template <int groups, class T, class Out, class Device>
void rotate_columns(Device& device, const Rotate& task, Out* out) {
  using Plain = RotateColumns<T, Out, groups, true>;
  bool wide = aligned<T>(task.rows, task.inputs, task.size) && aligned<Out>(out, task.outputs, task.size);
  for (Index s = 0; s < task.segments.count; ++s) wide = wide && task.segments[s].start % quad == 0;
  Index column_blocks = 0;
  const auto blocks_in = [](Index length) { return divided_up(length, Plain::columns); };
  const Index* spans = upload_numbered(device, task.segments, blocks_in, column_blocks);
  const Index blocks = column_blocks < device.resident() ? column_blocks : device.resident();
  const auto launch = [&](auto plain, T* panels) {
    using Body = RotateColumns<T, Out, groups, decltype(plain)::value>;
    device.launch(blocks, Body::shared, Body{task, spans, column_blocks, wide, out, panels});
  };
  if (task.out != nullptr) return launch(std::true_type{}, nullptr);
  if constexpr (std::is_same_v<T, Out>) {
    // In place, a second pass would find outputs of the first where the rows were.
    T* panels = nullptr;
    if (task.outputs > Plain::outputs) {
      const Index saved = blocks * Plain::panel_rows(task.inputs) * Plain::columns;
      panels = reinterpret_cast<T*>(device.workspace.take(divided_up(saved * static_cast<Index>(sizeof(T)), 8)));
    }
    with_flag(panels == nullptr && task.mean == nullptr, [&](auto plain) { launch(plain, panels); });
  }
}

template <class Device>
void rotate(Device& device, const Rotate& task) {
  with_type(task.type, [&]<class T>() {
    const auto by_outputs = [&]<class Out>(Out* out) {
      if (task.outputs <= RotateColumns<T, Out, 1, true>::outputs) {
        rotate_columns<1, T>(device, task, out);
      } else {
        rotate_columns<2, T>(device, task, out);
      }
    };
    if (task.out == nullptr) {
      by_outputs(static_cast<T*>(task.rows));
    } else {
      by_outputs(static_cast<Compute<T>*>(task.out));
    }
  });
}

}  // namespace grokcurv::block
