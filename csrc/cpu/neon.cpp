// NEON (64-bit Arm): 4 floats per register, 32 registers. A GEMM tile of 12 rows x 2 vectors keeps 24 sums.
#include <arm_neon.h>

#include "compiler.h"
#include "half.h"
#include "kernels.h"

namespace e2cm {
namespace {

constexpr int kDirectRows = 4, kDirectSums = 24, kGemmRows = 12;

struct Vec {
  static constexpr int lanes = 4;
  float32x4_t v;
  static Vec zero() { return {vdupq_n_f32(0.f)}; }
  static Vec load(const float* p) { return {vld1q_f32(p)}; }
  static Vec load_to_register(const float* p) {
    Vec a = load(p);
    E2CM_IN_REGISTER(a.v, "w");
    return a;
  }
  static void store(float* p, Vec a) { vst1q_f32(p, a.v); }
  static Vec set(float a) { return {vdupq_n_f32(a)}; }
  static Vec add(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
  static Vec max(Vec a, Vec b) { return {vmaxq_f32(a.v, b.v)}; }
  static Vec mul(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
  static Vec select_less(Vec a, Vec b, Vec then, Vec otherwise) {
    return {vbslq_f32(vcltq_f32(a.v, b.v), then.v, otherwise.v)};
  }
  static Vec select_nan(Vec a, Vec then, Vec otherwise) {
    return {vbslq_f32(vceqq_f32(a.v, a.v), otherwise.v, then.v)};
  }
  static Vec add_exponent(Vec a, Vec n) {
    return {vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a.v), vshlq_n_s32(vreinterpretq_s32_f32(n.v), 23)))};
  }
  static Vec sub(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec sum) { return {vfmaq_f32(sum.v, a.v, b.v)}; }
  static Vec load_as(const float* p) { return load(p); }
  static Vec load_as(const bf16* p) {
    const uint16x4_t bits = vld1_u16(reinterpret_cast<const uint16_t*>(p));
    return {vreinterpretq_f32_u32(vshll_n_u16(bits, 16))};
  }
  static Vec load_as(const f16* p) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))))};
  }
  template <int first>
  static Vec align(Vec a, Vec b) {
    return {vextq_f32(a.v, b.v, first)};
  }
  static void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(a.v, b.v), vpaddq_f32(c.v, d.v)));
  }
};

inline void transpose_square(Vec (&a)[Vec::lanes]) {
  const float32x4x2_t low = vtrnq_f32(a[0].v, a[1].v), high = vtrnq_f32(a[2].v, a[3].v);
  a[0].v = vcombine_f32(vget_low_f32(low.val[0]), vget_low_f32(high.val[0]));
  a[1].v = vcombine_f32(vget_low_f32(low.val[1]), vget_low_f32(high.val[1]));
  a[2].v = vcombine_f32(vget_high_f32(low.val[0]), vget_high_f32(high.val[0]));
  a[3].v = vcombine_f32(vget_high_f32(low.val[1]), vget_high_f32(high.val[1]));
}

}  // namespace
}  // namespace e2cm

#include "kernels.inl"

namespace e2cm {
const Kernels* neon_kernels() {
  static constexpr Kernels kernels = table("neon");
  return &kernels;
}
}  // namespace e2cm
