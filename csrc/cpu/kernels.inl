// The kernels of one unit, written once over a vector type. The including unit (scalar, avx2, avx512, neon) defines, in
// an anonymous namespace:
//
//   struct Vec                      `lanes` floats:
//     zero, set, load, store        load_as<Source> also converts bf16 and f16
//     load_to_register              a load that is not folded into the instructions that use it
//     add, sub, mul, fma(a, b, c)   fma is a * b + c
//     max(a, b)                     any value if one of them is NaN
//     select_less(a, b, then, otherwise), select_nan(a, then, otherwise)
//     add_exponent(a, n)            a * 2^n, n in the low bits
//     align<first>(a, b)            elements first ... first + lanes - 1 of the concatenation of a and b
//     sum4(a, b, c, d, float[4])    the sums over the lanes of each
//   transpose_square(Vec[lanes])    not a member: in a member, the array would be of an incomplete type
//   kDirectRows, kDirectSums        rows (a power of two) and accumulators of a register tile of direct.inl
//   kGemmRows                       rows of a register tile of gemm.inl, which is two vectors wide
//
// Everything here is in an anonymous namespace, and nothing is taken from the standard library that could become a
// function of its own (std::min, std::fill). The linker keeps one copy of each inline or template function for the
// whole program: it must not be one that was compiled for AVX-512.
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

namespace e2cm {
namespace {

int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

// out[c * ld + r] += the sum over the lanes of sums[c][r]. Every sum is reduced in the same order, whatever the tile:
// a row has the same bits in any batch.
template <int R, int C>
inline void add_lanes(const Vec (&sums)[C][R], double* out, int64_t ld) {
  E2CM_UNROLL for (int q = 0; q < R * C; q += 4) {
    const auto at = [&](int i) { return i < R * C ? sums[i / R][i % R] : Vec::zero(); };
    alignas(16) float parts[4];
    Vec::sum4(at(q), at(q + 1), at(q + 2), at(q + 3), parts);
    if constexpr (R % 4 == 0) {
      double* const to = out + q / R * ld + q % R;
      E2CM_SIMD for (int i = 0; i < 4; ++i) to[i] += static_cast<double>(parts[i]);
    } else {
      E2CM_UNROLL for (int i = q; i < q + 4; ++i) {
        if (i < R * C) out[i / R * ld + i % R] += parts[i - q];
      }
    }
  }
}

// The elements that do not fill a vector, copied and zero-padded: they take the same code as the others.
template <class Source, int N>
struct Tail {
  Source rows[N][kPad] = {};

  Tail(const Source* source, int64_t stride, int64_t count, int64_t n) {
    for (int64_t r = 0; r < count; ++r) std::memcpy(rows[r], source + r * stride, n * sizeof(Source));
  }
};

}  // namespace
}  // namespace e2cm

#include "direct.inl"
#include "gemm.inl"
#include "pooling.inl"
#include "softmax.inl"
#include "transpose.inl"

namespace e2cm {
namespace {

constexpr Kernels table(const char* name) {
  return {name,       2 * Vec::lanes, load_block,       add_squares,    add_dots,
          pack_means, add_products,   squared_distance, distance_lanes, softmax_lanes,
          add_cells,  pad_circular,   add_pairs,        average,        transpose};
}

}  // namespace
}  // namespace e2cm
