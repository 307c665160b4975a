#include "grokcurv/gram.h"

#include "cpu/chunks.h"
#include "cpu/threads.h"

namespace grokcurv::cpu::GROKCURV_ISA {

namespace {

constexpr Index steps = gram_block / lanes;

// Rows of a register tile: its tile x tile sums stay in registers, one part of the lanes after the other.
constexpr Index tile = Lanes::registers == 1 ? 4 : 3;

// Tiles that stay in the first cache while all others come by, one after the other.
constexpr Index beside = 3;

template <class T>
struct Rows {
  const T* values;
  Index count, size;

  Index tiles() const { return (count + tile - 1) / tile; }
};

// Into the second cache: a few rows at a large power of two from each other evict one another from the first. Rows are
// read in pieces too short for the processor to see what comes next.
template <class T>
GROKCURV_INLINE void prefetch(const T* x) {
  __builtin_prefetch(x, 0, 2);
}

// Whether products of coordinates are those of floats; the difference from an origin is none.
template <class T, bool shift>
constexpr bool exact = !shift && !std::is_same_v<T, double>;

// What all steps of a task share. `shift` says whether there is an origin.
template <class T, bool shift>
struct Source {
  const T* origin;

  // Eight coordinates of a row from p on, or the last n < 8 with zeros behind, as doubles about the origin.
  GROKCURV_INLINE Lanes load(const T* row, Index p, Index n) const {
    const Lanes x = Lanes::load(row + p, n);
    if constexpr (shift) return x - Lanes::load(origin + p, n);
    return x;
  }

  // The coordinates of `here`, `stride` doubles between one eight and the next; those of `next` are called for.
  GROKCURV_INLINE void pack(const T* row, const T* next, Span here, double* out, Index stride) const {
    Index p = here.start;
    for (; p + lanes <= here.stop; p += lanes, out += stride) {
      prefetch(next + p);
      load(row, p, lanes).store(out);
    }
    if (p < here.stop) load(row, p, here.stop - p).store(out);
  }
};

// ------------------------------------------------------------------------------------- many rows beside many: by tiles

// One block of all rows, tile by tile: eight coordinates of each row of the tile, then the next eight. Rows of zeros
// fill the last tile.
template <class T, bool shift>
void pack_tiles(const Source<T, shift>& source, const Rows<T>& rows, Span here, double* packed) {
  constexpr Index ahead = 2;
  for (Index i = 0; i < rows.tiles() * tile; ++i) {
    double* out = packed + (i / tile * steps * tile + i % tile) * lanes;
    if (i < rows.count) {
      const T* row = rows.values + i * rows.size;
      source.pack(row, i + ahead < rows.count ? row + ahead * rows.size : row, here, out, tile * lanes);
    } else {
      for (Index s = 0; s < steps; ++s) Lanes{}.store(out + s * tile * lanes);
    }
  }
}

// sums[i * stride + j] += x_i . y_j for the rows of two tiles over `count` steps of a block.
template <bool exact>
GROKCURV_INLINE void add_tile(const double* x, const double* y, Index count, double* sums, Index stride) {
  Lanes sum[tile][tile];
  for (int k = 0; k < Lanes::registers; ++k) {
    Register part[tile][tile] = {};
    const double *x_k = x + k * Lanes::width, *y_k = y + k * Lanes::width;
    for (Index s = 0; s < count; ++s, x_k += tile * lanes, y_k += tile * lanes) {
      Register y_j[tile];
#pragma GCC unroll 4
      for (Index j = 0; j < tile; ++j) std::memcpy(&y_j[j], y_k + j * lanes, sizeof(Register));
#pragma GCC unroll 4
      for (Index i = 0; i < tile; ++i) {
        Register x_i;
        std::memcpy(&x_i, x_k + i * lanes, sizeof x_i);
#pragma GCC unroll 4
        for (Index j = 0; j < tile; ++j) part[i][j] = multiply_add<exact>(x_i, y_j[j], part[i][j]);
      }
    }
#pragma GCC unroll 4
    for (Index i = 0; i < tile; ++i) {
#pragma GCC unroll 4
      for (Index j = 0; j < tile; ++j) sum[i][j].part[k] = part[i][j];
    }
  }
  for (Index i = 0; i < tile; ++i) {
    for (Index j = 0; j < tile; ++j) sums[i * stride + j] += sum[i][j].fold();
  }
}

template <class T, bool shift>
void add_range_by_tiles(const Source<T, shift>& source, const Rows<T>& x, const Rows<T>& y, bool symmetric, Span here,
                        double* room, double* sums, Index stride) {
  constexpr Index tile_size = tile * gram_block;
  double* packed_x = room;
  double* packed_y = symmetric ? room : room + x.tiles() * tile_size;
  for (Index i = 0; i < x.tiles() * tile * stride; ++i) sums[i] = 0.0;
  for (Index start = here.start; start < here.stop; start += gram_block) {
    const Span block = Span{start, start + gram_block} & here;
    pack_tiles(source, x, block, packed_x);
    if (!symmetric) pack_tiles(source, y, block, packed_y);
    const Index count = (block.length() + lanes - 1) / lanes;
    for (Index first = 0; first < x.tiles(); first += beside) {
      const Index last = first + beside < x.tiles() ? first + beside : x.tiles();
      for (Index j = symmetric ? first : 0; j < y.tiles(); ++j) {
        for (Index i = first; i < (symmetric && j < last ? j + 1 : last); ++i) {
          double* to = sums + i * tile * stride + j * tile;
          add_tile<exact<T, shift>>(packed_x + i * tile_size, packed_y + j * tile_size, count, to, stride);
        }
      }
    }
  }
}

// ----------------------------------------------------------------------------- few rows beside many: these stream past

// sums[i * few_stride + j * many_stride], for `kept` rows of which those beyond few.count are zeros.
template <Index kept, class T, bool shift>
void sum_range_of_kept(const Source<T, shift>& source, const Rows<T>& few, const Rows<T>& many, Span here, double* room,
                       double* sums, Index few_stride, Index many_stride) {
  constexpr Index together = 2;  // rows that stream; the last, if it is odd, beside itself
  double *x = room, *origin = room + kept * gram_slab;
  for (Index i = 0; i < kept * gram_slab; ++i) x[i] = 0.0;

  for (Index start = here.start; start < here.stop; start += gram_slab) {
    const Span slab = Span{start, start + gram_slab} & here;
    for (Index i = 0; i < few.count; ++i) {
      const T* row = few.values + i * few.size;
      source.pack(row, row, slab, x + i * gram_slab, lanes);
    }
    if constexpr (shift) Source<T, false>{}.pack(source.origin, source.origin, slab, origin, lanes);

    for (Index j = 0; j < many.count; j += together) {
      const Index second = j + 1 < many.count ? j + 1 : j;
      const Index after = j + together < many.count ? together * many.size : 0;
      const T* rows[together] = {many.values + j * many.size, many.values + second * many.size};
      const T* next[together] = {rows[0] + after, rows[second - j] + (j + 3 < many.count ? after : 0)};
      const auto load = [&](Index r, Index p, Index n) {
        const Lanes y = Lanes::load(rows[r] + p, n);
        if constexpr (shift) return y - Lanes::load(origin + (p - slab.start));
        return y;
      };

      double totals[kept][together];
      for (Index i = 0; i < kept; ++i) {
        totals[i][0] = start == here.start ? 0.0 : sums[i * few_stride + j * many_stride];
        totals[i][1] = start == here.start ? 0.0 : sums[i * few_stride + second * many_stride];
      }
      for (Index first = slab.start; first < slab.stop; first += gram_block) {
        const Span block = Span{first, first + gram_block} & slab;
        Lanes sum[kept][together] = {};
        const auto add = [&](Index p, Index n) {
          const Lanes y[together] = {load(0, p, n), load(1, p, n)};
#pragma GCC unroll 4
          for (Index i = 0; i < kept; ++i) {
            const Lanes x_i = Lanes::load(x + i * gram_slab + (p - slab.start));
            for (Index r = 0; r < together; ++r) sum[i][r] = multiply_add<exact<T, shift>>(x_i, y[r], sum[i][r]);
          }
        };
        Index p = block.start;
        for (; p + lanes <= block.stop; p += lanes) {
          for (Index r = 0; r < together; ++r) prefetch(next[r] + p);
          add(p, lanes);
        }
        if (p < block.stop) add(p, block.stop - p);
        for (Index i = 0; i < kept; ++i) {
          for (Index r = 0; r < together; ++r) totals[i][r] += sum[i][r].fold();
        }
      }
      for (Index i = 0; i < kept; ++i) {
        sums[i * few_stride + j * many_stride] = totals[i][0];
        sums[i * few_stride + second * many_stride] = totals[i][second - j];
      }
    }
  }
}

template <class T, bool shift>
void sum_range_of_few(const Source<T, shift>& source, const Rows<T>& few, const Rows<T>& many, Span here, double* room,
                      double* sums, Index few_stride, Index many_stride) {
  if (few.count == 1) return sum_range_of_kept<1>(source, few, many, here, room, sums, few_stride, many_stride);
  if (few.count == 2) return sum_range_of_kept<2>(source, few, many, here, room, sums, few_stride, many_stride);
  sum_range_of_kept<gram_few>(source, few, many, here, room, sums, few_stride, many_stride);
}

// ---------------------------------------------------------------------------------------------------------- the driver

template <class T, bool shift>
void run(const Gram& task, int threads) {
  const Source<T, shift> source{static_cast<const T*>(task.origin)};
  const bool symmetric = task.y == nullptr;
  const Rows<T> x{static_cast<const T*>(task.x), task.x_rows, task.size};
  const Rows<T> y = symmetric ? x : Rows<T>{static_cast<const T*>(task.y), task.y_rows, task.size};
  const Index stride = y.count + gram_few;
  for (Index i = 0; i < task.segments.count * x.count * y.count; ++i) task.out[i] = 0.0;
  if (x.count == 0 || y.count == 0) return;

#pragma omp parallel num_threads(threads)
  {
    double* room = task.workspace + thread_number() * gram_workspace_per_thread(x.count, y.count);
    double* sums = room + (x.count + y.count + 2 * gram_few) * gram_block + (gram_few + 1) * gram_slab;
    for (Index segment = 0; segment < task.segments.count; ++segment) {
      const Span all = task.segments[segment];
      double* out = task.out + segment * x.count * y.count;
#pragma omp for ordered schedule(dynamic) nowait
      for (Index start = all.start; start < all.stop; start += gram_range) {
        const Span here = Span{start, start + gram_range} & all;
        if (x.count <= gram_few) {
          sum_range_of_few(source, x, y, here, room, sums, stride, 1);
        } else if (y.count <= gram_few) {
          sum_range_of_few(source, y, x, here, room, sums, 1, stride);
        } else {
          add_range_by_tiles(source, x, y, symmetric, here, room, sums, stride);
        }
#pragma omp ordered
        for (Index i = 0; i < x.count; ++i) {
          for (Index j = symmetric ? i : 0; j < y.count; ++j) out[i * y.count + j] += sums[i * stride + j];
        }
      }
    }
  }

  for (Index segment = 0; symmetric && segment < task.segments.count; ++segment) {
    double* out = task.out + segment * x.count * x.count;
    for (Index i = 0; i < x.count; ++i) {
      for (Index j = 0; j < i; ++j) out[i * x.count + j] = out[j * x.count + i];
    }
  }
}

}  // namespace

void gram(const Gram& task, int threads) {
  with_type(task.type, [&]<class T>() {
    const auto kernel = task.origin == nullptr ? run<T, false> : run<T, true>;
    kernel(task, threads);
  });
}

}  // namespace grokcurv::cpu::GROKCURV_ISA
