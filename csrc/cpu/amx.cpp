// AMX: as AVX-512, but products of many rows and means are made of whole numbers, ten times as many a cycle.
//
// Within a block, a row or a mean is a power of two times whole numbers of 24 bits, about as precise as the largest of
// them is as a float: q = d2 * 256^2 + d1 * 256 + d0, d2 from -127 to 127, d1 and d0 from -128. A product of two such
// numbers is made of six products of digits; the smallest three, no larger than the rounding of q, are left out. Sums
// of products of digits are exact.
//
// What is not finite has NaN for products, and so has what is too large to be squared; what is too small for a scale
// counts as zeros.
//
// Tried and left: asking for what is ahead, as the other units do (5% slower: panels are read from end to end, and such
// processors look ahead themselves); two tiles of rows at a time, which leaves two registers for digits (a quarter
// slower); to make numbers of a tile's sums while the next tile is at work (10% slower).
#include <algorithm>
#include <cstring>
#include <limits>

#include "avx512.h"
#include "kernels.h"
#include "tiles.h"

namespace e2cm {
namespace {

using Digit = int8_t;

constexpr int64_t kDigits = 3;
constexpr int64_t kTile = 16;               // rows of a tile at most, and means side by side
constexpr int64_t kGroup = 4 * Vec::lanes;  // numbers whose digits fill a row of a tile
// Rows in scratch, in bytes: [digit][number], then the scale. Panels: [group][digit][tile], then the scales.
constexpr int64_t kRowBytes = kStride * sizeof(float);
constexpr int64_t kRowScale = kDigits * kBlock, kPanelScales = kDigits * kBlock * kTile;
constexpr float kLargest = 127 * 65536 + 127 * 256 + 127;

static_assert(kRowScale + int64_t{sizeof(float)} <= kRowBytes && kBlock % kGroup == 0);
static_assert(kBlock * kDigits * 128 * 128 < int64_t{1} << 31 &&
              kBlock * (127 * 127 * 256 + 2 * 127 * 128) < INT32_MAX);

// ---- digits ---------------------------------------------------------------------------------------------------------

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Numbers of one block, brought near the origin and filled up with zeros to whole groups.
struct Numbers {
  alignas(64) float at[kBlock];
  double norm;
  float largest;  // without its sign

  template <class Source>
  void read(const Source* source, const float* center, int64_t n) {
    Vec squares[4], most[4];
    E2CM_UNROLL for (int v = 0; v < 4; ++v) squares[v] = most[v] = Vec::zero();
    const auto add = [&](const Source* from, const float* offsets, float* to) {
      E2CM_UNROLL for (int v = 0; v < 4; ++v) {
        const Vec x = Vec::sub(Vec::load_as(from + v * Vec::lanes), Vec::load(offsets + v * Vec::lanes));
        Vec::store(to + v * Vec::lanes, x);
        squares[v] = Vec::fma(x, x, squares[v]);
        most[v] = {_mm512_range_ps(most[v].v, x.v, 0b1011)};  // the larger one, without its sign
      }
    };
    const int64_t whole = n / kGroup * kGroup, tail = n - whole;
    for (int64_t i = 0; i < whole; i += kGroup) add(source + i, center + i, at + i);
    if (tail) {
      Source rest[kGroup] = {};
      float offsets[kGroup] = {};
      std::memcpy(rest, source + whole, tail * sizeof(Source));
      std::memcpy(offsets, center + whole, tail * sizeof(float));
      add(rest, offsets, at + whole);
    }
    alignas(16) float parts[4];
    Vec::sum4(squares[0], squares[1], squares[2], squares[3], parts);
    norm = (static_cast<double>(parts[0]) + parts[1]) + (static_cast<double>(parts[2]) + parts[3]);
    largest = _mm512_reduce_max_ps(Vec::max(Vec::max(most[0], most[1]), Vec::max(most[2], most[3])).v);
  }

  // What makes whole numbers of them: the largest power of two that keeps all within kLargest. Or 0.
  float scale() const {
    if (!(largest >= 1e-30f && largest <= 3e38f)) return 0;
    // A difference of floats' bits is one of exponents, less one if the subtrahend has the larger fraction.
    return from_bits(((bits_of(kLargest) - bits_of(largest)) & 0xff800000) + bits_of(1));
  }

  // What makes numbers of them again.
  float scale_back() const {
    if (!(norm <= std::numeric_limits<double>::max())) return std::numeric_limits<float>::quiet_NaN();
    const float power = scale();
    return power > 0 ? 1 / power : 0;
  }
};

// A row of a tile for each digit. Four numbers that lie apart by a vector come together; which is first is of no
// matter, if only rows and means agree.
struct Digits {
  __m512i digit[kDigits];

  Digits(const float* numbers, __m512 scale) {
    const __m512 bias = _mm512_set1_ps(0x808080);  // makes digits from 0 to 255 of those from -128 to 127
    __m512i q[4];                                  // bytes: d0, d1, d2, 0
    E2CM_UNROLL for (int v = 0; v < 4; ++v) {
      q[v] = _mm512_cvtps_epi32(_mm512_fmadd_ps(_mm512_load_ps(numbers + v * Vec::lanes), scale, bias));
    }
    const __m512i low = _mm512_set1_epi32(0xffff), even = _mm512_set1_epi32(0xff00ff);
    const __m512i first = _mm512_set1_epi32(0xff), most = _mm512_set1_epi32(0xffffff);
    const __m512i a = choose(low, q[0], _mm512_slli_epi32(q[1], 16)),
                  b = choose(low, q[2], _mm512_slli_epi32(q[3], 16));
    digit[0] = choose(even, a, _mm512_slli_epi32(b, 8));
    digit[1] = choose(even, _mm512_srli_epi32(a, 8), b);
    const __m512i c = choose(first, _mm512_srli_epi32(q[0], 16), _mm512_srli_epi32(q[2], 8));
    digit[2] = choose(low, c, choose(most, q[1], _mm512_slli_epi32(q[3], 8)));
    E2CM_UNROLL for (int d = 0; d < kDigits; ++d) {
      digit[d] = _mm512_xor_si512(digit[d], _mm512_set1_epi32(static_cast<int>(0x80808080)));
    }
  }

  // Bits of `then` where the mask has ones.
  static __m512i choose(__m512i mask, __m512i then, __m512i otherwise) {
    return _mm512_ternarylogic_epi32(mask, then, otherwise, 0xca);
  }
};

int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

const float* or_zeros(const float* center) {
  static const float zeros[kBlock] = {};
  return center ? center : zeros;
}

template <class Source>
void load_rows_as(const Source* source, int64_t stride, const float* center, int64_t row_count, int64_t n, Digit* rows,
                  double* norms) {
  constexpr int64_t some = 4;  // rows, so that the scale of one need not be waited for
  Numbers numbers[some];
  for (int64_t first = 0; first < row_count; first += some) {
    const int64_t count = at_most(some, row_count - first);
    for (int64_t r = 0; r < count; ++r) numbers[r].read(source + (first + r) * stride, or_zeros(center), n);
    for (int64_t r = 0; r < count; ++r) {
      Digit* const row = rows + (first + r) * kRowBytes;
      const float scale = numbers[r].scale(), back = numbers[r].scale_back();
      std::memcpy(row + kRowScale, &back, sizeof back);
      if (norms) norms[first + r] += numbers[r].norm;
      for (int64_t i = 0; i < n; i += kGroup) {
        const Digits digits(numbers[r].at + i, _mm512_set1_ps(scale));
        E2CM_UNROLL for (int d = 0; d < kDigits; ++d) _mm512_storeu_si512(row + d * kBlock + i, digits.digit[d]);
      }
    }
  }
}

void load_rows(const void* source, DType dtype, int64_t stride, const float* center, int64_t row_count, int64_t n,
               float* rows, double* norms) {
  visit(source, dtype, [&](const auto* typed) {
    load_rows_as(typed, stride, center, row_count, n, reinterpret_cast<Digit*>(rows), norms);
  });
}

// Tiles of means are turned: row j has the j-th four digits of all of them.
void pack_means(const void* source, DType dtype, int64_t stride, const float* center, int64_t mean_count, int64_t n,
                float* panel, double* norms) {
  alignas(64) float rows[kTile * kStride];
  load_rows(source, dtype, stride, center, mean_count, n, rows, norms);
  Digit* const to = reinterpret_cast<Digit*>(panel);
  for (int d = 0; d < kDigits; ++d) {
    for (int64_t i = 0; i < n; i += kGroup) {
      Vec square[Vec::lanes];
      E2CM_UNROLL for (int k = 0; k < Vec::lanes; ++k) {
        const Digit* const from = reinterpret_cast<const Digit*>(rows) + k * kRowBytes + d * kBlock + i;
        square[k] = k < mean_count ? Vec::load(reinterpret_cast<const float*>(from)) : Vec::zero();
      }
      Vec::transpose(square);
      float* const tile = reinterpret_cast<float*>(to + (i * kDigits + d * kGroup) * kTile);
      E2CM_UNROLL for (int j = 0; j < Vec::lanes; ++j) Vec::store(tile + j * Vec::lanes, square[j]);
    }
  }
  float* const scales = reinterpret_cast<float*>(to + kPanelScales);
  for (int64_t k = 0; k < kTile; ++k) {
    scales[k] = 0;
    if (k < mean_count)
      std::memcpy(scales + k, reinterpret_cast<const Digit*>(rows) + k * kRowBytes + kRowScale, sizeof(float));
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

// Sums of products of digits, of 256^4, 256^3 and 256^2, for a tile of rows.
struct Sums {
  alignas(64) int32_t of[kDigits][kTile][kTile];
};

// Tiles 0 to 2 hold the sums, 3 to 5 digits of rows, 6 and 7 digits of means.
void multiply(Tiles& tiles, const Digit* rows, const Digit* panel, int64_t n, Sums& sums) {
  tiles.zero<0>(), tiles.zero<1>(), tiles.zero<2>();
  for (int64_t i = 0; i < n; i += kGroup) {
    const auto row = [&](int d) { return rows + d * kBlock + i; };
    const auto mean = [&](int d) { return panel + (i * kDigits + d * kGroup) * kTile; };
    tiles.load<5>(row(2), kRowBytes), tiles.load<7>(mean(2), kGroup);
    tiles.load<4>(row(1), kRowBytes), tiles.load<3>(row(0), kRowBytes), tiles.load<6>(mean(1), kGroup);
    tiles.add_products<0, 5, 7>(), tiles.add_products<1, 4, 7>(), tiles.add_products<2, 3, 7>();
    tiles.load<7>(mean(0), kGroup);
    tiles.add_products<1, 5, 6>(), tiles.add_products<2, 4, 6>(), tiles.add_products<2, 5, 7>();
  }
  tiles.store<0>(sums.of[0], kGroup), tiles.store<1>(sums.of[1], kGroup), tiles.store<2>(sums.of[2], kGroup);
}

// The same for one row, without tiles, which take longer to fill. Exact sums are the same bits, whatever makes them.
// The instruction wants one factor without a sign: 128 more of it, and 128 times the other one to be taken away in the
// end.
void multiply_one(const Digit* row, const Digit* panel, int64_t n, Sums& sums) {
  const __m512i flip = _mm512_set1_epi32(static_cast<int>(0x80808080));
  __m512i of[kDigits][kDigits], excess[kDigits];  // of[a][b]: products of the row's digits a and the means' digits b
  for (int a = 0; a < kDigits; ++a) {
    excess[a] = _mm512_setzero_si512();
    for (int b = 0; b < kDigits; ++b) of[a][b] = _mm512_setzero_si512();
  }
  const int64_t filled = (n + kGroup - 1) / kGroup * kGroup;
  for (int64_t i = 0; i < filled; i += 4) {
    const int64_t group = i / kGroup * kGroup, j = i - group;
    __m512i x[kDigits], mean[kDigits];
    E2CM_UNROLL for (int d = 0; d < kDigits; ++d) {
      int32_t four;
      std::memcpy(&four, row + d * kBlock + i, sizeof four);
      x[d] = _mm512_xor_si512(_mm512_set1_epi32(four), flip);
      mean[d] = _mm512_loadu_si512(panel + (group * kDigits + d * kGroup) * kTile + j * kTile);
      excess[d] = _mm512_dpbusd_epi32(excess[d], flip, mean[d]);
    }
    E2CM_UNROLL for (int a = 0; a < kDigits; ++a) {
      E2CM_UNROLL for (int b = kDigits - 1 - a; b < kDigits; ++b) of[a][b] =
          _mm512_dpbusd_epi32(of[a][b], x[a], mean[b]);
    }
  }
  for (int level = 0; level < kDigits; ++level) {  // a + b is 4, 3 and 2
    __m512i sum = _mm512_setzero_si512();
    for (int a = kDigits - 1; a >= kDigits - 1 - level; --a) {
      const int b = 2 * (kDigits - 1) - level - a;
      sum = _mm512_add_epi32(sum, _mm512_sub_epi32(of[a][b], excess[b]));
    }
    _mm512_store_si512(sums.of[level][0], sum);
  }
}

// products[k] += what the digits of one row and of all means of the panel make.
void add_sums(const Sums& sums, int64_t r, float row_scale, Vec scales, double* products) {
  const __m512i high =
      _mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(sums.of[0][r]), 8), _mm512_load_si512(sums.of[1][r]));
  const Vec low{_mm512_cvtepi32_ps(_mm512_load_si512(sums.of[2][r]))};
  const Vec whole = Vec::fma({_mm512_cvtepi32_ps(high)}, Vec::set(256), low);
  const Vec product = Vec::mul(whole, Vec::mul(scales, Vec::set(row_scale)));
  const auto add = [&](__m256 some, int64_t k) {
    _mm512_storeu_pd(products + k, _mm512_add_pd(_mm512_loadu_pd(products + k), _mm512_cvtps_pd(some)));
  };
  add(_mm512_castps512_ps256(product.v), 0);
  add(_mm512_extractf32x8_ps(product.v, 1), 8);
}

void add_products(const float* rows, int64_t row_count, const float* panel, int64_t, int64_t n, double* products,
                  int64_t ld, Ahead&, Ahead&) {
  const Digit *const x = reinterpret_cast<const Digit*>(rows), *const means = reinterpret_cast<const Digit*>(panel);
  const Vec scales = Vec::mul(Vec::load(reinterpret_cast<const float*>(means + kPanelScales)), Vec::set(65536));
  Sums sums;
  const auto add = [&](int64_t row, int64_t at) {  // whose sums are at `at`
    float row_scale;
    std::memcpy(&row_scale, x + row * kRowBytes + kRowScale, sizeof row_scale);
    add_sums(sums, at, row_scale, scales, products + row * ld);
  };
  if (row_count == 1) {
    multiply_one(x, means, n, sums);
    return add(0, 0);
  }
  const int64_t tiles = (row_count + kTile - 1) / kTile, height = (row_count + tiles - 1) / tiles;
  Tiles registers(height);
  for (int64_t begin = 0; begin < row_count; begin += height) {
    const int64_t first = at_most(begin, row_count - height);  // all are equally high: the last goes back a bit
    multiply(registers, x + first * kRowBytes, means, n, sums);
    for (int64_t r = begin; r < first + height; ++r) add(r, r - first);
  }
}

}  // namespace

const Kernels* amx_kernels() {
  static const Kernels kernels = [] {
    Kernels table = *avx512_kernels();
    table.name = "amx";
    table.panel = kTile;
    table.panel_floats = kPanelScales / sizeof(float) + kTile;
    table.load_rows = load_rows;
    table.pack_means = pack_means;
    table.add_products = add_products;
    return table;
  }();
  return &kernels;
}
}  // namespace e2cm
