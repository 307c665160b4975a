#pragma once

// Runs block algorithms on the CPU, to test them: one block after the other, the threads of a block by turns, in an
// order that changes with a seed. A missing barrier then shows as a wrong result.

#include <algorithm>
#include <cstring>
#include <deque>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "block/block.h"
#include "emulator/fibers.h"
#include "emulator/kernels.h"

namespace grokcurv::emulator {

// The copies of a thread that are on their way. They are made when they are waited for and no sooner, so that a wait
// that is missing, or for too few, shows.
class Copies {
 public:
  void add(void* to, const void* from, std::size_t bytes) { pending_.push_back({to, from, bytes, group_}); }
  void commit() { ++group_; }
  void wait(int n) {
    while (!pending_.empty() && pending_.front().group + n < group_) {
      std::memcpy(pending_.front().to, pending_.front().from, pending_.front().bytes);
      pending_.pop_front();
    }
  }

 private:
  struct Copy {
    void* to;
    const void* from;
    std::size_t bytes;
    Index group;
  };
  std::deque<Copy> pending_;
  Index group_ = 0;  // that is open
};

class Block {
 public:
  Block(Fibers& fibers, Copies& copies, int thread, int threads, Index index, Index count, double* shared)
      : fibers_(fibers),
        copies_(copies),
        thread_(thread),
        threads_(threads),
        index_(index),
        count_(count),
        shared_(shared) {}

  int thread() const { return thread_; }
  int threads() const { return threads_; }
  Index index() const { return index_; }
  Index count() const { return count_; }
  double* shared() const { return shared_; }
  void sync(const std::source_location& place = std::source_location::current()) const { fibers_.sync(place); }
  double warp_sum(double x) const { return fibers_.warp_sum(x); }
  double warp_max(double x) const { return fibers_.warp_max(x); }
  int warp_first(bool x) const { return fibers_.warp_first(x); }
  template <int depth, int rows, int columns, class Needed>
  void warp_multiply(const double (&a)[rows][depth / 2], const double (&b)[columns][depth / 4],
                     double (&c)[rows][columns][4], const Needed& needed) const {
    constexpr int of_a = depth / 2, of_b = depth / 4, before_b = rows * of_a, all = before_b + columns * of_b;
    double own[all];
    std::copy_n(&a[0][0], before_b, own);
    std::copy_n(&b[0][0], columns * of_b, own + before_b);
    const double* given = fibers_.exchange(own, all);
    const int group = thread_ % block::warp / 4, member = thread_ % 4;
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < columns; ++j) {
        for (int e = 0; e < 4 && needed(i, j); ++e) {
          for (int k = 0; k < depth; ++k) {
            const double* has_a = given + (4 * group + k % 4) * all;
            const double* has_b = given + (4 * (2 * member + e % 2) + k % 4) * all;
            c[i][j][e] = std::fma(has_a[i * of_a + k / 4 * 2 + e / 2], has_b[before_b + j * of_b + k / 4], c[i][j][e]);
          }
        }
      }
    }
  }
  // What is not aligned to its size, or to 16 bytes, a GPU would refuse.
  template <class T>
  void copy(T* to, const T* from) const {
    constexpr std::uintptr_t piece = sizeof(T) < 16 ? sizeof(T) : 16;
    if ((reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from)) % piece != 0) {
      throw std::runtime_error("a copy to shared memory is not aligned");
    }
    copies_.add(to, from, sizeof(T));
  }
  void commit() const { copies_.commit(); }
  template <int n>
  void wait() const {
    copies_.wait(n);
  }

 private:
  Fibers& fibers_;
  Copies& copies_;
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
      std::vector<Copies> copies(static_cast<std::size_t>(threads));
      fibers_.run(threads, order.seed == 0 ? 0 : random() | 1, [&](int thread) {
        Block block(fibers_, copies[static_cast<std::size_t>(thread)], thread, threads, index, blocks, memory.data());
        body(block);
      });
    }
  }

 private:
  static inline thread_local Fibers fibers_;
  bool runs_ = false;
};

}  // namespace grokcurv::emulator
