// Compiler hints for the hot loops. Where a compiler has no such hint (MSVC) the macro is empty: slower, same results.
#pragma once

#if defined(__GNUC__) || defined(__clang__)

// Into the second level of cache, or into the first.
#define E2CM_PREFETCH(address) __builtin_prefetch(address, 0, 2)
#define E2CM_PREFETCH_L1(address) __builtin_prefetch(address, 0, 3)
// A loop over lanes that should become vector instructions.
#define E2CM_SIMD _Pragma("omp simd")
// Keeps a loaded value in a register. Otherwise compilers fold the load into every instruction that uses the value, and
// memory is read as often as it is used. kind: the register constraint of the instruction set.
#define E2CM_IN_REGISTER(value, kind) __asm__("" : "+" kind(value))

#else

#define E2CM_PREFETCH(address) static_cast<void>(address)
#define E2CM_PREFETCH_L1(address) static_cast<void>(address)
#define E2CM_SIMD
#define E2CM_IN_REGISTER(value, kind) static_cast<void>(0)

#endif

// Register tiles are arrays. They stay in registers only if their loops are unrolled before the compiler splits arrays
// into scalars.
#if defined(__clang__)
#define E2CM_UNROLL _Pragma("unroll")
#define E2CM_UNROLL_2 _Pragma("unroll 2")
#elif defined(__GNUC__)
#define E2CM_UNROLL _Pragma("GCC unroll 32")
#define E2CM_UNROLL_2 _Pragma("GCC unroll 2")
#else
#define E2CM_UNROLL
#define E2CM_UNROLL_2
#endif
