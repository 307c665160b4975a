#pragma once

#include "grokcurv/vectors.h"

namespace grokcurv {

// out[i] = theta[i] - eta[i] directions[i], every operation rounded to the compute type, the result to the type of
// theta.
struct Perturb {
  Type type;
  Index vectors, size;
  Strided theta;           // (vectors, size), or (size) for all
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
