// Many classes: distance^2 = |x|^2 - 2 x.m + |m|^2 with x and m less the center, or logits x.m, by tensor cores.
//
// It must move (B / 64) K D + (K / 64) B D numbers from the second level of cache and take 2 B K D operations. A block
// takes a tile of 64 rows x 64 classes and one split of D; while it multiplies 32 columns, the next ones are on their
// way into registers. A warp has 32 x 32 sums. The products of 32 columns are summed up by the tensor cores, which
// round towards zero, and these sums in float32; splits are added up in order and in double by a second launch, a warp
// for each row: one block for a tile of rows, as in direct.cu, would read all of its sums alone.
//
// TF32 has 11 bits, which is not enough: a number is split in two TF32 numbers, high + low, and a product is high *
// high
// + high * low + low * high; what is left out is 2^-22 of it. Features of 16 bits are TF32 numbers as they are, if no
// center is taken from them, and need two products. (bfloat16 instructions are twice as fast, but a class vector is
// then three numbers, and a float16 feature two: nothing is gained.) GPUs before sm_80 have no TF32: there the same
// sums are made by plain instructions.
//
// Where the subtraction cancels, the answering warp takes the difference the long way.
#include "kernels.h"

namespace e2cm {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 32;           // of D, in shared memory
constexpr int kStride = kColumns + 4;  // of a row there: the eight rows that a warp reads from lie in other banks
constexpr int kPacks = kTile * kColumns / 4 / kThreads;  // of four numbers, that a thread brings
constexpr int kPassRows = kThreads / (kColumns / 4);     // rows that the threads bring at a time
static_assert(kTile % kPassRows == 0 && kManyStep % kColumns == 0, "whole passes, whole pieces of a split");

struct Many {
  Rows x;
  Rows vectors;  // float32
  const float* center;
  Splits splits;
  bool x_aligned, vectors_aligned, center_aligned;
  bool x_is_exact;  // as TF32
  float *sums, *row_norms, *class_norms;
};

// ---- two TF32 numbers -----------------------------------------------------------------------------------------------

// To nearest, by hand: a NaN may come out as zero here, but never of what is left.
__device__ inline float to_tf32(float x) { return bits_as_float((float_as_bits(x) + 0x1000u) & ~0x1fffu); }

struct Halves {
  float high, low;
};

__device__ inline Halves split(float x) {
  const float high = to_tf32(x);
  return {high, to_tf32(x - high)};
}

// ---- a warp's product of 16 rows and 8 classes over 8 columns
// --------------------------------------------------------- Lane 4 g + t holds of the rows: (g, t), (g + 8, t), (g, t +
// 4), (g + 8, t + 4); of the classes: (g, t), (g, t + 4); of the sums: (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2
// t + 1).

struct ManyLane {
  int group, member;
  __device__ ManyLane() : group(threadIdx.x % kWarp / 4), member(threadIdx.x % 4) {}
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
__device__ inline void multiply(float (&sums)[4], const float (&a)[4], const float (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(float_as_bits(a[0])), "r"(float_as_bits(a[1])), "r"(float_as_bits(a[2])), "r"(float_as_bits(a[3])),
        "r"(float_as_bits(b[0])), "r"(float_as_bits(b[1])));
}
#elif defined(E2CM_EMULATED)
__device__ inline void multiply(float (&sums)[4], const float (&a)[4], const float (&b)[2]) {
  emulation::multiply(sums, a, b);
}
#else
// The same, number by number: each lane asks the others for the rows and classes of its four sums.
__device__ inline void multiply(float (&sums)[4], const float (&a)[4], const float (&b)[2]) {
  const ManyLane lane;
  for (int column = 0; column < 8; ++column) {
    const int member = column % 4, part = column / 4;
    const float top = __shfl_sync(kAll, a[2 * part], 4 * lane.group + member);
    const float bottom = __shfl_sync(kAll, a[2 * part + 1], 4 * lane.group + member);
    const float left = __shfl_sync(kAll, b[part], 4 * (2 * lane.member) + member);
    const float right = __shfl_sync(kAll, b[part], 4 * (2 * lane.member + 1) + member);
    sums[0] = fmaf(top, left, sums[0]), sums[1] = fmaf(top, right, sums[1]);
    sums[2] = fmaf(bottom, left, sums[2]), sums[3] = fmaf(bottom, right, sums[3]);
  }
}
#endif

// ---- from memory to shared memory -----------------------------------------------------------------------------------

// This thread's part of 64 rows x 32 columns of a matrix, less the center; of rows behind the last one, that one again,
// and zeros behind the last column. Eight neighbouring threads have a row.
struct Piece {
  float numbers[kPacks][4];

  static __device__ int row(int pass) { return pass * kPassRows + static_cast<int>(threadIdx.x) / (kColumns / 4); }
  static __device__ int column() { return static_cast<int>(threadIdx.x) % (kColumns / 4) * 4; }

  template <class T>
  __device__ void load_as(const Rows& rows, bool aligned, int64_t first, int64_t from, int64_t end) {
    const T* const data = static_cast<const T*>(rows.data) + from;
    E2CM_LOOP for (int p = 0; p < kPacks; ++p) {
      const int64_t r = first + row(p) < rows.rows ? first + row(p) : rows.rows - 1;
      load_four(data + r * rows.stride, end - from, aligned, numbers[p]);
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
    E2CM_LOOP for (int p = 0; p < kPacks; ++p) { E2CM_LOOP for (int i = 0; i < 4; ++i) numbers[p][i] -= c[i]; }
  }

  __device__ void store(float* tile, float (&norms)[kPacks]) const {
    E2CM_LOOP for (int p = 0; p < kPacks; ++p) {
      float* const to = tile + row(p) * kStride + column();
      *reinterpret_cast<uint4*>(to) = make_uint4(float_as_bits(numbers[p][0]), float_as_bits(numbers[p][1]),
                                                 float_as_bits(numbers[p][2]), float_as_bits(numbers[p][3]));
      E2CM_LOOP for (int i = 0; i < 4; ++i) norms[p] = fmaf(numbers[p][i], numbers[p][i], norms[p]);
    }
  }
};

// Norms of the rows of a tile: the sums of eight neighbouring threads.
__device__ inline void write_norms(const float (&norms)[kPacks], float* out, int64_t first, int64_t rows) {
  E2CM_LOOP for (int p = 0; p < kPacks; ++p) {
    float norm = norms[p];
    E2CM_LOOP for (int offset = kColumns / 8; offset > 0; offset /= 2) norm += __shfl_xor_sync(kAll, norm, offset);
    const int64_t row = first + Piece::row(p);
    if (Piece::column() == 0 && row < rows) out[row] = norm;
  }
}

// ---- a warp's 32 x 32 sums ------------------------------------------------------------------------------------------

struct WarpTile {
  float sums[2][4][4];  // [16 rows each][8 classes each][of a lane]

  // += products of the columns in shared memory; x and vectors: where the warp's first row and class are.
  __device__ void add(const float* x, const float* vectors, bool x_is_exact) {
    const ManyLane lane;
    float products[2][4][4] = {};
    for (int column = 0; column < kColumns; column += 8) {
      float high_x[2][4], low_x[2][4];
      E2CM_LOOP for (int m = 0; m < 2; ++m) {
        E2CM_LOOP for (int i = 0; i < 4; ++i) {
          const int row = m * 16 + lane.group + i % 2 * 8;
          const Halves halves = split(x[row * kStride + column + lane.member + i / 2 * 4]);
          high_x[m][i] = halves.high, low_x[m][i] = halves.low;
        }
      }
      E2CM_LOOP for (int n = 0; n < 4; ++n) {
        float high[2], low[2];
        E2CM_LOOP for (int i = 0; i < 2; ++i) {
          const Halves halves = split(vectors[(n * 8 + lane.group) * kStride + column + lane.member + i * 4]);
          high[i] = halves.high, low[i] = halves.low;
        }
        E2CM_LOOP for (int m = 0; m < 2; ++m) {
          if (!x_is_exact) multiply(products[m][n], low_x[m], high);
          multiply(products[m][n], high_x[m], low);
          multiply(products[m][n], high_x[m], high);
        }
      }
    }
    E2CM_LOOP for (int m = 0; m < 2; ++m) {
      E2CM_LOOP for (int n = 0; n < 4; ++n) {
        E2CM_LOOP for (int i = 0; i < 4; ++i) sums[m][n][i] += products[m][n][i];
      }
    }
  }

  // out: [rows, classes]; of the warp: its first row and class.
  __device__ void write(float* out, int64_t first_row, int64_t rows, int64_t first_class, int64_t classes) const {
    const ManyLane lane;
    E2CM_LOOP for (int m = 0; m < 2; ++m) {
      E2CM_LOOP for (int n = 0; n < 4; ++n) {
        E2CM_LOOP for (int i = 0; i < 4; ++i) {
          const int64_t row = first_row + m * 16 + lane.group + i / 2 * 8;
          const int64_t k = first_class + n * 8 + 2 * lane.member + i % 2;
          if (row < rows && k < classes) out[row * classes + k] = sums[m][n][i];
        }
      }
    }
  }
};

// Without TF32 it takes a few more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kBlocks = 2;
#else
constexpr int kBlocks = 3;
#endif

__global__ void __launch_bounds__(kThreads, kBlocks) many_products(const Many f) {
  float* const x_tile = reinterpret_cast<float*>(shared_memory());
  float* const vector_tile = x_tile + kTile * kStride;
  const int64_t first_row = int64_t{blockIdx.x} * kTile, first_class = int64_t{blockIdx.z} * kTile;
  const int64_t begin = blockIdx.y * f.splits.each;
  const int64_t end = begin + f.splits.each < f.x.dim ? begin + f.splits.each : f.x.dim;
  const int warp = threadIdx.x / kWarp, warp_row = warp / 2 * 32, warp_class = warp % 2 * 32;

  float row_norms[kPacks] = {}, class_norms[kPacks] = {};
  WarpTile sums = {};
  Piece x, vectors;
  const auto load = [&](int64_t at) {
    x.load(f.x, f.x_aligned, f.center, f.center_aligned, first_row, at, end);
    vectors.load(f.vectors, f.vectors_aligned, f.center, f.center_aligned, first_class, at, end);
  };
  load(begin);
  for (int64_t at = begin; at < end; at += kColumns) {
    x.store(x_tile, row_norms);
    vectors.store(vector_tile, class_norms);
    __syncthreads();
    if (at + kColumns < end) load(at + kColumns);
    sums.add(x_tile + warp_row * kStride, vector_tile + warp_class * kStride, f.x_is_exact);
    __syncthreads();
  }
  sums.write(f.sums + blockIdx.y * f.x.rows * f.vectors.rows, first_row + warp_row, f.x.rows, first_class + warp_class,
             f.vectors.rows);
  if (blockIdx.z == 0) write_norms(row_norms, f.row_norms + blockIdx.y * f.x.rows, first_row, f.x.rows);
  if (blockIdx.x == 0)
    write_norms(class_norms, f.class_norms + blockIdx.y * f.vectors.rows, first_class, f.vectors.rows);
}

// ---- answers, a warp for each row -----------------------------------------------------------------------------------

constexpr double kDoubt = 0.125;  // what is left of the norms after the subtraction must be more

__device__ inline double over_splits(const float* sums, int64_t splits, int64_t stride) {
  double total = 0;
  for (int64_t s = 0; s < splits; ++s) total += sums[s * stride];
  return total;
}

// Penalties take the place of the sums of the first split.
__global__ void __launch_bounds__(kThreads) many_answers(const Many f, const Scores scores, const Finish finish) {
  const int64_t row = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= f.x.rows) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t classes = f.vectors.rows, splits = f.splits.count;
  float* const penalties = f.sums + row * classes;
  const double row_norm = scores.squares ? over_splits(f.row_norms + row, splits, f.x.rows) : 0;
  const bool spoiled = scores.squares && !scores.distances && !(row_norm <= kHuge) && is_spoiled(f.x, row);
  for (int64_t first = 0; first < classes; first += kWarp) {
    const int64_t k = first + lane;
    const bool exists = k < classes;
    const double product = exists ? over_splits(f.sums + row * classes + k, splits, f.x.rows * classes) : 0;
    float distance = 0;
    if (scores.squares) {
      const double norms = exists ? row_norm + over_splits(f.class_norms + k, splits, classes) : 0;
      const double square = norms - 2 * product;
      const bool asked = exists && (!scores.per_class || usable(scores.per_class[k]));
      const bool doubtful = asked && (!(square >= norms * kDoubt) || !(norms >= kTiny) || !(norms <= kHuge));
      distance = static_cast<float>(sqrt(static_cast<float>(square)));
      distance = spoiled ? not_a_number() : without_doubt(distance, doubtful, f.x, row, f.vectors, first);
    }
    if (!exists) continue;
    if (scores.distances) {
      scores.distances[(finish.first + row) * classes + k] = distance;
    } else {
      penalties[k] = penalty_of(scores, distance, product, k);
    }
  }
  __syncwarp();
  if (scores.distances) return;
  answer(finish, row, [&](int64_t k) { return penalties[k]; });
}

}  // namespace

cudaError_t launch_many(const Rows& x, const Rows& vectors, const float* center, const Scores& scores,
                        const Finish& finish, float* sums, float* row_norms, float* class_norms, cudaStream_t stream) {
  const Splits splits = splits_of(x.dim, vectors.rows);
  const Many many{x,
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
  const dim3 grid(static_cast<unsigned>(ceil_div(x.rows, kTile)), static_cast<unsigned>(splits.count),
                  static_cast<unsigned>(ceil_div(vectors.rows, kTile)));
  const cudaError_t error =
      launch(many_products, grid, dim3(kThreads), 2 * kTile * kStride * sizeof(float), stream, many);
  if (error != cudaSuccess) return error;
  const dim3 warps(static_cast<unsigned>(ceil_div(x.rows, kThreads / kWarp)));
  return launch(many_answers, warps, dim3(kThreads), 0, stream, many, scores, finish);
}

}  // namespace cuda
}  // namespace e2cm
