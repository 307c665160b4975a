#pragma once

// Eight float64 lanes: coordinate i of a sum goes to lane i % 8 whatever the registers are, so every instruction set
// adds the same numbers in the same order. Each instruction set compiles this header into a namespace of its own.

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "grokcurv/numbers.h"

namespace grokcurv::cpu::GROKCURV_ISA {

constexpr int lanes = 8;

// One register of doubles, and its conversions. Intrinsics, because GCC 12 takes __builtin_convertvector apart, and of
// pairs built element by element it loses the rounding when a float is widened again.
#if defined(__AVX512F__)
typedef __m512d Register;
// Masked, with every lane kept: the plain intrinsics set off GCC 12's warning about uninitialised values.
GROKCURV_INLINE Register load_floats(const float* x) {
  return _mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(x));
}
GROKCURV_INLINE void store_floats(float* x, Register y) {
  _mm256_storeu_ps(x, _mm512_maskz_cvtpd_ps(0xff, y));
}
#elif defined(__AVX__)
typedef __m256d Register;
GROKCURV_INLINE Register load_floats(const float* x) {
  return _mm256_cvtps_pd(_mm_loadu_ps(x));
}
GROKCURV_INLINE void store_floats(float* x, Register y) {
  _mm_storeu_ps(x, _mm256_cvtpd_ps(y));
}
#elif defined(__SSE2__)
typedef __m128d Register;
GROKCURV_INLINE Register load_floats(const float* x) {
  return _mm_cvtps_pd(_mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
}
GROKCURV_INLINE void store_floats(float* x, Register y) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(x), _mm_castps_si128(_mm_cvtpd_ps(y)));
}
#else
typedef double Register __attribute__((vector_size(16)));
typedef float Half __attribute__((vector_size(8)));
GROKCURV_INLINE Register load_floats(const float* x) {
  Half half;
  std::memcpy(&half, x, sizeof half);
  return __builtin_convertvector(half, Register);
}
GROKCURV_INLINE void store_floats(float* x, Register y) {
  const Half half = __builtin_convertvector(y, Half);
  std::memcpy(x, &half, sizeof half);
}
#endif

// sum + x y, rounded once. An `exact` product, as that of two numbers that were floats is, may be rounded before it is
// added: nothing is lost, and what comes out is the same.
template <bool exact>
GROKCURV_INLINE Register multiply_add(Register x, Register y, Register sum) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(x, y, sum);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(x, y, sum);
#else
  if constexpr (exact) return sum + x * y;
  for (unsigned i = 0; i < sizeof(Register) / sizeof(double); ++i) sum[i] = __builtin_fma(x[i], y[i], sum[i]);
  return sum;
#endif
}

struct Lanes {
  typedef Register Part;
  static constexpr int width = sizeof(Register) / sizeof(double);
  static constexpr int registers = lanes / width;

  Register part[registers];

  static GROKCURV_INLINE Lanes load(const double* x) {
    Lanes y;
    for (int k = 0; k < registers; ++k) std::memcpy(&y.part[k], x + k * width, sizeof(Register));
    return y;
  }

  static GROKCURV_INLINE Lanes load(const float* x) {
    Lanes y;
    for (int k = 0; k < registers; ++k) y.part[k] = load_floats(x + k * width);
    return y;
  }

  static GROKCURV_INLINE Lanes load(const bfloat16* x) {
    float values[lanes];
    for (int i = 0; i < lanes; ++i) values[i] = static_cast<float>(widen(x[i]));
    return load(values);
  }

  // The first n lanes from memory, zeros behind; all of them from n = 8 on.
  template <class T>
  static GROKCURV_INLINE Lanes load(const T* x, Index n) {
    if (n >= lanes) return load(x);
    T padded[lanes] = {};
    std::memcpy(padded, x, static_cast<std::size_t>(n) * sizeof(T));
    return load(padded);
  }

  static GROKCURV_INLINE Lanes filled(double x) {
    Lanes y;
    for (int k = 0; k < registers; ++k) y.part[k] = x - Register{};
    return y;
  }

  GROKCURV_INLINE void store(double* x) const {
    for (int k = 0; k < registers; ++k) std::memcpy(x + k * width, &part[k], sizeof(Register));
  }

  GROKCURV_INLINE void store(float* x) const {
    for (int k = 0; k < registers; ++k) store_floats(x + k * width, part[k]);
  }

  GROKCURV_INLINE void store(bfloat16* x) const {
    double values[lanes];
    store(values);
    for (int i = 0; i < lanes; ++i) x[i] = narrow<bfloat16>(values[i]);
  }

  // The first n lanes, n <= 8.
  template <class T>
  GROKCURV_INLINE void store(T* x, Index n) const {
    if (n == lanes) return store(x);
    T values[lanes];
    store(values);
    std::memcpy(x, values, static_cast<std::size_t>(n) * sizeof(T));
  }

  // The sum of the lanes, as a tree of fixed shape: ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)).
  GROKCURV_INLINE double fold() const {
#if defined(__AVX__)
#if defined(__AVX512F__)
    const auto all = part[0];
    const auto four = __builtin_shufflevector(all, all, 0, 1, 2, 3) + __builtin_shufflevector(all, all, 4, 5, 6, 7);
#else
    const auto four = part[0] + part[1];
#endif
    const auto two = __builtin_shufflevector(four, four, 0, 1) + __builtin_shufflevector(four, four, 2, 3);
#else
    const auto two = (part[0] + part[2]) + (part[1] + part[3]);
#endif
    return two[0] + two[1];
  }
};

// Eight floats, for arithmetic that is rounded as theirs.
struct Floats {
  typedef float Part __attribute__((vector_size(sizeof(Register) < 32 ? 16 : 32)));
  static constexpr int registers = lanes * sizeof(float) / sizeof(Part);

  Part part[registers];

  // As those of Lanes.
  static GROKCURV_INLINE Floats load(const float* x, Index n) {
    Floats y{};
    std::memcpy(&y, x, n >= lanes ? sizeof y : static_cast<std::size_t>(n) * sizeof(float));
    return y;
  }

  static GROKCURV_INLINE Floats filled(float x) {
    Floats y;
    for (int k = 0; k < registers; ++k) y.part[k] = x - Part{};
    return y;
  }
};

// What operations of a vector's own type are done on.
template <class T>
using Own = std::conditional_t<std::is_same_v<T, float>, Floats, Lanes>;

#define GROKCURV_LANEWISE(Eight, op)                                               \
  GROKCURV_INLINE Eight operator op(Eight x, Eight y) {                            \
    for (int k = 0; k < Eight::registers; ++k) x.part[k] = x.part[k] op y.part[k]; \
    return x;                                                                      \
  }
GROKCURV_LANEWISE(Lanes, +)
GROKCURV_LANEWISE(Lanes, -)
GROKCURV_LANEWISE(Lanes, *)
GROKCURV_LANEWISE(Floats, -)
GROKCURV_LANEWISE(Floats, *)

GROKCURV_INLINE Lanes& operator+=(Lanes& x, Lanes y) {
  return x = x + y;
}

template <bool exact>
GROKCURV_INLINE Lanes multiply_add(Lanes x, Lanes y, Lanes sum) {
  for (int k = 0; k < Lanes::registers; ++k) sum.part[k] = multiply_add<exact>(x.part[k], y.part[k], sum.part[k]);
  return sum;
}

GROKCURV_INLINE Lanes widened(Lanes x) {
  return x;
}

GROKCURV_INLINE Lanes widened(Floats x) {
  float values[lanes];
  std::memcpy(values, &x, sizeof x);
  return Lanes::load(values);
}

// Every lane rounded to T. What is done in float64 with floats and rounded to float is rounded as if it had been done
// with floats (53 >= 2 * 24 + 2 bits), so these are T's own operations.
template <class T>
GROKCURV_INLINE Lanes rounded(Lanes x) {
  if constexpr (std::is_same_v<T, double>) return x;
  T values[lanes];
  x.store(values);
  return Lanes::load(values);
}

template <class T>
GROKCURV_INLINE Floats rounded(Floats x) {
  return x;
}

// sum + x y, in one rounding where that changes nothing: x and y were an X and a Y.
template <class X, class Y>
GROKCURV_INLINE Lanes add_product(Lanes sum, Lanes x, Lanes y) {
  constexpr bool exact = !std::is_same_v<X, double> && !std::is_same_v<Y, double>;
  if constexpr (exact) return multiply_add<true>(x, y, sum);
  return sum + x * y;
}

// sum_i x_i y_i over n coordinates: eights of them in two sums by turns, since a sum waits for its term before.
template <class X, class Y>
GROKCURV_INLINE double dot(const X* x, const Y* y, Index n) {
  Lanes even{}, odd{};
  const auto add = [&](Lanes& sum, Index i) __attribute__((always_inline)) {
    if (i < n) sum = add_product<X, Y>(sum, Lanes::load(x + i, n - i), Lanes::load(y + i, n - i));
  };
  Index i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    even = add_product<X, Y>(even, Lanes::load(x + i), Lanes::load(y + i));
    odd = add_product<X, Y>(odd, Lanes::load(x + i + lanes), Lanes::load(y + i + lanes));
  }
  add(even, i);
  add(odd, i + lanes);
  return (even + odd).fold();
}

}  // namespace grokcurv::cpu::GROKCURV_ISA
