#pragma once

// The kernels of a core in its Python module: numbers and addresses (as integers) in, exceptions out. Whoever calls has
// checked them: see grokcurv/ops/. The source that includes this says which core, as GROKCURV_CORE; its namespace has
// all kernels, and Where, what they run on.

#include <pybind11/pybind11.h>

#include <cstdint>

#include "grokcurv/kernels.h"

namespace py = pybind11;
using namespace grokcurv;

namespace {

namespace core = grokcurv::GROKCURV_CORE;

// An integer in Python, here whatever pointer the task has in that place.
struct Address {
  std::uintptr_t value;

  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(value);
  }
};

}  // namespace

template <>
struct py::detail::type_caster<Address> {
  PYBIND11_TYPE_CASTER(Address, const_name("int"));

  bool load(handle source, bool convert) {
    type_caster<std::uintptr_t> integer;
    if (!integer.load(source, convert)) return false;
    value = {integer};
    return true;
  }
};

namespace {

// m.name(allocate, where, ...): what follows makes the task, in the order of its fields. allocate(n) returns the
// address of n doubles that live until it has been carried out.
template <class Task, class... Arguments>
void define(py::module_& m, const char* name, Index (*workspace)(const Task&, core::Where),
            void (*run)(const Task&, core::Where), Task (*make)(Arguments...)) {
  m.def(name, [=](const py::function& allocate, std::uintptr_t place, Arguments... arguments) {
    Task task = make(arguments...);
    const auto where = (core::Where)(place);
    const Index doubles = workspace(task, where);
    if (doubles > 0) task.workspace = allocate(doubles).template cast<Address>();
    const py::gil_scoped_release unlocked;
    run(task, where);
  });
}

void define_kernels(py::module_& m) {
  m.attr("FLOAT32") = static_cast<int>(Type::float32);
  m.attr("FLOAT64") = static_cast<int>(Type::float64);
  m.attr("BFLOAT16") = static_cast<int>(Type::bfloat16);

  define(
      m, "perturb", core::perturb_workspace, core::perturb,
      +[](int type, Index vectors, Index size, Address theta, Index theta_stride, Address directions, Address eta,
          Address out) { return Perturb{Type{type}, vectors, size, {theta, theta_stride}, directions, eta, out}; });
  define(
      m, "commutator", core::commutator_workspace, core::commutator,
      +[](int type, Index vectors, Index size, bool bracket, Address g_a, Address g_b, Address a2, Address b2,
          Address eta, Address theta, Index theta_stride, Address values, Index values_stride, Address rows,
          Index row_count, Address spans, Index span_count, Address sums, Address coefficients, Address energies,
          Address delta) {
        const Basis basis{{values, values_stride}, rows, row_count};
        const Segments segments{spans, span_count};
        return Commutator{Type{type}, vectors,  size, bracket,      g_a,      g_b,  a2, b2, eta, {theta, theta_stride},
                          basis,      segments, sums, coefficients, energies, delta};
      });
  define(
      m, "subspace_split", core::subspace_split_workspace, core::subspace_split,
      +[](int type, Index vectors, Index size, Address v, Address values, Index values_stride, Address rows,
          Index row_count, Address norm2, Address coefficients) {
        const Basis basis{{values, values_stride}, rows, row_count};
        return SubspaceSplit{Type{type}, vectors, size, v, basis, norm2, coefficients};
      });
  define(
      m, "subspace_filter", core::subspace_filter_workspace, core::subspace_filter,
      +[](int type, Index vectors, Index size, Address g, Address values, Index values_stride, Address rows,
          Index row_count, Address coefficients, double strength) {
        const Basis basis{{values, values_stride}, rows, row_count};
        return SubspaceFilter{Type{type}, vectors, size, g, basis, coefficients, strength};
      });
  define(
      m, "gram", core::gram_workspace, core::gram,
      +[](int type, Index x_rows, Index y_rows, Index size, Address x, Address y, Address origin, Address spans,
          Index span_count,
          Address out) { return Gram{Type{type}, x_rows, y_rows, size, x, y, origin, {spans, span_count}, out}; });
  define(
      m, "eigh", core::eigh_workspace, core::eigh,
      +[](Index matrices, Index size, Index leading, Address a, Address values, Address vectors) {
        return Eigh{matrices, size, leading, a, values, vectors};
      });
  define(
      m, "rotate", core::rotate_workspace, core::rotate,
      +[](int type, Index inputs, Index outputs, Index size, Address rows, Address coefficients, Address spans,
          Index span_count, Address out, Address mean, Address weights) {
        return Rotate{Type{type}, inputs, outputs, size, rows, coefficients, {spans, span_count}, out, mean, weights};
      });
  define(
      m, "sketch", core::sketch_workspace, core::sketch,
      +[](int type, Index vectors, Index size, Index outputs, std::uint64_t seed, Index start, Address x, Address out) {
        return Sketch{Type{type}, vectors, size, outputs, seed, start, x, out};
      });
  define(
      m, "draw", core::draw_workspace, core::draw,
      +[](Index runs, Index rows, std::uint32_t purpose, Address seeds, Address steps, Address n, Address out) {
        return Draw{runs, rows, purpose, seeds, steps, n, out};
      });
}

}  // namespace
