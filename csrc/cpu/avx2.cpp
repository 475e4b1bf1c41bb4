// AVX2 with FMA and F16C: 8 floats per register, 16 registers. A GEMM tile of 6 rows x 2 vectors keeps 12 sums.
#include <immintrin.h>

#include "compiler.h"
#include "half.h"
#include "kernels.h"

namespace e2cm {
namespace {

constexpr int kDirectRows = 2, kDirectSums = 10, kGemmRows = 6;

struct Vec {
  static constexpr int lanes = 8;
  __m256 v;
  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load_to_register(const float* p) {
    Vec a = load(p);
    E2CM_IN_REGISTER(a.v, "x");
    return a;
  }
  static void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
  static Vec set(float a) { return {_mm256_set1_ps(a)}; }
  static Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  static Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  static Vec select_less(Vec a, Vec b, Vec then, Vec otherwise) {
    return {_mm256_blendv_ps(otherwise.v, then.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
  }
  static Vec select_nan(Vec a, Vec then, Vec otherwise) {
    return {_mm256_blendv_ps(otherwise.v, then.v, _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q))};
  }
  static Vec add_exponent(Vec a, Vec n) {
    return {_mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(a.v), _mm256_slli_epi32(_mm256_castps_si256(n.v), 23)))};
  }
  static Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec sum) { return {_mm256_fmadd_ps(a.v, b.v, sum.v)}; }
  static Vec load_as(const float* p) { return load(p); }
  static Vec load_as(const bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static Vec load_as(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  template <int first>
  static Vec align(Vec a, Vec b) {
    const __m256i middle = _mm256_castps_si256(_mm256_permute2f128_ps(a.v, b.v, 0x21));
    const __m256i low = first < 4 ? _mm256_castps_si256(a.v) : middle;
    const __m256i high = first < 4 ? middle : _mm256_castps_si256(b.v);
    return {_mm256_castsi256_ps(_mm256_alignr_epi8(high, low, first % 4 * 4))};
  }
  static void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c.v, d.v), _mm256_unpackhi_ps(c.v, d.v));
    const __m256 abcd = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
    _mm_store_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
  }
};

inline void transpose_square(Vec (&a)[Vec::lanes]) {
  __m256 b[Vec::lanes];
  for (int i = 0; i < Vec::lanes; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i].v, a[i + 1].v);
    b[i + 1] = _mm256_unpackhi_ps(a[i].v, a[i + 1].v);
  }
  __m256 c[Vec::lanes];
  for (int i = 0; i < Vec::lanes; i += 4) {
    c[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    c[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xEE);
    c[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    c[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    a[i].v = _mm256_permute2f128_ps(c[i], c[i + 4], 0x20);
    a[i + 4].v = _mm256_permute2f128_ps(c[i], c[i + 4], 0x31);
  }
}

}  // namespace
}  // namespace e2cm

#include "kernels.inl"

namespace e2cm {
const Kernels* avx2_kernels() {
  static constexpr Kernels kernels = table("avx2");
  return &kernels;
}
}  // namespace e2cm
