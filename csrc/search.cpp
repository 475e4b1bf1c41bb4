// The threshold search. A set of samples is a row of bits, so the number of samples that reach each exit, from which
// the FLOPs follow, is `and` and popcount on words: 22,000 words for 50,000 samples and 28 exits, fewer if the
// threshold that has changed belongs to a late exit. Every step of a binary search needs these counts. Moving a
// threshold flips the bits of the samples between the old and the new one, which are adjacent in sorted order.
#include "search.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "bitset.h"
#include "cpu/parallel.h"

namespace e2cm {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kTolerance = 0.0005;  // a target is met by FLOPs that are lower by at most half the paper's step
constexpr int kRounds = 2;             // of complete binary searches, if the alternating ones have missed the target
constexpr int kMaxSweeps = 50;         // of coordinate ascent

uint64_t mix(uint64_t z) {  // the finaliser of splitmix64
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

// A number from 0 to most, a function of the arguments alone.
int64_t random_number(uint64_t seed, int64_t target, int64_t exit, int64_t most) {
  constexpr uint64_t kStep = 0x9e3779b97f4a7c15;
  const uint64_t stream = mix(seed + kStep * static_cast<uint64_t>(target + 1));
  const uint64_t bits = mix(stream + kStep * static_cast<uint64_t>(exit + 1));
  return static_cast<int64_t>((bits >> 32) * static_cast<uint64_t>(most + 1) >> 32);
}

// A sort key: keys ascend where the floats descend.
uint32_t descending(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits >> 31 ? bits : ~bits & 0x7fffffff;
}

// Halfway between the highest that stays and the lowest that leaves; if there is no float between, the one that stays.
float between(float stays, float leaves) {
  const float middle = static_cast<float>(0.5 * (static_cast<double>(stays) + static_cast<double>(leaves)));
  return middle < leaves ? middle : stays;
}

}  // namespace

ThresholdSearch::ThresholdSearch(const RecordView& record)
    : record_(record), rows_(record.rows), exits_(record.exits), words_((record.rows + 63) / 64) {
  if (rows_ < 1 || rows_ >= int64_t{1} << 31 || exits_ < 0)
    throw std::invalid_argument("a search needs 1 to 2^31 - 1 samples");
  stage_.assign(record.stage_flops, record.stage_flops + exits_ + 1);
  head_.assign(record.head_flops, record.head_flops + exits_);
  for (const double flops : stage_) base_ += flops;
  groups_.assign(static_cast<size_t>(exits_), 0);
  correct_.assign(static_cast<size_t>((exits_ + 1) * words_), 0);
  const size_t most = static_cast<size_t>(exits_ * (rows_ + 1));
  order_.reset(new uint32_t[most]);
  begin_.reset(new uint32_t[most]);
  value_.reset(new float[most]);
  for (int64_t i = 0; i < rows_; ++i)
    for (int64_t j = 0; j <= exits_; ++j)
      correct_[static_cast<size_t>(j * words_ + i / 64)] |= uint64_t{record.correct[i * (exits_ + 1) + j] != 0}
                                                            << (i % 64);
}

void ThresholdSearch::sort(int64_t first, int64_t count, int threads) {
  const int useful = useful_threads(static_cast<int>(std::min<int64_t>(threads, count)), count * rows_ * 64);
  const std::unique_ptr<uint64_t[]> key_memory(new uint64_t[static_cast<size_t>(useful * rows_)]);
  parallel_for(count, useful, [&](int64_t piece, int thread) {
    const int64_t exit = first + piece;
    uint64_t* const keys = key_memory.get() + thread * rows_;
    int64_t finite = 0;
    for (int64_t i = 0; i < rows_; ++i) {
      const float value = record_.confidence[i * (exits_ + 1) + exit] + 0.f;  // -0 is 0
      if (value > -kInfinity) keys[finite++] = uint64_t{descending(value)} << 32 | static_cast<uint64_t>(i);
    }
    std::sort(keys, keys + finite);
    uint32_t* const order = order_.get() + exit * rows_;
    uint32_t* const begin = begin_.get() + exit * (rows_ + 1);
    float* const value = value_.get() + exit * rows_;
    int64_t groups = 0;
    for (int64_t p = 0; p < finite; ++p) {
      order[p] = static_cast<uint32_t>(keys[p]);
      if (p > 0 && keys[p] >> 32 == keys[p - 1] >> 32) continue;
      value[groups] = record_.confidence[int64_t{order[p]} * (exits_ + 1) + exit] + 0.f;
      begin[groups++] = static_cast<uint32_t>(p);
    }
    begin[groups] = static_cast<uint32_t>(finite);
    groups_[static_cast<size_t>(exit)] = groups;
  });
}

// A threshold vector, the samples that leave at each exit under it, and its FLOPs. One per thread.
class Thresholds {
 public:
  explicit Thresholds(const ThresholdSearch& search)
      : search_(search),
        words_(search.words_),
        exits_(search.exits_),
        firing_(static_cast<size_t>(exits_ * words_)),
        reaching_(static_cast<size_t>((exits_ + 1) * words_), ~uint64_t{0}),
        group_(static_cast<size_t>(exits_)),
        computed_(static_cast<size_t>(exits_)),
        reach_count_(static_cast<size_t>(exits_ + 1)),
        flops_before_(static_cast<size_t>(exits_ + 1)),
        low_(static_cast<size_t>(exits_)),
        high_(static_cast<size_t>(exits_)),
        value_(static_cast<size_t>(search.rows_)) {
    if (const int64_t rest = search_.rows_ % 64) reaching_[static_cast<size_t>(words_ - 1)] = (uint64_t{1} << rest) - 1;
  }

  void search(int64_t number, int64_t targets, uint64_t seed) {
    target_ = static_cast<double>(number) / static_cast<double>(targets);
    start_at_random(number, seed);
    alternate();
    for (int round = 0; round < kRounds && !target_met(); ++round)
      if (!search_each()) break;
  }

  // Coordinate ascent from the current vector: sweeps over the exits, each of which gets the best threshold for the
  // current values of the others.
  void ascend(int64_t number, int64_t prices) {
    flops_weight_ = static_cast<double>(number);
    accuracy_weight_ = static_cast<double>(prices - number);
    for (int64_t j = 0; j < exits_; ++j) set(j, group_[static_cast<size_t>(j)]);  // off if no sample leaves
    bool improved = true;
    for (int sweep = 0; sweep < kMaxSweeps && improved; ++sweep) {
      for (int64_t j = 0; j < exits_; ++j) advance(j);
      improved = improve_each();
    }
    evaluate(0);
  }

  void set_thresholds(const float* thresholds) {
    for (int64_t j = 0; j < exits_; ++j) {
      const float* const values = search_.value_.get() + j * search_.rows_;
      const float* const end = values + search_.groups_at(j);
      move(j, std::partition_point(values, end, [&](float value) { return value > thresholds[j]; }) - values);
      computed(j) = thresholds[j] < kInfinity;  // even if no sample leaves
    }
    evaluate(0);
  }

  void write_thresholds(float* out) const {
    for (int64_t j = 0; j < exits_; ++j) {
      const int64_t g = group_[static_cast<size_t>(j)];
      const float* const values = search_.value_.get() + j * search_.rows_;
      out[j] = g == 0 ? kInfinity : g == search_.groups_at(j) ? -kInfinity : between(values[g], values[g - 1]);
    }
  }

  double flops() const { return flops_; }

  double accuracy() {
    int64_t right = 0;
    for (int64_t j = 0; j < exits_; ++j) {
      advance(j);
      for (int64_t w = 0; w < words_; ++w) right += popcount(reaching(j)[w] & firing(j)[w] & correct(j)[w]);
    }
    for (int64_t w = 0; w < words_; ++w) right += popcount(reaching(exits_)[w] & correct(exits_)[w]);
    return static_cast<double>(right) / static_cast<double>(search_.rows_);
  }

 private:
  // ---- the search

  void start_at_random(int64_t number, uint64_t seed) {
    for (int64_t j = 0; j < exits_; ++j) {
      const uint32_t* const begin = search_.begin_.get() + j * (search_.rows_ + 1);
      const uint32_t* const end = begin + search_.groups_at(j) + 1;
      const int64_t leaving = random_number(seed, number, j, end[-1]);
      set(j, std::upper_bound(begin, end, static_cast<uint32_t>(leaving)) - begin - 1);
    }
    evaluate(0);
  }

  // A binary search at every exit, interleaved: one step at the first exit, one at the second, and so on. The FLOPs of
  // the whole vector give the direction of each step. Ends when the target is met or no exit can move.
  void alternate() {
    std::fill(low_.begin(), low_.end(), int64_t{0});
    high_ = search_.groups_;
    for (bool moved = true; moved;) {
      moved = false;
      for (int64_t j = 0; j < exits_; ++j) {
        if (target_met()) return;
        int64_t &l = low_[static_cast<size_t>(j)], &h = high_[static_cast<size_t>(j)];
        const int64_t g = group_[static_cast<size_t>(j)];
        if (flops_ > target_ ? g < h : g > l) {
          (flops_ > target_ ? l : h) = flops_ > target_ ? g + 1 : g - 1;
          set(j, l + (h - l) / 2);
          evaluate(j);
          moved = true;
        }
        advance(j);
      }
    }
  }

  // A complete binary search at one exit after the other. Returns whether a threshold has changed.
  bool search_each() {
    bool changed = false;
    for (int64_t j = 0; j < exits_ && !target_met(); ++j) {
      const int64_t before = group_[static_cast<size_t>(j)];
      search_one(j);
      changed = changed || group_[static_cast<size_t>(j)] != before;
      advance(j);
    }
    return changed;
  }

  // Sets this exit to the highest FLOPs within the target, or if there are none, to the lowest.
  void search_one(int64_t j) {
    const auto flops_at = [&](int64_t g) {
      set(j, g);
      return evaluate(j);
    };
    int64_t low = 1, high = search_.groups_at(j);
    if (high == 0) return;
    if (flops_at(high) > target_) low = high;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (flops_at(middle) <= target_)
        high = middle;
      else
        low = middle + 1;
    }
    // Within the target higher is better, beyond it lower.
    const auto score = [&](double flops) { return flops <= target_ ? flops : -flops; };
    const double with = score(flops_at(low));
    const bool off = score(flops_at(0)) >= with;
    if (!off) flops_at(low);
  }

  bool target_met() const { return flops_ <= target_ && flops_ >= target_ - kTolerance; }

  // ---- coordinate ascent

  // From the last exit to the first: the value of a sample that stays depends on later exits only. The samples that
  // reach an exit depend on earlier exits only, which have not moved since reaching() was computed. Returns whether a
  // threshold has changed.
  bool improve_each() {
    bool moved = false;
    for (int64_t i = 0; i < search_.rows_; ++i)
      value_[static_cast<size_t>(i)] = accuracy_weight_ * bit(correct(exits_), i);
    for (int64_t j = exits_ - 1; j >= 0; --j) {
      const double next = flops_weight_ * weight(j + 1) / search_.base_;
      for (double& value : value_) value -= next;
      const int64_t g = best_group(j);
      moved = moved || g != group_[static_cast<size_t>(j)];
      set(j, g);
      const uint32_t* const order = search_.order_.get() + j * search_.rows_;
      const uint32_t leaving = search_.begin_[static_cast<size_t>(j * (search_.rows_ + 1) + g)];
      for (uint32_t p = 0; p < leaving; ++p) value_[order[p]] = accuracy_weight_ * bit(correct(j), order[p]);
    }
    return moved;
  }

  // The best number of groups, given value_[i] of every sample that stays.
  int64_t best_group(int64_t j) {
    const uint32_t* const begin = search_.begin_.get() + j * (search_.rows_ + 1);
    const uint32_t* const order = search_.order_.get() + j * search_.rows_;
    const uint64_t *const arrived = reaching(j), *const right = correct(j);
    int64_t arrivals = 0;
    for (int64_t w = 0; w < words_; ++w) arrivals += popcount(arrived[w]);
    // Relative to an exit that is off: minus the cost of its head, plus what each group gains by leaving.
    double gain =
        -flops_weight_ * search_.head_[static_cast<size_t>(j)] / search_.base_ * static_cast<double>(arrivals);
    double most = 0;
    int64_t best = 0;
    for (int64_t g = 1; g <= search_.groups_at(j); ++g) {
      for (uint32_t p = begin[g - 1]; p < begin[g]; ++p)
        gain += bit(arrived, order[p]) * (accuracy_weight_ * bit(right, order[p]) - value_[order[p]]);
      if (gain > most) {
        most = gain;
        best = g;
      }
    }
    return best;
  }

  static double bit(const uint64_t* bits, int64_t i) { return static_cast<double>(bits[i / 64] >> (i % 64) & 1); }

  // ---- the state

  uint64_t* firing(int64_t j) { return firing_.data() + j * words_; }
  uint64_t* reaching(int64_t j) { return reaching_.data() + j * words_; }
  const uint64_t* correct(int64_t j) const { return search_.correct_.data() + j * words_; }
  uint8_t& computed(int64_t j) { return computed_[static_cast<size_t>(j)]; }

  void set(int64_t j, int64_t g) {
    move(j, g);
    computed(j) = g > 0;
  }

  void move(int64_t j, int64_t g) {
    int64_t& now = group_[static_cast<size_t>(j)];
    const uint32_t* const begin = search_.begin_.get() + j * (search_.rows_ + 1);
    const uint32_t* const order = search_.order_.get() + j * search_.rows_;
    uint64_t* const bits = firing(j);
    const uint32_t end = begin[std::max(now, g)];
    for (uint32_t p = begin[std::min(now, g)]; p < end; ++p) bits[order[p] / 64] ^= uint64_t{1} << (order[p] % 64);
    now = g;
  }

  // FLOPs of the whole vector. reaching(j) and flops_before_[j] must be current; they depend on the exits before j.
  double evaluate(int64_t j) {
    count_reach(reaching(j), firing_.data(), words_, j, exits_, reach_count_.data());
    double sum = flops_before_[static_cast<size_t>(j)];
    for (int64_t k = j; k <= exits_; ++k) sum += cost(k);
    return flops_ = sum / search_.base_;
  }

  void advance(int64_t j) {
    for (int64_t w = 0; w < words_; ++w) reaching(j + 1)[w] = reaching(j)[w] & ~firing(j)[w];
    flops_before_[static_cast<size_t>(j + 1)] = flops_before_[static_cast<size_t>(j)] + cost(j);
  }

  // FLOPs of stage k and of the head after it (if computed): per sample of the record, and (weight) per sample that
  // reaches the stage.
  double cost(int64_t k) const {
    return static_cast<double>(reach_count_[static_cast<size_t>(k)]) / static_cast<double>(search_.rows_) * weight(k);
  }

  double weight(int64_t k) const {
    const size_t i = static_cast<size_t>(k);
    return k < exits_ && computed_[i] ? search_.stage_[i] + search_.head_[i] : search_.stage_[i];
  }

  const ThresholdSearch& search_;
  const int64_t words_, exits_;
  std::vector<uint64_t> firing_;      // [exits, words]: samples with a confidence above the threshold
  std::vector<uint64_t> reaching_;    // [exits + 1, words]: samples that reach the exit
  std::vector<int64_t> group_;        // [exits]: the thresholds, as numbers of groups
  std::vector<uint8_t> computed_;     // [exits]: whether the head is computed
  std::vector<int64_t> reach_count_;  // [exits + 1]: number of samples that reach the exit
  std::vector<double> flops_before_;  // [exits + 1]: FLOPs before stage j, per sample
  std::vector<int64_t> low_, high_;   // [exits]: bounds of the binary searches
  std::vector<double> value_;         // [rows]: the value of a sample that stays, in coordinate ascent
  double target_ = 0, flops_ = 0, flops_weight_ = 0, accuracy_weight_ = 0;
};

namespace {

// body(number, thresholds) for `count` numbers, with one Thresholds per thread.
template <class Body>
void for_each_vector(const ThresholdSearch& search, int64_t count, int threads, const Body& body) {
  const int useful =
      useful_threads(static_cast<int>(std::min<int64_t>(threads, count)), count * search.rows() * search.exits());
  std::vector<Thresholds> each;
  each.reserve(static_cast<size_t>(useful));
  for (int i = 0; i < useful; ++i) each.emplace_back(search);
  parallel_for(count, useful, [&](int64_t i, int thread) { body(i, each[static_cast<size_t>(thread)]); });
}

}  // namespace

void ThresholdSearch::search(int64_t first, int64_t count, int64_t targets, uint64_t seed, const Points& out,
                             int threads) const {
  for_each_vector(*this, count, threads, [&](int64_t i, Thresholds& thresholds) {
    thresholds.search(first + i, targets, seed);
    thresholds.write_thresholds(out.thresholds + i * exits_);
    out.flops[i] = thresholds.flops();
    out.accuracy[i] = thresholds.accuracy();
  });
}

void ThresholdSearch::ascend(int64_t first, int64_t count, int64_t prices, const Points& points, int threads) const {
  for_each_vector(*this, count, threads, [&](int64_t i, Thresholds& thresholds) {
    thresholds.set_thresholds(points.thresholds + i * exits_);
    thresholds.ascend(first + i, prices);
    thresholds.write_thresholds(points.thresholds + i * exits_);
    points.flops[i] = thresholds.flops();
    points.accuracy[i] = thresholds.accuracy();
  });
}

void ThresholdSearch::replay(int64_t count, const Points& points, int threads) const {
  for_each_vector(*this, count, threads, [&](int64_t i, Thresholds& thresholds) {
    thresholds.set_thresholds(points.thresholds + i * exits_);
    points.flops[i] = thresholds.flops();
    points.accuracy[i] = thresholds.accuracy();
  });
}

}  // namespace e2cm
