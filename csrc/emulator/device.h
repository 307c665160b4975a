#pragma once

// Runs block algorithms on the CPU, to test them: one block after the other, the threads of a block by turns, in an
// order that changes with a seed. A missing barrier then shows as a wrong result.

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "block/block.h"
#include "emulator/fibers.h"
#include "emulator/kernels.h"

namespace grokcurv::emulator {

class Block {
 public:
  Block(Fibers& fibers, int thread, int threads, Index index, Index count, double* shared)
      : fibers_(fibers), thread_(thread), threads_(threads), index_(index), count_(count), shared_(shared) {}

  int thread() const { return thread_; }
  int threads() const { return threads_; }
  Index index() const { return index_; }
  Index count() const { return count_; }
  double* shared() const { return shared_; }
  void sync(const std::source_location& place = std::source_location::current()) const { fibers_.sync(place); }
  double warp_sum(double x) const { return fibers_.warp_sum(x); }
  double warp_max(double x) const { return fibers_.warp_max(x); }
  int warp_first(bool x) const { return fibers_.warp_first(x); }

 private:
  Fibers& fibers_;
  int thread_, threads_;
  Index index_, count_;
  double* shared_;
};

class Device {
 public:
  Device() : workspace(nullptr) {}
  Device(double* memory, Where) : workspace(memory), runs_(true) {}

  block::Workspace workspace;

  Index resident() const { return 3; }

  template <class Body>
  void launch(Index blocks, Index shared, const Body& body) {
    if (!runs_) return;
    // What a GPU would refuse.
    if (shared > block::shared_limit) throw std::runtime_error("a block asks for too much shared memory");
    if (blocks > 0x7fffffff) throw std::runtime_error("a launch of too many blocks");
    const bool fewer = block::any_threads<Body> && order.threads > 0 && order.threads < Body::threads;
    const int threads = fewer ? order.threads : Body::threads;
    std::vector<Index> numbers(static_cast<std::size_t>(blocks));
    std::iota(numbers.begin(), numbers.end(), 0);
    std::mt19937_64 random(order.seed);
    if (order.seed != 0) std::shuffle(numbers.begin(), numbers.end(), random);
    for (const Index index : numbers) {
      // Of exactly this size, so that a sanitizer sees what lies beyond; never zeros that somebody counts on.
      std::vector<double> memory(static_cast<std::size_t>(shared), std::numeric_limits<double>::quiet_NaN());
      fibers_.run(threads, order.seed == 0 ? 0 : random() | 1, [&](int thread) {
        Block block(fibers_, thread, threads, index, blocks, memory.data());
        body(block);
      });
    }
  }

 private:
  static inline thread_local Fibers fibers_;
  bool runs_ = false;
};

}  // namespace grokcurv::emulator
