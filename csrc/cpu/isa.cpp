// The table of instruction sets. Every kernel is compiled once for each, from the same source, into a namespace of its
// own; the functions that the headers promise look up the chosen one here.

#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

#include "grokcurv/commutator.h"
#include "grokcurv/eigh.h"
#include "grokcurv/gram.h"
#include "grokcurv/perturb.h"
#include "grokcurv/rotate.h"
#include "grokcurv/sketch.h"
#include "grokcurv/subspace.h"

namespace grokcurv::cpu {

template <class Task>
using Kernel = void(const Task&, int threads);

struct Kernels {
  Isa isa;
  Kernel<Perturb>& perturb;
  Kernel<Commutator>& commutator;
  Kernel<SubspaceSplit>& subspace_split;
  Kernel<SubspaceFilter>& subspace_filter;
  Kernel<Gram>& gram;
  Kernel<Eigh>& eigh;
  Kernel<Rotate>& rotate;
  Kernel<Sketch>& sketch;
};

#define GROKCURV_DECLARE(isa)             \
  namespace isa {                         \
  Kernel<Perturb> perturb;                \
  Kernel<Commutator> commutator;          \
  Kernel<SubspaceSplit> subspace_split;   \
  Kernel<SubspaceFilter> subspace_filter; \
  Kernel<Gram> gram;                      \
  Kernel<Eigh> eigh;                      \
  Kernel<Rotate> rotate;                  \
  Kernel<Sketch> sketch;                  \
  }
#define GROKCURV_KERNELS(isa)                                                                                  \
  isa::perturb, isa::commutator, isa::subspace_split, isa::subspace_filter, isa::gram, isa::eigh, isa::rotate, \
      isa::sketch

GROKCURV_DECLARE(isa_default)
#ifdef __x86_64__
GROKCURV_DECLARE(isa_v3)
GROKCURV_DECLARE(isa_v4)
#endif

namespace {

const std::vector<Kernels>& table() {
  static const std::vector<Kernels> kernels = {
      {{"default", true}, GROKCURV_KERNELS(isa_default)},
#ifdef __x86_64__
      {{"v3", __builtin_cpu_supports("x86-64-v3") != 0}, GROKCURV_KERNELS(isa_v3)},
      {{"v4", __builtin_cpu_supports("x86-64-v4") != 0}, GROKCURV_KERNELS(isa_v4)},
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

void perturb(const Perturb& task, int threads) {
  chosen().perturb(task, threads);
}
void commutator(const Commutator& task, int threads) {
  chosen().commutator(task, threads);
}
void subspace_split(const SubspaceSplit& task, int threads) {
  chosen().subspace_split(task, threads);
}
void subspace_filter(const SubspaceFilter& task, int threads) {
  chosen().subspace_filter(task, threads);
}
void gram(const Gram& task, int threads) {
  chosen().gram(task, threads);
}
void eigh(const Eigh& task, int threads) {
  chosen().eigh(task, threads);
}
void rotate(const Rotate& task, int threads) {
  chosen().rotate(task, threads);
}
void sketch(const Sketch& task, int threads) {
  chosen().sketch(task, threads);
}

}  // namespace grokcurv::cpu
