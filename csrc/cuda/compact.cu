// Compaction: the indices of the rows that stay, by a stable scan, then the rows themselves, in their old order.
//
// Reads   the mask, then count * row_bytes and an 8-byte index per row.
// Writes  count indices, then count * row_bytes.
// Does    no arithmetic: memory bandwidth is the limit. Accesses of 16 bytes where addresses and sizes are multiples of
//         16, four in flight per thread.
//
// Up to 8192 rows the scan is one block. For more, each block scans 8192 rows and adds the counts of the blocks before
// it, which a first launch has made: at most two launches for any number of rows, and no library.
#include <algorithm>

#include "device.h"
#include "launch.h"
#include "plan.h"

namespace e2cm {
namespace cuda {
namespace {

// ---- indices of the rows to keep ------------------------------------------------------------------------------------

constexpr int kScanThreads = 1024, kScanWarps = kScanThreads / kWarp;
constexpr int kRowsPerThread = static_cast<int>(kScanRows) / kScanThreads;

// A thread's rows.
struct Kept {
  int64_t first;
  unsigned bits = 0;  // bit i: row first + i is kept

  __device__ Kept(const uint8_t* mask, int64_t rows)
      : first(blockIdx.x * kScanRows + int64_t{threadIdx.x} * kRowsPerThread) {
    E2CM_UNROLL for (int i = 0; i < kRowsPerThread; ++i) bits |= (first + i < rows && mask[first + i] ? 1u : 0u) << i;
  }
  __device__ int count() const { return __popc(bits); }
};

struct Scan {
  int before, all;  // kept rows of the threads before this one, and of the block
};

// shared: an int per warp. All threads must call it.
__device__ Scan scan(int count, int* shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int inclusive = count;
  E2CM_UNROLL for (int offset = 1; offset < kWarp; offset *= 2) {
    const int other = __shfl_up_sync(kAllLanes, inclusive, static_cast<unsigned>(offset));
    if (lane >= offset) inclusive += other;
  }
  if (lane == kWarp - 1) shared[warp] = inclusive;
  __syncthreads();
  int before = 0, all = 0;
  for (int w = 0; w < kScanWarps; ++w) {
    before += w < warp ? shared[w] : 0;
    all += shared[w];
  }
  return {before + inclusive - count, all};
}

__global__ void __launch_bounds__(kScanThreads) count_kept(const uint8_t* mask, int64_t rows, int64_t* counts) {
  const Scan found = scan(Kept(mask, rows).count(), reinterpret_cast<int*>(shared_memory()));
  if (threadIdx.x == 0) counts[blockIdx.x] = found.all;
}

// counts: kept rows per block; null for a single block. ids and kept_ids: both or neither.
__global__ void __launch_bounds__(kScanThreads)
    kept_rows(const uint8_t* mask, int64_t rows, const int64_t* counts, const int64_t* ids, int64_t* keep,
              int64_t* kept_ids, int64_t* total) {
  const Kept kept(mask, rows);
  const Scan found = scan(kept.count(), reinterpret_cast<int*>(shared_memory()));
  int64_t at = found.before;
  for (unsigned b = 0; b < blockIdx.x; ++b) at += counts[b];
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0) *total = at + found.all;
  E2CM_UNROLL for (int i = 0; i < kRowsPerThread; ++i) {
    if (!(kept.bits >> i & 1)) continue;
    keep[at] = kept.first + i;
    if (ids) kept_ids[at] = ids[kept.first + i];
    ++at;
  }
}

// ---- rows -----------------------------------------------------------------------------------------------------------

constexpr int kThreads = 256, kWordsInFlight = 4;

struct Gather {
  const char* source;
  int64_t words, stride;  // words per row; bytes between rows
  const int64_t* index;
  const int64_t* counted;  // the number of rows; null: `most`
  int64_t most;
  char* target;
};

// Neighbouring threads (x) copy neighbouring words of a row, so that reads and writes coalesce; y takes further rows,
// so that short rows do not leave most of a block idle. Both stride over the grid. A single index over all words would
// need a 64-bit division by the length of a row, which costs more than the copy.
template <class Word>
__global__ void __launch_bounds__(kThreads) gather_rows(const Gather g) {
  const int64_t count = g.counted ? *g.counted : g.most;
  if (g.counted && count >= g.most) return;
  const int64_t first_row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y, rows = int64_t{gridDim.x} * blockDim.y;
  const int64_t first_word = int64_t{blockIdx.y} * blockDim.x + threadIdx.x, step = int64_t{gridDim.y} * blockDim.x;
  for (int64_t i = first_row; i < count; i += rows) {
    const Word* const from = reinterpret_cast<const Word*>(g.source + g.index[i] * g.stride);
    Word* const to = reinterpret_cast<Word*>(g.target) + i * g.words;
    int64_t j = first_word;
    for (; j + (kWordsInFlight - 1) * step < g.words; j += kWordsInFlight * step) {
      Word words[kWordsInFlight];
      E2CM_UNROLL for (int a = 0; a < kWordsInFlight; ++a) words[a] = from[j + a * step];
      E2CM_UNROLL for (int a = 0; a < kWordsInFlight; ++a) to[j + a * step] = words[a];
    }
    for (; j < g.words; j += step) to[j] = from[j];
  }
}

template <class Word>
cudaError_t launch_as(Gather gather, int64_t row_bytes, cudaStream_t stream) {
  gather.words = row_bytes / static_cast<int64_t>(sizeof(Word));
  unsigned across = 1;
  while (across < kThreads && across < gather.words) across *= 2;
  const dim3 block(across, kThreads / across);
  // Enough blocks to fill any GPU, within the limits of CUDA; the kernel strides over the rest.
  const auto blocks = [](int64_t work, int64_t each, int64_t most) {
    return static_cast<unsigned>(std::min((work + each - 1) / each, most));
  };
  const dim3 grid(blocks(gather.most, block.y, 65536), blocks(gather.words, int64_t{block.x} * kWordsInFlight, 1024));
  return launch(gather_rows<Word>, grid, block, 0, stream, gather);
}

}  // namespace

int64_t kept_rows_workspace(int64_t rows) { return rows > kScanRows ? ceil_div(rows, kScanRows) * 8 : 0; }

cudaError_t launch_kept_rows(const uint8_t* mask, int64_t rows, const int64_t* ids, int64_t* keep, int64_t* kept_ids,
                             int64_t* count, void* workspace, cudaStream_t stream) {
  if (rows <= 0) return cudaMemsetAsync(count, 0, sizeof *count, stream);
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, kScanRows)));
  const size_t shared = kScanWarps * sizeof(int);
  int64_t* const counts = grid.x > 1 ? static_cast<int64_t*>(workspace) : nullptr;
  if (counts) {
    const cudaError_t error = launch(count_kept, grid, dim3(kScanThreads), shared, stream, mask, rows, counts);
    if (error != cudaSuccess) return error;
  }
  return launch(kept_rows, grid, dim3(kScanThreads), shared, stream, mask, rows, static_cast<const int64_t*>(counts),
                ids, keep, kept_ids, count);
}

cudaError_t launch_gather_rows(const void* source, int64_t row_bytes, int64_t source_stride, const int64_t* index,
                               const int64_t* counted, int64_t most, void* target, cudaStream_t stream) {
  if (most <= 0 || row_bytes <= 0) return cudaSuccess;  // an empty grid is an error in CUDA
  const Gather gather{static_cast<const char*>(source), 0, source_stride, index, counted, most,
                      static_cast<char*>(target)};
  const auto fits = [&](int64_t bytes) {
    return is_aligned(source, bytes) && is_aligned(target, bytes) && row_bytes % bytes == 0 &&
           source_stride % bytes == 0;
  };
  if (fits(16)) return launch_as<uint4>(gather, row_bytes, stream);
  if (fits(4)) return launch_as<uint32_t>(gather, row_bytes, stream);
  return launch_as<unsigned char>(gather, row_bytes, stream);
}

}  // namespace cuda
}  // namespace e2cm
