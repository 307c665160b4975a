#pragma once

#include <string>
#include <vector>

namespace grokcurv::cpu {

// An instruction set for which the kernels were compiled.
struct Isa {
  std::string name;
  bool runs_here;
};

// From the plainest to the widest.
std::vector<Isa> compiled_isas();

// The one in use: the widest that runs here, or the one that the environment variable GROKCURV_ISA names. Throws
// std::runtime_error if that was not compiled or does not run here.
std::string chosen_isa();

}  // namespace grokcurv::cpu
