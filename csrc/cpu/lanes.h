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

struct Lanes {
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

  // Every lane rounded to T.
  template <class T>
  GROKCURV_INLINE Lanes rounded() const {
    if constexpr (std::is_same_v<T, double>) return *this;
    T values[lanes];
    store(values);
    return load(values);
  }

  // The sum of the lanes, as a tree of fixed shape.
  GROKCURV_INLINE double fold() const {
    double x[lanes];
    store(x);
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
  }
};

#define GROKCURV_LANEWISE(op)                                                      \
  GROKCURV_INLINE Lanes operator op(Lanes x, Lanes y) {                            \
    for (int k = 0; k < Lanes::registers; ++k) x.part[k] = x.part[k] op y.part[k]; \
    return x;                                                                      \
  }
GROKCURV_LANEWISE(+)
GROKCURV_LANEWISE(-)
GROKCURV_LANEWISE(*)
#undef GROKCURV_LANEWISE

GROKCURV_INLINE Lanes& operator+=(Lanes& x, Lanes y) {
  return x = x + y;
}

// sum_i x_i y_i over n coordinates.
template <class X, class Y>
GROKCURV_INLINE double dot(const X* x, const Y* y, Index n) {
  Lanes sum{};
  Index i = 0;
  for (; i + lanes <= n; i += lanes) sum += Lanes::load(x + i) * Lanes::load(y + i);
  if (i < n) sum += Lanes::load(x + i, n - i) * Lanes::load(y + i, n - i);
  return sum.fold();
}

}  // namespace grokcurv::cpu::GROKCURV_ISA
