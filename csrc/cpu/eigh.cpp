#include "grokcurv/eigh.h"

#include "cpu/chunks.h"

namespace grokcurv::cpu::GROKCURV_ISA {

namespace {

constexpr double epsilon = 0x1p-53;
constexpr double tolerance = 1e-12;  // of |a v - w v| / |a| in subspace iteration
constexpr int max_sweeps = 60;
constexpr int max_iterations = 100;

GROKCURV_INLINE double magnitude(double x) {
  return x < 0 ? -x : x;
}

void swap_rows(double* x, double* y, Index n) {
  for (Index i = 0; i < n; ++i) {
    const double kept = x[i];
    x[i] = y[i];
    y[i] = kept;
  }
}

// (x, y) <- (c x - s y, s x + c y), row by row.
void rotate_rows(double* __restrict x, double* __restrict y, Index n, double c, double s) {
  for (Index i = 0; i < n; ++i) {
    const double kept = x[i];
    x[i] = c * kept - s * y[i];
    y[i] = s * kept + c * y[i];
  }
}

// Diagonalises the symmetric n x n matrix a by cyclic Jacobi rotations: its eigenvalues go to a[0], ..., a[n - 1],
// descending, its eigenvectors to the rows of v. Returns whether the rotations came to rest.
bool jacobi(double* a, double* v, Index n) {
  for (Index i = 0; i < n * n; ++i) v[i] = i % (n + 1) == 0 ? 1.0 : 0.0;
  const double negligible = epsilon * __builtin_sqrt(dot(a, a, n * n)) / static_cast<double>(n);
  bool rotated = true;
  for (int sweep = 0; rotated && sweep < max_sweeps; ++sweep) {
    rotated = false;
    for (Index p = 0; p < n; ++p) {
      for (Index q = p + 1; q < n; ++q) {
        const double off = a[p * n + q];
        if (!(magnitude(off) > negligible)) continue;
        rotated = true;
        const double theta = (a[q * n + q] - a[p * n + p]) / (2 * off);
        const double t = (theta < 0 ? -1 : 1) / (magnitude(theta) + __builtin_sqrt(theta * theta + 1));
        const double c = 1 / __builtin_sqrt(t * t + 1), s = t * c;
        const double a_pp = a[p * n + p] - t * off, a_qq = a[q * n + q] + t * off;
        rotate_rows(a + p * n, a + q * n, n, c, s);
        a[p * n + p] = a_pp;
        a[q * n + q] = a_qq;
        a[p * n + q] = a[q * n + p] = 0;
        for (Index i = 0; i < n; ++i) {
          a[i * n + p] = a[p * n + i];
          a[i * n + q] = a[q * n + i];
        }
        rotate_rows(v + p * n, v + q * n, n, c, s);
      }
    }
  }

  for (Index i = 0; i < n; ++i) a[i] = a[i * n + i];
  for (Index i = 0; i < n; ++i) {
    Index largest = i;
    for (Index j = i + 1; j < n; ++j) largest = a[j] > a[largest] ? j : largest;
    swap_rows(a + i, a + largest, 1);
    if (largest != i) swap_rows(v + i * n, v + largest * n, n);
  }
  return !rotated;
}

// out (m, n) = x (m, k) y (k, n)
void multiply(const double* x, const double* y, double* __restrict out, Index m, Index k, Index n) {
  for (Index i = 0; i < m; ++i) {
    for (Index p = 0; p < n; ++p) out[i * n + p] = 0.0;
    for (Index j = 0; j < k; ++j) {
      for (Index p = 0; p < n; ++p) out[i * n + p] += x[i * k + j] * y[j * n + p];
    }
  }
}

// Makes the m rows of q orthonormal by Gram-Schmidt, each projected twice ("twice is enough").
void orthonormalise(double* q, Index m, Index n) {
  for (Index i = 0; i < m; ++i) {
    double* row = q + i * n;
    for (int pass = 0; pass < 2; ++pass) {
      for (Index j = 0; j < i; ++j) {
        const double* other = q + j * n;
        const double overlap = dot(row, other, n);
        for (Index p = 0; p < n; ++p) row[p] -= overlap * other[p];
      }
      const double norm = __builtin_sqrt(dot(row, row, n));
      for (Index p = 0; p < n; ++p) row[p] /= norm;
    }
  }
}

struct Pairs {
  const double* values;
  const double* vectors;  // rows; null if there is no result
};

// The leading pairs by subspace iteration with Rayleigh-Ritz on m rows; `room` holds 3 m n + 2 m m doubles. No result
// where it converges slowly, or finds a negative eigenvalue, which need not lead.
Pairs iterate(const double* a, Index m, Index n, Index leading, double* room) {
  double *q = room, *aq = q + m * n, *spare = aq + m * n;
  double *ritz = spare + m * n, *turn = ritz + m * m;

  // Any start will do that no eigenvector is orthogonal to: numbers of a congruential generator.
  std::uint64_t state = 1;
  for (Index i = 0; i < m * n; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    q[i] = static_cast<double>(state >> 11) * 0x1p-53 - 0.5;
  }
  orthonormalise(q, m, n);

  for (int iteration = 0; iteration < max_iterations; ++iteration) {
    multiply(q, a, aq, m, n, n);
    for (Index i = 0; i < m; ++i) {
      for (Index j = i; j < m; ++j) ritz[i * m + j] = ritz[j * m + i] = dot(q + i * n, aq + j * n, n);
    }
    if (!jacobi(ritz, turn, m)) break;
    multiply(turn, q, spare, m, m, n);
    multiply(turn, aq, q, m, m, n);
    double* free = aq;
    aq = q;     // a times the Ritz vectors
    q = spare;  // the Ritz vectors
    spare = free;

    const double high = magnitude(ritz[0]), low = magnitude(ritz[m - 1]);
    const double norm = high > low ? high : low;
    bool converged = true;
    for (Index j = 0; j < leading && converged; ++j) {
      for (Index p = 0; p < n; ++p) spare[p] = aq[j * n + p] - ritz[j] * q[j * n + p];
      converged = __builtin_sqrt(dot(spare, spare, n)) <= tolerance * norm;
    }
    if (converged) {
      // What is outside the block is no larger in magnitude than what is in it, so a pair leads if it is not negative.
      if (ritz[leading - 1] < -tolerance * norm) break;
      return {ritz, q};
    }
    // Steps with a + 1e-13 |a|, so that a rank below m leaves no row without a direction.
    for (Index i = 0; i < m * n; ++i) aq[i] += 1e-13 * norm * q[i];
    orthonormalise(aq, m, n);
    double* next = aq;
    aq = q;
    q = next;
  }
  return {nullptr, nullptr};
}

void solve(const Eigh& task, Index matrix) {
  const Index n = task.size, leading = task.leading;
  const double* from = task.a + matrix * n * n;
  double* values = task.values + matrix * leading;
  double* vectors = task.vectors + matrix * n * leading;
  double* a = task.workspace + matrix * eigh_workspace(n);
  double* room = a + n * n;

  double largest = 0;
  bool finite = true;
  for (Index i = 0; i < n; ++i) {
    for (Index j = i; j < n; ++j) {
      const double x = magnitude(from[i * n + j]);
      finite = finite && x < __builtin_inf();
      largest = x > largest ? x : largest;
    }
  }
  for (Index i = 0; i < leading; ++i) values[i] = __builtin_nan("");
  for (Index i = 0; i < n * leading; ++i) vectors[i] = __builtin_nan("");
  if (!finite || leading == 0) return;

  // Scaled by a power of two, exactly, so that no square overflows.
  int exponent = largest > 0 ? __builtin_ilogb(largest) : 0;
  exponent = exponent < -1000 ? -1000 : exponent;
  const double scale = __builtin_ldexp(1.0, exponent);
  for (Index i = 0; i < n; ++i) {
    for (Index j = i; j < n; ++j) a[i * n + j] = a[j * n + i] = from[i * n + j] / scale;
  }

  Pairs pairs{nullptr, nullptr};
  if (const Index block = eigh_block(n, leading); block > 0) pairs = iterate(a, block, n, leading, room);
  if (pairs.vectors == nullptr && jacobi(a, room, n)) pairs = {a, room};
  if (pairs.vectors == nullptr) return;

  for (Index j = 0; j < leading; ++j) {
    const double* vector = pairs.vectors + j * n;
    Index top = 0;
    for (Index p = 1; p < n; ++p) top = magnitude(vector[p]) > magnitude(vector[top]) ? p : top;
    const double sign = vector[top] < 0 ? -1 : 1;
    values[j] = scale * pairs.values[j];
    for (Index p = 0; p < n; ++p) vectors[p * leading + j] = sign * vector[p];
  }
}

}  // namespace

void eigh(const Eigh& task, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (Index matrix = 0; matrix < task.matrices; ++matrix) solve(task, matrix);
}

}  // namespace grokcurv::cpu::GROKCURV_ISA
