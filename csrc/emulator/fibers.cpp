#undef _FORTIFY_SOURCE  // whose longjmp ends a program that leaves for another stack

#include "emulator/fibers.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <utility>

#include "block/block.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace grokcurv::emulator {

namespace {

constexpr std::size_t stack_bytes = 256 * 1024;
constexpr int warp = block::warp;

thread_local Fibers* current = nullptr;

}  // namespace

Order order;

bool Order::skips(const std::source_location& place) {
  for (const Barrier& barrier : met) {
    if (barrier.place.line() == place.line() && barrier.place.file_name() == place.file_name()) {
      return barrier.name == skipped;
    }
  }
  const auto file = std::filesystem::path(place.file_name()).filename().string();
  met.push_back({place, file + ":" + std::to_string(place.line())});
  return met.back().name == skipped;
}

// A place to switch to: a fiber's beginning, or where it was left, which takes no system call as swapcontext would. The
// address sanitizer must be told which stack that is.
struct Fibers::Switch {
  ucontext_t beginning;
  jmp_buf left;
  bool begun = false;
  void* stack = nullptr;
  std::size_t size = 0;
  void* fake = nullptr;

  void leave_for(Switch& other, [[maybe_unused]] bool for_good) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, other.stack, other.size);
#endif
    begun = true;
    if (_setjmp(left) == 0) {
      if (other.begun) _longjmp(other.left, 1);
      setcontext(&other.beginning);
    }
    arrived(nullptr);
  }

  // On this stack, coming from `origin` if that is not known yet.
  void arrived([[maybe_unused]] Switch* origin) {
#ifdef __SANITIZE_ADDRESS__
    const void* bottom = nullptr;
    std::size_t size = 0;
    __sanitizer_finish_switch_fiber(fake, &bottom, &size);
    if (origin != nullptr) {
      origin->stack = const_cast<void*>(bottom);
      origin->size = size;
    }
#endif
  }
};

struct Fibers::Fiber {
  Switch at;
  State state = State::ready;
  std::vector<double> given;  // to its warp

  Fiber() {
    at.stack = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at.stack == MAP_FAILED) throw std::bad_alloc();
    at.size = stack_bytes;
  }
  ~Fiber() { munmap(at.stack, stack_bytes); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
};

Fibers::Fibers() : home_(std::make_unique<Switch>()) {}
Fibers::~Fibers() = default;

void Fibers::enter() {
  Fibers& fibers = *current;
  Fiber& self = fibers.running();
  self.at.arrived(fibers.home_.get());
  try {
    (*fibers.body_)(fibers.running_);
  } catch (...) {
    fibers.failure_ = std::current_exception();
  }
  self.state = State::done;
  self.at.leave_for(*fibers.home_, true);
}

void Fibers::run(int threads, std::uint64_t seed, const std::function<void(int)>& body) {
  while (fibers_.size() < static_cast<std::size_t>(threads)) fibers_.push_back(std::make_unique<Fiber>());
  shuffled_ = seed != 0;
  body_ = &body;
  current = this;
  seen_.resize(static_cast<std::size_t>(block::divided_up(threads, warp)));
  random_.seed(seed);
  ready_.clear();
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = *fibers_[t];
    fiber.state = State::ready;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(fiber.at.stack, fiber.at.size);  // of frames that were left and never returned from
#endif
    getcontext(&fiber.at.beginning);
    fiber.at.beginning.uc_stack = {fiber.at.stack, 0, fiber.at.size};
    fiber.at.beginning.uc_link = nullptr;
    makecontext(&fiber.at.beginning, &Fibers::enter, 0);
    fiber.at.begun = false;
    fiber.at.fake = nullptr;
    ready_.push_back(t);
  }

  const auto count = [&](State state, int first, int last) {
    const auto is = [&](const auto& fiber) { return fiber->state == state; };
    return std::count_if(fibers_.begin() + first, fibers_.begin() + last, is);
  };
  const auto release = [&](int first, int last) {
    for (int t = first; t < last; ++t) {
      fibers_[t]->state = State::ready;
      ready_.push_back(t);
    }
  };
  for (;;) {
    while (!ready_.empty()) {
      const std::size_t last = ready_.size() - 1;
      const auto place = shuffled_ ? std::uniform_int_distribution<std::size_t>(0, last)(random_) : 0;
      running_ = ready_[place];
      ready_.erase(ready_.begin() + static_cast<std::ptrdiff_t>(place));
      home_->leave_for(running().at, false);
      if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
      const int first = running_ / warp * warp;
      if (count(State::at_warp, first, first + warp) < warp) continue;
      // All have given theirs, so that none still looks at what they gave before.
      std::vector<double>& seen = seen_[static_cast<std::size_t>(first / warp)];
      seen.clear();
      for (int t = first; t < first + warp; ++t) {
        const std::vector<double>& given = fibers_[t]->given;
        if (given.size() != fibers_[first]->given.size()) {
          throw std::runtime_error("the threads of a warp exchange different things");
        }
        seen.insert(seen.end(), given.begin(), given.end());
      }
      release(first, first + warp);
    }
    const auto in = [&](State state) { return count(state, 0, threads); };
    if (in(State::done) == threads) return;
    if (in(State::at_barrier) != threads) {
      throw std::runtime_error("block of " + std::to_string(threads) +
                               " threads: " + std::to_string(in(State::at_barrier)) + " wait at a barrier, " +
                               std::to_string(in(State::at_warp)) + " for their warp, and " +
                               std::to_string(in(State::done)) + " have returned");
    }
    release(0, threads);
  }
}

void Fibers::wait(State state) {
  running().state = state;
  running().at.leave_for(*home_, false);
}

void Fibers::sync(const std::source_location& place) {
  if (!order.skips(place)) wait(State::at_barrier);
}

const double* Fibers::exchange(const double* own, int n) {
  running().given.assign(own, own + n);
  wait(State::at_warp);
  return seen_[static_cast<std::size_t>(running_ / warp)].data();
}

// In pairs at a distance of 16, 8, ... 1, as on the GPU.
double Fibers::warp_sum(double x) {
  double sums[warp];
  std::copy_n(exchange(&x, 1), warp, sums);
  for (int distance = warp / 2; distance > 0; distance /= 2) {
    for (int k = 0; k < distance; ++k) sums[k] += sums[k + distance];
  }
  return sums[0];
}

double Fibers::warp_max(double x) {
  const double* all = exchange(&x, 1);
  for (int k = 0; k < warp; ++k) x = std::fmax(x, all[k]);
  return x;
}

int Fibers::warp_first(bool x) {
  const double own = x ? 1.0 : 0.0;
  const double* all = exchange(&own, 1);
  return static_cast<int>(std::find(all, all + warp, 1.0) - all);
}

}  // namespace grokcurv::emulator
