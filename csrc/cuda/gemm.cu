// Many classes: products x . m by tensor cores, from which a second launch makes distance^2 = |x|^2 - 2 x.m + |m|^2
// (the center subtracted from both) or logits, and the answers.
//
// Reads   (K / 64) * B * D features and (B / 64) * K * D float32 class-vector elements, from the second level of cache
//         at best; the second launch reads the sums.
// Writes  splits * B * K float32 sums, and splits * (B + K) norms.
// Does    2 * B * K * D operations, each product as two or three TF32 products (below).
//
// A block takes a tile of 64 rows x 64 classes and one split of D. While it multiplies 32 columns from shared memory,
// the next 32 are on their way to registers. A warp has 32 x 32 sums. Tensor cores accumulate the products of 32
// columns, rounding towards zero; those are then added in float32. The second launch adds up the splits, in order and
// in double, a warp per row. Where the subtraction cancels, that warp computes the difference itself.
//
// TF32 has 11 significant bits, too few. A float is split into two TF32 numbers, high + low, and a product is
// high * high + high * low + low * high; what is left out is 2^-22 of it. 16-bit features are TF32 numbers as they are,
// unless a center is subtracted, and need two products. GPUs before sm_80 have no TF32 and compute the same sums with
// FMA instructions.
//
// Considered and dropped: bfloat16 instructions are twice as fast, but a class vector then takes three numbers and a
// float16 feature two, so nothing is gained. Answers in the same launch, as in direct.cu: the last block of a tile of
// rows would have to read all its sums alone.
#include "kernels.h"

namespace e2cm {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 32;               // of D, in shared memory
constexpr int kTileStride = kColumns + 4;  // of a row there: the eight rows that a warp reads are in different banks
constexpr int kPacks = kGemmTile * kColumns / 4 / kThreads;  // groups of four columns that a thread loads
constexpr int kPassRows = kThreads / (kColumns / 4);         // rows that all threads load at a time
static_assert(kGemmTile % kPassRows == 0 && kGemmStep % kColumns == 0, "whole passes, and whole tiles in a split");

struct GemmArgs {
  Rows x;
  Rows vectors;  // float32
  const float* center;
  Splits splits;
  bool x_aligned, vectors_aligned, center_aligned;
  bool x_is_tf32;  // exactly representable
  float *sums, *row_norms, *class_norms;
};

// ---- a float as two TF32 numbers ------------------------------------------------------------------------------------

// To nearest. A NaN may become zero here, but then the low part is NaN.
__device__ inline float to_tf32(float x) { return bits_as_float((float_as_bits(x) + 0x1000u) & ~0x1fffu); }

struct Tf32Pair {
  float high, low;
};

__device__ inline Tf32Pair split_tf32(float x) {
  const float high = to_tf32(x);
  return {high, to_tf32(x - high)};
}

// ---- a warp's product of 16 rows and 8 classes over 8 columns -------------------------------------------------------
//
// Lane 4 g + t holds
//   of the rows      (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
//   of the classes   (g, t), (g, t + 4)
//   of the sums      (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1)

struct MmaLane {
  int group, member;
  __device__ MmaLane() : group(threadIdx.x % kWarp / 4), member(threadIdx.x % 4) {}
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
__device__ inline void mma_m16n8k8(float (&sums)[4], const float (&a)[4], const float (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(float_as_bits(a[0])), "r"(float_as_bits(a[1])), "r"(float_as_bits(a[2])), "r"(float_as_bits(a[3])),
        "r"(float_as_bits(b[0])), "r"(float_as_bits(b[1])));
}
#elif defined(E2CM_EMULATED)
__device__ inline void mma_m16n8k8(float (&sums)[4], const float (&a)[4], const float (&b)[2]) {
  emulation::mma_m16n8k8(sums, a, b);
}
#else
// Without tensor cores: each lane gets the rows and classes of its four sums from the others.
__device__ inline void mma_m16n8k8(float (&sums)[4], const float (&a)[4], const float (&b)[2]) {
  const MmaLane lane;
  for (int column = 0; column < 8; ++column) {
    const int member = column % 4, part = column / 4;
    const float top = __shfl_sync(kAllLanes, a[2 * part], 4 * lane.group + member);
    const float bottom = __shfl_sync(kAllLanes, a[2 * part + 1], 4 * lane.group + member);
    const float left = __shfl_sync(kAllLanes, b[part], 4 * (2 * lane.member) + member);
    const float right = __shfl_sync(kAllLanes, b[part], 4 * (2 * lane.member + 1) + member);
    sums[0] = fmaf(top, left, sums[0]), sums[1] = fmaf(top, right, sums[1]);
    sums[2] = fmaf(bottom, left, sums[2]), sums[3] = fmaf(bottom, right, sums[3]);
  }
}
#endif

// ---- from global to shared memory -----------------------------------------------------------------------------------

// A thread's part of a tile of 64 rows x 32 columns, less the center. Rows after the last one repeat it; columns after
// the last one are zeros. Eight neighbouring threads share a row.
struct TileLoader {
  float values[kPacks][4];

  static __device__ int row(int pass) { return pass * kPassRows + static_cast<int>(threadIdx.x) / (kColumns / 4); }
  static __device__ int column() { return static_cast<int>(threadIdx.x) % (kColumns / 4) * 4; }

  template <class T>
  __device__ void load_as(const Rows& rows, bool aligned, int64_t first, int64_t from, int64_t end) {
    const T* const data = static_cast<const T*>(rows.data) + from;
    E2CM_UNROLL for (int p = 0; p < kPacks; ++p) {
      const int64_t r = first + row(p) < rows.rows ? first + row(p) : rows.rows - 1;
      load_four(data + r * rows.stride, end - from, aligned, values[p]);
    }
  }

  __device__ void load(const Rows& rows, bool aligned, const float* center, bool center_aligned, int64_t first,
                       int64_t at, int64_t end) {
    const int64_t from = at + column();
    if (rows.dtype == DType::f32) load_as<float>(rows, aligned, first, from, end);
    if (rows.dtype == DType::bf16) load_as<bf16>(rows, aligned, first, from, end);
    if (rows.dtype == DType::f16) load_as<f16>(rows, aligned, first, from, end);
    if (!center) return;
    float c[4];
    load_four(center + from, end - from, center_aligned, c);
    E2CM_UNROLL for (int p = 0; p < kPacks; ++p) { E2CM_UNROLL for (int i = 0; i < 4; ++i) values[p][i] -= c[i]; }
  }

  __device__ void store(float* tile, float (&norms)[kPacks]) const {
    E2CM_UNROLL for (int p = 0; p < kPacks; ++p) {
      float* const to = tile + row(p) * kTileStride + column();
      *reinterpret_cast<uint4*>(to) = make_uint4(float_as_bits(values[p][0]), float_as_bits(values[p][1]),
                                                 float_as_bits(values[p][2]), float_as_bits(values[p][3]));
      E2CM_UNROLL for (int i = 0; i < 4; ++i) norms[p] = fmaf(values[p][i], values[p][i], norms[p]);
    }
  }
};

// Norms of the rows of a tile: sums over the eight threads that share a row.
__device__ inline void write_norms(const float (&norms)[kPacks], float* out, int64_t first, int64_t rows) {
  E2CM_UNROLL for (int p = 0; p < kPacks; ++p) {
    float norm = norms[p];
    E2CM_UNROLL for (int offset = kColumns / 8; offset > 0; offset /= 2) {
      norm += __shfl_xor_sync(kAllLanes, norm, offset);
    }
    const int64_t row = first + TileLoader::row(p);
    if (TileLoader::column() == 0 && row < rows) out[row] = norm;
  }
}

// ---- a warp's 32 x 32 sums ------------------------------------------------------------------------------------------

struct WarpTile {
  float sums[2][4][4];  // [groups of 16 rows][groups of 8 classes][of a lane]

  // Adds the products of the columns in shared memory. x, vectors: the warp's first row and class there.
  __device__ void add(const float* x, const float* vectors, bool x_is_tf32) {
    const MmaLane lane;
    float products[2][4][4] = {};
    for (int column = 0; column < kColumns; column += 8) {
      float high_x[2][4], low_x[2][4];
      E2CM_UNROLL for (int m = 0; m < 2; ++m) {
        E2CM_UNROLL for (int i = 0; i < 4; ++i) {
          const int row = m * 16 + lane.group + i % 2 * 8;
          const Tf32Pair pair = split_tf32(x[row * kTileStride + column + lane.member + i / 2 * 4]);
          high_x[m][i] = pair.high, low_x[m][i] = pair.low;
        }
      }
      E2CM_UNROLL for (int n = 0; n < 4; ++n) {
        float high[2], low[2];
        E2CM_UNROLL for (int i = 0; i < 2; ++i) {
          const Tf32Pair pair = split_tf32(vectors[(n * 8 + lane.group) * kTileStride + column + lane.member + i * 4]);
          high[i] = pair.high, low[i] = pair.low;
        }
        E2CM_UNROLL for (int m = 0; m < 2; ++m) {
          if (!x_is_tf32) mma_m16n8k8(products[m][n], low_x[m], high);
          mma_m16n8k8(products[m][n], high_x[m], low);
          mma_m16n8k8(products[m][n], high_x[m], high);
        }
      }
    }
    E2CM_UNROLL for (int m = 0; m < 2; ++m) {
      E2CM_UNROLL for (int n = 0; n < 4; ++n) {
        E2CM_UNROLL for (int i = 0; i < 4; ++i) sums[m][n][i] += products[m][n][i];
      }
    }
  }

  // To out, [rows, classes].
  __device__ void write(float* out, int64_t first_row, int64_t rows, int64_t first_class, int64_t classes) const {
    const MmaLane lane;
    E2CM_UNROLL for (int m = 0; m < 2; ++m) {
      E2CM_UNROLL for (int n = 0; n < 4; ++n) {
        E2CM_UNROLL for (int i = 0; i < 4; ++i) {
          const int64_t row = first_row + m * 16 + lane.group + i / 2 * 8;
          const int64_t k = first_class + n * 8 + 2 * lane.member + i % 2;
          if (row < rows && k < classes) out[row * classes + k] = sums[m][n][i];
        }
      }
    }
  }
};

// Resident blocks per multiprocessor. Without TF32 a thread takes a few more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kBlocks = 2;
#else
constexpr int kBlocks = 3;
#endif

__global__ void __launch_bounds__(kThreads, kBlocks) gemm_products(const GemmArgs args) {
  float* const x_tile = reinterpret_cast<float*>(shared_memory());
  float* const vector_tile = x_tile + kGemmTile * kTileStride;
  const int64_t first_row = int64_t{blockIdx.x} * kGemmTile, first_class = int64_t{blockIdx.z} * kGemmTile;
  const int64_t begin = blockIdx.y * args.splits.each;
  const int64_t end = begin + args.splits.each < args.x.dim ? begin + args.splits.each : args.x.dim;
  const int warp = threadIdx.x / kWarp, warp_row = warp / 2 * 32, warp_class = warp % 2 * 32;

  float row_norms[kPacks] = {}, class_norms[kPacks] = {};
  WarpTile sums = {};
  TileLoader x, vectors;
  const auto load = [&](int64_t at) {
    x.load(args.x, args.x_aligned, args.center, args.center_aligned, first_row, at, end);
    vectors.load(args.vectors, args.vectors_aligned, args.center, args.center_aligned, first_class, at, end);
  };
  load(begin);
  for (int64_t at = begin; at < end; at += kColumns) {
    x.store(x_tile, row_norms);
    vectors.store(vector_tile, class_norms);
    __syncthreads();
    if (at + kColumns < end) load(at + kColumns);
    sums.add(x_tile + warp_row * kTileStride, vector_tile + warp_class * kTileStride, args.x_is_tf32);
    __syncthreads();
  }
  sums.write(args.sums + blockIdx.y * args.x.rows * args.vectors.rows, first_row + warp_row, args.x.rows,
             first_class + warp_class, args.vectors.rows);
  if (blockIdx.z == 0) write_norms(row_norms, args.row_norms + blockIdx.y * args.x.rows, first_row, args.x.rows);
  if (blockIdx.x == 0)
    write_norms(class_norms, args.class_norms + blockIdx.y * args.vectors.rows, first_class, args.vectors.rows);
}

// ---- answers, a warp per row ----------------------------------------------------------------------------------------

constexpr double kMinRemainder = 0.125;  // of the norms, after the subtraction: less is inaccurate

__device__ inline double over_splits(const float* sums, int64_t splits, int64_t stride) {
  double total = 0;
  for (int64_t s = 0; s < splits; ++s) total += sums[s * stride];
  return total;
}

// Penalties overwrite the sums of the first split.
__global__ void __launch_bounds__(kThreads)
    gemm_answers(const GemmArgs args, const ScoreParams scores, const Epilogue epilogue) {
  const int64_t row = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= args.x.rows) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t classes = args.vectors.rows, splits = args.splits.count;
  float* const penalties = args.sums + row * classes;
  const double row_norm = scores.squares ? over_splits(args.row_norms + row, splits, args.x.rows) : 0;
  const bool non_finite =
      scores.squares && !scores.distances && !(row_norm <= kMaxSquare) && has_non_finite(args.x, row);
  for (int64_t first = 0; first < classes; first += kWarp) {
    const int64_t k = first + lane;
    const bool exists = k < classes;
    const double product = exists ? over_splits(args.sums + row * classes + k, splits, args.x.rows * classes) : 0;
    float distance = 0;
    if (scores.squares) {
      const double norms = exists ? row_norm + over_splits(args.class_norms + k, splits, classes) : 0;
      const double square = norms - 2 * product;
      const bool wanted = exists && (!scores.per_class || usable(scores.per_class[k]));
      const bool inaccurate =
          wanted && (!(square >= norms * kMinRemainder) || !(norms >= kMinSquare) || !(norms <= kMaxSquare));
      distance = static_cast<float>(sqrt(static_cast<float>(square)));
      distance =
          non_finite ? not_a_number() : replace_inaccurate(distance, inaccurate, args.x, row, args.vectors, first);
    }
    if (!exists) continue;
    if (scores.distances) {
      scores.distances[(epilogue.first + row) * classes + k] = distance;
    } else {
      penalties[k] = penalty_of(scores, distance, product, k);
    }
  }
  __syncwarp();
  if (scores.distances) return;
  write_answer(epilogue, row, [&](int64_t k) { return penalties[k]; });
}

}  // namespace

cudaError_t launch_gemm(const Rows& x, const Rows& vectors, const float* center, const ScoreParams& scores,
                        const Epilogue& epilogue, float* sums, float* row_norms, float* class_norms,
                        cudaStream_t stream) {
  const Splits splits = splits_of(x.dim, vectors.rows);
  const GemmArgs args{x,
                      vectors,
                      scores.squares ? center : nullptr,
                      splits,
                      rows_are_aligned(x),
                      rows_are_aligned(vectors),
                      is_aligned(center, 16),
                      x.dtype != DType::f32 && !(scores.squares && center),
                      sums,
                      row_norms,
                      class_norms};
  const dim3 grid(static_cast<unsigned>(ceil_div(x.rows, kGemmTile)), static_cast<unsigned>(splits.count),
                  static_cast<unsigned>(ceil_div(vectors.rows, kGemmTile)));
  const cudaError_t error =
      launch(gemm_products, grid, dim3(kThreads), 2 * kGemmTile * kTileStride * sizeof(float), stream, args);
  if (error != cudaSuccess) return error;
  const dim3 warps(static_cast<unsigned>(ceil_div(x.rows, kThreads / kWarp)));
  return launch(gemm_answers, warps, dim3(kThreads), 0, stream, args, scores, epilogue);
}

}  // namespace cuda
}  // namespace e2cm
