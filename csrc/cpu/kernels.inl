// The kernels, written once over a vector type. The including unit defines, in an anonymous namespace:
//
//   struct Vec { static constexpr int lanes; ... }   zero, set, load, load_once, load_as<Source>, store; add, sub, mul;
//                                                    max(a, b), anything if one is NaN;
//                                                    fma(a, b, c) = a * b + c; select_less(a, b, then, otherwise);
//                                                    select_nan(a, then, otherwise); sum4(a, b, c, d, float[4]);
//                                                    add_exponent(a, n) = a * 2^(n, held in the low bits);
//                                                    transpose(Vec[lanes])
//   kSquareRows, kSquareSums                         rows (a power of two) and sums of a register tile of add_squares
//   kTileRows                                        of add_products, by two vectors
//
// and bf16 / f16 below are the storage types. Everything here is in an anonymous namespace too: a function compiled for
// AVX-512 must never be the one that the linker keeps for all.
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

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

// out[c * ld + r] += the lanes of sums[c][r]. Every sum goes through the same tree, whatever tile it comes from.
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

int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// What does not fill a vector: copied and filled up with zeros, to go the same way as the rest.
template <class Source, int N>
struct Tail {
  Source rows[N][kPad] = {};

  Tail(const Source* source, int64_t stride, int64_t count, int64_t n) {
    for (int64_t r = 0; r < count; ++r) std::memcpy(rows[r], source + r * stride, n * sizeof(Source));
  }
};

// ---- few means: the sum of (x - m)^2 or x * m itself, of features as they arrive ------------------------------------

inline Vec add_square(Vec x, Vec m, Vec sum) {
  const Vec difference = Vec::sub(x, m);
  return Vec::fma(difference, difference, sum);
}

// What will be needed next: some rows, from `at` on, of as many numbers of `size` bytes as are worked on meanwhile.
struct Soon {
  const char* at;
  int64_t stride, size;
};

// R rows x C means, all sums in registers; n a multiple of kPad.
template <bool squares, int R, int C, class Source>
void compare(const Source* x, int64_t stride, int64_t n, const float* means, int64_t mean_stride, Soon soon, double* to,
             int64_t ld) {
  Vec sums[C][R];
  E2CM_UNROLL for (int c = 0; c < C; ++c) { E2CM_UNROLL for (int r = 0; r < R; ++r) sums[c][r] = Vec::zero(); }
  for (int64_t i = 0; i < n; i += Vec::lanes) {
    Vec a[R];
    E2CM_UNROLL for (int r = 0; r < R; ++r) {
      a[r] = Vec::load_as(x + r * stride + i);
      E2CM_PREFETCH(soon.at + r * soon.stride);
    }
    soon.at += Vec::lanes * soon.size;
    E2CM_UNROLL for (int c = 0; c < C; ++c) {
      const Vec m = Vec::load_once(means + c * mean_stride + i);
      E2CM_UNROLL for (int r = 0; r < R; ++r) {
        sums[c][r] = squares ? add_square(a[r], m, sums[c][r]) : Vec::fma(a[r], m, sums[c][r]);
      }
    }
  }
  add_lanes<R, C>(sums, to, ld);
}

template <class Source>
using Comparer = void (*)(const Source*, int64_t, int64_t, const float*, int64_t, Soon, double*, int64_t);

template <int R>
constexpr int kSquareMeans = kSquareSums / R < 6 ? kSquareSums / R : 6;

template <bool squares, class Source, int R, int C = 1>
Comparer<Source> comparer_of(int64_t means) {
  if constexpr (C == kSquareMeans<R>) {
    return compare<squares, R, C, Source>;
  } else {
    return means == C ? compare<squares, R, C, Source> : comparer_of<squares, Source, R, C + 1>(means);
  }
}

// R rows, block after block. While the first strip of means is at work, the next rows are asked for; while the last one
// is, the next means, a few for each of these rows.
template <bool squares, int R, class Source>
void compare_rows(const Source* x, int64_t stride, const Source* next, int64_t row, int64_t n, const FewMeans& means,
                  double* sums, int64_t ld) {
  const int64_t strips = (means.count + kSquareMeans<R> - 1) / kSquareMeans<R>;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = at_most(kBlock, n - begin), whole = count / kPad * kPad, tail = count - whole;
    const Source* const from = x + begin;
    const float* const block = means.data + begin / kBlock * means.block;
    const Soon here{reinterpret_cast<const char*>(from), 0, 0};
    for (int64_t s = 0; s < strips; ++s) {  // as equal as can be: 10 means are 5 + 5, not 6 + 4
      const int64_t first = means.count * s / strips, width = means.count * (s + 1) / strips - first;
      const Comparer<Source> run = comparer_of<squares, Source, R>(width);
      const float* const strip = block + first * means.stride;
      double* const to = sums + first * ld;
      Soon soon = here;
      if (s == 0)
        soon = {reinterpret_cast<const char*>(next + begin), stride * int64_t{sizeof(Source)}, sizeof(Source)};
      else if (s + 1 == strips && row < means.count && means.ahead)
        soon = {means.ahead + at_most(row, means.count - R) * means.ahead_stride + begin * means.ahead_size,
                means.ahead_stride, means.ahead_size};
      if (whole) run(from, stride, whole, strip, means.stride, soon, to, ld);
      if (!tail) continue;
      const Tail<Source, R> rest(from + whole, stride, R, tail);
      run(rest.rows[0], kPad, kPad, strip + whole, means.stride, here, to, ld);
    }
  }
}

template <bool squares, class Source, int R = kSquareRows>
void compare_all(const Source* x, int64_t stride, int64_t row, int64_t row_count, int64_t n, const FewMeans& means,
                 double* sums, int64_t ld) {
  for (; row + R <= row_count; row += R) {
    const Source* const from = x + row * stride;
    const Source* const next = row + 2 * R <= row_count ? from + R * stride : x + n;  // or what follows
    compare_rows<squares, R>(from, stride, next, row, n, means, sums + row, ld);
  }
  if constexpr (R > 1) compare_all<squares, Source, R / 2>(x, stride, row, row_count, n, means, sums, ld);
}

void add_squares(const void* x, DType dtype, int64_t stride, int64_t row_count, int64_t n, const FewMeans& means,
                 double* squares, int64_t ld) {
  visit(x, dtype, [&](const auto* typed) { compare_all<true>(typed, stride, 0, row_count, n, means, squares, ld); });
}

void add_dots(const void* x, DType dtype, int64_t stride, int64_t row_count, int64_t n, const FewMeans& means,
              double* sums, int64_t ld) {
  visit(x, dtype, [&](const auto* typed) { compare_all<false>(typed, stride, 0, row_count, n, means, sums, ld); });
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

// ---- distances from sums, a row or a class per lane
// ------------------------------------------------------------------

uint32_t distance_lanes(const double* sums, int64_t splits, int64_t split_stride, const double* lane_norms, double norm,
                        const float* scale, float* out) {
  double sum[kLanes], norms[kLanes];
  for (int j = 0; j < kLanes; ++j) sum[j] = sums[j];
  for (int64_t s = 1; s < splits; ++s) E2CM_SIMD for (int j = 0; j < kLanes; ++j) sum[j] += sums[s * split_stride + j];
  // Rounding has gone up to one chain and the chains of a block; the subtraction multiplies what it left.
  constexpr double doubt = static_cast<double>(kChain) / kBlock;
  for (int j = 0; j < kLanes; ++j) norms[j] = lane_norms ? lane_norms[j] + norm : sum[j];
  if (lane_norms)
    for (int j = 0; j < kLanes; ++j) sum[j] = norms[j] - 2 * sum[j];
  int32_t doubtful[kLanes];
  E2CM_SIMD for (int j = 0; j < kLanes; ++j) {
    doubtful[j] = !(sum[j] >= norms[j] * doubt) | !(norms[j] >= kTiny) | !(norms[j] <= kHuge);
    out[j] = std::sqrt(static_cast<float>(sum[j])) / scale[j];
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

// ---- statistics of cells, one channel per lane ----------------------------------------------------------------------

// The sums of some vectors of channels over some pixels, in chains: four at least, since one would wait for itself.
template <int vectors>
struct Chains {
  static constexpr int count = 4 / vectors;
  Vec sum[count][vectors], squares[count][vectors], most[count][vectors];

  Chains() {
    E2CM_UNROLL for (int c = 0; c < count; ++c) {
      E2CM_UNROLL for (int v = 0; v < vectors; ++v) {
        sum[c][v] = squares[c][v] = Vec::zero();
        most[c][v] = Vec::set(-std::numeric_limits<float>::infinity());
      }
    }
  }

  template <class Source>
  void add(int c, const Source* pixel) {
    E2CM_UNROLL for (int v = 0; v < vectors; ++v) {
      const Vec x = Vec::load_as(pixel + v * Vec::lanes);
      sum[c][v] = Vec::add(sum[c][v], x);
      squares[c][v] = Vec::fma(x, x, squares[c][v]);
      most[c][v] = Vec::max(most[c][v], x);
    }
  }

  void fold() {  // into chain 0
    E2CM_UNROLL for (int c = count / 2; c > 0; c /= 2) {
      E2CM_UNROLL for (int i = 0; i < c; ++i) {
        E2CM_UNROLL for (int v = 0; v < vectors; ++v) {
          sum[i][v] = Vec::add(sum[i][v], sum[i + c][v]);
          squares[i][v] = Vec::add(squares[i][v], squares[i + c][v]);
          most[i][v] = Vec::max(most[i][v], most[i + c][v]);
        }
      }
    }
  }

  static void add_doubles(const Vec (&from)[vectors], double* to) {
    alignas(64) float parts[vectors * Vec::lanes];
    E2CM_UNROLL for (int v = 0; v < vectors; ++v) Vec::store(parts + v * Vec::lanes, from[v]);
    E2CM_SIMD for (int j = 0; j < vectors * Vec::lanes; ++j) to[j] += static_cast<double>(parts[j]);
  }

  void write(const CellSums& to) {
    fold();
    if (to.sum) add_doubles(sum[0], to.sum);
    if (to.squares) add_doubles(squares[0], to.squares);
    if (!to.most) return;
    E2CM_UNROLL for (int v = 0; v < vectors; ++v) {
      const Vec before = Vec::load(to.most + v * Vec::lanes), spoiled = Vec::sub(sum[0][v], sum[0][v]);  // 0 or NaN
      const Vec now = Vec::select_nan(before, before, Vec::max(before, most[0][v]));
      Vec::store(to.most + v * Vec::lanes, Vec::select_nan(spoiled, spoiled, now));
    }
  }
};

template <int vectors, class Source>
void add_cell(const Source* x, const Strip& strip, int64_t columns, const CellSums& to) {
  constexpr int count = Chains<vectors>::count;
  Chains<vectors> chains;
  for (int64_t r = 0; r < strip.rows; ++r) {
    const Source* const row = x + r * strip.row_stride;
    int64_t i = 0;
    for (; i + count <= columns; i += count) {
      E2CM_UNROLL for (int c = 0; c < count; ++c) chains.add(c, row + (i + c) * strip.pixel_stride);
    }
    E2CM_UNROLL for (int c = 0; c < count - 1; ++c) {
      if (i + c < columns) chains.add(c, row + (i + c) * strip.pixel_stride);
    }
  }
  chains.write(to);
}

template <int vectors, class Source>
void add_cells_as(const Source* x, const Strip& strip, const CellSums* sums) {
  for (int64_t c = 0; c < strip.channels; c += vectors * Vec::lanes) {
    for (int64_t j = 0; j < strip.cells; ++j) {
      const CellSums to{sums[j].sum ? sums[j].sum + c : nullptr, sums[j].squares ? sums[j].squares + c : nullptr,
                        sums[j].most ? sums[j].most + c : nullptr};
      const int64_t begin = strip.cuts[j], end = strip.cuts[j + 1];
      add_cell<vectors>(x + begin * strip.pixel_stride + c, strip, end - begin, to);
    }
  }
}

void add_cells(const Strip& strip, const CellSums* sums) {
  visit(strip.x, strip.dtype, [&](const auto* x) {
    if (strip.channels == Vec::lanes) return add_cells_as<1>(x, strip, sums);
    if (strip.channels == 2 * Vec::lanes) return add_cells_as<2>(x, strip, sums);
    add_cells_as<4>(x, strip, sums);
  });
}

template <class Source>
void repeat_as(const Source* source, int64_t stride, int64_t pixels, int64_t channels, int64_t again, float* to,
               int64_t to_stride) {
  for (int64_t i = 0; i < pixels; ++i, source += stride, to += to_stride) {
    if (channels < 2 * Vec::lanes && channels != Vec::lanes) {
      for (int64_t c = 0; c < channels; ++c) to[c] = to_float(source[c]);
      for (int64_t c = 0; c < again; ++c) to[channels + c] = to[c];
      continue;
    }
    const int64_t last = channels - Vec::lanes;
    for (int64_t c = 0; c < last; c += Vec::lanes) Vec::store(to + c, Vec::load_as(source + c));
    Vec::store(to + last, Vec::load_as(source + last));  // back over its neighbour
    for (int64_t c = 0; c < again; c += Vec::lanes) Vec::store(to + channels + c, Vec::load(to + c));
  }
}

void repeat(const void* source, DType dtype, int64_t stride, int64_t pixels, int64_t channels, int64_t again, float* to,
            int64_t to_stride) {
  visit(source, dtype, [&](const auto* x) { repeat_as(x, stride, pixels, channels, again, to, to_stride); });
}

// ---- products of channels, one channel per lane -----------------------------------------------------------------

constexpr int kPairTile = Vec::lanes > 8 ? Vec::lanes : 8;  // offsets, each with its own chain of sums

// The numbers from number `first` on of vectors that stand side by side.
template <int first, int N>
Vec shifted(const Vec (&x)[N]) {
  constexpr int vector = first / Vec::lanes, lane = first % Vec::lanes;
  if constexpr (lane == 0) {
    return x[vector];
  } else {
    return Vec::join<lane>(x[vector], x[vector + 1]);
  }
}

// Joining registers takes as long as a product: it is done for `x` shifted by 0 to 3, and for `others` by 3, 7, 11 ...,
// whose differences are all the offsets. See kPairShifts.
template <int M, int N, int... O>
void add_shifted(const Vec (&x)[M], const Vec (&others)[N], Vec (&chains)[sizeof...(O)],
                 std::integer_sequence<int, O...>) {
  constexpr int last = kPairShifts - 1;
  ((chains[O] =
        Vec::fma(shifted<last - O % kPairShifts>(x), shifted<O / kPairShifts * kPairShifts + last>(others), chains[O])),
   ...);
}

// O offsets of a vector of channels. x: where it and the next ones are, others: those that they meet; near: x
// themselves.
template <class Source, bool near, int O>
void add_pairs_at(const Source* const* x, const Source* const* others, const Source* ahead, int64_t stride,
                  int64_t pixels, double* sums, int64_t ld) {
  constexpr int M = 1 + (kPairShifts - 2 + Vec::lanes) / Vec::lanes;
  constexpr int N = 1 + ((O - 1) / kPairShifts * kPairShifts + kPairShifts - 2 + Vec::lanes) / Vec::lanes;
  Vec totals[O];
  E2CM_UNROLL for (int o = 0; o < O; ++o) totals[o] = Vec::zero();
  for (int64_t begin = 0; begin < pixels; begin += kChain) {
    Vec chains[O];
    E2CM_UNROLL for (int o = 0; o < O; ++o) chains[o] = Vec::zero();
    for (int64_t p = begin * stride; p < at_most(begin + kChain, pixels) * stride; p += stride) {
      Vec a[M], b[N];
      E2CM_UNROLL for (int i = 0; i < M; ++i) a[i] = Vec::load_as(x[i] + p);
      E2CM_UNROLL for (int i = 0; i < N; ++i) b[i] = near && i < M ? a[i] : Vec::load_as(others[i] + p);
      E2CM_PREFETCH(ahead + p);
      add_shifted(a, b, chains, std::make_integer_sequence<int, O>());
    }
    E2CM_UNROLL for (int o = 0; o < O; ++o) totals[o] = Vec::add(totals[o], chains[o]);
  }
  E2CM_UNROLL for (int o = 0; o < O; ++o) {
    alignas(64) float parts[Vec::lanes];
    Vec::store(parts, totals[o]);
    E2CM_SIMD for (int j = 0; j < Vec::lanes; ++j) sums[o * ld + j] += static_cast<double>(parts[j]);
  }
}

template <class Source>
using PairAdder = void (*)(const Source* const*, const Source* const*, const Source*, int64_t, int64_t, double*,
                           int64_t);

template <class Source, bool near, int O = 1>
PairAdder<Source> pair_adder_of(int64_t offsets) {
  if constexpr (O == kPairTile) {
    return add_pairs_at<Source, near, O>;
  } else {
    return offsets == O ? add_pairs_at<Source, near, O> : pair_adder_of<Source, near, O + 1>(offsets);
  }
}

template <class Source>
void add_pairs_as(const Source* x, const Source* ahead, int64_t stride, int64_t pixels, int64_t channels,
                  int64_t behind, int64_t offsets, double* sums) {
  constexpr int count = 1 + (kPairTile + Vec::lanes - 1) / Vec::lanes;
  const auto find = [&](int64_t c, const Source*(&vectors)[count]) {
    for (int i = 0; i < count; ++i, c += Vec::lanes) vectors[i] = x + (c < channels ? c : c - channels + behind);
  };
  for (int64_t o = 0; o < offsets; o += kPairTile) {
    const int64_t tile = at_most(kPairTile, offsets - o);
    const PairAdder<Source> run = o == 0 ? pair_adder_of<Source, true>(tile) : pair_adder_of<Source, false>(tile);
    for (int64_t c = 0; c < channels; c += Vec::lanes) {
      const Source *vectors[count], *others[count];
      find(c, vectors);
      find(c + o, others);
      run(vectors, others, ahead + c, stride, pixels, sums + o * channels + c, channels);
    }
  }
}

void add_pairs(const void* x, const void* ahead, DType dtype, int64_t stride, int64_t pixels, int64_t channels,
               int64_t behind, int64_t offsets, double* sums) {
  visit(x, dtype, [&](const auto* typed) {
    add_pairs_as(typed, static_cast<decltype(typed)>(ahead), stride, pixels, channels, behind, offsets, sums);
  });
}

void average(const double* sums, const double* shares, int64_t cells, int64_t channels, bool root, float* out) {
  for (int64_t i = 0; i < cells; ++i)
    E2CM_SIMD for (int64_t j = i * channels; j < (i + 1) * channels; ++j) out[j] =
        static_cast<float>(sums[j] * shares[i]);
  if (!root) return;
  E2CM_SIMD for (int64_t j = 0; j < cells * channels; ++j) out[j] = std::copysign(std::sqrt(std::fabs(out[j])), out[j]);
}

// The first vectors of `rows` rows, turned; zeros behind them.
template <class Source>
void load_turned(const Source* source, int64_t stride, int64_t rows, Vec (&square)[Vec::lanes]) {
  E2CM_UNROLL for (int v = 0; v < Vec::lanes; ++v) {
    square[v] = v < rows ? Vec::load_as(source + v * stride) : Vec::zero();
  }
  Vec::transpose(square);
}

// Less rows than lanes, their results next to each other: what is too much of one is overwritten by the next.
template <class Source>
void turn_few(const Source* source, int64_t stride, int64_t rows, int64_t columns, float* target) {
  for (int64_t begin = 0; begin < columns; begin += Vec::lanes) {
    const int64_t j = at_most(begin, columns - Vec::lanes);
    Vec square[Vec::lanes];
    load_turned(source + j, stride, rows, square);
    E2CM_UNROLL for (int v = 0; v < Vec::lanes; ++v) {
      float* const to = target + (j + v) * rows;
      if ((columns - j - v) * rows >= Vec::lanes) {
        Vec::store(to, square[v]);
      } else {
        float last[Vec::lanes];
        Vec::store(last, square[v]);
        std::memcpy(to, last, rows * sizeof(float));
      }
    }
  }
}

// Squares of lanes x lanes; the last of a row or column goes back over its neighbour.
template <class Source>
void turn_as(const Source* source, int64_t stride, int64_t rows, int64_t columns, float* target,
             int64_t target_stride) {
  if (rows < Vec::lanes && columns >= Vec::lanes && target_stride == rows)
    return turn_few(source, stride, rows, columns, target);
  if (rows < Vec::lanes || columns < Vec::lanes) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) target[j * target_stride + i] = to_float(source[i * stride + j]);
    return;
  }
  for (int64_t at = 0; at < rows; at += Vec::lanes) {
    const int64_t i = at_most(at, rows - Vec::lanes);
    for (int64_t begin = 0; begin < columns; begin += Vec::lanes) {
      const int64_t j = at_most(begin, columns - Vec::lanes);
      Vec square[Vec::lanes];
      load_turned(source + i * stride + j, stride, Vec::lanes, square);
      E2CM_UNROLL for (int v = 0; v < Vec::lanes; ++v) Vec::store(target + (j + v) * target_stride + i, square[v]);
    }
  }
}

void turn(const void* source, DType dtype, int64_t stride, int64_t rows, int64_t columns, float* target,
          int64_t target_stride) {
  visit(source, dtype, [&](const auto* typed) { turn_as(typed, stride, rows, columns, target, target_stride); });
}

constexpr Kernels table(const char* name) {
  return {name,       2 * Vec::lanes, load_block,       add_squares,    add_dots,
          pack_means, add_products,   squared_distance, distance_lanes, softmax_lanes,
          add_cells,  repeat,         add_pairs,        average,        turn};
}

}  // namespace
}  // namespace e2cm
