// What the kernels share: launches, loads and conversions, reductions over a warp.
//
// The kernels compile in two ways: with nvcc, and with E2CM_EMULATED as plain C++, where the build provides a
// <cuda_runtime.h> that runs blocks on the CPU. Code that needs a GPU instruction has a plain equivalent here.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../cpu/half.h"

#if defined(__CUDACC__)
#define E2CM_UNROLL _Pragma("unroll")
#define E2CM_UNROLL_8 _Pragma("unroll 8")
#else
#define E2CM_UNROLL
#define E2CM_UNROLL_8
#endif

namespace e2cm {
namespace cuda {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                   Arguments... arguments) {
#ifdef E2CM_EMULATED
  static_cast<void>(stream);
  return emulation::run(grid, block, shared, [&] { kernel(arguments...); });
#else
  // clang-format off: it takes the file for plain C++, where <<< would be a shift
  kernel<<<grid, block, shared, stream>>>(arguments...);
  // clang-format on
  return cudaGetLastError();
#endif
}

__device__ inline char* shared_memory() {
#ifdef E2CM_EMULATED
  return emulation::shared_memory();
#else
  extern __shared__ uint4 memory[];
  return reinterpret_cast<char*>(memory);
#endif
}

// ---- loads and conversions ------------------------------------------------------------------------------------------

__device__ inline float bits_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

__device__ inline uint32_t float_as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(bf16 value) { return bits_as_float(static_cast<uint32_t>(value.bits) << 16); }
__device__ inline float widen(f16 value) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  return to_float(value);
#endif
}

// A 16-bit float of either type, for kernels that take the type at run time.
struct HalfBits {
  uint16_t bits;
};
__device__ inline float widen(float value, DType) { return value; }
__device__ inline float widen(HalfBits value, DType dtype) {
  return dtype == DType::bf16 ? widen(bf16{value.bits}) : widen(f16{value.bits});
}

// 16 bytes of features.
template <class T>
struct Pack {
  static constexpr int size = 16 / static_cast<int>(sizeof(T));
  union {
    uint4 words;
    T values[size];
  };
  __device__ Pack() {}
  // The first `count` of them; the others are zeros.
  __device__ void load(const T* from, int64_t count) {
    words = make_uint4(0, 0, 0, 0);
    E2CM_UNROLL for (int i = 0; i < size; ++i) {
      if (i < count) values[i] = from[i];
    }
  }
};

// For features that are read once: not kept in the first level of cache, where the class vectors are.
__device__ inline uint4 load_streaming(const void* address) {
#ifdef __CUDA_ARCH__
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
#else
  uint4 value;
  memcpy(&value, static_cast<const uint4*>(address), sizeof value);
  return value;
#endif
}

// For values that another block of this launch has written: the first level of cache may hold an old copy.
template <class T>
__device__ inline T load_from_l2(const T* address) {
#ifdef __CUDA_ARCH__
  return __ldcg(address);
#else
  return *address;
#endif
}

__device__ __host__ inline bool is_aligned(const void* address, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) == 0;
}

// Four elements; those from `count` on are zeros. aligned: `from` is a multiple of their size.
template <class T>
__device__ void load_four(const T* from, int64_t count, bool aligned, float (&to)[4]) {
  if (aligned && count >= 4) {
    if constexpr (sizeof(T) == 4) {
      const uint4 words = *reinterpret_cast<const uint4*>(from);
      to[0] = bits_as_float(words.x), to[1] = bits_as_float(words.y);
      to[2] = bits_as_float(words.z), to[3] = bits_as_float(words.w);
    } else {
      const uint2 words = *reinterpret_cast<const uint2*>(from);
      T values[4];
      memcpy(values, &words, sizeof words);
      E2CM_UNROLL for (int i = 0; i < 4; ++i) to[i] = widen(values[i]);
    }
  } else {
    E2CM_UNROLL for (int i = 0; i < 4; ++i) to[i] = i < count ? widen(from[i]) : 0.f;
  }
}

__device__ inline float load_one(const void* row, DType dtype, int64_t at) {
  if (dtype == DType::f32) return static_cast<const float*>(row)[at];
  if (dtype == DType::bf16) return widen(static_cast<const bf16*>(row)[at]);
  return widen(static_cast<const f16*>(row)[at]);
}

__device__ __host__ inline const char* row_of(const Rows& rows, int64_t row) {
  return static_cast<const char*>(rows.data) + row * rows.stride * (rows.dtype == DType::f32 ? 4 : 2);
}

__device__ __host__ inline bool rows_are_aligned(const Rows& rows) {
  return is_aligned(rows.data, 16) && rows.stride * (rows.dtype == DType::f32 ? 4 : 2) % 16 == 0;
}

// ---- reductions over a warp -----------------------------------------------------------------------------------------

template <class Value, class Combine>
__device__ Value warp_reduce(Value value, const Combine& combine) {
  E2CM_UNROLL for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  return value;
}

template <class Value>
__device__ Value warp_sum(Value value) {
  return warp_reduce(value, [](Value a, Value b) { return a + b; });
}

// Sums N values (a power of two up to 32) over all lanes; a lane gets the sum with index lane / (32 / N). In each step
// a lane gives half of its values to its partner and receives the other half: N exchanges instead of 5 N.
template <int offset, int N>
__device__ float warp_reduce_scatter(const float (&values)[N], int lane) {
  const bool upper = lane & offset;
  if constexpr (N == 1) {
    const float sum[1] = {values[0] + __shfl_xor_sync(kAllLanes, values[0], offset)};
    if constexpr (offset > 1) {
      return warp_reduce_scatter<offset / 2>(sum, lane);
    } else {
      return sum[0];
    }
  } else {
    float half[N / 2];
    E2CM_UNROLL for (int i = 0; i < N / 2; ++i) {
      const float given = upper ? values[i] : values[i + N / 2], kept = upper ? values[i + N / 2] : values[i];
      half[i] = kept + __shfl_xor_sync(kAllLanes, given, offset);
    }
    if constexpr (offset > 1) {
      return warp_reduce_scatter<offset / 2>(half, lane);
    } else {
      return half[0];
    }
  }
}

}  // namespace
}  // namespace cuda
}  // namespace e2cm
