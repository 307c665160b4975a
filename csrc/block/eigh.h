#pragma once

#include "block/block.h"
#include "grokcurv/eigh.h"

// As on the CPU where few pairs are asked for, but here for any number of them: Householder reflections make the matrix
// tridiagonal, T; multisection finds the leading eigenvalues of T, inverse iteration their vectors, and reflections
// carry these back (Golub and Van Loan, Matrix Computations, 8.3 and 8.4). One block a matrix.
//
// QL would be one chain of some n^2 rotations, each with a root and a quotient that wait for those before. Here all
// values are sought at once, each by several threads, and the first solves for all vectors made at once, a thread each.
// What is left to do one by one is short: n reflections and, since vectors of close values must be made orthogonal, k
// projections, and both are the work of the whole block.

namespace grokcurv::block {

// Where the numbers of a matrix are: in shared memory, or in the workspace if they do not fit. The factors of T always
// are there: one thread writes them and reads them back. All indices are ints: a matrix of more entries than that would
// take days.
struct EighPlan {
  int n, count, stride;  // of the matrix; of the pairs; odd, so that a column's entries lie in different banks
  bool in_shared;        // true up to n = 75 for all pairs, 103 for eight
  Index rows, factors;   // in doubles

  GROKCURV_INLINE explicit EighPlan(const Eigh& task)
      : n(static_cast<int>(task.size)), count(static_cast<int>(task.leading)), stride(n | 1) {
    rows = static_cast<Index>(n + 2 + count + 6) * stride;
    factors = Index{3} * n * count;
    in_shared = rows <= shared_limit;
  }
  GROKCURV_INLINE Index shared() const { return in_shared ? rows : 0; }
  GROKCURV_INLINE Index workspace() const { return factors + rows - shared(); }
};

// `in_shared` is that of the plan, so that the compiler knows which memory it is. Whatever is a sum is summed by every
// warp on its own, in the same order, so that all threads have the same bits, and come to the same barriers, and none
// is needed to hand sums around.
template <bool in_shared>
struct EighMatrix {
  static constexpr bool any_threads = true;
  static constexpr int threads = 512, resident = 1;
  static constexpr double epsilon = 0x1p-53;
  static constexpr int max_points = 32;  // tried together for one eigenvalue
  static constexpr int max_trips = 16;   // more of them for one vector: projections, and solves after the first two
  // Squares below this have lost digits to underflow and count as zero: the largest entry is scaled to [1, 2).
  static constexpr double underflow = 0x1p-900;
  static constexpr double negligible = 0x1p-110;  // the square of an entry of T, which is moved by epsilon / 4 at most

  Eigh task;
  double* workspace;

  // The numbers of a matrix, as rows. Reflection j, I - u u^T with |u|^2 = 2 or u = 0, is row j + 1 of the reflections,
  // from entry j + 1 on, so that it takes the place of row j - 1 of the matrix; row 0 is zero.
  struct Numbers {
    int n, count, stride;
    double* factors;                              // (n, 3, count)
    double* reflections;                          // n + 2 rows
    double* matrix = reflections + 2 * stride;    // the last n of them
    double* vectors = matrix + n * stride;        // count rows
    double* diagonal = vectors + count * stride;  // of T
    double* off = diagonal + stride;              // what is right of it
    double* squares = off + stride;               // of what is left of it
    double* w = squares + stride;                 // of a reflection; later what remains of a vector
    double* products = w + stride;                // of matrix and reflection; later of a vector and those before
    double* values = products + stride;           // of T
    double norm = 0.0;                            // of T: the largest sum of magnitudes in a row (Gershgorin)
  };

  template <class Block>
  GROKCURV_BLOCK void operator()(Block& block) const {
    const EighPlan plan(task);
    const int n = plan.n, count = plan.count, stride = plan.stride;
    double* outside = workspace + block.index() * plan.workspace();
    double* room = in_shared ? block.shared() : outside + plan.factors;
    Numbers t{n, count, stride, outside, room};

    const double* from = task.a + block.index() * n * n;
    double* values_out = task.values + block.index() * count;
    double* vectors_out = task.vectors + block.index() * n * count;

    // Every warp has looked at all entries, so all threads take the same way here and come to the same barriers below.
    const double largest = largest_entry(block, from, n);
    bool solved = largest < INFINITY;
    if (solved) {
      // Scaled by a power of two, exactly, the largest comes to lie in [1, 2), so that no square overflows.
      const double scale = ldexp(1.0, largest > 0 ? ilogb(largest) : 0);
      for (int e = block.thread(); e < n * n; e += block.threads()) {
        const int i = e / n, j = e % n;
        t.matrix[i * stride + j] = (i < j ? from[e] : from[j * n + i]) / scale;
      }
      for (int p = block.thread(); p < n; p += block.threads()) room[p] = t.products[p] = 0.0;
      // Each thread has filled entries of every row, and the first step reads rows as a whole.
      block.sync();
      tridiagonalise(block, t);
      t.norm = norm(block, t);
      find_values(block, t);
      solved = find_vectors(block, t);
      if (solved) finish(block, t, scale, values_out, vectors_out);
    }
    if (!solved) {
      for (int i = block.thread(); i < count; i += block.threads()) values_out[i] = NAN;
      for (int i = block.thread(); i < n * count; i += block.threads()) vectors_out[i] = NAN;
    }
  }

  // The largest magnitude of the upper triangle; infinite if an entry is not finite. Each warp looks at everything.
  template <class Block>
  static GROKCURV_BLOCK double largest_entry(Block& block, const double* from, int n) {
    double largest = 0.0;
    for (int e = block.thread() % warp; e < n * n; e += warp) {
      if (e / n > e % n) continue;
      const double x = fabs(from[e]);
      largest = x < INFINITY ? fmax(largest, x) : INFINITY;
    }
    return block.warp_max(largest);
  }

  // The sum of x[p] y[p] from p = first on; by each warp, so that all threads have it without a barrier.
  template <class Block>
  static GROKCURV_BLOCK double dot(Block& block, const double* x, const double* y, int first, int n) {
    double sum = 0.0;
    for (int p = own(block, first); p < n; p += warp) sum = fma(x[p], y[p], sum);
    return block.warp_sum(sum);
  }

  // Of the entries that a thread of a warp takes, always the same, the first from `first` on. Entry p is thread p %
  // 32's wherever a sum begins. So where one warp alone has a vector, as in finish, each entry is read and written by
  // one thread, and the warp needs no barrier between a sum and a change.
  template <class Block>
  static GROKCURV_BLOCK int own(Block& block, int first) {
    const int p = first / warp * warp + block.thread() % warp;
    return p < first ? p + warp : p;
  }

  // x[p] = of(p) from p = first on, by one warp. A thread reads four times before it writes, so that not every load
  // waits for a store that, for all the compiler knows, is to the same place.
  template <class Block, class Of>
  static GROKCURV_BLOCK void change(Block& block, double* x, int first, int n, const Of& of) {
    constexpr int together = 4;
    for (int p = own(block, first); p < n; p += together * warp) {
      double y[together];
      GROKCURV_UNROLL
      for (int k = 0; k < together; ++k) y[k] = p + k * warp < n ? of(p + k * warp) : 0.0;
      GROKCURV_UNROLL
      for (int k = 0; k < together; ++k) {
        if (p + k * warp < n) x[p + k * warp] = y[k];
      }
    }
  }

  // Reduces the matrix, full and symmetric, to T. Step j changes it by the reflection before, a -= u w^T + w u^T, and
  // multiplies it with its own, so that it is read once and written once: row j first, from which the reflection comes.
  template <class Block>
  static GROKCURV_BLOCK void tridiagonalise(Block& block, const Numbers& t) {
    const int n = t.n;
    double* w = t.w;
    double half = 0.0;
    for (int j = 0; j < n; ++j) {
      const double *u = t.reflections + j * t.stride, *row = t.matrix + j * t.stride;
      double* next = t.reflections + (j + 1) * t.stride;
      const auto w_of = [&](int p) { return t.products[p] - half * u[p]; };
      const double u_j = u[j], w_j = w_of(j);
      const auto entry = [&](int p) { return row[p] - (u_j * w_of(p) + w_j * u[p]); };
      // The reflection that leaves of the row, right of the diagonal, its first entry alone. The sign is that of
      // `first`, so that nothing cancels; scaled, |u|^2 = 2. `reflects` is false if there is nothing to clear, as in
      // the last two steps.
      double rest = 0.0;
      for (int p = own(block, j + 2); p < n; p += warp) rest = fma(entry(p), entry(p), rest);
      rest = block.warp_sum(rest);
      const double first = j + 1 < n ? entry(j + 1) : 0.0;
      const bool reflects = rest >= underflow;
      const double norm = sqrt(first * first + rest);
      const double scale = reflects ? 1 / sqrt(norm * (norm + fabs(first))) : 0.0;
      for (int p = j + 1 + block.thread(); p < n; p += block.threads()) {
        next[p] = (p > j + 1 ? entry(p) : first > 0 ? first + norm : first - norm) * scale;
        w[p] = w_of(p);
      }
      if (block.thread() == 0) {
        const double off = !reflects ? first : first > 0 ? -norm : norm;
        t.diagonal[j] = entry(j);
        t.off[j] = off;
        if (j == 0) t.squares[0] = 0.0;
        if (j + 1 < n) t.squares[j + 1] = fmax(off * off, negligible);
      }
      // The reflection and w are complete before anyone multiplies by them; and everyone has read the products, which
      // may now be written over.
      block.sync();
      // Both triangles are changed, and to the same bits, for (i, p) and (p, i) add the same two products. So a row is
      // contiguous, and each goes to a warp.
      for (int i = j + 1 + block.thread() / warp; i < n; i += block.threads() / warp) {
        double* a = t.matrix + i * t.stride;
        const double u_i = u[i], w_i = w[i];
        double sum = 0.0;
        change(block, a, j + 1, n, [&](int p) {
          const double x = a[p] - (u_i * w[p] + w_i * u[p]);
          sum = fma(x, next[p], sum);
          return x;
        });
        sum = block.warp_sum(sum);
        if (block.thread() % warp == 0) t.products[i] = sum;
      }
      // The next step reads products and a row of other warps, and puts its reflection where this one has read.
      block.sync();
      half = 0.5 * dot(block, next, t.products, j + 1, n);
    }
  }

  template <class Block>
  static GROKCURV_BLOCK double norm(Block& block, const Numbers& t) {
    double bound = 0.0;
    for (int p = own(block, 0); p < t.n; p += warp) {
      bound = fmax(bound, fabs(t.diagonal[p]) + fabs(t.off[p]) + (p > 0 ? fabs(t.off[p - 1]) : 0.0));
    }
    return block.warp_max(bound);
  }

  // How many eigenvalues of T are less than x: as often as the leading minors of T - x change sign, zero being
  // positive. As quotients of each and the one before they would need no scaling, but the chain would be ten times as
  // long.
  static GROKCURV_BLOCK int below(const Numbers& t, double x) {
    int count = 0;
    double minor = 1.0, before = 0.0;
    for (int start = 0; start < t.n; start += 8) {
      for (int i = start; i < t.n && i < start + 8; ++i) {
        const double next = fma(t.diagonal[i] - x, minor, -(t.squares[i] * before));
        count += (next < 0) != (minor < 0) ? 1 : 0;
        before = minor;
        minor = next;
      }
      // In eight steps the larger one changes by less than 2^600 either way.
      const double size = fmax(fabs(minor), fabs(before));
      const double scale = size < 0x1p-300 ? 0x1p600 : size > 0x1p300 ? 0x1p-600 : 1.0;
      minor *= scale;
      before *= scale;
    }
    return count;
  }

  // The leading eigenvalues of T, descending, to within epsilon |T|: at once if there are threads enough, several for
  // each, whose points cut its interval. All intervals are cut alike, so that no value comes out above the one before.
  template <class Block>
  static GROKCURV_BLOCK void find_values(Block& block, const Numbers& t) {
    const int each = block.threads() / t.count, most = t.n < max_points ? t.n : max_points;
    const int points = each < 1 ? 1 : each < most ? each : most, together = block.threads() / points;
    for (int first = 0; first < t.count; first += together) {
      const int j = first + block.thread() / points, point = block.thread() % points;
      const bool there = block.thread() < together * points && j < t.count;
      double* counts = t.vectors + j * t.stride;  // the vector has yet to come
      double low = -t.norm, high = t.norm;
      for (double width = 1.0; width > epsilon / 2; width /= points + 1) {
        const auto place = [&, low, size = high - low](int k) { return low + size * ((k + 1.0) / (points + 1)); };
        if (there) counts[point] = below(t, place(point));
        // Threads of several warps may have counted for a value.
        block.sync();
        if (there) {
          // Number j from above is not less than a point if no more than this many are.
          int k = 0;
          for (int l = 0; l < points; ++l) k += counts[l] <= t.n - 1 - j ? 1 : 0;
          high = k < points ? place(k) : high;
          low = k > 0 ? place(k - 1) : low;
          t.values[j] = low + (high - low) / 2;
        }
        // All have read the counts, which may now be written over, and at last the values are there for all.
        block.sync();
      }
    }
  }

  // Solves (T - value j) x = scale b by elimination, rows exchanged for the larger pivot; x is vector j, b may be.
  static GROKCURV_BLOCK void solve(const Numbers& t, int j, const double* b, double scale) {
    // A pivot of zero means that the value is exact; a small one serves.
    const double least = t.norm > 0 ? epsilon * t.norm : 1.0, value = t.values[j];
    double* x = t.vectors + j * t.stride;
    // Of the row that is eliminated with: its first two entries, and its right-hand side.
    double pivot = t.diagonal[0] - value, right = t.off[0], side = scale * b[0];
    for (int i = 0; i < t.n; ++i) {
      const bool last = i + 1 == t.n;
      const double under = t.off[i];  // 0 in the last row
      const double next = last ? 0.0 : t.diagonal[i + 1] - value, next_right = last ? 0.0 : t.off[i + 1];
      const double next_side = last ? 0.0 : scale * b[i + 1];
      const bool exchange = fabs(under) > fabs(pivot);
      const double larger = exchange ? under : pivot;
      const double inverse = 1 / (fabs(larger) >= least ? larger : larger < 0 ? -least : least);
      const double factor = (exchange ? pivot : under) * inverse;
      const double second = exchange ? next : right, third = exchange ? next_right : 0.0;
      x[i] = exchange ? next_side : side;
      side = (exchange ? side : next_side) - factor * x[i];
      pivot = (exchange ? right : next) - factor * second;
      right = (exchange ? 0.0 : next_right) - factor * third;
      double* row = t.factors + 3 * i * t.count + j;
      row[0] = inverse;
      row[t.count] = second;
      row[2 * t.count] = third;
    }
    double after = 0.0, after_that = 0.0;
    for (int i = t.n - 1; i >= 0; --i) {
      const double* row = t.factors + 3 * i * t.count + j;
      const double x_i = ((x[i] - row[2 * t.count] * after_that) - row[t.count] * after) * row[0];
      after_that = after;
      x[i] = after = x_i;
    }
  }

  // |T x - value x|^2, by each warp
  template <class Block>
  static GROKCURV_BLOCK double residual(Block& block, const Numbers& t, double value, const double* x) {
    double sum = 0.0;
    for (int p = own(block, 0); p < t.n; p += warp) {
      double r = (t.diagonal[p] - value) * x[p];
      if (p > 0) r = fma(t.off[p - 1], x[p - 1], r);
      if (p + 1 < t.n) r = fma(t.off[p], x[p + 1], r);
      sum = fma(r, r, sum);
    }
    return block.warp_sum(sum);
  }

  // The eigenvectors of T that belong to the values. Returns whether every residual is down to rounding.
  template <class Block>
  static GROKCURV_BLOCK bool find_vectors(Block& block, const Numbers& t) {
    // Any start will do that no eigenvector is orthogonal to: numbers of a congruential generator.
    for (int j = block.thread(); j < t.count; j += block.threads()) {
      double* x = t.vectors + j * t.stride;
      std::uint64_t state = (j + 1) * std::uint64_t{0x9e3779b97f4a7c15};
      for (int i = 0; i < t.n; ++i) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        x[i] = static_cast<double>(state >> 11) * 0x1p-53 - 0.5;
      }
      solve(t, j, x, 1.0);
      solve(t, j, x, 1.0);
    }
    double *overlaps = t.products, *rest = t.w;
    // What is left of a vector when those before are taken out has their residuals too: up to sqrt(n) times as large.
    const double tolerance = (16 + t.n) * epsilon * t.norm;
    for (int j = 0, trips = 0;;) {
      // Vector j is complete: one thread has solved for it; of that before, each has written a part.
      block.sync();
      if (j == t.count) return true;
      double* x = t.vectors + j * t.stride;
      const double before = dot(block, x, x, 0, t.n);
      for (int i = block.thread() / warp; i < j; i += block.threads() / warp) {
        const double overlap = dot(block, t.vectors + i * t.stride, x, 0, t.n);
        if (block.thread() % warp == 0) overlaps[i] = overlap;
      }
      // All warps need all overlaps.
      block.sync();
      for (int p = block.thread(); p < t.n; p += block.threads()) {
        double sum = 0.0;
        for (int i = 0; i < j; ++i) sum = fma(overlaps[i], t.vectors[i * t.stride + p], sum);
        rest[p] = x[p] - sum;
      }
      // Each warp sums over what all threads have written.
      block.sync();
      // Where much was taken out, what is left has too much of rounding: once more ("twice is enough").
      const double after = dot(block, rest, rest, 0, t.n);
      const bool again = after < before / 2;
      const double scale = 1 / sqrt(after);
      const bool good = residual(block, t, t.values[j], rest) * scale * scale <= tolerance * tolerance;
      if (again || good) {
        for (int p = block.thread(); p < t.n; p += block.threads()) x[p] = scale * rest[p];
      } else if (block.thread() == 0) {
        solve(t, j, rest, scale);
      }
      if (!again && good) {
        ++j;
        trips = 0;
      } else if (++trips > max_trips) {
        return false;
      }
    }
  }

  // Carries the vectors back, a warp each, and writes them down, peaks positive. Reflections go in the order opposite
  // to that in which they came; the last two steps had none. No other warp reads or writes the vector.
  template <class Block>
  static GROKCURV_BLOCK void finish(Block& block, const Numbers& t, double scale, double* values, double* vectors) {
    const int n = t.n;
    for (int k = block.thread() / warp; k < t.count; k += block.threads() / warp) {
      double* vector = t.vectors + k * t.stride;
      for (int j = n - 3; j >= 0; --j) {
        const double* u = t.reflections + (j + 1) * t.stride;
        const double overlap = dot(block, vector, u, j + 1, n);
        change(block, vector, j + 1, n, [&](int p) { return vector[p] - overlap * u[p]; });
      }
      // The place of the peak, the first if there are several: threads can exchange doubles only, and sums and the
      // largest only, so the place goes as a number and negative, and its sign as a sum of one term.
      double peak = 0.0, top = -n, sign = 0.0;
      for (int p = own(block, 0); p < n; p += warp) peak = fmax(peak, fabs(vector[p]));
      peak = block.warp_max(peak);
      for (int p = own(block, 0); p < n; p += warp) top = fmax(top, fabs(vector[p]) == peak ? -p : top);
      top = block.warp_max(top);
      for (int p = own(block, 0); p < n; p += warp) sign += p == -top ? vector[p] : 0.0;
      sign = block.warp_sum(sign) < 0 ? -1.0 : 1.0;
      if (block.thread() % warp == 0) values[k] = scale * t.values[k];
      for (int p = own(block, 0); p < n; p += warp) vectors[p * t.count + k] = sign * vector[p];
    }
  }
};

template <class Device>
void eigh(Device& device, const Eigh& task) {
  if (task.leading == 0) return;
  const EighPlan plan(task);
  double* workspace = device.workspace.take(task.matrices * plan.workspace());
  with_flag(plan.in_shared, [&](auto in_shared) {
    device.launch(task.matrices, plan.shared(), EighMatrix<in_shared>{task, workspace});
  });
}

}  // namespace grokcurv::block
