#pragma once

// Runs block algorithms on the GPU: the block as they see it, the kernel around them, the launch.

#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "block/block.h"
#include "grokcurv/kernels.h"

namespace grokcurv::cuda {

// The number of threads is known when a kernel is compiled, so that a loop over steps of a block can be unrolled.
template <int count_of_threads>
struct Block {
  __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x); }
  static constexpr __device__ __forceinline__ int threads() { return count_of_threads; }
  __device__ __forceinline__ Index index() const { return blockIdx.x; }
  __device__ __forceinline__ Index count() const { return gridDim.x; }
  __device__ __forceinline__ double* shared() const {
    extern __shared__ __align__(16) double memory[];
    return memory;
  }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ double warp_sum(double x) const {
    GROKCURV_UNROLL
    for (int distance = block::warp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
  }
  __device__ __forceinline__ double warp_max(double x) const {
    GROKCURV_UNROLL
    for (int distance = block::warp / 2; distance > 0; distance /= 2) x = fmax(x, __shfl_xor_sync(~0u, x, distance));
    return x;
  }
  template <int depth, int rows, int columns, class Needed>
  __device__ __forceinline__ void warp_multiply(const double (&a)[rows][depth / 2],
                                                const double (&b)[columns][depth / 4], double (&c)[rows][columns][4],
                                                const Needed& needed) const {
    GROKCURV_UNROLL
    for (int i = 0; i < rows; ++i) {
      GROKCURV_UNROLL
      for (int j = 0; j < columns; ++j) {
        if (needed(i, j)) multiply(a[i], b[j], c[i][j]);
      }
    }
  }
  // Asynchronously, past the registers, in pieces of 4, 8 or 16 bytes; what is smaller goes the ordinary way.
  template <class T>
  __device__ __forceinline__ void copy(T* to, const T* from) const {
    if constexpr (sizeof(T) < 4) {
      *to = *from;
    } else {
      constexpr int piece = sizeof(T) < 16 ? sizeof(T) : 16;
      GROKCURV_UNROLL
      for (int at = 0; at < static_cast<int>(sizeof(T)); at += piece) {
        __pipeline_memcpy_async(reinterpret_cast<char*>(to) + at, reinterpret_cast<const char*>(from) + at, piece);
      }
    }
  }
  __device__ __forceinline__ void commit() const { __pipeline_commit(); }
  template <int n>
  __device__ __forceinline__ void wait() const {
    __pipeline_wait_prior(n);
  }
  __device__ __forceinline__ int warp_first(bool x) const {
    const int first = __ffs(static_cast<int>(__ballot_sync(~0u, x)));
    return first == 0 ? block::warp : first - 1;
  }

 private:
  // The larger shapes are of sm_90 and later; they are made of the smallest, in the same order of sums.
  static __device__ __forceinline__ void multiply(const double (&a)[2], const double (&b)[1], double (&c)[4]) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
                 : "d"(a[0]), "d"(a[1]), "d"(b[0]));
#else
    GROKCURV_UNROLL
    for (int u = 0; u < 2; ++u) {
      asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                   : "+d"(c[2 * u]), "+d"(c[2 * u + 1])
                   : "d"(a[u]), "d"(b[0]));
    }
#endif
  }
  static __device__ __forceinline__ void multiply(const double (&a)[4], const double (&b)[2], double (&c)[4]) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
        : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
#else
    GROKCURV_UNROLL
    for (int h = 0; h < 2; ++h) {
      const double a_h[2] = {a[2 * h], a[2 * h + 1]}, b_h[1] = {b[h]};
      multiply(a_h, b_h, c);
    }
#endif
  }
};

template <class Body>
__global__ void __launch_bounds__(Body::threads, Body::resident) kernel(const __grid_constant__ Body body) {
  Block<Body::threads> block;
  body(block);
}

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Every kernel that is launched anywhere, to be loaded before the first: loading is not allowed during a capture.
std::vector<const void*>& kernels();

// One for each source: nvcc gives every source a stub of its own for a kernel that several have, and each is loaded by
// itself.
template <class Body>
static const bool registered = (kernels().push_back(reinterpret_cast<const void*>(&kernel<Body>)), true);

// Counts the workspace of a task, or carries it out on a stream.
class Device {
 public:
  Device() : workspace(nullptr) {}
  Device(double* memory, Stream stream) : workspace(memory), stream_(static_cast<cudaStream_t>(stream)), runs_(true) {}

  block::Workspace workspace;

  // Blocks that fill the GPU, for an algorithm whose blocks take turn after turn.
  Index resident() const {
    int device = 0, processors = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    return 2 * processors;
  }

  template <class Body>
  void launch(Index blocks, Index shared, const Body& body) {
    (void)&registered<Body>;
    if (!runs_ || blocks == 0) return;
    if (blocks > 0x7fffffff) throw std::runtime_error("a launch of " + std::to_string(blocks) + " blocks: too many");
    const int bytes = static_cast<int>(shared * static_cast<Index>(sizeof(double)));
    if (bytes > 48 * 1024) {
      check(cudaFuncSetAttribute(kernel<Body>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
    }
    kernel<Body><<<static_cast<unsigned>(blocks), Body::threads, bytes, stream_>>>(body);
    check(cudaGetLastError(), "launch");
  }

 private:
  cudaStream_t stream_ = nullptr;
  bool runs_ = false;
};

}  // namespace grokcurv::cuda
