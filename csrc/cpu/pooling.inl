// Statistics of feature maps: sum, sum of squares and maximum of cells, and products of pairs of channels. One channel
// per lane.
//
// Reads   each element of a chunk once per group of channels for the cells, and once per kPairOffsets offsets for the
//         pairs; a chunk (kChunk elements) is in the first level of cache.
// Writes  per chunk: double sums and float32 maxima per channel and cell, double sums per channel and offset.
// Does    an addition, an FMA and a maximum per element for the cells; an FMA per element and offset for the pairs.
//
// Tried and dropped:
// - Kernels for fewer than the three statistics of cells: the same time, memory is the limit.
// - Pairs with one load per offset instead of aligning registers: the loads cross cache lines, and the copy that they
//   need is written and read once more. Prefetching the next chunk into the first level of cache. Roots by an estimate
//   and a Newton step: 2% less.

namespace e2cm {
namespace {

// ---- cells ----------------------------------------------------------------------------------------------------------

// Accumulators of some vectors of channels. At least four independent chains: one would wait for its own latency.
template <int vectors>
struct CellAccumulators {
  static constexpr int count = 4 / vectors;
  Vec sum[count][vectors], squares[count][vectors], max[count][vectors];

  CellAccumulators() {
    E2CM_UNROLL for (int c = 0; c < count; ++c) {
      E2CM_UNROLL for (int v = 0; v < vectors; ++v) {
        sum[c][v] = squares[c][v] = Vec::zero();
        max[c][v] = Vec::set(-std::numeric_limits<float>::infinity());
      }
    }
  }

  template <class Source>
  void add(int c, const Source* pixel) {
    E2CM_UNROLL for (int v = 0; v < vectors; ++v) {
      const Vec x = Vec::load_as(pixel + v * Vec::lanes);
      sum[c][v] = Vec::add(sum[c][v], x);
      squares[c][v] = Vec::fma(x, x, squares[c][v]);
      max[c][v] = Vec::max(max[c][v], x);
    }
  }

  void reduce() {  // into chain 0
    E2CM_UNROLL for (int c = count / 2; c > 0; c /= 2) {
      E2CM_UNROLL for (int i = 0; i < c; ++i) {
        E2CM_UNROLL for (int v = 0; v < vectors; ++v) {
          sum[i][v] = Vec::add(sum[i][v], sum[i + c][v]);
          squares[i][v] = Vec::add(squares[i][v], squares[i + c][v]);
          max[i][v] = Vec::max(max[i][v], max[i + c][v]);
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
    reduce();
    if (to.sum) add_doubles(sum[0], to.sum);
    if (to.squares) add_doubles(squares[0], to.squares);
    if (!to.max) return;
    E2CM_UNROLL for (int v = 0; v < vectors; ++v) {
      // Vec::max does not propagate NaN, but the sum does: x - x is 0 for a finite sum, else NaN.
      const Vec before = Vec::load(to.max + v * Vec::lanes), nan_or_zero = Vec::sub(sum[0][v], sum[0][v]);
      const Vec now = Vec::select_nan(before, before, Vec::max(before, max[0][v]));
      Vec::store(to.max + v * Vec::lanes, Vec::select_nan(nan_or_zero, nan_or_zero, now));
    }
  }
};

template <int vectors, class Source>
void add_cell(const Source* x, const Strip& strip, int64_t columns, const CellSums& to) {
  constexpr int count = CellAccumulators<vectors>::count;
  CellAccumulators<vectors> accumulators;
  for (int64_t r = 0; r < strip.rows; ++r) {
    const Source* const row = x + r * strip.row_stride;
    int64_t i = 0;
    for (; i + count <= columns; i += count) {
      E2CM_UNROLL for (int c = 0; c < count; ++c) accumulators.add(c, row + (i + c) * strip.pixel_stride);
    }
    E2CM_UNROLL for (int c = 0; c < count - 1; ++c) {
      if (i + c < columns) accumulators.add(c, row + (i + c) * strip.pixel_stride);
    }
  }
  accumulators.write(to);
}

template <int vectors, class Source>
void add_cells_as(const Source* x, const Strip& strip, const CellSums* sums) {
  for (int64_t c = 0; c < strip.channels; c += vectors * Vec::lanes) {
    for (int64_t j = 0; j < strip.cells; ++j) {
      const CellSums to{sums[j].sum ? sums[j].sum + c : nullptr, sums[j].squares ? sums[j].squares + c : nullptr,
                        sums[j].max ? sums[j].max + c : nullptr};
      const int64_t begin = strip.edges[j], end = strip.edges[j + 1];
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

// ---- pairs of channels ----------------------------------------------------------------------------------------------

template <class Source>
void pad_circular_as(const Source* source, int64_t stride, int64_t pixels, int64_t channels, int64_t padding, float* to,
                     int64_t to_stride) {
  for (int64_t i = 0; i < pixels; ++i, source += stride, to += to_stride) {
    if (channels < 2 * Vec::lanes && channels != Vec::lanes) {
      for (int64_t c = 0; c < channels; ++c) to[c] = to_float(source[c]);
      for (int64_t c = 0; c < padding; ++c) to[channels + c] = to[c];
      continue;
    }
    const int64_t last = channels - Vec::lanes;
    for (int64_t c = 0; c < last; c += Vec::lanes) Vec::store(to + c, Vec::load_as(source + c));
    Vec::store(to + last, Vec::load_as(source + last));  // overlaps the vector before it
    for (int64_t c = 0; c < padding; c += Vec::lanes) Vec::store(to + channels + c, Vec::load(to + c));
  }
}

void pad_circular(const void* source, DType dtype, int64_t stride, int64_t pixels, int64_t channels, int64_t padding,
                  float* to, int64_t to_stride) {
  visit(source, dtype, [&](const auto* x) { pad_circular_as(x, stride, pixels, channels, padding, to, to_stride); });
}

constexpr int kPairOffsets = Vec::lanes > 8 ? Vec::lanes : 8;  // offsets of a tile, each with its own chain of sums

// The elements from `first` on of the concatenation of some vectors.
template <int first, int N>
Vec shifted(const Vec (&x)[N]) {
  constexpr int vector = first / Vec::lanes, lane = first % Vec::lanes;
  if constexpr (lane == 0) {
    return x[vector];
  } else {
    return Vec::align<lane>(x[vector], x[vector + 1]);
  }
}

// Aligning two registers takes as long as an FMA. So `x` is shifted by 0 to 3 only and `partners` by 3, 7, 11, ...: the
// differences are all the offsets. See kPairShifts.
template <int M, int N, int... O>
void add_shifted_products(const Vec (&x)[M], const Vec (&partners)[N], Vec (&chains)[sizeof...(O)],
                          std::integer_sequence<int, O...>) {
  constexpr int last = kPairShifts - 1;
  ((chains[O] = Vec::fma(shifted<last - O % kPairShifts>(x), shifted<O / kPairShifts * kPairShifts + last>(partners),
                         chains[O])),
   ...);
}

// O offsets of one vector of channels. x: the addresses of this vector and the next ones; partners: those of the
// vectors that they are multiplied with; adjacent: partners begin with x itself.
template <class Source, bool adjacent, int O>
void pair_tile(const Source* const* x, const Source* const* partners, const Source* next, int64_t stride,
               int64_t pixels, double* sums, int64_t ld) {
  constexpr int M = 1 + (kPairShifts - 2 + Vec::lanes) / Vec::lanes;
  constexpr int N = 1 + ((O - 1) / kPairShifts * kPairShifts + kPairShifts - 2 + Vec::lanes) / Vec::lanes;
  Vec totals[O];
  E2CM_UNROLL for (int o = 0; o < O; ++o) totals[o] = Vec::zero();
  for (int64_t begin = 0; begin < pixels; begin += kChain) {
    Vec chains[O];
    E2CM_UNROLL for (int o = 0; o < O; ++o) chains[o] = Vec::zero();
    for (int64_t p = begin * stride; p < minimum(begin + kChain, pixels) * stride; p += stride) {
      Vec a[M], b[N];
      E2CM_UNROLL for (int i = 0; i < M; ++i) a[i] = Vec::load_as(x[i] + p);
      E2CM_UNROLL for (int i = 0; i < N; ++i) b[i] = adjacent && i < M ? a[i] : Vec::load_as(partners[i] + p);
      E2CM_PREFETCH(next + p);
      add_shifted_products(a, b, chains, std::make_integer_sequence<int, O>());
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
using PairTile = void (*)(const Source* const*, const Source* const*, const Source*, int64_t, int64_t, double*,
                          int64_t);

template <class Source, bool adjacent, int O = 1>
PairTile<Source> select_pair_tile(int64_t offsets) {
  if constexpr (O == kPairOffsets) {
    return pair_tile<Source, adjacent, O>;
  } else {
    return offsets == O ? pair_tile<Source, adjacent, O> : select_pair_tile<Source, adjacent, O + 1>(offsets);
  }
}

template <class Source>
void add_pairs_as(const Source* x, const Source* next, int64_t stride, int64_t pixels, int64_t channels, int64_t wrap,
                  int64_t offsets, double* sums) {
  constexpr int count = 1 + (kPairOffsets + Vec::lanes - 1) / Vec::lanes;
  const auto find = [&](int64_t c, const Source*(&vectors)[count]) {
    for (int i = 0; i < count; ++i, c += Vec::lanes) vectors[i] = x + (c < channels ? c : c - channels + wrap);
  };
  for (int64_t o = 0; o < offsets; o += kPairOffsets) {
    const int64_t tile = minimum(kPairOffsets, offsets - o);
    const PairTile<Source> run = o == 0 ? select_pair_tile<Source, true>(tile) : select_pair_tile<Source, false>(tile);
    for (int64_t c = 0; c < channels; c += Vec::lanes) {
      const Source *vectors[count], *partners[count];
      find(c, vectors);
      find(c + o, partners);
      run(vectors, partners, next + c, stride, pixels, sums + o * channels + c, channels);
    }
  }
}

void add_pairs(const void* x, const void* next, DType dtype, int64_t stride, int64_t pixels, int64_t channels,
               int64_t wrap, int64_t offsets, double* sums) {
  visit(x, dtype, [&](const auto* typed) {
    add_pairs_as(typed, static_cast<decltype(typed)>(next), stride, pixels, channels, wrap, offsets, sums);
  });
}

// ---- from sums to means ---------------------------------------------------------------------------------------------

void average(const double* sums, const double* weights, int64_t cells, int64_t channels, bool root, float* out) {
  for (int64_t i = 0; i < cells; ++i)
    E2CM_SIMD for (int64_t j = i * channels; j < (i + 1) * channels; ++j) out[j] =
        static_cast<float>(sums[j] * weights[i]);
  if (!root) return;
  E2CM_SIMD for (int64_t j = 0; j < cells * channels; ++j) out[j] = std::copysign(std::sqrt(std::fabs(out[j])), out[j]);
}

}  // namespace
}  // namespace e2cm
