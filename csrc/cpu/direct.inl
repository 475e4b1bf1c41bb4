// Few classes: distance^2 = sum of (x - m)^2, or logit = sum of x * m, over features in their storage type.
//
// Reads   B * D features once, from memory; K * D float32 class vectors once per tile of rows, from cache.
// Writes  B * K double sums per block of kBlock features, which stay in cache.
// Does    a subtraction and an FMA per (row, class, feature), or one FMA for logits. Nothing cancels and nothing is
//         prepared, so small batches pay for nothing else. At ten classes memory and arithmetic take about as long.
//
// A tile has R rows and C classes, with all R * C sums in registers and a vector of features at a time. Class vectors
// are split into strips of C; the features of a block, read by the first strip, are in cache for the others. While the
// first strip runs, the next rows are prefetched; while the last one runs, the next class vectors.
//
// Tried and dropped:
// - The product form of gemm.inl: its preparation costs more than it saves if additions have execution units of their
//   own. If they do not, it takes 10% less time.
// - Tiles of 2 x 10 on AVX-512: as fast from cache, half as fast from memory.
// - Eight blocks in sequence instead of four (kDirectBlocks): no faster. Blocks of 1024 to 4096 features: slower, class
//   vectors leave the first level of cache.
// - No prefetch: 5% slower. Prefetch into the first level of cache: no difference.

namespace e2cm {
namespace {

inline Vec add_square(Vec x, Vec m, Vec sum) {
  const Vec difference = Vec::sub(x, m);
  return Vec::fma(difference, difference, sum);
}

// What a tile prefetches: some rows, as many elements of each as the tile has features.
struct Prefetch {
  const char* address;
  int64_t row_stride, element_size;  // bytes
};

// R rows x C classes; n is a multiple of kPad.
template <bool squares, int R, int C, class Source>
void direct_tile(const Source* x, int64_t stride, int64_t n, const float* means, int64_t mean_stride, Prefetch prefetch,
                 double* out, int64_t ld) {
  Vec sums[C][R];
  E2CM_UNROLL for (int c = 0; c < C; ++c) { E2CM_UNROLL for (int r = 0; r < R; ++r) sums[c][r] = Vec::zero(); }
  for (int64_t i = 0; i < n; i += Vec::lanes) {
    Vec a[R];
    E2CM_UNROLL for (int r = 0; r < R; ++r) {
      a[r] = Vec::load_as(x + r * stride + i);
      E2CM_PREFETCH(prefetch.address + r * prefetch.row_stride);
    }
    prefetch.address += Vec::lanes * prefetch.element_size;
    E2CM_UNROLL for (int c = 0; c < C; ++c) {
      const Vec m = Vec::load_to_register(means + c * mean_stride + i);
      E2CM_UNROLL for (int r = 0; r < R; ++r) {
        sums[c][r] = squares ? add_square(a[r], m, sums[c][r]) : Vec::fma(a[r], m, sums[c][r]);
      }
    }
  }
  add_lanes<R, C>(sums, out, ld);
}

template <class Source>
using DirectTile = void (*)(const Source*, int64_t, int64_t, const float*, int64_t, Prefetch, double*, int64_t);

// The most classes of a tile of R rows.
template <int R>
constexpr int kDirectTileClasses = kDirectSums / R < 6 ? kDirectSums / R : 6;

template <bool squares, class Source, int R, int C = 1>
DirectTile<Source> select_direct_tile(int64_t classes) {
  if constexpr (C == kDirectTileClasses<R>) {
    return direct_tile<squares, R, C, Source>;
  } else {
    return classes == C ? direct_tile<squares, R, C, Source> : select_direct_tile<squares, Source, R, C + 1>(classes);
  }
}

// R rows, block after block. next: the R rows to prefetch. row: the number of the first row, from which follows which
// of the next class vectors are prefetched here: a few for each group of rows.
template <bool squares, int R, class Source>
void direct_rows(const Source* x, int64_t stride, const Source* next, int64_t row, int64_t n, const DirectMeans& means,
                 double* sums, int64_t ld) {
  const int64_t strips = (means.count + kDirectTileClasses<R> - 1) / kDirectTileClasses<R>;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = minimum(kBlock, n - begin), whole = count / kPad * kPad, tail = count - whole;
    const Source* const from = x + begin;
    const float* const block = means.data + begin / kBlock * means.block_stride;
    const Prefetch nothing{reinterpret_cast<const char*>(from), 0, 0};
    for (int64_t s = 0; s < strips; ++s) {  // strips of equal width: 10 classes are 5 + 5, not 6 + 4
      const int64_t first = means.count * s / strips, width = means.count * (s + 1) / strips - first;
      const DirectTile<Source> run = select_direct_tile<squares, Source, R>(width);
      const float* const strip = block + first * means.stride;
      double* const out = sums + first * ld;
      Prefetch prefetch = nothing;
      if (s == 0)
        prefetch = {reinterpret_cast<const char*>(next + begin), stride * int64_t{sizeof(Source)}, sizeof(Source)};
      else if (s + 1 == strips && row < means.count && means.next)
        prefetch = {means.next + minimum(row, means.count - R) * means.next_stride + begin * means.next_size,
                    means.next_stride, means.next_size};
      if (whole) run(from, stride, whole, strip, means.stride, prefetch, out, ld);
      if (!tail) continue;
      const Tail<Source, R> rest(from + whole, stride, R, tail);
      run(rest.rows[0], kPad, kPad, strip + whole, means.stride, nothing, out, ld);
    }
  }
}

// All rows from `row` on, in groups of R; the last ones in smaller groups.
template <bool squares, class Source, int R = kDirectRows>
void direct_all(const Source* x, int64_t stride, int64_t row, int64_t row_count, int64_t n, const DirectMeans& means,
                double* sums, int64_t ld) {
  for (; row + R <= row_count; row += R) {
    const Source* const from = x + row * stride;
    const Source* const next = row + 2 * R <= row_count ? from + R * stride : x + n;  // or the blocks after these
    direct_rows<squares, R>(from, stride, next, row, n, means, sums + row, ld);
  }
  if constexpr (R > 1) direct_all<squares, Source, R / 2>(x, stride, row, row_count, n, means, sums, ld);
}

void add_squares(const void* x, DType dtype, int64_t stride, int64_t row_count, int64_t n, const DirectMeans& means,
                 double* squares, int64_t ld) {
  visit(x, dtype, [&](const auto* typed) { direct_all<true>(typed, stride, 0, row_count, n, means, squares, ld); });
}

void add_dots(const void* x, DType dtype, int64_t stride, int64_t row_count, int64_t n, const DirectMeans& means,
              double* sums, int64_t ld) {
  visit(x, dtype, [&](const auto* typed) { direct_all<false>(typed, stride, 0, row_count, n, means, sums, ld); });
}

}  // namespace
}  // namespace e2cm
