// From penalties to answers: softmax, rule, who leaves, whose answer goes where. A row is the work of a warp, a class
// that of a lane, every 32nd; so who reads what about a class has written it.
#pragma once

#include <cmath>
#include <limits>

#include "device.h"
#include "launch.h"

namespace e2cm {
namespace cuda {

// What is made of the sums over D of a launch.
struct Scores {
  bool squares;            // distances, else logits
  const float* per_class;  // their scale, or their bias; null: distances alone are wanted
  float* distances;        // [batch, classes]: they go here, and nothing else is done
};

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

__device__ inline float not_a_number() { return bits_as_float(0x7fc00000u); }
__device__ inline bool usable(float scale) { return scale > 0 && scale < kInfinity; }

struct Likeliest {
  float low;
  int64_t at;
};

// penalty(k): smaller is likelier, +inf impossible, NaN spoils the row. It is asked up to three times.
template <class Penalty>
__device__ void answer(const Finish& finish, int64_t local_row, const Penalty& penalty) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = finish.first + local_row, classes = finish.out.classes;
  if (finish.marked && !finish.stays[row]) return;

  Likeliest best{kInfinity, 0};
  bool spoiled = false;
  for (int64_t k = lane; k < classes; k += kWarp) {
    const float z = penalty(k);
    if (z < best.low) best = {z, k};
    spoiled |= z != z;
  }
  E2CM_LOOP for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Likeliest other{__shfl_xor_sync(kAll, best.low, offset), __shfl_xor_sync(kAll, best.at, offset)};
    if (other.low < best.low || (other.low == best.low && other.at < best.at)) best = other;
  }
  const bool valid = !__ballot_sync(kAll, spoiled) && best.low < kInfinity && best.low > -kInfinity;

  float sum = 0, weighted = 0;
  for (int64_t k = lane; k < classes; k += kWarp) {
    const float x = best.low - penalty(k);
    if (x >= -87.f) {
      const float e = expf(x);
      sum += e;
      weighted += e * x;
    }
  }
  sum = valid ? sum_over_warp(sum) : not_a_number();
  weighted = valid ? sum_over_warp(weighted) : not_a_number();
  if (!valid) best = {not_a_number(), 0};
  const float log_sum = logf(sum);

  int64_t target = row;
  if (finish.stays) {
    const bool leaves =
        finish.rule == Rule::confidence ? 1 / sum > finish.threshold : log_sum - weighted / sum < finish.threshold;
    if (finish.ids) target = finish.ids[row];
    const bool exists = target >= 0 && target < finish.out.rows;
    __syncwarp();  // all have read `stays`
    if (lane == 0) {
      finish.stays[row] = !leaves;
      if (!exists && finish.bad_ids) *finish.bad_ids = 1;
    }
    if (!leaves || !exists) return;
  }
  if (lane == 0) {
    finish.out.confidence[target] = 1 / sum;
    finish.out.prediction[target] = best.at;
    if (finish.out.exit) finish.out.exit[target] = finish.exit_number;
  }
  if (!finish.out.log_probs) return;
  float* const log_probs = finish.out.log_probs + target * classes;
  for (int64_t k = lane; k < classes; k += kWarp) log_probs[k] = (best.low - penalty(k)) - log_sum;
}

// ---- sums to penalties ----------------------------------------------------------------------------------------------

constexpr double kTiny = 1e-25, kHuge = 1e38;  // sums of squares outside may have met squares that float32 cannot hold

// || x - mean || in double, by all lanes of a warp: what is asked for a pair whose sum is not to be believed.
__device__ inline float the_long_way(const Rows& x, int64_t row, const Rows& vectors, int64_t k) {
  const char* const a = row_of(x, row);
  const float* const b = static_cast<const float*>(vectors.data) + k * vectors.stride;
  double sum = 0;
  for (int64_t i = threadIdx.x % kWarp; i < x.dim; i += kWarp) {
    const double difference = static_cast<double>(load_one(a, x.dtype, i)) - b[i];
    sum += difference * difference;
  }
  return static_cast<float>(sqrt(sum_over_warp(sum)));
}

// Is there a NaN or an infinity in the row? Then no distance needs to be found the long way: none of them is finite.
__device__ inline bool is_spoiled(const Rows& x, int64_t row) {
  const char* const a = row_of(x, row);
  bool spoiled = false;
  for (int64_t i = threadIdx.x % kWarp; i < x.dim; i += kWarp) {
    const float value = load_one(a, x.dtype, i);
    spoiled |= !(value - value == 0);
  }
  return __ballot_sync(kAll, spoiled) != 0;
}

// Distances of lanes whose pair (row, first + lane) is in doubt. All lanes must come.
__device__ inline float without_doubt(float distance, bool doubtful, const Rows& x, int64_t row, const Rows& vectors,
                                      int64_t first) {
  for (unsigned left = __ballot_sync(kAll, doubtful); left; left &= left - 1) {
    const int which = __ffs(left) - 1;
    const float exact = the_long_way(x, row, vectors, first + which);
    if (static_cast<int>(threadIdx.x) % kWarp == which) distance = exact;
  }
  return distance;
}

__device__ inline float penalty_of(const Scores& scores, float distance, double product, int64_t k) {
  if (scores.squares) return usable(scores.per_class[k]) ? distance / scores.per_class[k] : kInfinity;
  return -static_cast<float>(scores.per_class[k] + product);
}

}  // namespace
}  // namespace cuda
}  // namespace e2cm
