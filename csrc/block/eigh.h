#pragma once

#include "block/block.h"
#include "grokcurv/eigh.h"

// As on the CPU: Householder reflections make the matrix tridiagonal, implicit QL solves that, reflections carry the
// vectors back (Golub and Van Loan, Matrix Computations, 8.3). One block a matrix. The rotations of a QL sweep are a
// chain of scalars: one thread works out those of the next sweep while the others apply those of the last, each to
// columns of its own.

namespace grokcurv::block {

// One block has the whole matrix because every step waits for the last: n steps of Householder with three barriers
// each, then a barrier for each sweep. Between blocks a barrier would be a launch. Whatever is a sum is summed by every
// warp on its own, in the same order, so that all threads have the same bits and no barrier is needed to hand them
// around.

// Where the numbers of a matrix are: all in shared memory, or the two matrices, or everything, in the workspace.
struct EighPlan {
  Index stride;
  bool matrices_fit;  // true where all of it lies in the block's shared memory: up to n = 75
  bool vectors_fit;   // true where at least what else there is does, which every step reads; it comes first

  Index matrices, vectors;  // doubles for the matrix and its eigenvectors, and for what else there is

  GROKCURV_INLINE explicit EighPlan(Index n) : stride(n | 1) {  // odd: a column's entries lie in different banks
    matrices = 2 * n * stride;
    vectors = 9 * stride + 4;
    matrices_fit = matrices + vectors <= shared_limit;
    vectors_fit = vectors <= shared_limit;
  }
  GROKCURV_INLINE Index shared() const { return (matrices_fit ? matrices : 0) + (vectors_fit ? vectors : 0); }
  GROKCURV_INLINE Index workspace() const { return matrices + vectors - shared(); }
};

struct EighMatrix {
  static constexpr bool any_threads = true;
  static constexpr int threads = 256, resident = 2;
  static constexpr double epsilon = 0x1p-53;
  static constexpr int max_sweeps = 60;  // for one eigenvalue; two or three are usual
  // Squares below this have lost digits to underflow and count as zero: the largest entry is scaled to [1, 2).
  static constexpr double underflow = 0x1p-900;

  // Rotations of rows i and i + 1, for i = low + count - 1, ... low, by c[i] and s[i]. A count of 0 says that all is
  // solved, of -1 that an eigenvalue did not converge.
  struct Sweep {
    Index low, count;
  };

  Eigh task;
  double* workspace;

  template <class Block>
  GROKCURV_BLOCK void operator()(Block& block) const {
    const Index n = task.size, leading = task.leading;
    const EighPlan plan(n);
    const Index stride = plan.stride;
    double* outside = workspace + block.index() * plan.workspace();
    double* a = plan.matrices_fit ? block.shared() + plan.vectors : outside;
    double* z = a + n * stride;
    double* room = plan.vectors_fit ? block.shared() : outside + plan.matrices;
    double *diagonal = room, *off = room + stride, *u = room + 2 * stride, *product = room + 3 * stride;
    double *order = room + 4 * stride, *rotations = room + 5 * stride;

    const double* from = task.a + block.index() * n * n;
    double* values = task.values + block.index() * leading;
    double* vectors = task.vectors + block.index() * n * leading;

    // Every warp has looked at all entries, so all threads take the same way here and come to the same barriers below.
    const double largest = largest_entry(block, from);
    bool failed = !(largest < INFINITY);
    if (!failed) {
      // Scaled by a power of two, exactly, so that no square overflows.
      // From 2^-1000 down it stays there, a normal number, and the entries come out smaller than 1.
      const int exponent = largest > 0 ? ilogb(largest) : 0;
      const double scale = ldexp(1.0, exponent < -1000 ? -1000 : exponent);
      for (Index e = block.thread(); e < n * n; e += block.threads()) {
        const Index i = e / n, j = e % n;
        a[i * stride + j] = (i < j ? from[e] : from[j * n + i]) / scale;
        z[i * stride + j] = i == j ? 1.0 : 0.0;
      }
      // Each thread has filled entries of every row, and the first step reads rows as a whole.
      block.sync();
      tridiagonalise(block, a, stride, diagonal, off, u, product);
      failed = !solve(block, diagonal, off, z, stride, rotations);
      if (!failed) {
        rank(block, diagonal, order);
        finish(block, a, stride, diagonal, order, z, scale, values, vectors);
      }
    }
    if (failed) {
      for (Index i = block.thread(); i < leading; i += block.threads()) values[i] = NAN;
      for (Index i = block.thread(); i < n * leading; i += block.threads()) vectors[i] = NAN;
    }
  }

  // The largest magnitude of the upper triangle; infinite if an entry is not finite. Each warp looks at everything.
  template <class Block>
  GROKCURV_BLOCK double largest_entry(Block& block, const double* from) const {
    double largest = 0.0;
    for (Index e = block.thread() % warp; e < task.size * task.size; e += warp) {
      if (e / task.size > e % task.size) continue;
      const double x = fabs(from[e]);
      largest = x < INFINITY ? fmax(largest, x) : INFINITY;
    }
    return block.warp_max(largest);
  }

  // The sum of x[p] y[p] from p = first on; by each warp, so that all threads have it without a barrier.
  template <class Block>
  GROKCURV_BLOCK double dot(Block& block, const double* x, const double* y, Index first) const {
    double sum = 0.0;
    for (Index p = own(block, first); p < task.size; p += warp) sum = fma(x[p], y[p], sum);
    return block.warp_sum(sum);
  }

  // Of the entries that a thread of a warp takes, always the same, the first from `first` on. Entry p is thread p %
  // 32's wherever a sum begins. So where one warp alone has a vector, as in finish, each entry is read and written by
  // one thread, and the warp needs no barrier between a sum and a change.
  template <class Block>
  static GROKCURV_BLOCK Index own(Block& block, Index first) {
    const Index p = first / warp * warp + block.thread() % warp;
    return p < first ? p + warp : p;
  }

  // Reduces a, full and symmetric, to its diagonal and the entries right of it. Row j then holds, from j + 1 on, the u
  // of reflection j, I - u u^T with |u|^2 = 2 or u = 0. Thread 0 alone writes to the diagonal and beside it, and reads
  // them next.
  template <class Block>
  GROKCURV_BLOCK void tridiagonalise(Block& block, double* a, Index stride, double* diagonal, double* off, double* u,
                                     double* product) const {
    const Index n = task.size;
    for (Index j = 0; j < n; ++j) {
      double* row = a + j * stride;
      // The reflection that leaves of the row, right of the diagonal, its first entry alone. The sign is that of
      // `first`, so that nothing cancels; scaled, |u|^2 = 2. `reflects` is false if there is nothing to clear, as in
      // the last two steps: for all threads, since each warp has summed the same.
      const double rest = dot(block, row, row, j + 2);
      const double first = j + 1 < n ? row[j + 1] : 0.0;
      const bool reflects = rest >= underflow;
      const double norm = sqrt(first * first + rest);
      const double scale = reflects ? 1 / sqrt(norm * (norm + fabs(first))) : 0.0;
      for (Index p = j + 1 + block.thread(); p < n; p += block.threads()) {
        const double x = p > j + 1 ? row[p] : first > 0 ? first + norm : first - norm;
        u[p] = x * scale;
      }
      if (block.thread() == 0) {
        diagonal[j] = row[j];
        off[j] = !reflects ? first : first > 0 ? -norm : norm;
      }
      // u is complete before anyone multiplies by it; and everyone has read the row, which may now be written over.
      block.sync();
      if (!reflects) {
        for (Index p = j + 1 + block.thread(); p < n; p += block.threads()) row[p] = 0.0;
        continue;  // the next step reads other rows, and writes to u what all have
      }
      // The product with what is left of the matrix, which is full: a row of it is contiguous, and each goes to a warp.
      for (Index i = j + 1 + block.thread() / warp; i < n; i += block.threads() / warp) {
        const double sum = dot(block, a + i * stride, u, j + 1);
        if (block.thread() % warp == 0) product[i] = sum;
      }
      // Without this barrier a thread would update with products that other warps have yet to sum.
      block.sync();
      // Both triangles are updated, and to the same bits, for (i, p) and (p, i) add the same two products.
      // a -= u w^T + w u^T with w = product - half u
      const double half = 0.5 * dot(block, u, product, j + 1);
      const Index width = n - j - 1;
      for (Index e = block.thread(); e < width * width; e += block.threads()) {
        const Index i = j + 1 + e / width, p = j + 1 + e % width;
        const double w_i = product[i] - half * u[i], w_p = product[p] - half * u[p];
        a[i * stride + p] -= u[i] * w_p + w_i * u[p];
      }
      for (Index p = j + 1 + block.thread(); p < n; p += block.threads()) row[p] = u[p];
      // The next step reads a row that all threads have updated, and puts its own numbers into u and product.
      block.sync();
    }
  }

  // What is negligible beside the diagonal: a rounding of a bound on the norm (Gershgorin).
  GROKCURV_BLOCK double rounding(const double* diagonal, const double* off) const {
    double bound = 0.0;
    for (Index i = 0; i < task.size; ++i) {
      bound = fmax(bound, fabs(diagonal[i]) + fabs(off[i]) + (i > 0 ? fabs(off[i - 1]) : 0.0));
    }
    return epsilon / 4 * bound;
  }

  // Turns the diagonal into the eigenvalues, in no order, and z, the identity, into their eigenvectors, as rows.
  // Returns whether it converged. Room for 4 stride + 4 doubles.
  template <class Block>
  GROKCURV_BLOCK bool solve(Block& block, double* diagonal, double* off, double* z, Index stride, double* room) const {
    // Two buffers: `turn` is the number of that whose sweep is applied now, while thread 0 fills the other. The scalars
    // of a sweep, d and e, are thread 0's alone from here on; what the others see of it is the buffer.
    double* sizes = room + 4 * stride;  // of the sweep that is applied, and of the next: low and count
    const double negligible = block.thread() == 0 ? rounding(diagonal, off) : 0.0;
    const auto prepare = [&](int turn, Index& low, int& sweeps) {
      double* c = room + 2 * turn * stride;
      const Sweep sweep = next_sweep(diagonal, off, negligible, low, sweeps, c, c + stride);
      sizes[2 * turn] = static_cast<double>(sweep.low);
      sizes[2 * turn + 1] = static_cast<double>(sweep.count);
    };
    Index solved = 0;
    int sweeps = 0;
    if (block.thread() == 0) prepare(0, solved, sweeps);
    // The others wait for the first sweep.
    block.sync();
    for (int turn = 0;; turn = 1 - turn) {
      const Index low = static_cast<Index>(sizes[2 * turn]), count = static_cast<Index>(sizes[2 * turn + 1]);
      // All threads read the same numbers, so all leave together.
      if (count <= 0) return count == 0;
      if (block.thread() == 0) prepare(1 - turn, solved, sweeps);
      if (block.thread() >= warp) apply(block, low, count, room + 2 * turn * stride, z, stride);
      // Here the buffers change places. Without the barrier thread 0 would fill that which is still applied, and the
      // others would apply one that is half filled.
      block.sync();
    }
  }

  // By all warps but the first, each thread to columns of its own: the same ones in every sweep, so z needs no barrier.
  // Going up the rows, y is the row below before its last rotation, so each row is read once and written once. The
  // first warp stays out as a whole: its threads would wait for thread 0.
  template <class Block>
  GROKCURV_BLOCK void apply(Block& block, Index low, Index count, const double* c, double* z, Index stride) const {
    const double* s = c + stride;
    for (Index p = block.thread() - warp; p < task.size; p += block.threads() - warp) {
      double y = z[(low + count) * stride + p];
      for (Index i = low + count - 1; i >= low; --i) {
        const double x = z[i * stride + p];
        z[(i + 1) * stride + p] = s[i] * x + c[i] * y;
        y = c[i] * x - s[i] * y;
      }
      z[low * stride + p] = y;
    }
  }

  // The next sweep that has rotations, after `solved` eigenvalues and some sweeps for the next one.
  GROKCURV_BLOCK Sweep next_sweep(double* d, double* e, double negligible, Index& solved, int& sweeps, double* c_of,
                                  double* s_of) const {
    const Index n = task.size;
    while (solved < n) {
      const Index l = solved;
      Index m = l;
      while (m + 1 < n && fabs(e[m]) > negligible) ++m;
      // Nothing couples row l to the next: an eigenvalue.
      if (m == l) {
        ++solved;
        sweeps = 0;
        continue;
      }
      if (sweeps++ == max_sweeps) return {0, -1};
      // Wilkinson's shift; then a rotation per row chases the bulge from m to l.
      const double half = (d[l + 1] - d[l]) / (2 * e[l]);
      const double root = sqrt(half * half + 1);
      double g = d[m] - d[l] + e[l] / (half < 0 ? half - root : half + root);
      double s = 1, c = 1, moved = 0;
      Index i = m - 1;
      for (; i >= l; --i) {
        const double f = s * e[i], b = c * e[i];
        const double square = f * f + g * g;
        if (square < underflow) break;  // the matrix falls apart here
        const double r = sqrt(square);
        e[i + 1] = r;
        s = f / r;
        c = g / r;
        g = d[i + 1] - moved;
        const double change = (d[i] - g) * s + 2 * c * b;
        moved = s * change;
        d[i + 1] = g + moved;
        g = c * change - b;
        c_of[i] = c;
        s_of[i] = s;
      }
      d[i + 1] -= moved;  // i is l - 1 if the bulge came through
      e[i + 1] = i < l ? g : 0.0;
      e[m] = 0.0;
      // If the matrix fell apart at the first rotation there is none to apply, and the next sweep is worked out at
      // once.
      if (i + 1 < m) return {i + 1, m - i - 1};
    }
    return {0, 0};
  }

  // order[k] = the number of the k-th largest. Equal ones go by number, so each place is taken once; so every thread
  // ranks eigenvalues of its own, without sorting.
  template <class Block>
  GROKCURV_BLOCK void rank(Block& block, const double* diagonal, double* order) const {
    for (Index i = block.thread(); i < task.size; i += block.threads()) {
      Index above = 0;
      for (Index j = 0; j < task.size; ++j) {
        above += diagonal[j] > diagonal[i] || (diagonal[j] == diagonal[i] && j < i) ? 1 : 0;
      }
      order[above] = static_cast<double>(i);
    }
    // A warp of finish reads what threads of other warps have written.
    block.sync();
  }

  // Carries the leading vectors back, a warp each, and writes them down, peaks positive. Reflections go in the order
  // opposite to that in which they came; the last two steps had none. No other warp reads or writes the vector.
  template <class Block>
  GROKCURV_BLOCK void finish(Block& block, const double* a, Index stride, const double* diagonal, const double* order,
                             double* z, double scale, double* values, double* vectors) const {
    const Index n = task.size;
    for (Index k = block.thread() / warp; k < task.leading; k += block.threads() / warp) {
      const Index number = static_cast<Index>(order[k]);
      double* vector = z + number * stride;
      for (Index j = n - 3; j >= 0; --j) {
        const double* u = a + j * stride;
        const double overlap = dot(block, vector, u, j + 1);
        for (Index p = own(block, j + 1); p < n; p += warp) vector[p] -= overlap * u[p];
      }
      // The place of the peak, the first if there are several: threads can exchange doubles only, and sums and the
      // largest only, so the place goes as a number and negative, and its sign as a sum of one term.
      double peak = 0.0, top = -static_cast<double>(n), sign = 0.0;
      for (Index p = own(block, 0); p < n; p += warp) peak = fmax(peak, fabs(vector[p]));
      peak = block.warp_max(peak);
      for (Index p = own(block, 0); p < n; p += warp)
        top = fmax(top, fabs(vector[p]) == peak ? -static_cast<double>(p) : top);
      top = block.warp_max(top);
      for (Index p = own(block, 0); p < n; p += warp) sign += static_cast<double>(p) == -top ? vector[p] : 0.0;
      sign = block.warp_sum(sign) < 0 ? -1.0 : 1.0;
      if (block.thread() % warp == 0) values[k] = scale * diagonal[number];
      for (Index p = own(block, 0); p < n; p += warp) vectors[p * task.leading + k] = sign * vector[p];
    }
  }
};

template <class Device>
void eigh(Device& device, const Eigh& task) {
  if (task.leading == 0) return;
  const EighPlan plan(task.size);
  double* workspace = device.workspace.take(task.matrices * plan.workspace());
  device.launch(task.matrices, plan.shared(), EighMatrix{task, workspace});
}

}  // namespace grokcurv::block
