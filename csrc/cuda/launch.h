// What the CUDA backend offers: functions that put work on a stream of the current device and return at once. Pointers
// are device pointers, 8-byte aligned where numbers are of 8 bytes; features may start anywhere. All return what the
// launches said; an error of a kernel itself shows at the next synchronisation.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../api.h"

namespace e2cm {
namespace cuda {

// What becomes of the rows of a batch, or of a part of one whose row 0 is row `first` of the batch.
struct Epilogue {
  int64_t first;
  Answers out;
  const int64_t* ids;  // where the answers go; null: row by row
  Rule rule;
  float threshold;
  int64_t exit_number;
  uint8_t* stays;    // [batch]: 1 or 0; null: every row is answered
  bool marked;       // rows whose `stays` is 0 have left before, and are passed over
  int64_t* bad_ids;  // set to 1 by an id outside of `out`, whose row is not answered; or null
};

// What an exit reads, its head (with vectors [classes, dim] float32), and what becomes of it; see api.h.
struct Exit {
  HeadInput input;
  HeadParams head;
  float* distances;   // [rows, classes]: they go here, and nothing else is done (head.per_class is not read); or null
  Epilogue epilogue;  // epilogue.first is 0
};

int64_t exit_workspace(const Exit& exit);  // bytes
cudaError_t launch_exit(const Exit& exit, void* workspace, cudaStream_t stream);

int64_t statistics_workspace(int64_t rows, int64_t channels, const Statistics& wanted);
cudaError_t launch_statistics(const Maps& maps, const Statistics& wanted, float* out, void* workspace,
                              cudaStream_t stream);

// step for scores that some other head has made: logits if `scale` is null, else distances to be divided by it.
cudaError_t launch_decide(const Rows& scores, const float* scale, const Epilogue& epilogue, cudaStream_t stream);

// keep: the numbers of the true bytes of mask[rows]; kept_ids: ids[keep], if there are ids; count: how many.
int64_t kept_rows_workspace(int64_t rows);
cudaError_t launch_kept_rows(const uint8_t* mask, int64_t rows, const int64_t* ids, int64_t* keep, int64_t* kept_ids,
                             int64_t* count, void* workspace, cudaStream_t stream);

// target[i] = source[index[i]] for rows of row_bytes bytes that start source_stride bytes apart; target is dense. There
// are *counted rows, at most `most`; if that many, nothing is copied: it is the source itself that is wanted. Without
// `counted` there are `most`. The indices are trusted.
cudaError_t launch_gather_rows(const void* source, int64_t row_bytes, int64_t source_stride, const int64_t* index,
                               const int64_t* counted, int64_t most, void* target, cudaStream_t stream);

}  // namespace cuda
}  // namespace e2cm
