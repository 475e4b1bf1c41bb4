// Few classes (up to kMaxDirectClasses): distance^2 = sum of (x - m)^2, or logit = sum of x * m, over features in their
// storage type, and the answers made from them in the same launch.
//
// Reads   B * D features once, from memory, and K * D float32 class vectors once per tile of rows, from the second
//         level of cache at best; within a block they stay in the first level.
// Writes  splits * B * K float32 partial sums, read again by the block that finishes a tile.
// Does    a subtraction and an FMA per (row, class, feature), or one FMA for logits. Nothing cancels, nothing is
//         prepared. With ten classes a float32 feature costs about 22 instructions, while an H200 can issue 33 in the
//         time it takes to read one at full bandwidth: memory bound. 16-bit features arrive twice as fast: compute
//         bound.
//
// A block takes some rows and one split of D. Its threads hold 8 features of 8 rows each in registers (16-byte loads,
// all issued before the first is used), process the classes four at a time, and reduce the 32 sums over the warp: one
// per lane. The block that finishes a tile of rows last adds up its splits, in order and in double, and writes the
// answers. Nothing depends on which block that is, and D is split by D alone: the same bits in every run and any batch.
//
// Considered and dropped: products instead of differences halve the arithmetic, but cancel (see gemm.cu). One kernel
// for bf16 and one for f16: HalfBits takes the type at run time, which halves the time to compile.
#include "kernels.h"

namespace e2cm {
namespace cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kRows = static_cast<int>(kDirectRows), kColumns = 8;  // a thread's rows, and its features of each
constexpr int kClasses = 4;                                         // processed together
static_assert(kThreads * kColumns == kDirectStep, "a step of D is what the threads of a block hold");
static_assert(kRows * kClasses == kWarp, "one sum per lane");

struct DirectArgs {
  Rows x;        // of this launch
  Rows vectors;  // of the classes, float32
  Splits splits;
  int64_t block_rows;  // a multiple of kRows
  bool x_aligned, vectors_aligned;
  float* sums;         // [splits, x.rows, classes]
  unsigned* counters;  // blocks that have finished, per tile of rows
  ScoreParams scores;
  Epilogue epilogue;
};

// A thread's features. Feature i of part p is number p * kThreads * size + thread * size + i of the step: neighbouring
// threads read neighbouring 16 bytes.
template <class T>
struct Fragment {
  static constexpr int size = Pack<T>::size, parts = kColumns / size;
  float values[kRows][kColumns];

  static __device__ int64_t column(int64_t at, int part) {
    return at + (part * kThreads + static_cast<int>(threadIdx.x)) * size;
  }

  // Rows after the last one repeat it; columns after the last one are zeros.
  __device__ void load(const DirectArgs& args, int64_t first_row, int64_t at, int64_t end) {
    E2CM_UNROLL for (int p = 0; p < parts; ++p) {
      const int64_t from = column(at, p);
      Pack<T> packs[kRows];
      E2CM_UNROLL for (int r = 0; r < kRows; ++r) {
        const int64_t row = first_row + r < args.x.rows ? first_row + r : args.x.rows - 1;
        const T* const x = static_cast<const T*>(args.x.data) + row * args.x.stride + from;
        if (args.x_aligned && from + size <= end) {
          packs[r].words = load_streaming(x);
        } else {
          packs[r].load(x, end - from);
        }
      }
      E2CM_UNROLL for (int r = 0; r < kRows; ++r) {
        E2CM_UNROLL for (int i = 0; i < size; ++i) values[r][p * size + i] = widen(packs[r].values[i], args.x.dtype);
      }
    }
  }
};

// Adds the features of this step to sums[k * kRows + r] of the warp, for `count` classes from k on.
template <bool squares, int count, class T>
__device__ void add_classes(const DirectArgs& args, const Fragment<T>& x, int64_t at, int64_t end, int k, float* sums) {
  const float* const vectors = static_cast<const float*>(args.vectors.data) + k * args.vectors.stride;
  float totals[count * kRows];
  E2CM_UNROLL for (int i = 0; i < count * kRows; ++i) totals[i] = 0;
  E2CM_UNROLL for (int q = 0; q < kColumns / 4; ++q) {
    const int64_t from = Fragment<T>::column(at, q * 4 / Fragment<T>::size) + q * 4 % Fragment<T>::size;
    float m[count][4];
    E2CM_UNROLL for (int c = 0; c < count; ++c) {
      load_four(vectors + c * args.vectors.stride + from, end - from, args.vectors_aligned, m[c]);
    }
    E2CM_UNROLL for (int c = 0; c < count; ++c) {
      E2CM_UNROLL for (int i = 0; i < 4; ++i) {
        E2CM_UNROLL for (int r = 0; r < kRows; ++r) {
          float& total = totals[c * kRows + r];
          const float value = x.values[r][q * 4 + i], difference = value - m[c][i];
          total = squares ? fmaf(difference, difference, total) : fmaf(value, m[c][i], total);
        }
      }
    }
  }
  const int lane = threadIdx.x % kWarp;
  constexpr int copies = kWarp / (count * kRows);  // lanes that get the same sum
  const float total = warp_reduce_scatter<kWarp / 2>(totals, lane);
  if (lane % copies == 0) sums[k * kRows + lane / copies] += total;
}

// The warp's share of the sums of kRows rows over the split, in shared memory.
template <class T, bool squares>
__device__ void add_rows(const DirectArgs& args, int64_t first_row, int64_t begin, int64_t end, float* sums) {
  const int classes = static_cast<int>(args.vectors.rows);
  for (int i = threadIdx.x % kWarp; i < classes * kRows; i += kWarp) sums[i] = 0;
  __syncwarp();  // the sums of the last classes are added by other lanes
  for (int64_t at = begin; at < end; at += kDirectStep) {
    Fragment<T> x;
    x.load(args, first_row, at, end);
    int k = 0;
    for (; k + kClasses <= classes; k += kClasses) add_classes<squares, kClasses>(args, x, at, end, k, sums);
    if (k + 2 <= classes) {
      add_classes<squares, 2>(args, x, at, end, k, sums);
      k += 2;
    }
    if (k < classes) add_classes<squares, 1>(args, x, at, end, k, sums);
  }
}

// Answers for rows [first, last) of the launch, a warp per row. A lane adds up every (32 / K)-th split of one class.
__device__ void answer_rows(const DirectArgs& args, int64_t first, int64_t last) {
  const int lane = threadIdx.x % kWarp, classes = static_cast<int>(args.vectors.rows);
  const int shares = kWarp / classes, k = lane % classes, share = lane / classes;
  for (int64_t row = first + threadIdx.x / kWarp; row < last; row += kWarps) {
    double part = 0;
    for (int64_t s = share; s < args.splits.count && share < shares; s += shares)
      part += load_from_l2(args.sums + (s * args.x.rows + row) * classes + k);
    double total = 0;
    for (int i = 0; i < shares; ++i) total += __shfl_sync(kAllLanes, part, i * classes + k);

    float distance = 0;
    if (args.scores.squares) {
      distance = static_cast<float>(sqrt(static_cast<float>(total)));
      // A NaN comes from a NaN or an infinity in x or in the mean: it is the result.
      const bool wanted = lane < classes && (!args.scores.per_class || usable(args.scores.per_class[k]));
      const bool inaccurate = wanted && (total < kMinSquare || total > kMaxSquare);
      if (!args.scores.distances && __ballot_sync(kAllLanes, wanted && total > kMaxSquare) &&
          has_non_finite(args.x, row)) {
        distance = not_a_number();
      } else {
        distance = replace_inaccurate(distance, inaccurate, args.x, row, args.vectors, 0);
      }
    }
    if (args.scores.distances) {
      if (lane < classes) args.scores.distances[(args.epilogue.first + row) * classes + lane] = distance;
      continue;
    }
    const float z = penalty_of(args.scores, distance, total, k);
    write_answer(args.epilogue, row, [&](int64_t) { return z; });
  }
}

template <class T, bool squares>
__global__ void __launch_bounds__(kThreads, 3) direct_sums(const DirectArgs args) {
  const int64_t first = int64_t{blockIdx.x} * args.block_rows;
  const int64_t last = first + args.block_rows < args.x.rows ? first + args.block_rows : args.x.rows;
  const int64_t begin = blockIdx.y * args.splits.each;
  const int64_t end = begin + args.splits.each < args.x.dim ? begin + args.splits.each : args.x.dim;
  const int classes = static_cast<int>(args.vectors.rows), warp_sums = classes * kRows;
  float* const sums = reinterpret_cast<float*>(shared_memory());  // [warps, classes, kRows]
  for (int64_t row = first; row < last; row += kRows) {
    add_rows<T, squares>(args, row, begin, end, sums + threadIdx.x / kWarp * warp_sums);
    __syncthreads();
    for (int i = threadIdx.x; i < warp_sums; i += kThreads) {
      float total = sums[i];
      E2CM_UNROLL for (int w = 1; w < kWarps; ++w) total += sums[w * warp_sums + i];
      const int64_t r = row + i % kRows;
      if (r < last) args.sums[(blockIdx.y * args.x.rows + r) * classes + i / kRows] = total;
    }
    __syncthreads();
  }
  // The sums of all threads are visible before the block is counted; the last block then sees those of all blocks.
  __threadfence();
  __syncthreads();
  unsigned* const finished = reinterpret_cast<unsigned*>(sums);
  if (threadIdx.x == 0) *finished = atomicAdd(args.counters + blockIdx.x, 1u);
  __syncthreads();
  if (*finished + 1 < args.splits.count) return;
  __threadfence();
  answer_rows(args, first, last);
}

template <class T>
cudaError_t launch_as(const DirectArgs& args, dim3 grid, size_t shared, cudaStream_t stream) {
  return args.scores.squares ? launch(direct_sums<T, true>, grid, dim3(kThreads), shared, stream, args)
                             : launch(direct_sums<T, false>, grid, dim3(kThreads), shared, stream, args);
}

}  // namespace

cudaError_t launch_direct(const Rows& x, const Rows& vectors, const ScoreParams& scores, const Epilogue& epilogue,
                          float* sums, unsigned* counters, int processors, cudaStream_t stream) {
  const Splits splits = splits_of(x.dim, vectors.rows);
  const int64_t block_rows = direct_block_rows(x.rows, splits.count, processors), tiles = ceil_div(x.rows, block_rows);
  const cudaError_t error = cudaMemsetAsync(counters, 0, static_cast<size_t>(tiles) * sizeof(unsigned), stream);
  if (error != cudaSuccess) return error;
  const DirectArgs args{x,    vectors,  splits, block_rows, rows_are_aligned(x), rows_are_aligned(vectors),
                        sums, counters, scores, epilogue};
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(splits.count));
  const size_t shared = static_cast<size_t>(kWarps * vectors.rows * kRows) * sizeof(float);
  return x.dtype == DType::f32 ? launch_as<float>(args, grid, shared, stream)
                               : launch_as<HalfBits>(args, grid, shared, stream);
}

}  // namespace cuda
}  // namespace e2cm
