// grokcurv._cpu: pointers (as integers) and sizes in, exceptions out. Whoever calls has checked them: see
// grokcurv/ops.py.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <string>

#include "cpu/isa.h"
#include "grokcurv/commutator.h"
#include "grokcurv/eigh.h"
#include "grokcurv/gram.h"
#include "grokcurv/perturb.h"
#include "grokcurv/rotate.h"
#include "grokcurv/sketch.h"
#include "grokcurv/subspace.h"

namespace py = pybind11;
using namespace grokcurv;

namespace {

using Address = std::uintptr_t;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Basis basis(Address values, Address rows, Index count) {
  return {at(values), at<Index>(rows), count};
}
Segments segments(Address spans, Index count) {
  return {at<Index>(spans), count};
}

std::map<std::string, bool> isas() {
  std::map<std::string, bool> result;
  for (const cpu::Isa& isa : cpu::compiled_isas()) result[isa.name] = isa.runs_here;
  return result;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.attr("FLOAT32") = static_cast<int>(Type::float32);
  m.attr("FLOAT64") = static_cast<int>(Type::float64);
  m.attr("BFLOAT16") = static_cast<int>(Type::bfloat16);
  m.attr("CHUNK") = chunk;
  m.attr("COMPILER") = GROKCURV_COMPILER;
  m.attr("FLAGS") = GROKCURV_FLAGS;
  m.attr("BUILD_TYPE") = GROKCURV_BUILD_TYPE;
  m.attr("OPENMP") = _OPENMP;
  m.attr("ISA") = cpu::chosen_isa();
  m.attr("ISAS") = isas();

  const py::call_guard<py::gil_scoped_release> unlocked;

  m.def(
      "perturb",
      [](int type, Index vectors, Index size, Address theta, Address directions, Address eta, Address out,
         int threads) {
        const Perturb task{.type = Type{type},
                           .vectors = vectors,
                           .size = size,
                           .theta = at(theta),
                           .directions = at(directions),
                           .eta = at<double>(eta),
                           .out = at(out)};
        cpu::perturb(task, threads);
      },
      unlocked);

  m.def(
      "commutator",
      [](int type, Index vectors, Index size, bool bracket, Address g_a, Address g_b, Address a2, Address b2,
         Address eta, Address theta, Address values, Address rows, Index row_count, Address spans, Index span_count,
         Address sums, Address coefficients, Address energies, Address delta, Address workspace, int threads) {
        const Commutator task{.type = Type{type},
                              .vectors = vectors,
                              .size = size,
                              .bracket = bracket,
                              .g_a = at(g_a),
                              .g_b = at(g_b),
                              .a2 = at(a2),
                              .b2 = at(b2),
                              .eta = at<double>(eta),
                              .theta = at(theta),
                              .basis = basis(values, rows, row_count),
                              .segments = segments(spans, span_count),
                              .sums = at<double>(sums),
                              .coefficients = at<double>(coefficients),
                              .energies = at<double>(energies),
                              .delta = at(delta),
                              .workspace = at<double>(workspace)};
        cpu::commutator(task, threads);
      },
      unlocked);

  m.def(
      "subspace_split",
      [](int type, Index vectors, Index size, Address v, Address values, Address rows, Index row_count, Address norm2,
         Address coefficients, Address workspace, int threads) {
        const SubspaceSplit task{.type = Type{type},
                                 .vectors = vectors,
                                 .size = size,
                                 .v = at(v),
                                 .basis = basis(values, rows, row_count),
                                 .norm2 = at<double>(norm2),
                                 .coefficients = at<double>(coefficients),
                                 .workspace = at<double>(workspace)};
        cpu::subspace_split(task, threads);
      },
      unlocked);

  m.def(
      "subspace_filter",
      [](int type, Index vectors, Index size, Address g, Address values, Address rows, Index row_count,
         Address coefficients, double strength, int threads) {
        const SubspaceFilter task{.type = Type{type},
                                  .vectors = vectors,
                                  .size = size,
                                  .g = at(g),
                                  .basis = basis(values, rows, row_count),
                                  .coefficients = at<double>(coefficients),
                                  .strength = strength};
        cpu::subspace_filter(task, threads);
      },
      unlocked);

  m.def("gram_workspace", [](Index x_rows, Index y_rows) { return gram_workspace(x_rows, y_rows); });
  m.def(
      "gram",
      [](int type, Index x_rows, Index y_rows, Index size, Address x, Address y, Address origin, Address spans,
         Index span_count, Address out, Address workspace, int threads) {
        const Gram task{.type = Type{type},
                        .x_rows = x_rows,
                        .y_rows = y_rows,
                        .size = size,
                        .x = at(x),
                        .y = at(y),
                        .origin = at(origin),
                        .segments = segments(spans, span_count),
                        .out = at<double>(out),
                        .workspace = at<double>(workspace)};
        cpu::gram(task, threads);
      },
      unlocked);

  m.def("eigh_workspace", [](Index size) { return eigh_workspace(size); });
  m.def(
      "eigh",
      [](Index matrices, Index size, Index leading, Address a, Address values, Address vectors, Address workspace,
         int threads) {
        const Eigh task{.matrices = matrices,
                        .size = size,
                        .leading = leading,
                        .a = at<double>(a),
                        .values = at<double>(values),
                        .vectors = at<double>(vectors),
                        .workspace = at<double>(workspace)};
        cpu::eigh(task, threads);
      },
      unlocked);

  m.def("rotate_workspace", [](Index inputs) { return rotate_workspace(inputs); });
  m.def(
      "rotate",
      [](int type, Index inputs, Index outputs, Index size, Address rows, Address coefficients, Address spans,
         Index span_count, Address out, Address mean, Address weights, Address workspace, int threads) {
        const Rotate task{.type = Type{type},
                          .inputs = inputs,
                          .outputs = outputs,
                          .size = size,
                          .rows = at(rows),
                          .coefficients = at<double>(coefficients),
                          .segments = segments(spans, span_count),
                          .out = at(out),
                          .mean = at<double>(mean),
                          .weights = at<double>(weights),
                          .workspace = at<double>(workspace)};
        cpu::rotate(task, threads);
      },
      unlocked);

  m.def("sketch_workspace", [](Index vectors, Index size, Index outputs, Index start) {
    return sketch_workspace(vectors, size, outputs, start);
  });
  m.def(
      "sketch",
      [](int type, Index vectors, Index size, Index outputs, std::uint64_t seed, Index start, Address x, Address out,
         Address workspace, int threads) {
        const Sketch task{.type = Type{type},
                          .vectors = vectors,
                          .size = size,
                          .outputs = outputs,
                          .seed = seed,
                          .start = start,
                          .x = at(x),
                          .out = at<double>(out),
                          .workspace = at<double>(workspace)};
        cpu::sketch(task, threads);
      },
      unlocked);
}
