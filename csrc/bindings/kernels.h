#pragma once

// The kernels of a core in its Python module: numbers and addresses (as integers) in, exceptions out. Whoever calls has
// checked them: see grokcurv/ops/. The source that includes this says which core, as GROKCURV_CORE; its namespace has
// all kernels, and Where, what they run on.

#include <pybind11/pybind11.h>

#include <cstdint>

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

namespace core = grokcurv::GROKCURV_CORE;

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

// m.name(allocate, where, ...): what follows makes the task. allocate(n) returns the address of n doubles that live
// until it has been carried out.
template <class Task, class... Arguments>
void define(py::module_& m, const char* name, Task (*make)(Arguments...), Index (*workspace)(const Task&, core::Where),
            void (*run)(const Task&, core::Where)) {
  m.def(name, [=](const py::function& allocate, Address place, Arguments... arguments) {
    Task task = make(arguments...);
    const auto where = (core::Where)(place);
    const Index doubles = workspace(task, where);
    if (doubles > 0) task.workspace = at<double>(allocate(doubles).template cast<Address>());
    const py::gil_scoped_release unlocked;
    run(task, where);
  });
}

void define_kernels(py::module_& m) {
  m.attr("FLOAT32") = static_cast<int>(Type::float32);
  m.attr("FLOAT64") = static_cast<int>(Type::float64);
  m.attr("BFLOAT16") = static_cast<int>(Type::bfloat16);

  define(
      m, "perturb",
      +[](int type, Index vectors, Index size, Address theta, Address directions, Address eta, Address out) {
        return Perturb{.type = Type{type},
                       .vectors = vectors,
                       .size = size,
                       .theta = at(theta),
                       .directions = at(directions),
                       .eta = at<double>(eta),
                       .out = at(out),
                       .workspace = nullptr};
      },
      core::perturb_workspace, core::perturb);

  define(
      m, "commutator",
      +[](int type, Index vectors, Index size, bool bracket, Address g_a, Address g_b, Address a2, Address b2,
          Address eta, Address theta, Address values, Address rows, Index row_count, Address spans, Index span_count,
          Address sums, Address coefficients, Address energies, Address delta) {
        return Commutator{.type = Type{type},
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
                          .workspace = nullptr};
      },
      core::commutator_workspace, core::commutator);

  define(
      m, "subspace_split",
      +[](int type, Index vectors, Index size, Address v, Address values, Address rows, Index row_count, Address norm2,
          Address coefficients) {
        return SubspaceSplit{.type = Type{type},
                             .vectors = vectors,
                             .size = size,
                             .v = at(v),
                             .basis = basis(values, rows, row_count),
                             .norm2 = at<double>(norm2),
                             .coefficients = at<double>(coefficients),
                             .workspace = nullptr};
      },
      core::subspace_split_workspace, core::subspace_split);

  define(
      m, "subspace_filter",
      +[](int type, Index vectors, Index size, Address g, Address values, Address rows, Index row_count,
          Address coefficients, double strength) {
        return SubspaceFilter{.type = Type{type},
                              .vectors = vectors,
                              .size = size,
                              .g = at(g),
                              .basis = basis(values, rows, row_count),
                              .coefficients = at<double>(coefficients),
                              .strength = strength,
                              .workspace = nullptr};
      },
      core::subspace_filter_workspace, core::subspace_filter);

  define(
      m, "gram",
      +[](int type, Index x_rows, Index y_rows, Index size, Address x, Address y, Address origin, Address spans,
          Index span_count, Address out) {
        return Gram{.type = Type{type},
                    .x_rows = x_rows,
                    .y_rows = y_rows,
                    .size = size,
                    .x = at(x),
                    .y = at(y),
                    .origin = at(origin),
                    .segments = segments(spans, span_count),
                    .out = at<double>(out),
                    .workspace = nullptr};
      },
      core::gram_workspace, core::gram);

  define(
      m, "eigh",
      +[](Index matrices, Index size, Index leading, Address a, Address values, Address vectors) {
        return Eigh{.matrices = matrices,
                    .size = size,
                    .leading = leading,
                    .a = at<double>(a),
                    .values = at<double>(values),
                    .vectors = at<double>(vectors),
                    .workspace = nullptr};
      },
      core::eigh_workspace, core::eigh);

  define(
      m, "rotate",
      +[](int type, Index inputs, Index outputs, Index size, Address rows, Address coefficients, Address spans,
          Index span_count, Address out, Address mean, Address weights) {
        return Rotate{.type = Type{type},
                      .inputs = inputs,
                      .outputs = outputs,
                      .size = size,
                      .rows = at(rows),
                      .coefficients = at<double>(coefficients),
                      .segments = segments(spans, span_count),
                      .out = at(out),
                      .mean = at<double>(mean),
                      .weights = at<double>(weights),
                      .workspace = nullptr};
      },
      core::rotate_workspace, core::rotate);

  define(
      m, "sketch",
      +[](int type, Index vectors, Index size, Index outputs, std::uint64_t seed, Index start, Address x, Address out) {
        return Sketch{.type = Type{type},
                      .vectors = vectors,
                      .size = size,
                      .outputs = outputs,
                      .seed = seed,
                      .start = start,
                      .x = at(x),
                      .out = at<double>(out),
                      .workspace = nullptr};
      },
      core::sketch_workspace, core::sketch);
}

}  // namespace
