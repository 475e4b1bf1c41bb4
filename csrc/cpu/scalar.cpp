// Portable C++ for any machine: vectors of four floats, which compilers map to whatever the machine has.
#include <utility>

#include "compiler.h"
#include "half.h"
#include "kernels.h"

namespace e2cm {
namespace {

constexpr int kDirectRows = 2, kDirectSums = 4, kGemmRows = 4;

struct Vec {
  static constexpr int lanes = 4;
  float v[lanes];
  static Vec zero() { return {{0.f, 0.f, 0.f, 0.f}}; }
  template <class Source>
  static Vec load_as(const Source* p) {
    return {{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
  }
  static Vec load(const float* p) { return load_as(p); }
  static Vec load_to_register(const float* p) { return load_as(p); }
  static void store(float* p, Vec a) {
    for (int i = 0; i < lanes; ++i) p[i] = a.v[i];
  }
  static Vec set(float a) { return {{a, a, a, a}}; }
  static Vec add(Vec a, Vec b) {
    for (int i = 0; i < lanes; ++i) a.v[i] += b.v[i];
    return a;
  }
  static Vec mul(Vec a, Vec b) {
    for (int i = 0; i < lanes; ++i) a.v[i] *= b.v[i];
    return a;
  }
  static Vec max(Vec a, Vec b) {
    for (int i = 0; i < lanes; ++i) a.v[i] = a.v[i] < b.v[i] ? b.v[i] : a.v[i];
    return a;
  }
  static Vec select_less(Vec a, Vec b, Vec then, Vec otherwise) {
    for (int i = 0; i < lanes; ++i) otherwise.v[i] = a.v[i] < b.v[i] ? then.v[i] : otherwise.v[i];
    return otherwise;
  }
  static Vec select_nan(Vec a, Vec then, Vec otherwise) {
    for (int i = 0; i < lanes; ++i) otherwise.v[i] = a.v[i] != a.v[i] ? then.v[i] : otherwise.v[i];
    return otherwise;
  }
  static Vec add_exponent(Vec a, Vec n) {
    for (int i = 0; i < lanes; ++i) {
      uint32_t bits, power;
      std::memcpy(&bits, a.v + i, sizeof bits), std::memcpy(&power, n.v + i, sizeof power);
      a.v[i] = from_bits(bits + (power << 23));
    }
    return a;
  }
  static Vec sub(Vec a, Vec b) {
    Vec out;
    for (int i = 0; i < lanes; ++i) out.v[i] = a.v[i] - b.v[i];
    return out;
  }
  static Vec fma(Vec a, Vec b, Vec c) {
    for (int i = 0; i < lanes; ++i) c.v[i] += a.v[i] * b.v[i];
    return c;
  }
  static float sum(Vec a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }
  template <int first>
  static Vec align(Vec a, Vec b) {
    for (int i = 0; i < lanes; ++i) a.v[i] = first + i < lanes ? a.v[first + i] : b.v[first + i - lanes];
    return a;
  }
  static void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
    out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
  }
};

inline void transpose_square(Vec (&a)[Vec::lanes]) {
  for (int i = 0; i < Vec::lanes; ++i)
    for (int j = 0; j < i; ++j) std::swap(a[i].v[j], a[j].v[i]);
}

}  // namespace
}  // namespace e2cm

#include "kernels.inl"

namespace e2cm {
const Kernels* scalar_kernels() {
  static constexpr Kernels kernels = table("scalar");
  return &kernels;
}
}  // namespace e2cm
