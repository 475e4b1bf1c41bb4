// From sums to penalties and from penalties to answers: softmax, exit rule, and the row of the output. A warp processes
// a row, a lane every 32nd class; so each penalty is read by the lane that has written it.
#pragma once

#include <cmath>
#include <limits>

#include "device.h"
#include "launch.h"

namespace e2cm {
namespace cuda {

// What the kernels make of the sums over D.
struct ScoreParams {
  bool squares;            // distances, else logits
  const float* per_class;  // scales or biases; null if only distances are wanted
  float* distances;        // [batch, classes]: the only output; or null
};

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

__device__ inline float not_a_number() { return bits_as_float(0x7fc00000u); }
__device__ inline bool usable(float scale) { return scale > 0 && scale < kInfinity; }

// ---- penalties to answers -------------------------------------------------------------------------------------------

struct Best {
  float penalty;
  int64_t k;
};

// penalty(k): smaller is likelier, +inf impossible, NaN: the row has no answer. It is called up to three times.
template <class Penalty>
__device__ void write_answer(const Epilogue& epilogue, int64_t local_row, const Penalty& penalty) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = epilogue.first + local_row, classes = epilogue.out.classes;
  if (epilogue.marked && !epilogue.stays[row]) return;

  Best best{kInfinity, 0};
  bool has_nan = false;
  for (int64_t k = lane; k < classes; k += kWarp) {
    const float z = penalty(k);
    if (z < best.penalty) best = {z, k};
    has_nan |= z != z;
  }
  E2CM_UNROLL for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Best other{__shfl_xor_sync(kAllLanes, best.penalty, offset), __shfl_xor_sync(kAllLanes, best.k, offset)};
    if (other.penalty < best.penalty || (other.penalty == best.penalty && other.k < best.k)) best = other;
  }
  const bool valid = !__ballot_sync(kAllLanes, has_nan) && best.penalty < kInfinity && best.penalty > -kInfinity;

  float sum = 0, weighted = 0;
  for (int64_t k = lane; k < classes; k += kWarp) {
    const float x = best.penalty - penalty(k);
    if (x >= -87.f) {
      const float e = expf(x);
      sum += e;
      weighted += e * x;
    }
  }
  sum = valid ? warp_sum(sum) : not_a_number();
  weighted = valid ? warp_sum(weighted) : not_a_number();
  if (!valid) best = {not_a_number(), 0};
  const float log_sum = logf(sum);

  int64_t target = row;
  if (epilogue.stays) {
    const bool leaves = epilogue.rule == Rule::confidence ? 1 / sum > epilogue.threshold
                                                          : log_sum - weighted / sum < epilogue.threshold;
    if (epilogue.ids) target = epilogue.ids[row];
    const bool exists = target >= 0 && target < epilogue.out.rows;
    __syncwarp();  // all lanes have read `stays`
    if (lane == 0) {
      epilogue.stays[row] = !leaves;
      if (!exists && epilogue.bad_ids) *epilogue.bad_ids = 1;
    }
    if (!leaves || !exists) return;
  }
  if (lane == 0) {
    epilogue.out.confidence[target] = 1 / sum;
    epilogue.out.prediction[target] = best.k;
    if (epilogue.out.exit) epilogue.out.exit[target] = epilogue.exit_number;
  }
  if (!epilogue.out.log_probs) return;
  float* const log_probs = epilogue.out.log_probs + target * classes;
  for (int64_t k = lane; k < classes; k += kWarp) log_probs[k] = (best.penalty - penalty(k)) - log_sum;
}

// ---- sums to penalties ----------------------------------------------------------------------------------------------

// Outside of this range a sum of squares may contain squares that float32 cannot represent.
constexpr double kMinSquare = 1e-25, kMaxSquare = 1e38;

// || x - mean || in double, by all lanes of a warp, for a pair whose sum is inaccurate.
__device__ inline float exact_distance(const Rows& x, int64_t row, const Rows& vectors, int64_t k) {
  const char* const a = row_of(x, row);
  const float* const b = static_cast<const float*>(vectors.data) + k * vectors.stride;
  double sum = 0;
  for (int64_t i = threadIdx.x % kWarp; i < x.dim; i += kWarp) {
    const double difference = static_cast<double>(load_one(a, x.dtype, i)) - b[i];
    sum += difference * difference;
  }
  return static_cast<float>(sqrt(warp_sum(sum)));
}

// Whether the row has a NaN or an infinity. Then none of its distances is finite, and none needs exact_distance.
__device__ inline bool has_non_finite(const Rows& x, int64_t row) {
  const char* const a = row_of(x, row);
  bool non_finite = false;
  for (int64_t i = threadIdx.x % kWarp; i < x.dim; i += kWarp) {
    const float value = load_one(a, x.dtype, i);
    non_finite |= !(value - value == 0);
  }
  return __ballot_sync(kAllLanes, non_finite) != 0;
}

// The distance of the pair (row, first + lane), computed again if it is inaccurate. All lanes must call it.
__device__ inline float replace_inaccurate(float distance, bool inaccurate, const Rows& x, int64_t row,
                                           const Rows& vectors, int64_t first) {
  for (unsigned left = __ballot_sync(kAllLanes, inaccurate); left; left &= left - 1) {
    const int which = __ffs(left) - 1;
    const float exact = exact_distance(x, row, vectors, first + which);
    if (static_cast<int>(threadIdx.x) % kWarp == which) distance = exact;
  }
  return distance;
}

__device__ inline float penalty_of(const ScoreParams& scores, float distance, double product, int64_t k) {
  if (scores.squares) return usable(scores.per_class[k]) ? distance / scores.per_class[k] : kInfinity;
  return -static_cast<float>(scores.per_class[k] + product);
}

}  // namespace
}  // namespace cuda
}  // namespace e2cm
