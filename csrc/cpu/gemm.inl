// Many classes: products x . m by register-blocked tiles, from which distances.cpp makes distance^2 = |x|^2 - 2 x.m +
// |m|^2 or logits; and the exact sum of squared differences for the few pairs where that cancels.
//
// Reads   B * D features once per group of classes and K * D class vectors once per group of rows (see distances.cpp),
//         from memory. Per tile, from scratch: the rows (first level of cache) and a panel of class vectors of
//         2 * lanes * kBlock floats (first or second level).
// Writes  scratch: rows as float32 less the center, class vectors transposed into panels. B * K double sums per block.
// Does    one FMA per (row, class, feature); a tile of R rows x C vectors of classes loads C vectors and broadcasts R
//         floats for R * C vector FMAs.
//
// Class vectors are transposed, so that every sum has a lane of its own and nothing is reduced over lanes at the end.
// Products are accumulated in chains of kChain additions, which bounds how much rounding errors can drift in one
// direction.
//
// Tried and dropped:
// - Dot products of rows and class vectors in tiles of 4 x 6: a quarter of the time went into sums over lanes. For the
//   last few classes only, the ones that leave a panel half empty: 9% faster at 100 classes, but these classes were
//   then added up in another order. Equal class vectors must have equal bits, or ties do not go to the lowest class.
// - Blocks of 256, 1024 and 2048 features; chains of 128.
// - The inner loop unrolled by 4 or 8 (by 2: 8% faster, kept). Without the prefetch of the panel, 3% faster if the loop
//   is not unrolled, no difference if it is.
// - AMX: products of 24-bit numbers from int8 digits on tiles, 1.6 times as fast where the core is not shared. The
//   elements of a block share an exponent, so one outlier takes digits from all the others: distances off by up to
//   7e-4, logits by any amount.

namespace e2cm {
namespace {

// ---- rows into scratch ----------------------------------------------------------------------------------------------

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
  const Tail<float, 1> center_tail(center + whole, 0, 1, tail);
  for (int64_t r = 0; r < row_count; ++r) {
    Vec norm[1][1] = {{Vec::zero()}};
    load_row(source + r * stride, center, whole, rows + r * kScratchStride, norm[0][0]);
    if (tail) {
      const Tail<Source, 1> rest(source + r * stride + whole, 0, 1, tail);
      load_row(rest.rows[0], center_tail.rows[0], kPad, rows + r * kScratchStride + whole, norm[0][0]);
    }
    if (norms) add_lanes<1, 1>(norm, norms + r, 0);
  }
}

void load_block(const void* source, DType dtype, int64_t stride, const float* center, int64_t row_count, int64_t n,
                float* rows, double* norms) {
  visit(source, dtype, [&](const auto* typed) { load_block_as(typed, stride, center, row_count, n, rows, norms); });
}

// ---- class vectors into panels --------------------------------------------------------------------------------------

// `lanes` elements of each of at most `lanes` vectors, transposed: element i of all of them goes to panel[i * width].
template <class Source>
void pack_transposed(const Source* source, int64_t stride, int64_t mean_count, Vec center, int64_t n, float* panel,
                     int64_t width, Vec& norms) {
  Vec square[Vec::lanes];
  E2CM_UNROLL for (int k = 0; k < Vec::lanes; ++k) {
    square[k] = k < mean_count ? Vec::sub(Vec::load_as(source + k * stride), center) : Vec::zero();
  }
  transpose_square(square);
  E2CM_UNROLL for (int i = 0; i < Vec::lanes; ++i) {
    if (i < n) Vec::store(panel + i * width, square[i]);
    norms = Vec::fma(square[i], square[i], norms);
  }
}

// All n elements of at most `lanes` vectors.
template <class Source>
void pack_group(const Source* source, int64_t stride, const float* center, int64_t mean_count, int64_t n, float* panel,
                int64_t width, double* norms) {
  for (int64_t begin = 0; begin < n; begin += kChain) {
    Vec sums = Vec::zero();
    for (int64_t i = begin; i < minimum(n, begin + kChain); i += Vec::lanes) {
      if (i + Vec::lanes <= n) {
        pack_transposed(source + i, stride, mean_count, Vec::load(center + i), n - i, panel + i * width, width, sums);
      } else {
        const Tail<Source, Vec::lanes> rest(source + i, stride, mean_count, n - i);
        const Tail<float, 1> center_tail(center + i, 0, 1, n - i);
        pack_transposed(rest.rows[0], kPad, mean_count, Vec::load(center_tail.rows[0]), n - i, panel + i * width, width,
                        sums);
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
      pack_group(typed + k * stride, stride, or_zeros(center), minimum(Vec::lanes, mean_count - k), n, panel + k, width,
                 norms ? norms + k : nullptr);
  });
}

// ---- products -------------------------------------------------------------------------------------------------------

// R rows x C vectors of classes.
template <int R, int C>
void gemm_tile(const float* rows, const float* panel, int64_t n, double* products, int64_t ld, PrefetchQueue next) {
  alignas(64) float chains[R][C * Vec::lanes];
  for (int64_t begin = 0; begin < n; begin += kChain) {
    Vec sums[R][C];
    E2CM_UNROLL for (int r = 0; r < R; ++r) { E2CM_UNROLL for (int c = 0; c < C; ++c) sums[r][c] = Vec::zero(); }
    const int64_t end = minimum(n, begin + kChain);
    const int64_t row = begin / kChain;
    // Without a next row, the panel: a prefetch of a page that is not mapped is slow.
    const char* const prefetch =
        row < next.rows ? next.address + row * next.row_stride : reinterpret_cast<const char*>(panel);
    E2CM_UNROLL_2 for (int64_t i = begin; i < end; ++i) {
      const float* const m = panel + i * (C * Vec::lanes);
      Vec means[C];
      E2CM_UNROLL for (int c = 0; c < C; ++c) {
        means[c] = Vec::load_to_register(m + c * Vec::lanes);
        E2CM_PREFETCH_L1(m + (16 * C + c) * Vec::lanes);
      }
      E2CM_PREFETCH(prefetch + (i - begin) * next.block_bytes / kChain);
      E2CM_UNROLL for (int r = 0; r < R; ++r) {
        const Vec x = Vec::set(rows[r * kScratchStride + i]);
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

using GemmTile = void (*)(const float*, const float*, int64_t, double*, int64_t, PrefetchQueue);

template <int C, int R = 1>
GemmTile select_gemm_tile(int64_t rows) {
  if constexpr (R == kGemmRows) {
    return gemm_tile<R, C>;
  } else {
    return rows == R ? gemm_tile<R, C> : select_gemm_tile<C, R + 1>(rows);
  }
}

// The rows that one tile prefetches, one per chain.
PrefetchQueue take_rows(PrefetchQueue& queue) {
  constexpr int64_t count = kBlock / kChain;
  const PrefetchQueue taken = queue;
  queue.address += count * queue.row_stride;
  queue.rows -= count;
  return taken;
}

void add_products(const float* rows, int64_t row_count, const float* panel, int64_t mean_count, int64_t n,
                  double* products, int64_t ld, PrefetchQueue& next_means, PrefetchQueue& next_rows) {
  const int64_t tiles = (row_count + kGemmRows - 1) / kGemmRows;
  for (int64_t t = 0; t < tiles; ++t) {  // of equal height: a tile with few rows waits for the latency of its FMAs
    const int64_t begin = row_count * t / tiles, height = row_count * (t + 1) / tiles - begin;
    const GemmTile run = mean_count > Vec::lanes ? select_gemm_tile<2>(height) : select_gemm_tile<1>(height);
    PrefetchQueue& next = next_means.rows > 0 ? next_means : next_rows;
    run(rows + begin * kScratchStride, panel, n, products + begin * ld, ld, take_rows(next));
  }
}

// ---- the exact squared distance of one pair -------------------------------------------------------------------------

template <class X, class Mean>
double squared_distance_as(const X* x, const Mean* mean, int64_t n) {
  constexpr int64_t step = 4 * Vec::lanes;  // four independent sums hide the latency of the FMA
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
      for (int64_t i = 0; i < n; i += kBlock) total += squared_distance_as(a + i, b + i, minimum(kBlock, n - i));
      return total;
    });
  });
}

}  // namespace
}  // namespace e2cm
