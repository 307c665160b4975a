#pragma once

#include <cstring>
#include <type_traits>

#include "grokcurv/vectors.h"

namespace grokcurv {

struct bfloat16 {
  std::uint16_t bits;
};

template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

GROKCURV_INLINE double widen(double x) {
  return x;
}
GROKCURV_INLINE double widen(float x) {
  return x;
}
GROKCURV_INLINE double widen(bfloat16 x) {
  const std::uint32_t bits = std::uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounds to T by way of its compute type, to nearest, ties to even; every NaN of bfloat16 becomes the quiet one, as in
// PyTorch.
template <class T>
GROKCURV_INLINE T narrow(double x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    const float value = static_cast<float>(x);
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return {0x7fc0};
    return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else {
    return static_cast<T>(x);
  }
}

// Calls body.operator()<T>() with the element type.
template <class Body>
void with_type(Type type, Body body) {
  switch (type) {
    case Type::float32:
      return body.template operator()<float>();
    case Type::float64:
      return body.template operator()<double>();
    case Type::bfloat16:
      return body.template operator()<bfloat16>();
  }
}

}  // namespace grokcurv
