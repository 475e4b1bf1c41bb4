// The threshold search: which threshold vectors to try on a record, and the FLOPs and accuracy of each.
//
//   leaving      sample i leaves at the first exit j with confidence[i][j] > T[j]. A NaN never does.
//   its FLOPs    those of stages 0 ... j, and of the heads of the exits up to j whose threshold is not +infinity
//   flops(T)     the mean of that over all samples, divided by the FLOPs of all stages
//
// flops(T) grows with every component of T, except that it drops where a component reaches +infinity: the head of that
// exit is not computed then.
//
// Only the order of the confidences at an exit matters. So a component is a number of *groups*: the samples of an exit
// in descending order of confidence, equal values in one group; the first g groups leave. For g = 0 the threshold is
// +infinity, for all groups -infinity, otherwise halfway between the last group that leaves and the first that stays:
// as far as possible from both, since the next run of the network may round differently.
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

// The results: row i belongs to the i-th vector.
struct Points {
  float* thresholds;  // [count, exits]
  double* flops;      // [count]
  double* accuracy;   // [count]
};

class ThresholdSearch {
 public:
  // Throws std::invalid_argument for no rows or for 2^31 or more. The record must outlive `sort`.
  explicit ThresholdSearch(const RecordView& record);

  // Sorts `count` exits from `first` on. Every exit must be sorted once before the functions below are called.
  void sort(int64_t first, int64_t count, int threads);

  // The paper's search for the targets first / targets, (first + 1) / targets, ..., `count` of them, independently: the
  // same bits however they are divided among calls and threads.
  void search(int64_t first, int64_t count, int64_t targets, uint64_t seed, const Points& out, int threads) const;

  // Coordinate ascent of (prices - number) * accuracy - number * FLOPs, for the numbers first, first + 1, ..., each
  // starting from its row of points.thresholds, which receives the result.
  void ascend(int64_t first, int64_t count, int64_t prices, const Points& points, int threads) const;

  // FLOPs and accuracy of points.thresholds, any values but NaN.
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
  // [exits]: the number of groups. The arrays below have a row per exit, filled up to its number of groups.
  std::vector<int64_t> groups_;
  // [exits, rows]: samples in descending order of confidence, without those of NaN and -infinity.
  std::unique_ptr<uint32_t[]> order_;
  // [exits, rows + 1]: where each group starts in order_, and where the last one ends.
  std::unique_ptr<uint32_t[]> begin_;
  // [exits, rows]: the confidence of each group.
  std::unique_ptr<float[]> value_;
};

}  // namespace e2cm
