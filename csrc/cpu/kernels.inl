// The kernels, written once over a vector type. The including unit defines, in an anonymous namespace:
//
//   struct Vec { static constexpr int lanes; ... }   zero, set, load, load_once, load_as<Source>, store; add, sub, mul;
//                                                    fma(a, b, c) = a * b + c; select_less(a, b, then, otherwise);
//                                                    select_nan(a, then, otherwise); sum4(a, b, c, d, float[4]);
//                                                    add_exponent(a, n) = a * 2^(n, held in the low bits)
//   kLoadRows, kLoadMeans                            the register tile in which features arrive
//   kTileRows, kTileMeans                            the register tile of add_products
//
// and bf16 / f16 below are the storage types. Everything here is in an anonymous namespace too: a function compiled for
// AVX-512 must never be the one that the linker keeps for all.
#include <cmath>
#include <cstring>
#include <limits>

// The tiles live in registers only if their loops are unrolled before arrays are broken up.
#if defined(__clang__)
#define E2CM_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define E2CM_UNROLL _Pragma("GCC unroll 16")
#else
#define E2CM_UNROLL
#endif
#if defined(__GNUC__) || defined(__clang__)
#define E2CM_PREFETCH(address) __builtin_prefetch(address, 0, 2)
#else
#define E2CM_PREFETCH(address) static_cast<void>(address)
#endif
// One row per lane: these loops should become vectors. Right without it, too.
#if defined(__GNUC__) || defined(__clang__)
#define E2CM_SIMD _Pragma("omp simd")
#else
#define E2CM_SIMD
#endif

namespace e2cm {
namespace {

// ---- sums of lanes --------------------------------------------------------------------------------------------------

// products[c * ld + r] += the lanes of sums[c][r]. Every sum goes through the same tree, whatever tile it comes from.
template <int R, int C>
inline void add_lanes(const Vec (&sums)[C][R], double* products, int64_t ld) {
  E2CM_UNROLL for (int q = 0; q < R * C; q += 4) {
    const auto at = [&](int i) { return i < R * C ? sums[i / R][i % R] : Vec::zero(); };
    alignas(16) float parts[4];
    Vec::sum4(at(q), at(q + 1), at(q + 2), at(q + 3), parts);
    E2CM_UNROLL for (int i = q; i < q + 4; ++i) {
      if (i < R * C) products[i / R * ld + i % R] += parts[i - q];
    }
  }
}

// ---- features as they arrive: loaded, squared, and multiplied by the first means while memory still delivers
// ---------

// R rows of `source`, n a multiple of kPad: their norms, their products with C means, and themselves into `rows` if
// kStore. `next` is where the rows that follow begin: they are asked for while these are worked on.
template <int R, int C, bool kStore, class Source>
void load_and_multiply(const Source* source, int64_t source_stride, const Source* next, const float* center, int64_t n,
                       float* rows, double* row_norms, const float* means, double* products, int64_t ld) {
  Vec x[R], norms[1][R], sums[C > 0 ? C : 1][R];
  E2CM_UNROLL for (int r = 0; r < R; ++r) {
    norms[0][r] = Vec::zero();
    E2CM_UNROLL for (int c = 0; c < C; ++c) sums[c][r] = Vec::zero();
  }
  for (int64_t i = 0; i < n; i += Vec::lanes) {
    const Vec offset = Vec::load_once(center + i);
    E2CM_UNROLL for (int r = 0; r < R; ++r) {
      const Source* const at = source + r * source_stride + i;
      E2CM_PREFETCH(next + r * source_stride + i);
      x[r] = Vec::sub(Vec::load_as(at), offset);
      if (kStore) Vec::store(rows + r * kStride + i, x[r]);
      norms[0][r] = Vec::fma(x[r], x[r], norms[0][r]);
    }
    E2CM_UNROLL for (int c = 0; c < C; ++c) {
      const Vec m = Vec::load_once(means + c * kStride + i);
      E2CM_UNROLL for (int r = 0; r < R; ++r) sums[c][r] = Vec::fma(x[r], m, sums[c][r]);
    }
  }
  add_lanes<R, 1>(norms, row_norms, 0);
  if constexpr (C > 0) add_lanes<R, C>(sums, products, ld);
}

template <class Source>
using Loader = void (*)(const Source*, int64_t, const Source*, const float*, int64_t, float*, double*, const float*,
                        double*, int64_t);

// The loader for so many means; it stores rows if more means follow than it can take, or if there are none.
template <class Source, int R, int C = 0>
Loader<Source> loader_of(int64_t means) {
  if constexpr (C == kLoadMeans) {
    return means > C ? load_and_multiply<R, C, true, Source> : load_and_multiply<R, C, false, Source>;
  } else {
    return means == C ? load_and_multiply<R, C, C == 0, Source> : loader_of<Source, R, C + 1>(means);
  }
}

// ---- products of rows and means, both in scratch --------------------------------------------------------------------

// R rows x C means, all sums in registers.
template <int R, int C>
void multiply(const float* rows, const float* means, int64_t n, double* products, int64_t ld) {
  Vec x[R], sums[C][R];
  E2CM_UNROLL for (int c = 0; c < C; ++c) { E2CM_UNROLL for (int r = 0; r < R; ++r) sums[c][r] = Vec::zero(); }
  for (int64_t i = 0; i < n; i += Vec::lanes) {
    E2CM_UNROLL for (int r = 0; r < R; ++r) x[r] = Vec::load(rows + r * kStride + i);
    E2CM_UNROLL for (int c = 0; c < C; ++c) {
      const Vec m = Vec::load_once(means + c * kStride + i);
      E2CM_UNROLL for (int r = 0; r < R; ++r) sums[c][r] = Vec::fma(x[r], m, sums[c][r]);
    }
  }
  add_lanes<R, C>(sums, products, ld);
}

using Multiplier = void (*)(const float*, const float*, int64_t, double*, int64_t);

template <int R, int C = 1>
Multiplier multiplier_of(int64_t means) {
  if constexpr (C == kTileMeans) {
    return multiply<R, C>;
  } else {
    return means == C ? multiply<R, C> : multiplier_of<R, C + 1>(means);
  }
}

Multiplier multiplier_of(int64_t rows, int64_t means) {
  static_assert(kTileRows == 4, "one line per height");
  return rows == 1   ? multiplier_of<1>(means)
         : rows == 2 ? multiplier_of<2>(means)
         : rows == 3 ? multiplier_of<3>(means)
                     : multiplier_of<4>(means);
}

int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

void add_products(const float* rows, int64_t row_count, const float* means, int64_t mean_count, int64_t n,
                  double* products, int64_t ld) {
  const int64_t whole = n / kPad * kPad;
  const int64_t strips = (mean_count + kTileMeans - 1) / kTileMeans;
  for (int64_t s = 0; s < strips; ++s) {  // as equal as can be: 10 means are 5 + 5, not 6 + 4
    const int64_t begin = mean_count * s / strips, width = mean_count * (s + 1) / strips - begin;
    const float* const strip = means + begin * kStride;
    const Multiplier full = multiplier_of(kTileRows, width);
    for (int64_t r = 0; r < row_count; r += kTileRows) {
      const Multiplier run = r + kTileRows <= row_count ? full : multiplier_of(row_count - r, width);
      const float* const from = rows + r * kStride;
      double* const to = products + begin * ld + r;
      if (whole) run(from, strip, whole, to, ld);
      if (whole < n) run(from + whole, strip + whole, kPad, to, ld);  // apart, as load_block does: the same bits
    }
  }
}

template <class Source>
void load_block_as(const Source* source, int64_t stride, const float* center, int64_t row_count, int64_t n, float* rows,
                   double* row_norms, const float* means, int64_t mean_count, double* products, int64_t ld) {
  static_assert(kLoadRows == 2, "one line per height");
  static const float no_center[kBlock] = {};
  if (!center) center = no_center;
  const Loader<Source> pair = loader_of<Source, 2>(mean_count), single = loader_of<Source, 1>(mean_count);
  const int64_t whole = n / kPad * kPad, tail = n - whole;
  // What does not fill a vector is copied and filled up with zeros, then goes the same way as the rest.
  Source copies[2][kPad] = {};
  float offsets[kPad] = {};
  if (tail) std::memcpy(offsets, center + whole, tail * sizeof(float));
  for (int64_t r = 0; r < row_count; r += kLoadRows) {
    const int64_t count = at_most(kLoadRows, row_count - r);
    const Loader<Source> load = count == kLoadRows ? pair : single;
    const Source* const from = source + r * stride;
    const Source* const next = r + kLoadRows < row_count ? from + kLoadRows * stride : source + n;  // or the next block
    if (whole) load(from, stride, next, center, whole, rows + r * kStride, row_norms + r, means, products + r, ld);
    if (!tail) continue;
    for (int64_t i = 0; i < count; ++i) std::memcpy(copies[i], from + i * stride + whole, tail * sizeof(Source));
    load(copies[0], kPad, copies[0], offsets, kPad, rows + r * kStride + whole, row_norms + r, means + whole,
         products + r, ld);
  }
  if (mean_count > kLoadMeans)
    add_products(rows, row_count, means + kLoadMeans * kStride, mean_count - kLoadMeans, n, products + kLoadMeans * ld,
                 ld);
}

void load_block(const void* source, DType dtype, int64_t stride, const float* center, int64_t row_count, int64_t n,
                float* rows, double* row_norms, const float* means, int64_t mean_count, double* products, int64_t ld) {
  visit(source, dtype, [&](const auto* typed) {
    load_block_as(typed, stride, center, row_count, n, rows, row_norms, means, mean_count, products, ld);
  });
}

// ---- distance the long way ------------------------------------------------------------------------------------------

template <class X, class Mean>
double squared_distance_as(const X* x, const Mean* mean, int64_t n) {
  constexpr int64_t step = 4 * Vec::lanes;  // four chains of sums: one would wait for itself
  Vec sums[1][4] = {{Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()}};
  const auto add = [&](const X* a, const Mean* b) {
    E2CM_UNROLL for (int u = 0; u < 4; ++u) {
      const Vec difference = Vec::sub(Vec::load_as(a + u * Vec::lanes), Vec::load_as(b + u * Vec::lanes));
      sums[0][u] = Vec::fma(difference, difference, sums[0][u]);
    }
  };
  int64_t i = 0;
  for (; i + step <= n; i += step) add(x + i, mean + i);
  if (i < n) {
    X x_rest[step] = {};
    Mean mean_rest[step] = {};
    std::memcpy(x_rest, x + i, (n - i) * sizeof(X));
    std::memcpy(mean_rest, mean + i, (n - i) * sizeof(Mean));
    add(x_rest, mean_rest);
  }
  double parts[4] = {};
  add_lanes<4, 1>(sums, parts, 0);
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

double squared_distance(const void* x, DType x_dtype, const void* mean, DType mean_dtype, int64_t n) {
  return visit(x, x_dtype, [&](const auto* a) {
    return visit(mean, mean_dtype, [&](const auto* b) {
      double total = 0;
      for (int64_t i = 0; i < n; i += kBlock) total += squared_distance_as(a + i, b + i, at_most(kBlock, n - i));
      return total;
    });
  });
}

// ---- distances from norms and products, one row per lane ------------------------------------------------------------

uint32_t distance_lanes(const double* products, int64_t splits, int64_t split_stride, const double* row_norms,
                        double mean_norm, float scale, float* out) {
  double sum[kLanes];
  for (int j = 0; j < kLanes; ++j) sum[j] = products[j];
  for (int64_t s = 1; s < splits; ++s)
    for (int j = 0; j < kLanes; ++j) sum[j] += products[s * split_stride + j];
  // Rounding has gone up to one chain of sums, kBlock / lanes long; the subtraction multiplies what it left.
  constexpr double doubt = 1.0 / Vec::lanes;
  int32_t doubtful[kLanes];
  E2CM_SIMD for (int j = 0; j < kLanes; ++j) {
    const double norms = row_norms[j] + mean_norm;
    const double square = norms - 2 * sum[j];
    doubtful[j] = !(square >= norms * doubt) | !(norms >= kTiny) | !(norms <= kHuge);
    out[j] = std::sqrt(static_cast<float>(square)) / scale;
  }
  uint32_t mask = 0;
  for (int j = 0; j < kLanes; ++j) mask |= static_cast<uint32_t>(doubtful[j]) << j;
  return mask;
}

// ---- softmax, one row per lane --------------------------------------------------------------------------------------

// exp(x) for -87 <= x <= 0, to 2 ulp: a power of two times a polynomial. Adding 1.5 * 2^23 rounds x / log(2) to an
// integer and leaves it in the low bits, from where add_exponent moves it into the exponent.
inline Vec exp_of_negative(Vec x) {
  const Vec magic = Vec::set(12582912.f);
  const Vec shifted = Vec::fma(x, Vec::set(1.44269504088896341f), magic);
  const Vec n = Vec::sub(shifted, magic);
  const Vec r = Vec::fma(n, Vec::set(2.12194440e-4f), Vec::fma(n, Vec::set(-0.693359375f), x));
  Vec p = Vec::set(1.9875691500e-4f);
  p = Vec::fma(p, r, Vec::set(1.3981999507e-3f));
  p = Vec::fma(p, r, Vec::set(8.3334519073e-3f));
  p = Vec::fma(p, r, Vec::set(4.1665795894e-2f));
  p = Vec::fma(p, r, Vec::set(1.6666665459e-1f));
  p = Vec::fma(p, r, Vec::set(5.0000001201e-1f));
  p = Vec::add(Vec::fma(Vec::mul(p, r), r, r), Vec::set(1.f));
  return Vec::add_exponent(p, shifted);
}

void softmax_lanes(const float* z, int64_t classes, float* best, int64_t* prediction, float* sum, float* weighted) {
  constexpr float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const Vec zero = Vec::zero(), least = Vec::set(-87.f);
  for (int64_t j = 0; j < kLanes; j += Vec::lanes) {
    Vec low = Vec::set(inf), winner = zero, spoiled = zero;
    for (int64_t k = 0; k < classes; ++k) {
      const Vec value = Vec::load(z + k * kLanes + j);
      winner = Vec::select_less(value, low, Vec::set(static_cast<float>(k)), winner);
      low = Vec::select_less(value, low, value, low);
      spoiled = Vec::select_nan(value, Vec::set(1.f), spoiled);
    }
    Vec total = zero, moment = zero;
    for (int64_t k = 0; k < classes; ++k) {
      const Vec x = Vec::sub(low, Vec::load(z + k * kLanes + j));
      const Vec e = Vec::select_less(x, least, zero, exp_of_negative(Vec::select_less(x, least, least, x)));
      total = Vec::add(total, e);
      moment = Vec::fma(e, Vec::select_less(x, least, zero, x), moment);
    }
    float lows[Vec::lanes], winners[Vec::lanes], bad[Vec::lanes];
    Vec::store(lows, low), Vec::store(winners, winner), Vec::store(bad, spoiled);
    Vec::store(sum + j, total), Vec::store(weighted + j, moment);
    for (int i = 0; i < Vec::lanes; ++i) {
      const bool valid = bad[i] == 0.f && lows[i] < inf && lows[i] > -inf;
      best[j + i] = valid ? lows[i] : nan;
      prediction[j + i] = valid ? static_cast<int64_t>(winners[i]) : 0;
      if (!valid) sum[j + i] = weighted[j + i] = nan;
    }
  }
}

constexpr Kernels table(const char* name) {
  return {name, load_block, kLoadMeans, add_products, squared_distance, distance_lanes, softmax_lanes};
}

}  // namespace
}  // namespace e2cm
