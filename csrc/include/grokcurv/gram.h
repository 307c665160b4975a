#pragma once

#include "grokcurv/vectors.h"

namespace grokcurv {

// out[s][i][j] = (x[i] - origin) . (y[j] - origin) over segment s. How an entry is summed depends on its segment alone,
// so its bits do not depend on which other rows are in the call. Without y the result is x beside x, symmetric.
struct Gram {
  Type type;
  Index x_rows, y_rows, size;
  const void* x;       // (x_rows, size)
  const void* y;       // (y_rows, size) or null: then y_rows = x_rows
  const void* origin;  // (size) or null: zero
  Segments segments;
  double* out;  // (segments.count, x_rows, y_rows)
};

namespace cpu {
void gram(const Gram& task, int threads);
}

}  // namespace grokcurv
