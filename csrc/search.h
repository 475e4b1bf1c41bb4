// The threshold search: which threshold vectors to try on a record, and what each of them costs and gets right.
//
//   leaving    sample i leaves at the first exit j with confidence[i][j] > T[j], if any; a NaN never is
//   its cost   stage 0, ..., stage j, and the heads of those exits up to j whose threshold is not +infinity
//   flops(T)   the mean of that over all samples, over the sum of all stages
//
// flops(T) grows with every component of T, but for one step down where a component reaches +infinity, since the head
// of that exit is then not computed.
//
// Only the order of the confidences at an exit matters. So a component is a number of *groups*: the samples of an exit,
// highest confidence first, those of one value together; the first g groups leave. For g = 0 the threshold is
// +infinity, for all groups -infinity, and else halfway between the last group that leaves and the first that stays: as
// far as can be from both, since the next run of the network may round differently.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace e2cm {

struct RecordView {
  const float* confidence;  // [rows, exits + 1]; the last column, the network's own, is not read
  const uint8_t* correct;   // [rows, exits + 1]: 1 where that exit is right
  int64_t rows;
  int64_t exits;
  const double* stage_flops;  // [exits + 1], not negative, their sum positive
  const double* head_flops;   // [exits], not negative
};

// Room for the results: row i belongs to the i-th vector.
struct Points {
  float* thresholds;  // [count, exits]
  double* flops;      // [count]
  double* accuracy;   // [count]
};

class ThresholdSearch {
 public:
  // Throws std::invalid_argument without rows or with 2^31 or more of them. The record must stay until all is sorted.
  explicit ThresholdSearch(const RecordView& record);

  // Sorts `count` exits from `first` on: each of them once, before anything below is called.
  void sort(int64_t first, int64_t count, int threads);

  // The paper's search for the targets first / targets, (first + 1) / targets, ... `count` of them, each by itself: the
  // same bits however they are divided between calls and threads.
  void search(int64_t first, int64_t count, int64_t targets, uint64_t seed, const Points& out, int threads) const;

  // Coordinate ascent of (prices - number) * accuracy - number * FLOPs, for the numbers first, first + 1, ..., each
  // from its row of points.thresholds, where the result goes too.
  void ascend(int64_t first, int64_t count, int64_t prices, const Points& points, int threads) const;

  // What points.thresholds, any numbers but NaN, cost and get right.
  void replay(int64_t count, const Points& points, int threads) const;

  int64_t rows() const { return rows_; }
  int64_t exits() const { return exits_; }

 private:
  friend class Thresholds;
  int64_t groups_at(int64_t exit) const { return groups_[static_cast<size_t>(exit)]; }

  RecordView record_;
  int64_t rows_, exits_, words_;
  std::vector<double> stage_, head_;
  double base_ = 0;
  // [exits + 1, words]: a bit per sample.
  std::vector<uint64_t> correct_;
  // [exits]: how many groups there are. All below: a row per exit, filled as far as its groups go.
  std::vector<int64_t> groups_;
  // [exits, rows]: sample numbers, highest confidence first; NaN and -infinity left out.
  std::unique_ptr<uint32_t[]> order_;
  // [exits, rows + 1]: where each group begins in order_, and where the last one ends.
  std::unique_ptr<uint32_t[]> begin_;
  // [exits, rows]: the confidence of each group.
  std::unique_ptr<float[]> value_;
};

}  // namespace e2cm
