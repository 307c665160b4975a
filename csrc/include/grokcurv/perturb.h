#pragma once

#include "grokcurv/vectors.h"

namespace grokcurv {

// out[i] = theta - eta[i] directions[i], every operation rounded to the compute type, the result to the type of theta.
struct Perturb {
  Type type;
  Index vectors, size;
  const void* theta;       // (size)
  const void* directions;  // (vectors, size)
  const double* eta;       // (vectors)
  void* out;               // (vectors, size), apart from the inputs
  double* workspace = nullptr;
};

namespace cpu {
GROKCURV_INLINE Index perturb_workspace(const Perturb&, int) {
  return 0;
}
}  // namespace cpu

}  // namespace grokcurv
