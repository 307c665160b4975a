// Every kernel of the CPU on numbers of its own, a line each: a checksum of all bytes that it writes. The lines are the
// same whichever compiler and processor there is (tests/test_portable.py).

#include <cmath>
#include <cstdio>
#include <vector>

#include "grokcurv/kernels.h"
#include "grokcurv/numbers.h"

using namespace grokcurv;

namespace {

std::uint64_t state = 1;

// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
std::uint64_t next() {
  std::uint64_t z = state += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

// Of both signs, and of sizes from 2^-8 to 1.
double number() {
  const std::uint64_t bits = next();
  const double mantissa = 1.0 + static_cast<double>(bits >> 12) * 0x1p-52;
  return std::ldexp(bits % 2 == 0 ? mantissa : -mantissa, -1 - static_cast<int>(bits / 2 % 8));
}

template <class T>
std::vector<T> numbers(Index count) {
  std::vector<T> x(count);
  for (T& one : x) one = narrow<T>(number());
  return x;
}

void say(const char* kernel, Type type, Index size, const void* data, std::size_t bytes) {
  std::uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
  for (std::size_t i = 0; i < bytes; ++i) hash = (hash ^ static_cast<const unsigned char*>(data)[i]) * 0x100000001b3;
  std::printf("%s %d %lld %016llx\n", kernel, static_cast<int>(type), static_cast<long long>(size),
              static_cast<unsigned long long>(hash));
}

template <class T>
void say(const char* kernel, Type type, Index size, const std::vector<T>& x) {
  say(kernel, type, size, x.data(), x.size() * sizeof(T));
}

// Runs a task with room of its own.
template <class Task>
void run(Task task, Index (*workspace)(const Task&, int), void (*kernel)(const Task&, int)) {
  std::vector<double> room(workspace(task, 2));
  task.workspace = room.data();
  kernel(task, 2);
}

template <class T>
void of_vectors(Type type, Index size) {
  using C = Compute<T>;
  const Index n = 2;
  const auto theta = numbers<T>(size), g_a = numbers<T>(n * size), g_b = numbers<T>(n * size);
  const auto a2 = numbers<T>(n * size), b2 = numbers<T>(n * size);
  const std::vector<double> eta = {1e-3, 3e-2};
  std::vector<T> moved(n * size);
  run(Perturb{type, n, size, {theta.data(), 0}, g_a.data(), eta.data(), moved.data()}, cpu::perturb_workspace,
      cpu::perturb);
  say("perturb", type, size, moved);

  const Index third = size / 3;
  const std::vector<Index> rows = {0, size, 0, third, third, size}, spans = {0, third, third, size - third};
  const auto values = numbers<C>(size + third);
  const Basis basis{{values.data(), 0}, rows.data(), 2};
  for (const bool bracket : {false, true}) {
    const int sums = commutator_sums(!bracket);
    std::vector<double> found(n * (sums + 2 + 2));
    double* coefficients = found.data() + n * sums;
    std::vector<C> delta(n * size);
    const Strided at{bracket ? nullptr : theta.data(), 0};
    run(Commutator{type,
                   n,
                   size,
                   bracket,
                   g_a.data(),
                   g_b.data(),
                   a2.data(),
                   b2.data(),
                   eta.data(),
                   at,
                   basis,
                   {spans.data(), 2},
                   found.data(),
                   coefficients,
                   coefficients + n * 2,
                   delta.data()},
        cpu::commutator_workspace, cpu::commutator);
    say(bracket ? "bracket" : "difference", type, size, found);
    say("delta", type, size, delta);
  }
  std::vector<double> norms(n), coefficients(n * 2);
  run(SubspaceSplit{type, n, size, g_a.data(), basis, norms.data(), coefficients.data()}, cpu::subspace_split_workspace,
      cpu::subspace_split);
  say("norms", type, size, norms);
  say("coefficients", type, size, coefficients);
  auto filtered = g_a;
  run(SubspaceFilter{type, n, size, filtered.data(), basis, coefficients.data(), 0.7}, cpu::subspace_filter_workspace,
      cpu::subspace_filter);
  say("filtered", type, size, filtered);

  for (const Index count : {Index{1}, Index{5}, Index{13}}) {
    auto x = numbers<T>(count * size);
    const auto y = numbers<T>(3 * size);
    std::vector<double> own(2 * count * count), other(2 * count * 3), away(2 * count * count);
    const Segments segments{spans.data(), 2};
    run(Gram{type, count, count, size, x.data(), nullptr, nullptr, segments, own.data()}, cpu::gram_workspace,
        cpu::gram);
    run(Gram{type, count, 3, size, x.data(), y.data(), nullptr, segments, other.data()}, cpu::gram_workspace,
        cpu::gram);
    run(Gram{type, count, count, size, x.data(), nullptr, theta.data(), segments, away.data()}, cpu::gram_workspace,
        cpu::gram);
    say("gram", type, size, own);
    say("gram of two", type, size, other);
    say("gram about a row", type, size, away);
    const Index outputs = (count + 1) / 2;
    const auto by = numbers<double>(2 * outputs * count), weights = numbers<double>(count);
    std::vector<C> out(outputs * size);
    std::vector<double> mean(size);
    run(Rotate{type, count, outputs, size, x.data(), by.data(), segments, out.data(), mean.data(), weights.data()},
        cpu::rotate_workspace, cpu::rotate);
    say("rotate", type, size, out);
    say("mean", type, size, mean);
    run(Rotate{type, count, outputs, size, x.data(), by.data(), segments, nullptr, nullptr, nullptr},
        cpu::rotate_workspace, cpu::rotate);
    say("rotate in place", type, size, x);
  }
  std::vector<double> sketched(n * 256);
  run(Sketch{type, n, size, 256, 12345, 77, g_b.data(), sketched.data()}, cpu::sketch_workspace, cpu::sketch);
  say("sketch", type, size, sketched);
}

void of_matrices(Index size) {
  std::vector<double> a(2 * size * size);
  for (Index m = 0; m < 2; ++m) {
    for (Index i = 0; i < size; ++i) {
      for (Index j = i; j < size; ++j) a[(m * size + j) * size + i] = a[(m * size + i) * size + j] = number();
    }
  }
  for (const Index leading : {size, std::min<Index>(size, 3)}) {
    std::vector<double> values(2 * leading), vectors(2 * size * leading);
    run(Eigh{2, size, leading, a.data(), values.data(), vectors.data()}, cpu::eigh_workspace, cpu::eigh);
    say("eigenvalues", Type::float64, size, values);
    say("eigenvectors", Type::float64, size, vectors);
  }
}

}  // namespace

int main() {
  for (const Index size : {Index{1}, Index{31}, Index{4099}, Index{20011}}) {
    of_vectors<float>(Type::float32, size);
    of_vectors<double>(Type::float64, size);
    of_vectors<bfloat16>(Type::bfloat16, size);
  }
  for (const Index size : {1, 2, 7, 33, 90}) of_matrices(size);
  const std::vector<Index> seeds = {1, -7}, steps = {0, 4000000000}, n = {97, 4294967296};
  std::vector<Index> drawn(2 * 1003);
  run(Draw{2, 1003, 3, seeds.data(), steps.data(), n.data(), drawn.data()}, cpu::draw_workspace, cpu::draw);
  say("draw", Type::float64, 1003, drawn);
}
