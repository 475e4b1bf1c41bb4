// distance^2 = |x|^2 - 2 x.m + |m|^2, with x and m brought near the origin first (`center`).
//
// What must move: each feature once from memory, each mean once per group of rows. What must be computed: B * K * D
// multiply-adds, at two per cycle and register width. Blocks of features and means are converted, centred and padded
// into scratch that stays in the first two cache levels; the inner loop sees aligned float32 without tails.
//
// Same bits whatever the threads and the batch: D is cut into splits by D alone, a split's blocks are added in order
// (double), splits are added in order, and inside a block every (row, mean) pair goes through the same instructions.
//
// Tried and left: the direct sum of (x - m)^2 needs two operations where this needs one, so it is only the way out when
// the subtraction cancels (the_long_way). Blocks of 768 and 1024 numbers, sub-blocks of 8 and 16 rows, rows interleaved
// in panels, and asking early for the next means changed nothing that could be told from noise.
#include "distances.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "half.h"
#include "kernels.h"
#include "parallel.h"

namespace e2cm {
namespace {

constexpr int64_t kMaxSplits = 16;
constexpr int64_t kSplit = 4096;     // less is not worth a thread of its own
constexpr int64_t kGroupRows = 128;  // rows per work item: means are prepared once for all of them
constexpr int64_t kApart = 256;      // floats: rows at 0 and means at 1 KiB, modulo 4 KiB (see kStride)
constexpr int64_t kGroupMeans = 48;  // means prepared at a time

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

const void* element(const Rows& rows, int64_t row, int64_t column) {
  return static_cast<const char*>(rows.data) + (row * rows.stride + column) * size_of(rows.dtype);
}

int64_t splits_of(int64_t dim) { return std::max<int64_t>(1, std::min(kMaxSplits, ceil_div(dim, kSplit))); }

}  // namespace

struct Distances::Plan {
  int threads;
  int64_t group_rows;
  int64_t groups;
  int64_t group_means;
  int64_t scratch;  // floats per thread

  Plan(const Rows& x, int64_t means, int64_t splits, int allowed)
      // A mean costs about as much to prepare as four rows cost to compare with it.
      : threads(useful_threads(allowed, x.dim * (x.rows * means + 4 * (x.rows + means)))),
        group_rows(std::min(kGroupRows, round_up(x.rows, 4))) {
    while (group_rows > 4 && ceil_div(x.rows, group_rows) * splits < 2 * threads)
      group_rows = round_up(group_rows / 2, 4);
    groups = ceil_div(x.rows, group_rows);
    group_means = ceil_div(means, ceil_div(means, kGroupMeans));  // as equal as can be: 100 means are 34 + 33 + 33
    scratch = round_up(group_rows * kStride, 1024) + kApart + round_up(group_means * kStride, 1024);
  }
};

Distances::Distances(const Rows& x, const ClassMeans& head, int threads)
    : isa_(kernels()),  // here, where a wrong E2CM_ISA may still throw
      x_(x),
      head_(head),
      splits_(splits_of(x.dim)),
      row_stride_(round_up(x.rows, kLanes)),
      size_(splits_ * (head.means.rows * row_stride_ + row_stride_ + head.means.rows)),
      sums_(size_),
      products_(sums_.get()),
      row_norms_(products_ + splits_ * head.means.rows * row_stride_),
      mean_norms_(row_norms_ + splits_ * row_stride_) {
  if (x.rows > 0) compute(Plan(x, head.means.rows, splits_, threads));
}

int64_t Distances::rows_that_fit(int64_t dim, int64_t means) {
  const int64_t sums = int64_t{1} << 23;
  return std::max(kGroupRows, sums / (splits_of(dim) * means) / kGroupRows * kGroupRows);
}

void Distances::compute(const Plan& plan) {
  Buffer<float> scratch(plan.threads * plan.scratch);
  std::fill_n(sums_.get(), size_, 0.0);
  parallel_for(plan.groups * splits_, plan.threads,
               [&](int64_t item, int thread) { work_item(plan, item, scratch.get() + thread * plan.scratch); });
}

// One group of rows against all means, over one split of D.
void Distances::work_item(const Plan& plan, int64_t item, float* scratch) {
  const int64_t split = item / plan.groups, group = item % plan.groups;
  const int64_t first_row = group * plan.group_rows, rows = std::min(plan.group_rows, x_.rows - first_row);
  const int64_t means = head_.means.rows, blocks = ceil_div(x_.dim, kBlock);
  double* const products = products_ + split * means * row_stride_ + first_row;
  double* const row_norms = row_norms_ + split * row_stride_ + first_row;
  double* const mean_norms = mean_norms_ + split * means;
  float* const row_block = scratch;
  float* const mean_block = scratch + round_up(plan.group_rows * kStride, 1024) + kApart;
  double unused[kGroupMeans] = {};

  for (int64_t block = blocks * split / splits_; block < blocks * (split + 1) / splits_; ++block) {
    const int64_t at = block * kBlock, n = std::min(kBlock, x_.dim - at);
    const float* const center = head_.center ? head_.center + at : nullptr;
    for (int64_t k = 0; k < means; k += plan.group_means) {
      const int64_t count = std::min(plan.group_means, means - k);
      double* const norms = group == 0 ? mean_norms + k : unused;  // the same for every group: written once
      isa_.load_block(element(head_.means, k, at), head_.means.dtype, head_.means.stride, center, count, n, mean_block,
                      norms, nullptr, 0, nullptr, 0);
      double* const out = products + k * row_stride_;
      if (k == 0)
        isa_.load_block(element(x_, first_row, at), x_.dtype, x_.stride, center, rows, n, row_block, row_norms,
                        mean_block, count, out, row_stride_);
      else
        isa_.add_products(row_block, rows, mean_block, count, n, out, row_stride_);
    }
  }
}

// For the few pairs that distance_lanes doubts. `norms` says why: either the subtraction has cancelled, which the
// direct sum of squares mends, or float32 cannot hold the squares, and the sum is done in double.
float Distances::the_long_way(int64_t row, int64_t mean, double norms) const {
  const Rows& means = head_.means;
  const void *const x = element(x_, row, 0), *const m = element(means, mean, 0);
  if (norms >= kTiny && norms <= kHuge)
    return static_cast<float>(std::sqrt(isa_.squared_distance(x, x_.dtype, m, means.dtype, x_.dim)));
  return visit(x, x_.dtype, [&](const auto* a) {
    return visit(m, means.dtype, [&](const auto* b) {
      double total = 0;
      for (int64_t i = 0; i < x_.dim; ++i) {
        const double difference = static_cast<double>(to_float(a[i])) - to_float(b[i]);
        total += difference * difference;
        if (!(total <= std::numeric_limits<double>::max())) break;  // NaN or infinite: it stays so
      }
      return static_cast<float>(std::sqrt(total));
    });
  });
}

void Distances::lanes(int64_t first, float* out) const {
  const int64_t means = head_.means.rows;
  double norms[kLanes] = {};
  for (int64_t s = 0; s < splits_; ++s)
    for (int64_t j = 0; j < kLanes; ++j) norms[j] += row_norms_[s * row_stride_ + first + j];
  for (int64_t k = 0; k < means; ++k) {
    double mean_norm = 0;
    for (int64_t s = 0; s < splits_; ++s) mean_norm += mean_norms_[s * means + k];
    const float scale = head_.scale ? head_.scale[k] : 1.f;
    float* const distances = out + k * kLanes;
    const uint32_t doubtful = isa_.distance_lanes(products_ + k * row_stride_ + first, splits_, means * row_stride_,
                                                  norms, mean_norm, scale, distances);
    for (int64_t j = 0; doubtful >> j; ++j)
      if (doubtful >> j & 1 && first + j < x_.rows)
        distances[j] = the_long_way(first + j, k, norms[j] + mean_norm) / scale;
  }
}

}  // namespace e2cm
