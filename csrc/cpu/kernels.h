// What one instruction set offers to the rest of the core. Each unit (scalar, avx2, avx512, neon) compiles kernels.inl
// with its own vector type and fills one table; only plain pointers and numbers cross between translation units.
#pragma once

#include <cstdint>

#include "../exit_step.h"

namespace e2cm {

// Features are worked on in blocks of this many numbers: sums inside a block are float32, sums of blocks are double.
constexpr int64_t kBlock = 512;
// Rows of scratch start this many floats apart. Not kBlock: a load whose address agrees with that of a recent store in
// its last 12 bits waits for it, and rows 2 KiB apart would agree all the time.
constexpr int64_t kStride = kBlock + 16;
// Rows of answers are worked on side by side, one row per lane.
constexpr int64_t kLanes = 16;
// Blocks in scratch (kBlock floats a row) are filled up with zeros to a multiple of this: no tail in any inner loop.
constexpr int64_t kPad = 16;
// Sums of squares outside of this range may have met squares that float32 cannot hold.
constexpr double kTiny = 1e-25, kHuge = 1e38;

struct Kernels {
  const char* name;

  // x = source[r * stride + i] - center[i] for i < n <= kBlock, zeros behind it up to a multiple of kPad; center may be
  // null (nothing is subtracted), source need not be aligned. Then, in one pass:
  //   row_norms[r] += |x|^2                  products[k * ld + r] += x . means[k]
  //   rows[r * kStride + i] = x, if there are no means or more than few_means of them; else rows may be null
  void (*load_block)(const void* source, DType dtype, int64_t stride, const float* center, int64_t row_count, int64_t n,
                     float* rows, double* row_norms, const float* means, int64_t mean_count, double* products,
                     int64_t ld);
  int64_t few_means;

  // The products alone, of rows that load_block has left in scratch.
  void (*add_products)(const float* rows, int64_t row_count, const float* means, int64_t mean_count, int64_t n,
                       double* products, int64_t ld);

  // || x - mean ||^2 the long way, which no cancellation can hurt.
  double (*squared_distance)(const void* x, DType x_dtype, const void* mean, DType mean_dtype, int64_t n);

  // out[lane] = sqrt(row_norms[lane] + mean_norm - 2 * (sum over splits of products[split * split_stride + lane])) /
  // scale. Returns the lanes, a bit each, in which the subtraction has cancelled too much to be believed.
  uint32_t (*distance_lanes)(const double* products, int64_t splits, int64_t split_stride, const double* row_norms,
                             double mean_norm, float scale, float* out);

  // Penalties z[k * kLanes + lane] (smaller is likelier; +inf: impossible; NaN: spoils the row) become, per lane, the
  // best penalty and its class (the lowest of equals), sum e and sum e * (best - z) with e = exp(best - z); a lane that
  // is spoiled or has no finite best gets NaN, and class 0.
  void (*softmax_lanes)(const float* z, int64_t classes, float* best, int64_t* prediction, float* sum, float* weighted);
};

const Kernels& kernels();  // the table in use, chosen once

const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();

}  // namespace e2cm
