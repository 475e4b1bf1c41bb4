// Survivors move together: their numbers by a stable scan, then their rows.
//
// gather_rows must move count * (2 * row_bytes + 8) bytes: each row read once and written once, and its index. There is
// no arithmetic to hide that behind, so the bandwidth of the memory is the limit: 16-byte accesses where everything is
// on multiples of 16, four of them on their way at a time.
//
// The scan is one block for up to 8192 rows. For more, every block looks at 8192 of them and adds up what a first
// launch has counted in the blocks before it: two launches, whatever the number of rows, and no library.
#include <algorithm>

#include "device.h"
#include "launch.h"
#include "plan.h"

namespace e2cm {
namespace cuda {
namespace {

// ---- the numbers of the rows to keep
// ----------------------------------------------------------------------------------

constexpr int kScanThreads = 1024, kScanEach = static_cast<int>(kScanRows) / kScanThreads,
              kScanWarps = kScanThreads / kWarp;

// This thread's rows of the block's.
struct Kept {
  int64_t first;
  unsigned bits = 0;  // bit i: row first + i is kept

  __device__ Kept(const uint8_t* mask, int64_t rows)
      : first(blockIdx.x * kScanRows + int64_t{threadIdx.x} * kScanEach) {
    E2CM_LOOP for (int i = 0; i < kScanEach; ++i) bits |= (first + i < rows && mask[first + i] ? 1u : 0u) << i;
  }
  __device__ int count() const { return __popc(bits); }
};

struct Scan {
  int before, all;  // kept by the threads before this one; by all
};

// shared: an int for every warp. All threads must come.
__device__ Scan scan(int count, int* shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int up_to = count;
  E2CM_LOOP for (int offset = 1; offset < kWarp; offset *= 2) {
    const int other = __shfl_up_sync(kAll, up_to, static_cast<unsigned>(offset));
    if (lane >= offset) up_to += other;
  }
  if (lane == kWarp - 1) shared[warp] = up_to;
  __syncthreads();
  int before = 0, all = 0;
  for (int w = 0; w < kScanWarps; ++w) {
    before += w < warp ? shared[w] : 0;
    all += shared[w];
  }
  return {before + up_to - count, all};
}

__global__ void __launch_bounds__(kScanThreads) count_kept(const uint8_t* mask, int64_t rows, int64_t* counts) {
  const Scan found = scan(Kept(mask, rows).count(), reinterpret_cast<int*>(shared_memory()));
  if (threadIdx.x == 0) counts[blockIdx.x] = found.all;
}

// counts: of the blocks before this one; null if there is none. ids and kept_ids: both or neither.
__global__ void __launch_bounds__(kScanThreads)
    kept_rows(const uint8_t* mask, int64_t rows, const int64_t* counts, const int64_t* ids, int64_t* keep,
              int64_t* kept_ids, int64_t* total) {
  const Kept kept(mask, rows);
  const Scan found = scan(kept.count(), reinterpret_cast<int*>(shared_memory()));
  int64_t at = found.before;
  for (unsigned b = 0; b < blockIdx.x; ++b) at += counts[b];
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0) *total = at + found.all;
  E2CM_LOOP for (int i = 0; i < kScanEach; ++i) {
    if (!(kept.bits >> i & 1)) continue;
    keep[at] = kept.first + i;
    if (ids) kept_ids[at] = ids[kept.first + i];
    ++at;
  }
}

// ---- rows
// -------------------------------------------------------------------------------------------------------------

constexpr int kThreads = 256, kAhead = 4;

struct Gather {
  const char* source;
  int64_t words, stride;  // of a row; the stride in bytes
  const int64_t* index;
  const int64_t* counted;  // how many rows; null: `most`
  int64_t most;
  char* target;
};

// Neighbouring threads (x) take neighbouring words of one row, so that reads and writes coalesce; y takes further rows,
// so that short rows do not leave most of a block idle. Both directions stride over the grid. No division by the length
// of a row: in 64 bits it would cost more than the copy.
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
    for (; j + (kAhead - 1) * step < g.words; j += kAhead * step) {
      Word words[kAhead];
      E2CM_LOOP for (int a = 0; a < kAhead; ++a) words[a] = from[j + a * step];
      E2CM_LOOP for (int a = 0; a < kAhead; ++a) to[j + a * step] = words[a];
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
  // Enough blocks to fill any GPU; the strides do the rest. The caps also keep the grid inside what CUDA allows.
  const auto blocks = [](int64_t work, int64_t each, int64_t most) {
    return static_cast<unsigned>(std::min((work + each - 1) / each, most));
  };
  const dim3 grid(blocks(gather.most, block.y, 65536), blocks(gather.words, int64_t{block.x} * kAhead, 1024));
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
  if (most <= 0 || row_bytes <= 0) return cudaSuccess;  // CUDA calls an empty grid an error
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
