#pragma once

#include "block/block.h"
#include "grokcurv/rotate.h"

namespace grokcurv::block {

// A block takes some columns at a time. Their rows come to shared memory part by part, eight rows each, with the
// coefficients for them, and each warp multiplies its columns by them on the tensor cores: sums of 64 outputs in the
// registers of a thread, to which the rows' terms are added in turn, as on the CPU. 16 outputs for each of `groups` are
// a pass; where there are more, the rows come again.
//
// While a part is multiplied, the next three are on their way: copies go past the registers, and past the end of a
// pass and of the columns, so that memory is never idle. Rows stay what they are in memory until they are multiplied:
// as doubles they would take twice the room, and nothing could be copied asynchronously.
//
// A thread reads a quad of columns, one for each of four tiles of the cores: of 32 columns, tile s has every fourth
// from s on. Which eight quads are a tile's columns in turn is chosen so that the outputs of a thread are quads again,
// and those of threads beside each other lie beside each other: see `quad_of`.
//
// This works in place: a block has all its columns of all rows in shared memory, or behind it, before it writes any of
// them, and no other block reads or writes these columns. Only if there are more passes, the first leaves the rows in a
// piece of the workspace, where the others find them. `plain` is true where that is not so, and no mean is asked for.
template <class T, class Out, int groups, bool plain>
struct RotateColumns {
  static constexpr int threads = 128, warps = threads / warp, resident = 2;
  static constexpr int tile = 16, outputs = groups * tile;  // of a pass
  static constexpr int places = threads / groups / (sizeof(T) == 8 ? 2 : 1), columns = places * quad;
  static constexpr int strips = columns / warps / 32;  // of 32 columns, of a warp
  static constexpr int rows = 8, parts = 4;            // of a part; in shared memory
  static constexpr int stride = columns + quad;        // of rows in shared memory: four of them meet all banks
  static_assert(strips > 0);

  static constexpr Index values_room = rows * stride * static_cast<Index>(sizeof(T)) / 8;  // in doubles
  static constexpr Index part_room = values_room + rows * outputs, shared = parts * part_room;
  static_assert(shared <= shared_limit && part_room % 2 == 0);

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
    T* panel = plain || panels == nullptr ? nullptr : panels + block.index() * panel_rows(task.inputs) * columns;

    Part part{block.index(), 0, 0, 0, 0, 0};
    find_columns(part);
    Part ahead = part;
    for (int n = 0; n < parts - 1; ++n) {
      fetch(block, ahead, panel, block.shared() + n * part_room);
      advance(block, ahead);
    }
    double sum[strips][groups][quad][4] = {}, mean[quad] = {};
    const int place = block.thread() * quad;  // of the mean
    const bool means = !plain && task.mean != nullptr && place < columns;
    for (int n = 0; part.block < column_blocks; n = (n + 1) % parts, advance(block, part)) {
      const double* coefficients = block.shared() + n * part_room + values_room;
      const T* values = reinterpret_cast<const T*>(block.shared() + n * part_room);
      block.template wait<parts - 2>();
      // What this thread has copied is there; now what the others have, too. And all have used the part before, so that
      // another can take its place. In place, it is also what keeps rows from being written over before they are read.
      block.sync();
      fetch(block, ahead, panel, block.shared() + (n + parts - 1) % parts * part_room);
      advance(block, ahead);

      add(block, coefficients, values, sum);
      if (!plain && part.top == 0) {
        if (panel != nullptr) save(block, values, panel + part.row * columns);
        if (means) add_mean(part, values + place, mean);
      }
      if (part.row + rows >= task.inputs) {
        write(block, part, sum);
        if (part.top == 0 && means) write_mean(part, place, mean);
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
      T* values = reinterpret_cast<T*>(to) + row * stride + place;
      const bool whole = again || (wide && place + quad <= part.width);
      GROKCURV_UNROLL
      for (int i = 0; i < rows; i += threads / places) {
        const bool there = part.row + row + i < task.inputs;
        if (whole && there) {
          block.copy(reinterpret_cast<Quad<T>*>(values + i * stride), reinterpret_cast<const Quad<T>*>(from));
        } else {
          GROKCURV_ROLLED
          for (int e = 0; e < quad; ++e) {
            if (there && place + e < part.width) {
              block.copy(values + i * stride + e, from + e);
            } else {
              values[i * stride + e] = T{};
            }
          }
        }
        from += threads / places * apart;
      }

      // As the tiles of the cores have them: for each group, half of the rows and thread two coefficients.
      const double* coefficients =
          task.coefficients + (part.segment * task.outputs + part.top) * task.inputs + part.row;
      GROKCURV_UNROLL
      for (int first = 0; first < rows * outputs; first += threads) {
        const int item = first + block.thread(), i = item % rows, j = item / rows;
        if (item >= rows * outputs) break;
        const int half = j / tile * 2 + i / 4, thread = j % 8 * 4 + i % 4;
        double* coefficient = to + values_room + (half * warp + thread) * 2 + j % tile / 8;
        if (part.top + j < task.outputs && part.row + i < task.inputs) {
          block.copy(coefficient, coefficients + j * task.inputs + i);
        } else {
          *coefficient = 0.0;
        }
      }
    }
    block.commit();
  }

  // Of the eight quads of a strip the one with the columns of the tiles' number n. A thread has outputs of numbers 2 t
  // and 2 t + 1: with this quads t and 4 + t, so that four threads write 64 bytes beside each other at once.
  static GROKCURV_BLOCK int quad_of(int n) { return n / 2 + n % 2 * 4; }

  static GROKCURV_BLOCK int strip_of(int own_warp, int strip) { return (own_warp * strips + strip) * 32; }

  // Adds the rows of a part, times their coefficients.
  template <class Block>
  GROKCURV_BLOCK void add(Block& block, const double* c, const T* x, double (&sum)[strips][groups][quad][4]) const {
    const int lane = block.thread() % warp, number = lane / 4, member = lane % 4;
    double a[groups][4];
    GROKCURV_UNROLL
    for (int i = 0; i < groups; ++i) {
      GROKCURV_UNROLL
      for (int h = 0; h < 2; ++h) {
        const Pair pair = *reinterpret_cast<const Pair*>(c + ((2 * i + h) * warp + lane) * 2);
        a[i][2 * h] = pair.value[0];
        a[i][2 * h + 1] = pair.value[1];
      }
    }
    GROKCURV_UNROLL
    for (int strip = 0; strip < strips; ++strip) {
      const int column = strip_of(block.thread() / warp, strip) + quad_of(number) * quad;
      double b[quad][2];
      GROKCURV_UNROLL
      for (int h = 0; h < 2; ++h) {
        const Quad<T> values = load<true>(x + (member + 4 * h) * stride + column, quad);
        GROKCURV_UNROLL
        for (int e = 0; e < quad; ++e) b[e][h] = widen(values.value[e]);
      }
      block.template warp_multiply<rows>(a, b, sum[strip], [](int, int) { return true; });
    }
  }

  struct alignas(16) Pair {
    double value[2];
  };

  // A thread leaves what it has copied, and will be the one to copy it again: in time, for where there is a second pass
  // in place there are more than 32 rows, and no more than three parts are on their way.
  template <class Block>
  GROKCURV_BLOCK void save(Block& block, const T* values, T* to) const {
    const int row = block.thread() / places, place = block.thread() % places * quad;
    GROKCURV_ROLLED
    for (int i = row; i < rows; i += threads / places) {
      store<true>(load<true>(values + i * stride + place, quad), to + i * columns + place, quad);
    }
  }

  GROKCURV_BLOCK void add_mean(const Part& part, const T* x, double (&mean)[quad]) const {
    GROKCURV_ROLLED
    for (int i = 0; i < rows && part.row + i < task.inputs; ++i) {
      const Quad<T> values = load<true>(x + i * stride, quad);
      const double weight = task.weights[part.row + i];
      GROKCURV_UNROLL
      for (int e = 0; e < quad; ++e) mean[e] = fma(weight, widen(values.value[e]), mean[e]);
    }
  }

  // Writes the sums of a pass and begins anew.
  template <class Block>
  GROKCURV_BLOCK void write(Block& block, const Part& part, double (&sum)[strips][groups][quad][4]) const {
    const int number = block.thread() % warp / 4, member = block.thread() % 4;
    GROKCURV_UNROLL
    for (int strip = 0; strip < strips; ++strip) {
      GROKCURV_UNROLL
      for (int n = 0; n < 2 * groups; ++n) {
        const Index output = part.top + 8 * n + number;
        GROKCURV_UNROLL
        for (int v = 0; v < 2; ++v) {
          Quad<Out> values;
          GROKCURV_UNROLL
          for (int e = 0; e < quad; ++e) {
            double& entry = sum[strip][n / 2][e][n % 2 * 2 + v];
            values.value[e] = narrow<Out>(entry);
            entry = 0.0;
          }
          const int column = strip_of(block.thread() / warp, strip) + quad_of(2 * member + v) * quad;
          Out* to = out + output * task.size + part.first + column;
          if (output >= task.outputs) continue;
          if (wide) {
            store<true>(values, to, part.width - column);
          } else {
            store<false>(values, to, part.width - column);
          }
        }
      }
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
