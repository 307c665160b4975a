#include "grokcurv/eigh.h"

#include "cpu/chunks.h"

// Householder reflections make the matrix tridiagonal, T. Its leading pairs come one of two ways: all of T by implicit
// QL, or, where few are asked for, values by multisection and vectors by inverse iteration. Reflections carry the
// vectors back. (Golub and Van Loan, Matrix Computations, 8.3 and 8.4.) Vectors are rows, padded with zeros to whole
// eights.

namespace grokcurv::cpu::GROKCURV_ISA {

namespace {

constexpr double epsilon = 0x1p-53;
constexpr int max_sweeps = 60;  // of QL for one eigenvalue; two or three are usual
constexpr int max_solves = 8;   // of inverse iteration for one vector; two or three are usual

// Squares below this have lost digits to underflow. What they measure counts as zero: matrices are scaled to have their
// largest entry in [1, 2).
constexpr double underflow = 0x1p-900;

struct Tridiagonal {
  Index n;
  double* diagonal;  // n
  double* off;       // n - 1, and a zero
  double norm;       // a bound: the largest sum of magnitudes in a row (Gershgorin)

  // Off-diagonal entries up to this may be dropped, which moves eigenvalues by less than epsilon / 2 norm.
  double negligible() const { return epsilon / 4 * norm; }

  void measure() {
    norm = 0;
    for (Index i = 0; i < n; ++i) {
      const double sum =
          __builtin_fabs(diagonal[i]) + __builtin_fabs(off[i]) + (i > 0 ? __builtin_fabs(off[i - 1]) : 0);
      norm = sum > norm ? sum : norm;
    }
    for (Index i = 0; i < n; ++i) off[i] = __builtin_fabs(off[i]) > negligible() ? off[i] : 0.0;
  }
};

// The first column, in whole eights, of what holds column `from`.
GROKCURV_INLINE Index eight_of(Index from) {
  return from / lanes * lanes;
}

// ------------------------------------------------------------------------------------------- to tridiagonal form, back

// For `count` rows of the matrix from a on: row -= u_i w + w_i u, the reflection before; then product_i = row . next.
// u_i, w_i and product_i belong to these rows; the columns are those from `from` on.
template <int count>
GROKCURV_INLINE void update_rows(double* a, Index stride, Index from, const double* u, const double* w,
                                 const double* next, const double* u_i, const double* w_i, double* product) {
  Lanes sum[count] = {}, u_row[count], w_row[count];
  for (int r = 0; r < count; ++r) {
    u_row[r] = Lanes::filled(u_i[r]);
    w_row[r] = Lanes::filled(w_i[r]);
  }
  for (Index p = from; p < stride; p += lanes) {
    const Lanes u_p = Lanes::load(u + p), w_p = Lanes::load(w + p), next_p = Lanes::load(next + p);
#pragma GCC unroll 4
    for (int r = 0; r < count; ++r) {
      const Lanes row = Lanes::load(a + r * stride + p) - (u_row[r] * w_p + w_row[r] * u_p);
      row.store(a + r * stride + p);
      sum[r] += row * next_p;
    }
  }
  for (int r = 0; r < count; ++r) product[r] = sum[r].fold();
}

// Turns row[from], row[from + 1], ... into the u of a reflection I - u u^T, |u|^2 = 2, that maps it to a multiple of
// its first entry, and returns that; u = 0 where there is nothing to map. Zeros come before.
double reflection(double* row, Index stride, Index from) {
  const Index start = eight_of(from);
  const double first = row[from];
  for (Index p = start; p <= from; ++p) row[p] = 0.0;
  const double rest = dot(row + start, row + start, stride - start);
  if (rest < underflow) {
    for (Index p = start; p < stride; ++p) row[p] = 0.0;
    return first;
  }
  const double norm = __builtin_sqrt(first * first + rest);
  const double scale = 1 / __builtin_sqrt(norm * (norm + __builtin_fabs(first)));
  row[from] = first > 0 ? first + norm : first - norm;
  for (Index p = start; p < stride; ++p) row[p] *= scale;
  return first > 0 ? -norm : norm;
}

// Reduces a, full and symmetric, to t. Row j of a then holds the reflection of step j.
void tridiagonalise(double* a, Index stride, Tridiagonal& t, double* room) {
  const Index n = t.n;
  double *w = room, *product = room + stride, *zeros = room + 2 * stride;
  for (Index p = 0; p < 3 * stride; ++p) room[p] = 0.0;
  const double* u = zeros;
  for (Index j = 0; j < n; ++j) {
    double* row = a + j * stride;
    double unused;
    update_rows<1>(row, stride, eight_of(j), u, w, zeros, u + j, w + j, &unused);
    t.diagonal[j] = row[j] + 0.0;  // never -0: see count_below
    t.off[j] = 0.0;
    if (j + 1 == n) break;
    t.off[j] = reflection(row, stride, j + 1);
    const Index from = eight_of(j + 1);
    Index i = j + 1;
    for (; i + 4 <= n; i += 4) update_rows<4>(a + i * stride, stride, from, u, w, row, u + i, w + i, product + i);
    for (; i < n; ++i) update_rows<1>(a + i * stride, stride, from, u, w, row, u + i, w + i, product + i);
    product[j] = 0.0;
    const double half = 0.5 * dot(row + from, product + from, stride - from);
    for (Index p = from; p < stride; ++p) w[p] = product[p] - half * row[p];
    u = row;
  }
  t.measure();
}

// z -= (u . z) u for `count` rows z
template <int count>
GROKCURV_INLINE void reflect_rows(double* z, Index stride, Index from, const double* u) {
  Lanes sum[count] = {};
  for (Index p = from; p < stride; p += lanes) {
#pragma GCC unroll 4
    for (int r = 0; r < count; ++r) sum[r] += Lanes::load(z + r * stride + p) * Lanes::load(u + p);
  }
  for (int r = 0; r < count; ++r) sum[r] = Lanes::filled(sum[r].fold());
  for (Index p = from; p < stride; p += lanes) {
#pragma GCC unroll 4
    for (int r = 0; r < count; ++r) {
      double* to = z + r * stride + p;
      (Lanes::load(to) - sum[r] * Lanes::load(u + p)).store(to);
    }
  }
}

// Eigenvectors of the tridiagonal matrix, the rows of z, become those of the matrix.
void carry_back(const double* a, Index n, Index stride, double* z, Index count) {
  for (Index j = n - 3; j >= 0; --j) {
    const double* u = a + j * stride;
    const Index from = eight_of(j + 1);
    Index i = 0;
    for (; i + 4 <= count; i += 4) reflect_rows<4>(z + i * stride, stride, from, u);
    for (; i < count; ++i) reflect_rows<1>(z + i * stride, stride, from, u);
  }
}

// ---------------------------------------------------------------------------------------------- all pairs: implicit QL

void swap_rows(double* x, double* y, Index n) {
  for (Index i = 0; i < n; ++i) {
    const double kept = x[i];
    x[i] = y[i];
    y[i] = kept;
  }
}

// (x, y) <- (c x - s y, s x + c y), row by row.
GROKCURV_INLINE void rotate_rows(double* x, double* y, Index stride, double c, double s) {
  const Lanes c_all = Lanes::filled(c), s_all = Lanes::filled(s);
  for (Index p = 0; p < stride; p += lanes) {
    const Lanes x_p = Lanes::load(x + p), y_p = Lanes::load(y + p);
    (c_all * x_p - s_all * y_p).store(x + p);
    (s_all * x_p + c_all * y_p).store(y + p);
  }
}

// Eigenvalues to t.diagonal, descending, and eigenvectors of t to the rows of z. Returns whether it converged.
bool solve_all(Tridiagonal& t, double* z, Index stride) {
  const Index n = t.n;
  double *d = t.diagonal, *e = t.off;
  for (Index i = 0; i < n; ++i) {
    for (Index p = 0; p < stride; ++p) z[i * stride + p] = p == i ? 1.0 : 0.0;
  }
  const double negligible = t.negligible();
  for (Index l = 0; l < n; ++l) {
    for (int sweep = 0;; ++sweep) {
      Index m = l;
      while (m + 1 < n && __builtin_fabs(e[m]) > negligible) ++m;
      if (m == l) break;
      if (sweep == max_sweeps) return false;
      // Wilkinson's shift; then a rotation per row chases the bulge from m to l.
      const double half = (d[l + 1] - d[l]) / (2 * e[l]);
      const double root = __builtin_sqrt(half * half + 1);
      double g = d[m] - d[l] + e[l] / (half < 0 ? half - root : half + root);
      double s = 1, c = 1, moved = 0;
      Index i = m - 1;
      for (; i >= l; --i) {
        const double f = s * e[i], b = c * e[i];
        const double square = f * f + g * g;
        if (square < underflow) break;  // t falls apart here
        const double r = __builtin_sqrt(square);
        e[i + 1] = r;
        s = f / r;
        c = g / r;
        g = d[i + 1] - moved;
        const double change = (d[i] - g) * s + 2 * c * b;
        moved = s * change;
        d[i + 1] = g + moved;
        g = c * change - b;
        rotate_rows(z + i * stride, z + (i + 1) * stride, stride, c, s);
      }
      d[i + 1] -= moved;  // i is l - 1 if the bulge came through
      e[i + 1] = i < l ? g : 0.0;
      e[m] = 0.0;
    }
  }
  for (Index i = 0; i < n; ++i) {
    Index largest = i;
    for (Index j = i + 1; j < n; ++j) largest = d[j] > d[largest] ? j : largest;
    swap_rows(d + i, d + largest, 1);
    if (largest != i) swap_rows(z + i * stride, z + largest * stride, stride);
  }
  return true;
}

// ---------------------------------------------------------------- few pairs: multisection, then inverse iteration

// below[l] = how many eigenvalues of t are less than points[l]: as many as the pivots of t - x are negative. A pivot of
// zero makes the next one infinite and negative, which counts right, so long as the pivot is not -0 and no square is 0.
GROKCURV_INLINE void count_below(const double* diagonal, const double* squares, Index n, const double* points,
                                 double* below) {
  const Lanes x = Lanes::load(points), one = Lanes::filled(1.0), zero{};
  Lanes count{}, pivot = one;
  for (Index i = 0; i < n; ++i) {
    const Lanes d = Lanes::filled(diagonal[i]), square = Lanes::filled(squares[i]);
    for (int k = 0; k < Lanes::registers; ++k) {
      pivot.part[k] = (d.part[k] - x.part[k]) - square.part[k] / pivot.part[k];
      count.part[k] += pivot.part[k] < zero.part[k] ? one.part[k] : zero.part[k];
    }
  }
  count.store(below);
}

// The k largest eigenvalues of t, descending, to within epsilon |t|. Eight points are tried together: the intervals of
// up to eight eigenvalues are cut in 2, 3, 5 or 9 parts each.
void leading_values(const Tridiagonal& t, Index k, double* squares, double* values) {
  const Index n = t.n;
  squares[0] = 0.0;
  for (Index i = 1; i < n; ++i) {
    const double square = t.off[i - 1] * t.off[i - 1];
    squares[i] = square < 0x1p-1000 ? 0x1p-1000 : square;
  }
  for (Index first = 0; first < k; first += lanes) {
    const Index count = k - first < lanes ? k - first : lanes;
    // For each eigenvalue so many points, and so many passes that (points + 1)^passes > 2^54.
    const Index points = count > 4 ? 1 : count > 2 ? 2 : count > 1 ? 4 : 8;
    const int passes = count > 4 ? 54 : count > 2 ? 35 : count > 1 ? 24 : 18;
    double low[lanes], high[lanes], x[lanes], below[lanes];
    for (Index j = 0; j < count; ++j) {
      low[j] = -t.norm;
      high[j] = t.norm;
    }
    for (int pass = 0; pass < passes; ++pass) {
      for (Index l = 0; l < lanes; ++l) {
        const Index j = l / points < count ? l / points : count - 1;
        x[l] = low[j] + (high[j] - low[j]) * (static_cast<double>(l % points + 1) / static_cast<double>(points + 1));
      }
      count_below(t.diagonal, squares, n, x, below);
      for (Index j = 0; j < count; ++j) {
        // The eigenvalue number first + j from above is not less than x if no more than this many are.
        const double rank = static_cast<double>(n - 1 - first - j);
        for (Index l = j * points; l < (j + 1) * points; ++l) {
          if (below[l] > rank) {
            high[j] = x[l];
            break;
          }
          low[j] = x[l];
        }
      }
    }
    for (Index j = 0; j < count; ++j) {
      const Index i = first + j;
      values[i] = low[j] + (high[j] - low[j]) / 2;
      if (i > 0 && values[i] > values[i - 1]) values[i] = values[i - 1];  // by rounding
    }
  }
}

// t - value = P L U, with rows exchanged for the larger pivot.
struct Factors {
  double *inverse, *second, *third;  // 1 / pivot, and the two entries right of it in U
  double *factor, *exchanged;        // of L; 1 where rows i and i + 1 were exchanged, else 0

  void factorise(const Tridiagonal& t, double value) {
    // A pivot of zero means that the value is exact; a small one serves.
    const double least = t.norm > 0 ? epsilon * t.norm : 1.0;
    double pivot = t.diagonal[0] - value, right = t.off[0];
    for (Index i = 0; i < t.n; ++i) {
      const double under = t.off[i];  // 0 in the last row
      const bool last = i + 1 == t.n;
      const double next = last ? 0.0 : t.diagonal[i + 1] - value, next_right = last ? 0.0 : t.off[i + 1];
      if (__builtin_fabs(pivot) >= __builtin_fabs(under)) {
        if (__builtin_fabs(pivot) < least) pivot = pivot < 0 ? -least : least;
        exchanged[i] = 0.0;
        factor[i] = under / pivot;
        inverse[i] = 1 / pivot;
        second[i] = right;
        third[i] = 0.0;
        pivot = next - factor[i] * right;
        right = next_right;
      } else {
        exchanged[i] = 1.0;
        factor[i] = pivot / under;
        inverse[i] = 1 / under;
        second[i] = next;
        third[i] = next_right;
        pivot = right - factor[i] * next;
        right = -factor[i] * next_right;
      }
    }
  }

  void solve(double* x, Index n) const {
    for (Index i = 0; i + 1 < n; ++i) {
      const double upper = exchanged[i] != 0 ? x[i + 1] : x[i], lower = exchanged[i] != 0 ? x[i] : x[i + 1];
      x[i] = upper;
      x[i + 1] = lower - factor[i] * upper;
    }
    double after = 0, after_that = 0;
    for (Index i = n - 1; i >= 0; --i) {
      x[i] = ((x[i] - third[i] * after_that) - second[i] * after) * inverse[i];
      after_that = after;
      after = x[i];
    }
  }
};

// Makes row number i of z orthogonal to those before it, projecting twice ("twice is enough"), and of length 1.
void orthonormalise(double* z, Index stride, Index i) {
  double* row = z + i * stride;
  const auto normalise = [&] {
    const double norm = __builtin_sqrt(dot(row, row, stride));
    for (Index p = 0; p < stride; ++p) row[p] /= norm;
  };
  for (int pass = 0; pass < 2; ++pass) {
    normalise();
    for (Index j = 0; j < i; ++j) {
      const double* other = z + j * stride;
      const double overlap = dot(row, other, stride);
      for (Index p = 0; p < stride; ++p) row[p] -= overlap * other[p];
    }
  }
  normalise();
}

// |t z - value z|
double residual(const Tridiagonal& t, double value, const double* z) {
  double sum = 0;
  for (Index i = 0; i < t.n; ++i) {
    double x = (t.diagonal[i] - value) * z[i];
    if (i > 0) x += t.off[i - 1] * z[i - 1];
    if (i + 1 < t.n) x += t.off[i] * z[i + 1];
    sum += x * x;
  }
  return __builtin_sqrt(sum);
}

// The k leading eigenvalues of t, descending, and their eigenvectors to the rows of z. Returns whether every residual
// is down to rounding.
bool solve_few(const Tridiagonal& t, Index k, double* values, double* z, Index stride, double* room) {
  const Index n = t.n;
  leading_values(t, k, room, values);
  Factors factors{room, room + stride, room + 2 * stride, room + 3 * stride, room + 4 * stride};
  // Any start will do that no eigenvector is orthogonal to: numbers of a congruential generator.
  std::uint64_t state = 1;
  for (Index j = 0; j < k; ++j) {
    double* row = z + j * stride;
    for (Index p = 0; p < stride; ++p) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      row[p] = p < n ? static_cast<double>(state >> 11) * 0x1p-53 - 0.5 : 0.0;
    }
    factors.factorise(t, values[j]);
    bool converged = false;
    for (int solve = 0; solve < max_solves && !converged; ++solve) {
      factors.solve(row, n);
      orthonormalise(z, stride, j);
      converged = residual(t, values[j], row) <= 16 * epsilon * t.norm;
    }
    if (!converged) return false;
  }
  return true;
}

// ---------------------------------------------------------------------------------------------------------- the driver

void solve(const Eigh& task, Index matrix) {
  const Index n = task.size, leading = task.leading, stride = eigh_stride(n);
  const double* from = task.a + matrix * n * n;
  double* values = task.values + matrix * leading;
  double* vectors = task.vectors + matrix * n * leading;
  double* a = task.workspace + matrix * eigh_workspace_per_matrix(n);
  double* z = a + n * stride;
  double* room = z + n * stride;

  double largest = 0;  // infinite where an entry is not finite
  for (Index i = 0; i < n; ++i) {
    for (Index j = i; j < n; ++j) {
      const double x = __builtin_fabs(from[i * n + j]);
      if (!(x <= largest)) largest = x < __builtin_inf() ? x : __builtin_inf();
    }
  }
  for (Index i = 0; i < leading; ++i) values[i] = __builtin_nan("");
  for (Index i = 0; i < n * leading; ++i) vectors[i] = __builtin_nan("");
  if (!(largest < __builtin_inf()) || leading == 0) return;

  // Scaled by a power of two, exactly, so that no square overflows.
  int exponent = largest > 0 ? __builtin_ilogb(largest) : 0;
  exponent = exponent < -1000 ? -1000 : exponent;
  const double scale = __builtin_ldexp(1.0, exponent);
  for (Index i = 0; i < n; ++i) {
    for (Index j = i; j < n; ++j) a[i * stride + j] = a[j * stride + i] = from[i * n + j] / scale;
    for (Index j = n; j < stride; ++j) a[i * stride + j] = 0.0;
  }

  Tridiagonal t{n, room, room + stride, 0.0};
  double* found = room + 2 * stride;
  tridiagonalise(a, stride, t, room + 3 * stride);
  const bool few = leading <= n / 4 && solve_few(t, leading, found, z, stride, room + 3 * stride);
  if (!few) {
    if (!solve_all(t, z, stride)) return;
    found = t.diagonal;
  }
  carry_back(a, n, stride, z, leading);

  for (Index j = 0; j < leading; ++j) {
    const double* vector = z + j * stride;
    Index top = 0;
    for (Index p = 1; p < n; ++p) top = __builtin_fabs(vector[p]) > __builtin_fabs(vector[top]) ? p : top;
    const double sign = vector[top] < 0 ? -1 : 1;
    values[j] = scale * found[j];
    for (Index p = 0; p < n; ++p) vectors[p * leading + j] = sign * vector[p];
  }
}

}  // namespace

void eigh(const Eigh& task, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (Index matrix = 0; matrix < task.matrices; ++matrix) solve(task, matrix);
}

}  // namespace grokcurv::cpu::GROKCURV_ISA
