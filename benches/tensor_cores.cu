// In which order the float64 tensor cores of a GPU add and round, found by comparing bits with sums on the CPU.
//
//   nvcc -std=c++20 -arch=sm_90 -o tensor_cores benches/tensor_cores.cu && ./tensor_cores
//
// An instruction forms c + a_0 b_0 + ... + a_{k-1} b_{k-1} for each entry of a tile. Factors have 26 random bits and
// exponents of a wide range, so that products are exact and the order of the sum decides the last bits. Printed is, for
// each order, in how many entries of how many the bits are its own: the right one has all.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

constexpr int warp = 32, tiles = 2000;

// D = A B + C for one tile a block: (rows, k) A, (k, 8) B and (rows, 8) C, row by row. Which thread has which entry of
// a fragment is from the PTX manual, "Matrix fragments for mma".
template <int rows, int k>
__global__ void multiply(const double* a, const double* b, const double* c, double* d) {
  const int group = threadIdx.x / 4, member = threadIdx.x % 4;
  a += blockIdx.x * rows * k;
  b += blockIdx.x * k * 8;
  c += blockIdx.x * rows * 8;
  d += blockIdx.x * rows * 8;
  if constexpr (rows == 8) {
    const double* from = c + group * 8 + 2 * member;
    double x, y;
    asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%4, %5};"
                 : "=d"(x), "=d"(y)
                 : "d"(a[group * k + member]), "d"(b[member * 8 + group]), "d"(from[0]), "d"(from[1]));
    d[group * 8 + 2 * member] = x;
    d[group * 8 + 2 * member + 1] = y;
  } else {
#if __CUDA_ARCH__ >= 900
    const int upper = group * 8 + 2 * member, lower = upper + 64;
    double x[4];
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=d"(x[0]), "=d"(x[1]), "=d"(x[2]), "=d"(x[3])
        : "d"(a[group * k + member]), "d"(a[(group + 8) * k + member]), "d"(a[group * k + member + 4]),
          "d"(a[(group + 8) * k + member + 4]), "d"(b[member * 8 + group]), "d"(b[(member + 4) * 8 + group]),
          "d"(c[upper]), "d"(c[upper + 1]), "d"(c[lower]), "d"(c[lower + 1]));
    d[upper] = x[0];
    d[upper + 1] = x[1];
    d[lower] = x[2];
    d[lower + 1] = x[3];
#endif
  }
}

struct Terms {
  int count;
  double a[8], b[8], c;

  double chain(double from, int first, int step, int n) const {
    for (int i = 0; i < n; ++i) from = std::fma(a[first + i * step], b[first + i * step], from);
    return from;
  }
};

struct Order {
  const char* name;
  double (*sum)(const Terms&);
};

// In units of 2^-100 every product and every sum here is whole.
double rounded_once(const Terms& t) {
  __int128 sum = static_cast<__int128>(std::ldexp(t.c, 100));
  for (int i = 0; i < t.count; ++i) sum += static_cast<__int128>(std::ldexp(t.a[i] * t.b[i], 100));
  return std::ldexp(static_cast<double>(sum), -100);
}

const Order orders[] = {
    {"c, then products in turn", [](const Terms& t) { return t.chain(t.c, 0, 1, t.count); }},
    {"c, then products from the last", [](const Terms& t) { return t.chain(t.c, t.count - 1, -1, t.count); }},
    {"products in turn, then c", [](const Terms& t) { return t.chain(0.0, 0, 1, t.count) + t.c; }},
    {"pairs of products, then c",
     [](const Terms& t) {
       double sum[4];
       for (int i = 0; i < t.count / 2; ++i) sum[i] = t.chain(0.0, 2 * i, 1, 2);
       for (int n = t.count / 2; n > 1; n /= 2) {
         for (int i = 0; i < n / 2; ++i) sum[i] = sum[2 * i] + sum[2 * i + 1];
       }
       return sum[0] + t.c;
     }},
    {"fours of products, each added to c",
     [](const Terms& t) {
       double sum = t.c;
       for (int first = 0; first < t.count; first += 4) sum += t.chain(0.0, first, 1, 4);
       return sum;
     }},
    {"even products on c, plus odd ones",
     [](const Terms& t) { return t.chain(t.c, 0, 2, t.count / 2) + t.chain(0.0, 1, 2, t.count / 2); }},
    {"all exact, rounded once", rounded_once},
};

bool succeeds(cudaError_t error) {
  if (error == cudaSuccess) return true;
  const bool none = error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver;
  std::printf("%s%s\n", none ? "no CUDA device: " : "", cudaGetErrorString(error));
  return false;
}

template <int rows, int k>
bool probe(std::mt19937_64& random) {
  const auto numbers = [&](std::size_t n) {
    std::vector<double> x(n);
    for (double& one : x) {
      const auto bits = static_cast<std::int64_t>(random() % (1 << 26)) - (1 << 25);
      one = std::ldexp(static_cast<double>(bits), -26 - static_cast<int>(random() % 12));
    }
    return x;
  };
  const std::vector<double> a = numbers(tiles * rows * k), b = numbers(tiles * k * 8), c = numbers(tiles * rows * 8);
  std::vector<double> d(c.size());
  double *at[4], *on_device;
  const std::size_t sizes[] = {a.size(), b.size(), c.size(), d.size()};
  if (!succeeds(cudaMalloc(&on_device, (sizes[0] + sizes[1] + 2 * sizes[2]) * sizeof(double)))) return false;
  at[0] = on_device;
  for (int i = 0; i < 3; ++i) at[i + 1] = at[i] + sizes[i];
  const double* from[] = {a.data(), b.data(), c.data()};
  for (int i = 0; i < 3; ++i) {
    if (!succeeds(cudaMemcpy(at[i], from[i], sizes[i] * sizeof(double), cudaMemcpyHostToDevice))) return false;
  }
  multiply<rows, k><<<tiles, warp>>>(at[0], at[1], at[2], at[3]);
  if (!succeeds(cudaGetLastError())) return false;
  if (!succeeds(cudaMemcpy(d.data(), at[3], sizes[3] * sizeof(double), cudaMemcpyDeviceToHost))) return false;
  cudaFree(on_device);

  std::size_t same[std::size(orders)] = {};
  double worst = 0.0;
  for (std::size_t entry = 0; entry < d.size(); ++entry) {
    const std::size_t tile = entry / (rows * 8), row = entry / 8 % rows, column = entry % 8;
    Terms terms{k, {}, {}, c[entry]};
    for (int i = 0; i < k; ++i) {
      terms.a[i] = a[(tile * rows + row) * k + i];
      terms.b[i] = b[(tile * k + i) * 8 + column];
    }
    worst = std::fmax(worst, std::fabs(d[entry] - rounded_once(terms)));
    for (std::size_t o = 0; o < std::size(orders); ++o) {
      const double sum = orders[o].sum(terms);
      same[o] += std::memcmp(&sum, &d[entry], sizeof sum) == 0;
    }
  }
  std::printf("m%dn8k%d, largest difference from the exact sums %.1e\n", rows, k, worst);
  for (std::size_t o = 0; o < std::size(orders); ++o) {
    std::printf("  %-36s %zu of %zu\n", orders[o].name, same[o], d.size());
  }
  return worst < 1e-14;  // else a fragment is not what it was taken for
}

int main() {
  cudaDeviceProp device;
  if (!succeeds(cudaGetDeviceProperties(&device, 0))) return 1;
  std::mt19937_64 random(std::random_device{}());
  bool right = probe<8, 4>(random);
  if (device.major >= 9) right = probe<16, 8>(random) && right;
  if (!right) std::puts("WRONG: these are not the products that were asked for");
  return right ? 0 : 1;
}
