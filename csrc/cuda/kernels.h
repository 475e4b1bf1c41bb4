// Between the files of this folder: one launch function per kernel family, for rows of which the sums fit into the
// workspace (see plan.h). All return what the launch said.
#pragma once

#include "epilogue.h"
#include "plan.h"

namespace e2cm {
namespace cuda {

// Up to kFewClasses classes. sums: [splits, x.rows, classes]; counters: one for every kFewRows rows.
cudaError_t launch_few(const Rows& x, const Rows& vectors, const Scores& scores, const Finish& finish, float* sums,
                       unsigned* counters, int processors, cudaStream_t stream);

// More than that. row_norms: [splits, x.rows], class_norms: [splits, classes].
cudaError_t launch_many(const Rows& x, const Rows& vectors, const float* center, const Scores& scores,
                        const Finish& finish, float* sums, float* row_norms, float* class_norms, cudaStream_t stream);

}  // namespace cuda
}  // namespace e2cm
