// The two 16-bit storage types and their conversion to float. Everything is in an anonymous namespace, because units
// that are compiled for different instruction sets include it (see kernels.inl).
#pragma once

#include <cstdint>
#include <cstring>

#include "../api.h"

namespace e2cm {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }

inline float to_float(f16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));  // infinity, NaN
  if (rest >= 0x0400u) return from_bits(sign | ((rest << 13) + (112u << 23)));          // normal: rebias the exponent
  const float magnitude = static_cast<float>(rest) * 5.9604644775390625e-8f;            // subnormal: rest * 2^-24
  return sign ? -magnitude : magnitude;
}

// Calls body with the pointer cast to its element type.
template <class Body>
auto visit(const void* data, DType dtype, const Body& body) {
  if (dtype == DType::bf16) return body(static_cast<const bf16*>(data));
  if (dtype == DType::f16) return body(static_cast<const f16*>(data));
  return body(static_cast<const float*>(data));
}

}  // namespace
}  // namespace e2cm
