#include "grokcurv/gram.h"

#include "cpu/chunks.h"

namespace grokcurv::cpu::GROKCURV_ISA {

namespace {

// An entry is summed over blocks of `block` coordinates, counted from the start of its segment: eight lanes within a
// block, blocks in order. A task computes a tile of rows x rows, whose blocks, widened and shifted to the origin, fit
// the first cache.
constexpr Index block = 512;
constexpr Index tile = 4;

struct alignas(64) Rows {
  double row[tile][block];
};

template <class T>
struct Matrix {
  const T* values;
  Index rows, size;

  // Rows [first, first + tile) on the coordinates of `here`, shifted, zeros behind and below.
  void widen_block(Index first, Span here, const T* origin, Rows& out) const {
    for (Index i = 0; i < tile; ++i) {
      double* to = out.row[i];
      Index p = 0;
      if (first + i < rows) {
        const T* from = values + (first + i) * size + here.start;
        for (; p < here.length(); ++p)
          to[p] = widen(from[p]) - (origin == nullptr ? 0.0 : widen(origin[here.start + p]));
      }
      for (; p < block; ++p) to[p] = 0.0;
    }
  }
};

// sums[i][j] += x.row[i] . y.row[j] over one block; the rows are taken in pairs so that a register serves two products.
GROKCURV_INLINE void add_products(const Rows& x, const Rows& y, double (&sums)[tile][tile]) {
  for (Index i = 0; i < tile; i += 2) {
    for (Index j = 0; j < tile; j += 2) {
      Lanes s00{}, s01{}, s10{}, s11{};
      for (Index p = 0; p < block; p += lanes) {
        const Lanes x0 = Lanes::load(x.row[i] + p), x1 = Lanes::load(x.row[i + 1] + p);
        const Lanes y0 = Lanes::load(y.row[j] + p), y1 = Lanes::load(y.row[j + 1] + p);
        s00 += x0 * y0;
        s01 += x0 * y1;
        s10 += x1 * y0;
        s11 += x1 * y1;
      }
      sums[i][j] += s00.fold();
      sums[i][j + 1] += s01.fold();
      sums[i + 1][j] += s10.fold();
      sums[i + 1][j + 1] += s11.fold();
    }
  }
}

template <class T>
void run(const Gram& task, int threads) {
  const Matrix<T> x{static_cast<const T*>(task.x), task.x_rows, task.size};
  const bool symmetric = task.y == nullptr;
  const Matrix<T> y = symmetric ? x : Matrix<T>{static_cast<const T*>(task.y), task.y_rows, task.size};
  const T* origin = static_cast<const T*>(task.origin);
  const Index x_tiles = (x.rows + tile - 1) / tile, y_tiles = (y.rows + tile - 1) / tile;

#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (Index n = 0; n < task.segments.count * x_tiles * y_tiles; ++n) {
    const Index segment = n / (x_tiles * y_tiles);
    const Index first_x = n / y_tiles % x_tiles * tile, first_y = n % y_tiles * tile;
    if (symmetric && first_y < first_x) continue;
    const Index* span = task.segments.spans + 2 * segment;
    const Index stop = span[0] + span[1];

    double sums[tile][tile] = {};
    Rows x_block, y_block;
    for (Index start = span[0]; start < stop; start += block) {
      const Span here = Span{start, start + block} & Span{0, stop};
      x.widen_block(first_x, here, origin, x_block);
      y.widen_block(first_y, here, origin, y_block);
      add_products(x_block, y_block, sums);
    }

    double* out = task.out + segment * x.rows * y.rows;
    for (Index i = first_x; i < first_x + tile && i < x.rows; ++i) {
      for (Index j = first_y; j < first_y + tile && j < y.rows; ++j) {
        const double sum = sums[i - first_x][j - first_y];
        out[i * y.rows + j] = sum;
        if (symmetric) out[j * y.rows + i] = sum;
      }
    }
  }
}

}  // namespace

void gram(const Gram& task, int threads) {
  with_type(task.type, [&](auto* t) { run<std::remove_pointer_t<decltype(t)>>(task, threads); });
}

}  // namespace grokcurv::cpu::GROKCURV_ISA
