#pragma once

#include "grokcurv/vectors.h"

namespace grokcurv {

// What the four gradients of a commutator say, in one pass over them. With g_a, g_b the gradients of two losses at
// theta,
//   difference: a2, b2 are the gradients at theta - eta g_b, theta - eta g_a, and delta = eta ((a2 - g_a) - (b2 -
//   g_b)); bracket:    a2 = H_a g_b, b2 = H_b g_a, and delta = eta^2 (b2 - a2).
//
// sums holds, for each vector, over its coordinates:
//   |g_a|^2, |g_b|^2, g_a . g_b, |delta|^2, then |a2 - g_a|^2, |b2 - g_b|^2 (difference) or |a2|^2, |b2|^2 (bracket);
// with theta, which only the difference takes, also |r|^2, |r - delta|^2, |q_a|^2, |q_b|^2, where
//   r = ((theta - eta g_a) - eta b2) - ((theta - eta g_b) - eta a2), every operation rounded to the type of the
//   vectors, q_a = perturb(theta, g_a) - (theta - eta g_a), and q_b likewise.
struct Commutator {
  Type type;
  Index vectors, size;
  bool bracket;
  const void *g_a, *g_b, *a2, *b2;  // (vectors, size)
  const double* eta;                // (vectors)
  Strided theta;                    // (vectors, size), (size) for all, or null
  Basis basis;
  Segments segments;
  double* sums;          // (vectors, 6), or (vectors, 10) with theta
  double* coefficients;  // (vectors, basis.count): basis . delta
  double* energies;      // (vectors, segments.count): the sum of delta^2 over each segment
  void* delta;           // (vectors, size) of the compute type, or null
  double* workspace = nullptr;
};

GROKCURV_INLINE constexpr int commutator_sums(bool with_theta) {
  return with_theta ? 10 : 6;
}

// Of sums, coefficients and energies.
GROKCURV_INLINE Index commutator_columns(const Commutator& task) {
  return commutator_sums(task.theta.data != nullptr) + task.basis.count + task.segments.count;
}

namespace cpu {
GROKCURV_INLINE Index commutator_workspace(const Commutator& task, int) {
  return task.vectors * chunks(task.size) * commutator_columns(task);
}
}  // namespace cpu

}  // namespace grokcurv
