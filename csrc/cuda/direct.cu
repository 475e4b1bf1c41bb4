// Few classes: distance^2 = sum of (x - m)^2, or logit = sum of x * m, of features as they arrive. Each feature is read
// once; nothing cancels and nothing is prepared.
//
// It must move B D numbers of x, and K D of the vectors for each tile of rows, from the second level of cache at best.
// A block takes some rows and one split of D. Its threads hold 8 numbers of 8 rows each in registers (16-byte loads,
// all on their way before the first is needed), take the classes four at a time against them, and fold the 32 sums over
// their warp: one for every lane. The vectors come through the first level of cache, once for all rows of a block.
//
// Partial sums [split, B, K] are float32. The block that finishes a tile of rows last adds its splits up, in order and
// in double, and goes on to the answers; so nothing depends on which block that is: the same bits in every run, and in
// any batch, since D is cut by D alone.
//
// With ten classes a float32 feature costs about 22 instructions, of which an H200 can issue 33 in the time it reads
// one at full speed; 16-bit features arrive twice as fast, and arithmetic is then what is waited for. Products instead
// of differences would halve it, but cancel: see gemm.cu.
#include "kernels.h"

namespace e2cm {
namespace cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kRows = static_cast<int>(kFewRows), kEach = 8;  // rows, and numbers of each of them, of a thread
constexpr int kTogether = 4;                                  // classes
static_assert(kThreads * kEach == kFewStep, "a step of D is what the threads of a block hold");
static_assert(kRows * kTogether == kWarp, "one sum for every lane");

struct Few {
  Rows x;        // of this launch
  Rows vectors;  // of the classes, float32
  Splits splits;
  int64_t block_rows;  // a multiple of kRows
  bool x_aligned, vectors_aligned;
  float* sums;  // [splits, x.rows, classes]
  unsigned* counters;
  Scores scores;
  Finish finish;
};

// Number i of part p of a thread is number p * kThreads * size + thread * size + i of the step: neighbouring threads
// read neighbouring 16 bytes.
template <class T>
struct Numbers {
  static constexpr int size = Pack<T>::size, parts = kEach / size;
  float values[kRows][kEach];

  static __device__ int64_t column(int64_t at, int part) {
    return at + (part * kThreads + static_cast<int>(threadIdx.x)) * size;
  }

  // Of rows behind the last one, that one again; zeros behind the last column.
  __device__ void load(const Few& f, int64_t first_row, int64_t at, int64_t end) {
    E2CM_LOOP for (int p = 0; p < parts; ++p) {
      const int64_t from = column(at, p);
      Pack<T> packs[kRows];
      E2CM_LOOP for (int r = 0; r < kRows; ++r) {
        const int64_t row = first_row + r < f.x.rows ? first_row + r : f.x.rows - 1;
        const T* const x = static_cast<const T*>(f.x.data) + row * f.x.stride + from;
        if (f.x_aligned && from + size <= end) {
          packs[r].words = load_once(x);
        } else {
          packs[r].load(x, end - from);
        }
      }
      E2CM_LOOP for (int r = 0; r < kRows; ++r) {
        E2CM_LOOP for (int i = 0; i < size; ++i) values[r][p * size + i] = widen(packs[r].numbers[i], f.x.dtype);
      }
    }
  }
};

// sums[k * kRows + r] of this warp += those of `together` classes from k on.
template <bool squares, int together, class T>
__device__ void add_classes(const Few& f, const Numbers<T>& x, int64_t at, int64_t end, int k, float* sums) {
  const float* const vectors = static_cast<const float*>(f.vectors.data) + k * f.vectors.stride;
  float totals[together * kRows];
  E2CM_LOOP for (int i = 0; i < together * kRows; ++i) totals[i] = 0;
  E2CM_LOOP for (int q = 0; q < kEach / 4; ++q) {
    const int64_t from = Numbers<T>::column(at, q * 4 / Numbers<T>::size) + q * 4 % Numbers<T>::size;
    float m[together][4];
    E2CM_LOOP for (int c = 0; c < together; ++c) {
      load_four(vectors + c * f.vectors.stride + from, end - from, f.vectors_aligned, m[c]);
    }
    E2CM_LOOP for (int c = 0; c < together; ++c) {
      E2CM_LOOP for (int i = 0; i < 4; ++i) {
        E2CM_LOOP for (int r = 0; r < kRows; ++r) {
          float& total = totals[c * kRows + r];
          const float value = x.values[r][q * 4 + i], difference = value - m[c][i];
          total = squares ? fmaf(difference, difference, total) : fmaf(value, m[c][i], total);
        }
      }
    }
  }
  const int lane = threadIdx.x % kWarp;
  constexpr int lanes = kWarp / (together * kRows);  // that end with the same sum
  const float total = fold<kWarp / 2>(totals, lane);
  if (lane % lanes == 0) sums[k * kRows + lane / lanes] += total;
}

// The warp's own sums of one group of rows over the split, in shared memory.
template <class T, bool squares>
__device__ void add_rows(const Few& f, int64_t first_row, int64_t begin, int64_t end, float* sums) {
  const int classes = static_cast<int>(f.vectors.rows);
  for (int i = threadIdx.x % kWarp; i < classes * kRows; i += kWarp) sums[i] = 0;
  __syncwarp();  // of the last classes, other lanes will add them up
  for (int64_t at = begin; at < end; at += kFewStep) {
    Numbers<T> x;
    x.load(f, first_row, at, end);
    int k = 0;
    for (; k + kTogether <= classes; k += kTogether) add_classes<squares, kTogether>(f, x, at, end, k, sums);
    if (k + 2 <= classes) {
      add_classes<squares, 2>(f, x, at, end, k, sums);
      k += 2;
    }
    if (k < classes) add_classes<squares, 1>(f, x, at, end, k, sums);
  }
}

// Rows [first, last) of the launch, a warp each. A lane adds up every 32 / K-th split of one class.
__device__ void answer_rows(const Few& f, int64_t first, int64_t last) {
  const int lane = threadIdx.x % kWarp, classes = static_cast<int>(f.vectors.rows);
  const int shares = kWarp / classes, k = lane % classes, share = lane / classes;
  for (int64_t row = first + threadIdx.x / kWarp; row < last; row += kWarps) {
    double part = 0;
    for (int64_t s = share; s < f.splits.count && share < shares; s += shares)
      part += load_shared_by_blocks(f.sums + (s * f.x.rows + row) * classes + k);
    double total = 0;
    for (int i = 0; i < shares; ++i) total += __shfl_sync(kAll, part, i * classes + k);

    float distance = 0;
    if (f.scores.squares) {
      distance = static_cast<float>(sqrt(static_cast<float>(total)));
      // NaN comes from a NaN or an infinity in x or in the mean, and stays.
      const bool asked = lane < classes && (!f.scores.per_class || usable(f.scores.per_class[k]));
      const bool doubtful = asked && (total < kTiny || total > kHuge);
      if (!f.scores.distances && __ballot_sync(kAll, asked && total > kHuge) && is_spoiled(f.x, row)) {
        distance = not_a_number();
      } else {
        distance = without_doubt(distance, doubtful, f.x, row, f.vectors, 0);
      }
    }
    if (f.scores.distances) {
      if (lane < classes) f.scores.distances[(f.finish.first + row) * classes + lane] = distance;
      continue;
    }
    const float z = penalty_of(f.scores, distance, total, k);
    answer(f.finish, row, [&](int64_t) { return z; });
  }
}

template <class T, bool squares>
__global__ void __launch_bounds__(kThreads, 3) few_sums(const Few f) {
  const int64_t first = int64_t{blockIdx.x} * f.block_rows;
  const int64_t last = first + f.block_rows < f.x.rows ? first + f.block_rows : f.x.rows;
  const int64_t begin = blockIdx.y * f.splits.each;
  const int64_t end = begin + f.splits.each < f.x.dim ? begin + f.splits.each : f.x.dim;
  const int classes = static_cast<int>(f.vectors.rows), of_warp = classes * kRows;
  float* const sums = reinterpret_cast<float*>(shared_memory());  // [warps, classes, kRows]
  for (int64_t row = first; row < last; row += kRows) {
    add_rows<T, squares>(f, row, begin, end, sums + threadIdx.x / kWarp * of_warp);
    __syncthreads();
    for (int i = threadIdx.x; i < of_warp; i += kThreads) {
      float total = sums[i];
      E2CM_LOOP for (int w = 1; w < kWarps; ++w) total += sums[w * of_warp + i];
      const int64_t r = row + i % kRows;
      if (r < last) f.sums[(blockIdx.y * f.x.rows + r) * classes + i / kRows] = total;
    }
    __syncthreads();
  }
  // Every thread's sums are to be seen before the block counts as finished; the last one sees those of all.
  __threadfence();
  __syncthreads();
  unsigned* const finished = reinterpret_cast<unsigned*>(sums);
  if (threadIdx.x == 0) *finished = atomicAdd(f.counters + blockIdx.x, 1u);
  __syncthreads();
  if (*finished + 1 < f.splits.count) return;
  __threadfence();
  answer_rows(f, first, last);
}

template <class T>
cudaError_t launch_as(const Few& few, dim3 grid, size_t shared, cudaStream_t stream) {
  return few.scores.squares ? launch(few_sums<T, true>, grid, dim3(kThreads), shared, stream, few)
                            : launch(few_sums<T, false>, grid, dim3(kThreads), shared, stream, few);
}

}  // namespace

cudaError_t launch_few(const Rows& x, const Rows& vectors, const Scores& scores, const Finish& finish, float* sums,
                       unsigned* counters, int processors, cudaStream_t stream) {
  const Splits splits = splits_of(x.dim, vectors.rows);
  const int64_t block_rows = few_rows_of(x.rows, splits.count, processors), tiles = ceil_div(x.rows, block_rows);
  const cudaError_t error = cudaMemsetAsync(counters, 0, static_cast<size_t>(tiles) * sizeof(unsigned), stream);
  if (error != cudaSuccess) return error;
  const Few few{x,    vectors,  splits, block_rows, rows_are_aligned(x), rows_are_aligned(vectors),
                sums, counters, scores, finish};
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(splits.count));
  const size_t shared = static_cast<size_t>(kWarps * vectors.rows * kRows) * sizeof(float);
  return x.dtype == DType::f32 ? launch_as<float>(few, grid, shared, stream)
                               : launch_as<Half>(few, grid, shared, stream);
}

}  // namespace cuda
}  // namespace e2cm
