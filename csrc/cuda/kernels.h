// The launch functions of direct.cu and gemm.cu, for as many rows as the workspace has room for (see plan.h). They
// return the error of the launch.
#pragma once

#include "epilogue.h"
#include "plan.h"

namespace e2cm {
namespace cuda {

// Up to kMaxDirectClasses classes. sums: [splits, x.rows, classes]; counters: one per kDirectRows rows.
cudaError_t launch_direct(const Rows& x, const Rows& vectors, const ScoreParams& scores, const Epilogue& epilogue,
                          float* sums, unsigned* counters, int processors, cudaStream_t stream);

// More classes. sums: [splits, x.rows, classes]; row_norms: [splits, x.rows]; class_norms: [splits, classes].
cudaError_t launch_gemm(const Rows& x, const Rows& vectors, const float* center, const ScoreParams& scores,
                        const Epilogue& epilogue, float* sums, float* row_norms, float* class_norms,
                        cudaStream_t stream);

}  // namespace cuda
}  // namespace e2cm
