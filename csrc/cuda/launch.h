// What the CUDA backend offers: functions that put work on a stream and return at once. Pointers are device pointers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace e2cm {
namespace cuda {

// target[i] = source[index[i]] for rows of row_bytes bytes that start source_stride bytes apart; target is dense. The
// indices are trusted. Returns what the launch said; an error of the kernel itself shows at the next synchronisation.
cudaError_t launch_gather_rows(const void* source, int64_t row_bytes, int64_t source_stride, const int64_t* index,
                               int64_t count, void* target, cudaStream_t stream);

}  // namespace cuda
}  // namespace e2cm
