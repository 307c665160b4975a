// The table of instruction sets. Every kernel is compiled once for each, from the same source, into a namespace of its
// own; the functions that the headers promise look up the chosen one here.

#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

#include "grokcurv/kernels.h"

namespace grokcurv::cpu {

#define GROKCURV_DECLARE(Task, kernel, isa)   \
  namespace isa {                             \
  void kernel(const Task& task, int threads); \
  }
#define GROKCURV_FIELD(Task, kernel, isa) void (*kernel)(const Task& task, int threads);
#define GROKCURV_ENTRY(Task, kernel, isa) isa::kernel,

GROKCURV_EACH_KERNEL(GROKCURV_DECLARE, isa_default)
#ifdef __x86_64__
GROKCURV_EACH_KERNEL(GROKCURV_DECLARE, isa_v3)
GROKCURV_EACH_KERNEL(GROKCURV_DECLARE, isa_v4)
#endif

namespace {

struct Kernels {
  Isa isa;
  GROKCURV_EACH_KERNEL(GROKCURV_FIELD, cpu)
};

#ifdef __x86_64__
// By their parts: Clang knows the levels by name from 18 on. What else is in a level no processor lacks that has these.
bool supports_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}
bool supports_v4() {
  return supports_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const std::vector<Kernels>& table() {
  static const std::vector<Kernels> kernels = {
      {{"default", true}, GROKCURV_EACH_KERNEL(GROKCURV_ENTRY, isa_default)},
#ifdef __x86_64__
      {{"v3", supports_v3()}, GROKCURV_EACH_KERNEL(GROKCURV_ENTRY, isa_v3)},
      {{"v4", supports_v4()}, GROKCURV_EACH_KERNEL(GROKCURV_ENTRY, isa_v4)},
#endif
  };
  return kernels;
}

const Kernels& choose() {
  const char* variable = std::getenv("GROKCURV_ISA");
  const std::string wanted = variable == nullptr ? "" : variable;
  const Kernels* best = nullptr;
  std::string names;
  for (const Kernels& kernels : table()) {
    const Isa& isa = kernels.isa;
    names += (names.empty() ? "" : ", ") + isa.name;
    if (isa.name == wanted && !isa.runs_here) {
      throw std::runtime_error("GROKCURV_ISA=" + wanted + ": this processor lacks x86-64-" + wanted);
    }
    if (isa.runs_here && (wanted.empty() || isa.name == wanted)) best = &kernels;
  }
  if (best == nullptr) throw std::runtime_error("GROKCURV_ISA=" + wanted + ": compiled for " + names);
  return *best;
}

const Kernels& chosen() {
  static const Kernels& kernels = choose();
  return kernels;
}

}  // namespace

std::vector<Isa> compiled_isas() {
  std::vector<Isa> isas;
  for (const Kernels& kernels : table()) isas.push_back(kernels.isa);
  return isas;
}

std::string chosen_isa() {
  return chosen().isa.name;
}

#define GROKCURV_FORWARD(Task, kernel, core)   \
  void kernel(const Task& task, int threads) { \
    chosen().kernel(task, threads);            \
  }
GROKCURV_EACH_KERNEL(GROKCURV_FORWARD, cpu)

}  // namespace grokcurv::cpu
