#pragma once

// What block algorithms are written in. A block algorithm is a struct with a number of `threads`, a multiple of 32, and
// a call operator that every thread of a block runs; its members are its arguments. `resident` says for how many blocks
// the registers of a multiprocessor must do; `any_threads`, that fewer threads would do as well, down to two warps. The
// block that it gets offers
//
//   thread(), threads()   this thread's number, and of how many
//   index(), count()      the number of this block, and of how many
//   shared()              the block's shared memory, in doubles
//   sync()                a barrier: every thread of the block comes to it
//   warp_sum(x)           the sum over the 32 threads of a warp, each of which comes to it; all get the same bits
//   warp_max(x)           likewise the largest
//   warp_first(x)         the first thread of the warp, counted within it, whose x is true; 32 if there is none
//   warp_multiply(a, b, c, needed)   adds products of tiles, whose entries the threads of a warp share (below), to c
//   copy(to, from)        begins to copy a T from global to shared memory
//   commit(), wait<n>()   closes a group of copies; until all groups are there, but for the n that were closed last
//
// warp_sum, warp_max, warp_first and warp_multiply exchange registers and order no memory: what one thread writes and
// another reads has a sync() between. So has what one thread copies: its wait is for itself.
//
// warp_multiply is for the tensor cores: C += A B, a double at a time, for tiles i of 16 rows of A, j of 8 columns of
// B, and so C[i][j] where needed(i, j). With `depth` of 4 or 8 columns of A and rows of B, thread 4 g + t has
//
//   a[i][2 h + u]     row g + 8 u, column t + 4 h of tile i of A     (u below 2, h below depth / 4)
//   b[j][h]           row t + 4 h, column g of tile j of B
//   c[i][j][2 u + v]  row g + 8 u, column 2 t + v of tile (i, j)     (v below 2)
//
// as "Matrix Fragments for mma" of the PTX manual has it. To an entry of C its products are added one after the other,
// in the order of the columns of A, each with one rounding, as fma does: so do the cores (benches/tensor_cores.cu).
//
// csrc/cuda/device.cuh runs blocks on a GPU, csrc/emulator/device.h the same source on the CPU. Both do the arithmetic
// that is written down: products and sums are fused only where it says fma.

#include <cmath>
#include <vector>

#include "grokcurv/numbers.h"

#ifdef __CUDACC__
#define GROKCURV_BLOCK __device__ __forceinline__
#define GROKCURV_UNROLL _Pragma("unroll")    // so that an array lives in registers
#define GROKCURV_ROLLED _Pragma("unroll 1")  // so that they suffice
#else
#define GROKCURV_BLOCK inline
#define GROKCURV_UNROLL
#define GROKCURV_ROLLED
#endif

namespace grokcurv::block {

// The threads that exchange registers; a block is made of whole warps.
constexpr int warp = 32;

// Shared memory that every GPU since sm_80 gives a block, in doubles. It is 96 KiB: sm_86, sm_89 and sm_120 give 99 at
// most, others more. What goes beyond this belongs in the workspace.
constexpr Index shared_limit = 96 * 1024 / sizeof(double);

GROKCURV_INLINE constexpr Index divided_up(Index n, Index by) {
  return (n + by - 1) / by;
}

template <class Body>
constexpr bool any_threads = requires { requires Body::any_threads; };

// ------------------------------------------------------------------------------------------------ coordinates by fours

// Four coordinates in a row, the piece of a vector that a thread takes: of float32, one load of 16 bytes, the most that
// a thread loads at once; of bfloat16 one of 8 bytes, of float64 two of 16. Which coordinates a thread takes does not
// depend on the type, nor does the order of its sums.
constexpr Index quad = 4;

// The alignment is what lets the compiler load it as one: a pointer to T promises no more than that of T.
template <class T>
struct alignas(quad * sizeof(T) < 16 ? quad * sizeof(T) : 16) Quad {
  T value[quad];
};

// Of the coordinates at x, `left` are there; those beyond read as zero. `wide`: x is aligned to whole quads.
// The last quad of a range may be cut, so that it is read one by one even then. Zeros add zeros to every sum: a caller
// adds up whole quads and asks for `left` only where it writes. The numbers are the same either way, and so are the
// bits.
template <bool wide, class T>
GROKCURV_BLOCK Quad<T> load(const T* x, Index left) {
  if constexpr (wide) {
    if (left >= quad) return *reinterpret_cast<const Quad<T>*>(x);
  }
  Quad<T> result;
  GROKCURV_UNROLL
  for (Index e = 0; e < quad; ++e) result.value[e] = e < left ? x[e] : T{};
  return result;
}

// Writes those that are there and nothing behind them: that is the next vector, which another block may be writing.
template <bool wide, class T>
GROKCURV_BLOCK void store(const Quad<T>& values, T* x, Index left) {
  if constexpr (wide) {
    if (left >= quad) {
      *reinterpret_cast<Quad<T>*>(x) = values;
      return;
    }
  }
  GROKCURV_UNROLL
  for (Index e = 0; e < quad; ++e) {
    if (e < left) x[e] = values.value[e];
  }
}

// A thread may have several quads on their way at once, `apart` coordinates from each other, of which `left`
// coordinates are there. Where all are (`whole`), nothing is asked between one load and the next.
template <bool wide, bool whole, int n, class T>
GROKCURV_BLOCK void load(Quad<T> (&quads)[n], const T* x, int apart, int left) {
  constexpr bool at_once = wide && whole;
  GROKCURV_UNROLL
  for (int k = 0; k < n; ++k) quads[k] = load<at_once>(x + k * apart, whole ? quad : left - k * apart);
}

template <bool wide, bool whole, int n, class T>
GROKCURV_BLOCK void store(const Quad<T> (&quads)[n], T* x, int apart, int left) {
  constexpr bool at_once = wide && whole;
  GROKCURV_UNROLL
  for (int k = 0; k < n; ++k) store<at_once>(quads[k], x + k * apart, whole ? quad : left - k * apart);
}

// Whether vectors in a row, `size` coordinates from each other, are all aligned to whole quads: the first of them, and
// the distance unless there is but one. Memory that is not there (null) does no harm.
template <class T>
bool aligned(const void* x, Index vectors, Index size) {
  constexpr std::uintptr_t bytes = alignof(Quad<T>);
  const auto apart = static_cast<std::uintptr_t>(size) * sizeof(T);
  return reinterpret_cast<std::uintptr_t>(x) % bytes == 0 && (vectors <= 1 || apart % bytes == 0);
}

// Calls body(std::true_type) or body(std::false_type). So a flag becomes the argument of a template, and the loops of
// the kernel do not ask.
template <class Body>
void with_flag(bool flag, Body body) {
  flag ? body(std::true_type{}) : body(std::false_type{});
}

// ---------------------------------------------------------------------------------------------------------------- sums

// Sums run over ranges of the coordinates: a partial sum for each, folded in a fixed order. There are at most 1024, of
// whole steps (the last may be cut), and how long they are depends on the number of coordinates alone.
// So neither the GPU nor the batch has a say in the order of a sum. 1024 are enough to fill a GPU with one vector
// alone, and few enough for their partial sums to cost nothing beside the coordinates. Without coordinates there are
// none.
struct Ranges {
  Index size, length, count;

  GROKCURV_INLINE Span operator[](Index n) const { return Span{n * length, (n + 1) * length} & Span{0, size}; }
};

GROKCURV_INLINE constexpr Ranges ranges_of(Index size, Index step) {
  const Index length = divided_up(divided_up(size, step), 1024) * step;
  return {size, length, size == 0 ? 0 : divided_up(size, length)};
}

// out[j * stride] = the sum of sum[j] over all threads. Room for n doubles a warp.
// Threads are added up in a tree within each warp, and warps in their order by one thread for each sum; the bits depend
// on the number of threads, which is the algorithm's. The barrier protects `room`: without it, that one thread would
// read totals that other warps have not written yet. None follows, so `room` is not for anything that comes after.
template <int n, class Block>
GROKCURV_BLOCK void sum_over_block(Block& block, const double (&sum)[n], double* room, double* out, Index stride) {
  const int warps = block.threads() / warp;
  // Unrolled because sum[] lives in registers, which no number known only at run time can choose among.
  GROKCURV_UNROLL
  for (int j = 0; j < n; ++j) {
    const double total = block.warp_sum(sum[j]);
    if (block.thread() % warp == 0) room[j * warps + block.thread() / warp] = total;
  }
  block.sync();
  static_assert(n <= 2 * warp);
  if (const int j = block.thread(); j < n) {
    double total = 0.0;
    for (int w = 0; w < warps; ++w) total += room[j * warps + w];
    out[j * stride] = total;
  }
}

// The sum of partials[0], ... by one warp; every thread gets it.
// Each thread takes every 32nd, and a tree takes the threads: an order that `count` alone determines.
template <class Block>
GROKCURV_BLOCK double sum_over_warp(Block& block, const double* partials, Index count) {
  double sum = 0.0;
  for (Index i = block.thread() % warp; i < count; i += warp) sum += partials[i];
  return block.warp_sum(sum);
}

// For each vector and column the sum over the ranges of partials (vectors, columns, ranges), a warp each. The columns
// are those of up to three outputs, one beside the other.
//
// This is the second launch of a reduction: the end of the first is the one barrier between blocks that there is. Its
// order, that of sum_over_warp, is determined by the number of ranges, so by the number of coordinates.
struct Fold {
  static constexpr int threads = 256, resident = 4;

  struct Output {
    double* out;  // (vectors, columns)
    Index columns;
  };

  const double* partials;
  Index vectors, columns, ranges;
  Output outputs[3];

  template <class Block>
  GROKCURV_BLOCK void operator()(Block& block) const {
    // n is the same for the threads of a warp, so that a warp leaves as a whole: warp_sum waits for all 32.
    const Index n = (block.index() * block.threads() + block.thread()) / warp;
    if (n >= vectors * columns) return;
    const double sum = sum_over_warp(block, partials + n * ranges, ranges);
    if (block.thread() % warp != 0) return;
    // Counted from the first column of each output in turn, the column lies in the one output where it is neither
    // negative nor too large.
    const Index vector = n / columns;
    Index column = n % columns;
    for (const Output& output : outputs) {
      if (column >= 0 && column < output.columns) output.out[vector * output.columns + column] = sum;
      column -= output.columns;
    }
  }
};

template <class Device>
void fold(Device& device, const Fold& task) {
  device.launch(divided_up(task.vectors * task.columns, Fold::threads / warp), 0, task);
}

// --------------------------------------------------------------------------------------------- a basis, and segments

// What a row or a segment meets of a chunk is summed by the whole block, each thread over coordinates of its own, by
// quads: thread t takes quads t, t + threads, ... It reads back what it wrote itself, so that no barrier is needed
// between writing and reading. The numbers lie in planes, the first of each quad, the second, ..., so that threads
// beside each other meet no bank of shared memory twice.
constexpr int plane = chunk / quad;

// Writes the numbers of a quad to its place in the planes.
GROKCURV_BLOCK void keep(const Quad<double>& values, double* place) {
  GROKCURV_UNROLL
  for (int e = 0; e < quad; ++e) place[e * plane] = values.value[e];
}

// sum[v] = the sum of values[i] x_i, or without values of x_i^2, over this thread's coordinates from `begin` to `end`,
// which count from the start of the chunk, as i does; x[v] has the planes of vector v. Values begin anywhere, and are
// read one by one where they are not aligned to whole quads or where a quad is cut: the order of the sum is the same,
// and so are its bits.
template <class C, int vectors, class Block>
GROKCURV_BLOCK void sum_of_own(Block& block, const C* values, const double* const (&x)[vectors], int begin, int end,
                               double (&sum)[vectors]) {
  constexpr int ahead = 4;  // on their way at once: with 256 threads, all of a chunk
  const int apart = quad * block.threads();
  const bool wide = values != nullptr && reinterpret_cast<std::uintptr_t>(values) % alignof(Quad<C>) == 0;
  for (int from = 0; from < chunk; from += ahead * apart) {
    const int first = from + quad * block.thread(), place = from / quad + block.thread();
    if (wide && begin <= first && first + (ahead - 1) * apart + quad <= end) {
      Quad<C> q[ahead];
      load<true, true>(q, values + first, apart, end - first);
      GROKCURV_UNROLL
      for (int k = 0; k < ahead; ++k) {
        GROKCURV_UNROLL
        for (int e = 0; e < quad; ++e) {
          const double value = q[k].value[e];
          GROKCURV_UNROLL
          for (int v = 0; v < vectors; ++v) sum[v] = fma(x[v][place + k * block.threads() + e * plane], value, sum[v]);
        }
      }
    } else {
      // It is rare, and its registers should be few.
      GROKCURV_ROLLED
      for (int k = 0; k < ahead; ++k) {
        GROKCURV_UNROLL
        for (int e = 0; e < quad; ++e) {
          const int i = first + k * apart + e;
          if (i < begin || i >= end) continue;
          const double value = values == nullptr ? 0.0 : values[i];
          GROKCURV_UNROLL
          for (int v = 0; v < vectors; ++v) {
            const double x_i = x[v][place + k * block.threads() + e * plane];
            sum[v] = fma(x_i, values == nullptr ? x_i : value, sum[v]);
          }
        }
      }
    }
  }
}

// What coordinates are multiplied with and summed over: a row of a basis, whose value at i is values[i], or a segment,
// which has none.
template <class C>
struct Projection {
  Span span;
  const C* values;
};

// Where sums over a range go: that of entry j and vector v to first[j * of_entry + v * of_vector].
struct Totals {
  double* first;
  Index of_entry, of_vector;
};

// The sums over the coordinates of `here` of what projection_of(j) says, for every j below `count` and each of
// `present` vectors, whose numbers `keep` has put into x[0], x[1], ...; added to the totals, or written there if these
// are `fresh`. A vector that is not present has any numbers. Room for 32 doubles a warp and vector.
//
// Totals are fresh in the first chunk of a range: memory that nobody has written. Then even a row that does not meet
// the chunk must write its zero. The same thread comes back to the same total in every chunk, and reads what it wrote
// itself, so totals need no barrier.
template <int vectors, class Block, class ProjectionOf>
GROKCURV_BLOCK void project(Block& block, int present, int count, const ProjectionOf& projection_of, Span here,
                            const double* const (&x)[vectors], double* room, Totals totals, bool fresh) {
  const int lane = block.thread() % warp, own_warp = block.thread() / warp, warps = block.threads() / warp;
  // Every warp looks through the whole table, 32 entries at once, for those that meet the chunk: mostly few.
  for (int begin = 0; begin < count; begin += warp) {
    const bool exists = begin + lane < count;
    const bool meets = exists && (projection_of(begin + lane).span & here).length() > 0;
    bool waits = meets;
    int next = block.warp_first(waits);
    // What misses the chunk adds nothing. All warps agree on that, so that none waits alone.
    if (next == warp && !fresh) continue;
    for (; next < warp; next = block.warp_first(waits)) {
      waits = waits && lane != next;
      const auto [span, values] = projection_of(begin + next);
      const Span both = span & here;
      double sum[vectors] = {};
      sum_of_own(block, values == nullptr ? nullptr : values + here.start, x, static_cast<int>(both.start - here.start),
                 static_cast<int>(both.stop - here.start), sum);
      GROKCURV_UNROLL
      for (int v = 0; v < vectors; ++v) {
        const double of_warp = block.warp_sum(sum[v]);
        if (lane == 0) room[(next * vectors + v) * warps + own_warp] = of_warp;
      }
    }
    // Warp v adds up vector v, a thread an entry, in the order of the warps, when all have written.
    block.sync();
    if (own_warp < present && exists && (meets || fresh)) {
      double sum = 0.0;
      for (int w = 0; w < warps && meets; ++w) sum += room[(lane * vectors + own_warp) * warps + w];
      double* total = totals.first + (begin + lane) * totals.of_entry + own_warp * totals.of_vector;
      *total = fresh ? sum : *total + sum;
    }
    // Without this, a fast warp would write the next sums over those that are being added up.
    block.sync();
  }
}

// ------------------------------------------------------------------------------------------------------------- drivers

// The workspace of a task, dealt out piece by piece. Without memory behind it, it only counts. A driver is written once
// and run twice: first on a device that counts what it takes, then on one that has so much memory and launches. So the
// two cannot disagree about the size or the order of the pieces.
class Workspace {
 public:
  explicit Workspace(double* memory) : memory_(memory) {}

  // Each piece begins at 16 bytes, as widest loads and copies want it, if the workspace does.
  double* take(Index doubles) {
    double* piece = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += divided_up(doubles, 2) * 2;
    return piece;
  }
  Index used() const { return used_; }

 private:
  double* memory_;
  Index used_ = 0;
};

// Writes a piece of a table to the device. The numbers are arguments of the launch: no copy to wait for, and a captured
// graph holds them.
// Every launch takes 4096 bytes of arguments; 480 words, their count and their place fill 3856. The launch copies them,
// so the host's table may go at once; the stream sees to it that whoever reads the table is launched behind it.
struct Upload {
  static constexpr bool any_threads = true;
  static constexpr int threads = 256, resident = 4;
  static constexpr Index most = 480;

  Index words[most];
  Index count;
  Index* to;

  template <class Block>
  GROKCURV_BLOCK void operator()(Block& block) const {
    for (Index i = block.thread(); i < count; i += block.threads()) to[i] = words[i];
  }
};

// A copy of a table of the host's on the device, one launch for each piece, in the workspace of the task: an Index
// takes the place of a double.
template <class Device>
const Index* upload(Device& device, const Index* table, Index words) {
  static_assert(sizeof(Index) == sizeof(double));
  Index* to = reinterpret_cast<Index*>(device.workspace.take(words));
  for (Index done = 0; done < words; done += Upload::most) {
    Upload piece{};
    piece.count = words - done < Upload::most ? words - done : Upload::most;
    piece.to = to + done;
    std::memcpy(piece.words, table + done, static_cast<std::size_t>(piece.count) * sizeof(Index));
    device.launch(1, 0, piece);
  }
  return to;
}

// On the device, (segments.count, 3): start and length of each segment, and the number of the first of its pieces, of
// which pieces_of(length) make up a segment; how many there are in all goes to `pieces`.
template <class Device, class PiecesOf>
const Index* upload_numbered(Device& device, const Segments& segments, const PiecesOf& pieces_of, Index& pieces) {
  std::vector<Index> table;
  for (Index s = 0; s < segments.count; ++s) {
    const Span span = segments[s];
    table.insert(table.end(), {span.start, span.length(), pieces});
    pieces += pieces_of(span.length());
  }
  return upload(device, table.data(), static_cast<Index>(table.size()));
}

// Of a task's tables, so that the task that is passed to a kernel has addresses of the device alone.
template <class Device>
Basis upload(Device& device, const Basis& basis) {
  return {basis.values, upload(device, basis.rows, 3 * basis.count), basis.count};
}

template <class Device>
Segments upload(Device& device, const Segments& segments) {
  return {upload(device, segments.spans, 2 * segments.count), segments.count};
}

}  // namespace grokcurv::block

// Keeps the two promises of a kernel by the launches of its block algorithm, on the Device of the core. One that has
// no memory and no stream launches nothing: it counts the workspace.
#define GROKCURV_BY_LAUNCHES(Task, kernel, core)      \
  namespace core {                                    \
  Index kernel##_workspace(const Task& task, Where) { \
    Device device;                                    \
    block::kernel(device, task);                      \
    return device.workspace.used();                   \
  }                                                   \
  void kernel(const Task& task, Where where) {        \
    Device device(task.workspace, where);             \
    block::kernel(device, task);                      \
  }                                                   \
  }
