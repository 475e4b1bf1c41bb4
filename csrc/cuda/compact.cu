// target[i] = source[index[i]], row by row: what moves the survivors of a batch together.
//
// It must move count * (2 * row_bytes + 8) bytes: each row read once and written once, and its index. There is no
// arithmetic to hide that behind, so the bandwidth of the memory is the limit.
#include <algorithm>

#include "launch.h"

namespace e2cm {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// Neighbouring threads (x) take neighbouring words of one row, so that reads and writes coalesce; y takes further rows,
// so that short rows do not leave most of a block idle. Both directions stride over the grid. No division by the length
// of a row: in 64 bits it would cost more than the copy.
template <class Word>
__global__ void __launch_bounds__(kThreads) gather_rows(const char* source, int64_t words, int64_t source_stride,
                                                        const int64_t* index, int64_t count, Word* target) {
  const int64_t first_row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y, rows = int64_t{gridDim.x} * blockDim.y;
  const int64_t first_word = int64_t{blockIdx.y} * blockDim.x + threadIdx.x, step = int64_t{gridDim.y} * blockDim.x;
  for (int64_t i = first_row; i < count; i += rows) {
    const Word* const from = reinterpret_cast<const Word*>(source + index[i] * source_stride);
    for (int64_t j = first_word; j < words; j += step) target[i * words + j] = from[j];
  }
}

template <class Word>
cudaError_t launch(const void* source, int64_t row_bytes, int64_t source_stride, const int64_t* index, int64_t count,
                   void* target, cudaStream_t stream) {
  const int64_t words = row_bytes / static_cast<int64_t>(sizeof(Word));
  unsigned across = 1;
  while (across < kThreads && across < words) across *= 2;
  const dim3 block(across, kThreads / across);
  // Enough blocks to fill any GPU; the strides do the rest. The caps also keep the grid inside what CUDA allows.
  const auto blocks = [](int64_t work, int64_t each, int64_t most) {
    return static_cast<unsigned>(std::min((work + each - 1) / each, most));
  };
  const dim3 grid(blocks(count, block.y, 65536), blocks(words, block.x, 1024));
  gather_rows<Word><<<grid, block, 0, stream>>>(static_cast<const char*>(source), words, source_stride, index, count,
                                                static_cast<Word*>(target));
  return cudaGetLastError();
}

bool aligned(int64_t value) { return value % 16 == 0; }

}  // namespace

cudaError_t launch_gather_rows(const void* source, int64_t row_bytes, int64_t source_stride, const int64_t* index,
                               int64_t count, void* target, cudaStream_t stream) {
  if (count <= 0 || row_bytes <= 0) return cudaSuccess;  // CUDA calls an empty grid an error
  const bool wide = aligned(reinterpret_cast<intptr_t>(source)) && aligned(reinterpret_cast<intptr_t>(target)) &&
                    aligned(row_bytes) && aligned(source_stride);
  return wide ? launch<uint4>(source, row_bytes, source_stride, index, count, target, stream)
              : launch<unsigned char>(source, row_bytes, source_stride, index, count, target, stream);
}

}  // namespace cuda
}  // namespace e2cm
