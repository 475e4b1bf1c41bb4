// A whole exit on a stream: statistics if the head reads them, sums, answers; and answers to scores of other heads.
// As many rows at a time as the workspace has room for.
//
// Scores of other heads: a warp for each row, which reads its K scores up to three times, the last two from cache, and
// writes 20 bytes if it leaves, and 4 K bytes of log-probabilities.
#include "kernels.h"

namespace e2cm {
namespace cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;

struct Decision {
  Rows scores;
  const float* scale;
  Epilogue epilogue;
};

__global__ void __launch_bounds__(kThreads) answer_scores(const Decision d) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (row >= d.scores.rows) return;
  const char* const scores = row_of(d.scores, row);
  write_answer(d.epilogue, row, [&](int64_t k) {
    const float score = load_one(scores, d.scores.dtype, k);
    return !d.scale ? -score : usable(d.scale[k]) ? score / d.scale[k] : kInfinity;
  });
}

const Pooled* pooled_of(const Exit& exit) { return std::get_if<Pooled>(&exit.input); }

Workspace workspace_of(const Exit& exit) {
  const Rows& vectors = exit.head.vectors;
  return workspace_for(rows_of(exit.input), vectors.dim, vectors.rows, pooled_of(exit) != nullptr);
}

Rows some(const Rows& rows, int64_t first, int64_t count) {
  return {row_of(rows, first), rows.dtype, count, rows.dim, rows.stride};
}

Maps some(const Maps& maps, int64_t first, int64_t count) {
  Maps few = maps;
  few.data = static_cast<const char*>(maps.data) + first * maps.stride * size_of(maps.dtype);
  few.rows = count;
  return few;
}

}  // namespace

int64_t exit_workspace(const Exit& exit) {
  const Workspace workspace = workspace_of(exit);
  const Pooled* const pooled = pooled_of(exit);
  return workspace.bytes + (pooled ? statistics_workspace(workspace.rows, pooled->maps.channels, pooled->wanted) : 0);
}

cudaError_t launch_exit(const Exit& exit, void* memory, cudaStream_t stream) {
  const Workspace workspace = workspace_of(exit);
  const auto at = [&](int64_t offset) { return static_cast<void*>(static_cast<char*>(memory) + offset); };
  const auto floats = [&](int64_t offset) { return static_cast<float*>(at(offset)); };
  const HeadParams& head = exit.head;
  const ScoreParams scores{head.kind == HeadKind::distances, head.per_class, exit.distances};
  const Pooled* const pooled = pooled_of(exit);
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  for (int64_t first = 0; first < rows_of(exit.input) && error == cudaSuccess; first += workspace.rows) {
    const int64_t count = std::min(workspace.rows, rows_of(exit.input) - first);
    Epilogue epilogue = exit.epilogue;
    epilogue.first = first;
    Rows x;
    if (pooled) {
      x = {at(workspace.features), DType::f32, count, head.vectors.dim, head.vectors.dim};
      error = launch_statistics(some(pooled->maps, first, count), pooled->wanted, floats(workspace.features),
                                at(workspace.bytes), stream);
      if (error != cudaSuccess) return error;
    } else {
      x = some(std::get<Rows>(exit.input), first, count);
    }
    error = head.vectors.rows <= kMaxDirectClasses
                ? launch_direct(x, head.vectors, scores, epilogue, floats(workspace.sums),
                                static_cast<unsigned*>(at(workspace.counters)), processors, stream)
                : launch_gemm(x, head.vectors, head.center, scores, epilogue, floats(workspace.sums),
                              floats(workspace.row_norms), floats(workspace.class_norms), stream);
  }
  return error;
}

cudaError_t launch_decide(const Rows& scores, const float* scale, const Epilogue& epilogue, cudaStream_t stream) {
  if (scores.rows <= 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(ceil_div(scores.rows, kWarps)));
  return launch(answer_scores, grid, dim3(kThreads), 0, stream, Decision{scores, scale, epilogue});
}

}  // namespace cuda
}  // namespace e2cm
