// The kernels, written once over a vector type. The including unit defines, in an anonymous namespace:
//
//   struct Vec { static constexpr int lanes; ... }   zero, set, load, load_once, load_as<Source>, store; add, sub, mul;
//                                                    fma(a, b, c) = a * b + c; select_less(a, b, then, otherwise);
//                                                    select_nan(a, then, otherwise); sum4(a, b, c, d, float[4]);
//                                                    add_exponent(a, n) = a * 2^(n, held in the low bits);
//                                                    transpose(Vec[lanes])
//   kSquareRows, kSquareMeans                        the register tile of add_squares
//   kTileRows                                        of add_products, by two vectors
//
// and bf16 / f16 below are the storage types. Everything here is in an anonymous namespace too: a function compiled for
// AVX-512 must never be the one that the linker keeps for all.
#include <cmath>
#include <cstring>
#include <limits>

#if defined(__GNUC__) || defined(__clang__)
#define E2CM_PREFETCH(address) __builtin_prefetch(address, 0, 2)
#define E2CM_PREFETCH_NEAR(address) __builtin_prefetch(address, 0, 3)
#else
#define E2CM_PREFETCH(address) static_cast<void>(address)
#define E2CM_PREFETCH_NEAR(address) static_cast<void>(address)
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

// out[r * ld + c] += the lanes of sums[c][r]. Every sum goes through the same tree, whatever tile it comes from.
template <int R, int C>
inline void add_lanes(const Vec (&sums)[C][R], double* out, int64_t ld) {
  E2CM_UNROLL for (int q = 0; q < R * C; q += 4) {
    const auto at = [&](int i) { return i < R * C ? sums[i / R][i % R] : Vec::zero(); };
    alignas(16) float parts[4];
    Vec::sum4(at(q), at(q + 1), at(q + 2), at(q + 3), parts);
    E2CM_UNROLL for (int i = q; i < q + 4; ++i) {
      if (i < R * C) out[i % R * ld + i / R] += parts[i - q];
    }
  }
}

int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// What does not fill a vector: copied and filled up with zeros, to go the same way as the rest.
template <class Source, int N>
struct Tail {
  Source rows[N][kPad] = {};

  Tail(const Source* source, int64_t stride, int64_t count, int64_t n) {
    for (int64_t r = 0; r < count; ++r) std::memcpy(rows[r], source + r * stride, n * sizeof(Source));
  }
};

// ---- few means: the sum of (x - m)^2 itself, of features as they arrive ---------------------------------------------

// R rows x C means, all sums in registers; n a multiple of kPad. `next`: the rows that follow, asked for in time.
template <int R, int C, class Source>
void square(const Source* x, int64_t stride, const Source* next, int64_t n, const float* means, int64_t mean_stride,
            double* squares, int64_t ld) {
  Vec sums[C][R];
  E2CM_UNROLL for (int c = 0; c < C; ++c) { E2CM_UNROLL for (int r = 0; r < R; ++r) sums[c][r] = Vec::zero(); }
  for (int64_t i = 0; i < n; i += Vec::lanes) {
    Vec a[R];
    E2CM_UNROLL for (int r = 0; r < R; ++r) {
      a[r] = Vec::load_as(x + r * stride + i);
      E2CM_PREFETCH(next + r * stride + i);
    }
    E2CM_UNROLL for (int c = 0; c < C; ++c) {
      const Vec m = Vec::load_once(means + c * mean_stride + i);
      E2CM_UNROLL for (int r = 0; r < R; ++r) {
        const Vec difference = Vec::sub(a[r], m);
        sums[c][r] = Vec::fma(difference, difference, sums[c][r]);
      }
    }
  }
  add_lanes<R, C>(sums, squares, ld);
}

template <class Source>
using Squarer = void (*)(const Source*, int64_t, const Source*, int64_t, const float*, int64_t, double*, int64_t);

template <class Source, int R, int C = 1>
Squarer<Source> squarer_of(int64_t means) {
  if constexpr (C == kSquareMeans) {
    return square<R, C, Source>;
  } else {
    return means == C ? square<R, C, Source> : squarer_of<Source, R, C + 1>(means);
  }
}

template <class Source>
void add_squares_as(const Source* x, int64_t stride, int64_t row_count, int64_t n, const float* means,
                    int64_t mean_stride, int64_t mean_count, double* squares, int64_t ld) {
  static_assert(kSquareRows == 2, "one line per height");
  const int64_t whole = n / kPad * kPad, tail = n - whole;
  const int64_t strips = (mean_count + kSquareMeans - 1) / kSquareMeans;
  for (int64_t r = 0; r < row_count; r += kSquareRows) {
    const int64_t count = at_most(kSquareRows, row_count - r);
    const Source* const from = x + r * stride;
    const Source* const next = r + kSquareRows < row_count ? from + kSquareRows * stride : x + n;  // or the next block
    const Tail<Source, kSquareRows> rest(from + whole, stride, tail ? count : 0, tail);
    for (int64_t s = 0; s < strips; ++s) {  // as equal as can be: 10 means are 5 + 5, not 6 + 4
      const int64_t begin = mean_count * s / strips, width = mean_count * (s + 1) / strips - begin;
      const Squarer<Source> run = count == 2 ? squarer_of<Source, 2>(width) : squarer_of<Source, 1>(width);
      const float* const strip = means + begin * mean_stride;
      double* const to = squares + r * ld + begin;
      if (whole) run(from, stride, next, whole, strip, mean_stride, to, ld);
      if (tail) run(rest.rows[0], kPad, rest.rows[0], kPad, strip + whole, mean_stride, to, ld);
    }
  }
}

void add_squares(const void* x, DType dtype, int64_t stride, int64_t row_count, int64_t n, const float* means,
                 int64_t mean_stride, int64_t mean_count, double* squares, int64_t ld) {
  visit(x, dtype, [&](const auto* typed) {
    add_squares_as(typed, stride, row_count, n, means, mean_stride, mean_count, squares, ld);
  });
}

// ---- many means: rows into scratch, means into panels, and their products -------------------------------------------

template <class Source>
void load_row(const Source* source, const float* center, int64_t n, float* row, Vec& norm) {
  for (int64_t i = 0; i < n; i += Vec::lanes) {
    const Vec x = Vec::sub(Vec::load_as(source + i), Vec::load(center + i));
    Vec::store(row + i, x);
    norm = Vec::fma(x, x, norm);
  }
}

const float* or_zeros(const float* center) {
  static const float zeros[kBlock] = {};
  return center ? center : zeros;
}

template <class Source>
void load_block_as(const Source* source, int64_t stride, const float* center, int64_t row_count, int64_t n, float* rows,
                   double* norms) {
  const int64_t whole = n / kPad * kPad, tail = n - whole;
  center = or_zeros(center);
  const Tail<float, 1> offsets(center + whole, 0, 1, tail);
  for (int64_t r = 0; r < row_count; ++r) {
    Vec norm[1][1] = {{Vec::zero()}};
    load_row(source + r * stride, center, whole, rows + r * kStride, norm[0][0]);
    if (tail) {
      const Tail<Source, 1> rest(source + r * stride + whole, 0, 1, tail);
      load_row(rest.rows[0], offsets.rows[0], kPad, rows + r * kStride + whole, norm[0][0]);
    }
    if (norms) add_lanes<1, 1>(norm, norms + r, 0);
  }
}

void load_block(const void* source, DType dtype, int64_t stride, const float* center, int64_t row_count, int64_t n,
                float* rows, double* norms) {
  visit(source, dtype, [&](const auto* typed) { load_block_as(typed, stride, center, row_count, n, rows, norms); });
}

// `lanes` numbers of each of at most `lanes` means, turned: number i of all of them goes to panel[i * width].
template <class Source>
void pack_square(const Source* source, int64_t stride, int64_t mean_count, Vec center, int64_t n, float* panel,
                 int64_t width, Vec& norms) {
  Vec square[Vec::lanes];
  E2CM_UNROLL for (int k = 0; k < Vec::lanes; ++k) {
    square[k] = k < mean_count ? Vec::sub(Vec::load_as(source + k * stride), center) : Vec::zero();
  }
  Vec::transpose(square);
  E2CM_UNROLL for (int i = 0; i < Vec::lanes; ++i) {
    if (i < n) Vec::store(panel + i * width, square[i]);
    norms = Vec::fma(square[i], square[i], norms);
  }
}

template <class Source>
void pack_vector(const Source* source, int64_t stride, const float* center, int64_t mean_count, int64_t n, float* panel,
                 int64_t width, double* norms) {
  for (int64_t begin = 0; begin < n; begin += kChain) {
    Vec sums = Vec::zero();
    for (int64_t i = begin; i < at_most(n, begin + kChain); i += Vec::lanes) {
      if (i + Vec::lanes <= n) {
        pack_square(source + i, stride, mean_count, Vec::load(center + i), n - i, panel + i * width, width, sums);
      } else {
        const Tail<Source, Vec::lanes> rest(source + i, stride, mean_count, n - i);
        const Tail<float, 1> offsets(center + i, 0, 1, n - i);
        pack_square(rest.rows[0], kPad, mean_count, Vec::load(offsets.rows[0]), n - i, panel + i * width, width, sums);
      }
    }
    float parts[Vec::lanes];
    Vec::store(parts, sums);
    for (int64_t k = 0; k < mean_count && norms; ++k) norms[k] += parts[k];
  }
}

void pack_means(const void* source, DType dtype, int64_t stride, const float* center, int64_t mean_count, int64_t n,
                float* panel, double* norms) {
  const int64_t width = mean_count > Vec::lanes ? 2 * Vec::lanes : Vec::lanes;
  visit(source, dtype, [&](const auto* typed) {
    for (int64_t k = 0; k < mean_count; k += Vec::lanes)
      pack_vector(typed + k * stride, stride, or_zeros(center), at_most(Vec::lanes, mean_count - k), n, panel + k,
                  width, norms ? norms + k : nullptr);
  });
}

// R rows x C vectors of means: every sum a lane of its own, so nothing is left to be added up but the chains.
template <int R, int C>
void multiply(const float* rows, const float* panel, int64_t n, double* products, int64_t ld, Ahead ahead) {
  alignas(64) float chains[R][C * Vec::lanes];
  for (int64_t begin = 0; begin < n; begin += kChain) {
    Vec sums[R][C];
    E2CM_UNROLL for (int r = 0; r < R; ++r) { E2CM_UNROLL for (int c = 0; c < C; ++c) sums[r][c] = Vec::zero(); }
    const int64_t end = at_most(n, begin + kChain);
    const int64_t row = begin / kChain;
    // Not just anywhere: asking for a page that does not exist takes long.
    const char* const soon = row < ahead.rows ? ahead.at + row * ahead.stride : reinterpret_cast<const char*>(panel);
    E2CM_UNROLL_2 for (int64_t i = begin; i < end; ++i) {
      const float* const m = panel + i * (C * Vec::lanes);
      Vec means[C];
      E2CM_UNROLL for (int c = 0; c < C; ++c) {
        means[c] = Vec::load_once(m + c * Vec::lanes);
        E2CM_PREFETCH_NEAR(m + (16 * C + c) * Vec::lanes);
      }
      E2CM_PREFETCH(soon + (i - begin) * ahead.block / kChain);
      E2CM_UNROLL for (int r = 0; r < R; ++r) {
        const Vec x = Vec::set(rows[r * kStride + i]);
        E2CM_UNROLL for (int c = 0; c < C; ++c) sums[r][c] = Vec::fma(x, means[c], sums[r][c]);
      }
    }
    E2CM_UNROLL for (int r = 0; r < R; ++r) {
      E2CM_UNROLL for (int c = 0; c < C; ++c) {
        float* const chain = chains[r] + c * Vec::lanes;
        Vec::store(chain, begin ? Vec::add(Vec::load(chain), sums[r][c]) : sums[r][c]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    E2CM_SIMD for (int k = 0; k < C * Vec::lanes; ++k) products[r * ld + k] += static_cast<double>(chains[r][k]);
}

using Multiplier = void (*)(const float*, const float*, int64_t, double*, int64_t, Ahead);

template <int C, int R = 1>
Multiplier multiplier_of(int64_t rows) {
  if constexpr (R == kTileRows) {
    return multiply<R, C>;
  } else {
    return rows == R ? multiply<R, C> : multiplier_of<C, R + 1>(rows);
  }
}

void add_products(const float* rows, int64_t row_count, const float* panel, int64_t mean_count, int64_t n,
                  double* products, int64_t ld, Ahead& means_ahead, Ahead& rows_ahead) {
  const int64_t tiles = (row_count + kTileRows - 1) / kTileRows;
  for (int64_t t = 0; t < tiles; ++t) {  // as equal as can be: a tile of few rows waits for itself
    const int64_t begin = row_count * t / tiles, height = row_count * (t + 1) / tiles - begin;
    const Multiplier run = mean_count > Vec::lanes ? multiplier_of<2>(height) : multiplier_of<1>(height);
    Ahead& ahead = means_ahead.rows > 0 ? means_ahead : rows_ahead;
    run(rows + begin * kStride, panel, n, products + begin * ld, ld, ahead.take_few());
  }
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

uint32_t distance_lanes(const double* sums, int64_t splits, int64_t split_stride, int64_t ld, const double* row_norms,
                        double mean_norm, float scale, float* out) {
  double sum[kLanes], norms[kLanes];
  for (int j = 0; j < kLanes; ++j) sum[j] = sums[j * ld];
  for (int64_t s = 1; s < splits; ++s)
    for (int j = 0; j < kLanes; ++j) sum[j] += sums[s * split_stride + j * ld];
  // Rounding has gone up to one chain and the chains of a block; the subtraction multiplies what it left.
  constexpr double doubt = static_cast<double>(kChain) / kBlock;
  for (int j = 0; j < kLanes; ++j) norms[j] = row_norms ? row_norms[j] + mean_norm : sum[j];
  if (row_norms)
    for (int j = 0; j < kLanes; ++j) sum[j] = norms[j] - 2 * sum[j];
  int32_t doubtful[kLanes];
  E2CM_SIMD for (int j = 0; j < kLanes; ++j) {
    doubtful[j] = !(sum[j] >= norms[j] * doubt) | !(norms[j] >= kTiny) | !(norms[j] <= kHuge);
    out[j] = std::sqrt(static_cast<float>(sum[j])) / scale;
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
  return {name,         2 * Vec::lanes,   load_block,     add_squares,  pack_means,
          add_products, squared_distance, distance_lanes, softmax_lanes};
}

}  // namespace
}  // namespace e2cm
