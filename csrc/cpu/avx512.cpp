// AVX-512 (F, BW, DQ, VL): 16 floats per register, 32 registers. A GEMM tile of 14 rows x 2 vectors keeps 28 sums.
#include <immintrin.h>

#include "compiler.h"
#include "half.h"
#include "kernels.h"

namespace e2cm {
namespace {

constexpr int kDirectRows = 4, kDirectSums = 24, kGemmRows = 14;

struct Vec {
  static constexpr int lanes = 16;
  __m512 v;
  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load_to_register(const float* p) {
    Vec a = load(p);
    E2CM_IN_REGISTER(a.v, "v");
    return a;
  }
  static void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
  static Vec set(float a) { return {_mm512_set1_ps(a)}; }
  static Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  static Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static Vec select_less(Vec a, Vec b, Vec then, Vec otherwise) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), otherwise.v, then.v)};
  }
  static Vec select_nan(Vec a, Vec then, Vec otherwise) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), otherwise.v, then.v)};
  }
  static Vec add_exponent(Vec a, Vec n) {
    return {_mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_slli_epi32(_mm512_castps_si512(n.v), 23)))};
  }
  static Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec sum) { return {_mm512_fmadd_ps(a.v, b.v, sum.v)}; }
  static Vec load_as(const float* p) { return load(p); }
  static Vec load_as(const bf16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static Vec load_as(const f16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  template <int first>
  static Vec align(Vec a, Vec b) {
    return {_mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(b.v), _mm512_castps_si512(a.v), first))};
  }
  static void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
    const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_store_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }
};

inline void transpose_square(Vec (&a)[Vec::lanes]) {
  __m512 b[Vec::lanes];
  E2CM_UNROLL for (int i = 0; i < Vec::lanes; i += 2) {  // pairs, fours, then the quarters of the registers
    b[i] = _mm512_unpacklo_ps(a[i].v, a[i + 1].v);
    b[i + 1] = _mm512_unpackhi_ps(a[i].v, a[i + 1].v);
  }
  __m512 c[Vec::lanes];
  E2CM_UNROLL for (int i = 0; i < Vec::lanes; i += 4) {
    c[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
    c[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xEE);
    c[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    c[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xEE);
  }
  E2CM_UNROLL for (int i = 0; i < 4; ++i) {
    const __m512 even_low = _mm512_shuffle_f32x4(c[i], c[i + 4], 0x88);
    const __m512 odd_low = _mm512_shuffle_f32x4(c[i], c[i + 4], 0xDD);
    const __m512 even_high = _mm512_shuffle_f32x4(c[i + 8], c[i + 12], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(c[i + 8], c[i + 12], 0xDD);
    a[i].v = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    a[i + 4].v = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    a[i + 8].v = _mm512_shuffle_f32x4(even_low, even_high, 0xDD);
    a[i + 12].v = _mm512_shuffle_f32x4(odd_low, odd_high, 0xDD);
  }
}

}  // namespace
}  // namespace e2cm

#include "kernels.inl"

namespace e2cm {
const Kernels* avx512_kernels() {
  static constexpr Kernels kernels = table("avx512");
  return &kernels;
}
}  // namespace e2cm
