#pragma once

// The threads of a block, on one thread of the CPU: each runs until it waits for others, then another takes over.

#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <source_location>
#include <string>
#include <vector>

#include "grokcurv/vectors.h"

namespace grokcurv::emulator {

// How the threads of all blocks take turns, until it is set anew.
struct Order {
  std::uint64_t seed = 0;  // of the order in which they run between two barriers; 0: by number
  int threads = 0;         // of a block, for algorithms that leave the number open, if that is fewer; 0: as on the GPU
  std::string skipped;     // the barrier that every thread runs through, as file:line; empty: none

  // The barriers of the source that threads have come to.
  struct Barrier {
    std::source_location place;
    std::string name;
  };
  std::vector<Barrier> met;

  bool skips(const std::source_location& place);
};
extern Order order;

class Fibers {
 public:
  Fibers();
  ~Fibers();

  // Runs body(0), ..., body(threads - 1) until all have returned. Throws what one of them throws, and
  // std::runtime_error if some wait where others never come.
  void run(int threads, std::uint64_t seed, const std::function<void(int)>& body);

  // For the thread that runs now: wait for all the others; exchange numbers with the 32 of its warp.
  void sync(const std::source_location& place);
  // Where the n of thread t begin at n t, until this thread exchanges again.
  const double* exchange(const double* own, int n);
  double warp_sum(double x);
  double warp_max(double x);
  int warp_first(bool x);

 private:
  struct Fiber;
  enum class State { ready, at_barrier, at_warp, done };

  static void enter();
  Fiber& running() { return *fibers_[running_]; }
  void wait(State state);

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<std::vector<double>> seen_;  // of each warp, what its threads gave last
  std::vector<int> ready_;
  const std::function<void(int)>* body_ = nullptr;
  std::exception_ptr failure_;  // of a thread
  bool shuffled_ = false;
  std::mt19937_64 random_;
  int running_ = 0;
  struct Switch;
  std::unique_ptr<Switch> home_;
};

}  // namespace grokcurv::emulator
