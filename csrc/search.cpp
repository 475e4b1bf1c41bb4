// A set of samples is a row of bits, so that counting who reaches which exit, all that FLOPs depend on, is `and` and
// popcount on words: 22,000 of them for 50,000 samples and 28 exits, and fewer if it is a late exit that has moved.
// Every step of a binary search asks for that. Moving a threshold flips the bits of the samples between the old and the
// new one, which stand together in sorted order.
#include "search.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "cpu/parallel.h"

#if defined(__GNUC__) && defined(__x86_64__)
#define E2CM_POPCNT 1
#endif

namespace e2cm {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kTolerance = 0.0005;  // a target is met by FLOPs that are lower by no more than half the paper's step
constexpr int kRounds = 2;             // of whole binary searches, where the alternating ones have missed the target
constexpr int kSweeps = 50;            // of coordinate ascent, at most
constexpr int64_t kBlock = 32;         // words that go through all exits together, in registers or the nearest cache

#ifdef __GNUC__
#define E2CM_INLINE inline __attribute__((always_inline))
E2CM_INLINE int64_t bits_in(uint64_t word) { return __builtin_popcountll(word); }
#else
#define E2CM_INLINE inline
E2CM_INLINE int64_t bits_in(uint64_t word) {
  word -= word >> 1 & 0x5555555555555555;
  word = (word & 0x3333333333333333) + (word >> 2 & 0x3333333333333333);
  return static_cast<int64_t>(((word + (word >> 4)) & 0x0f0f0f0f0f0f0f0f) * 0x0101010101010101 >> 56);
}
#endif

// reach[k] = how many of `here`, who reach exit `first`, reach exit k: for every k in first ... exits.
E2CM_INLINE void count_reach_inline(const uint64_t* here, const uint64_t* fire, int64_t words, int64_t first,
                                    int64_t exits, int64_t* reach) {
  std::fill(reach + first, reach + exits + 1, int64_t{0});
  uint64_t left[kBlock];
  for (int64_t begin = 0; begin < words; begin += kBlock) {
    const int64_t n = std::min(kBlock, words - begin);
    int64_t count = 0;
    for (int64_t w = 0; w < n; ++w) {
      left[w] = here[begin + w];
      count += bits_in(left[w]);
    }
    reach[first] += count;
    for (int64_t k = first; k < exits && count; ++k) {
      const uint64_t* const leavers = fire + k * words + begin;
      count = 0;
      for (int64_t w = 0; w < n; ++w) {
        left[w] &= ~leavers[w];
        count += bits_in(left[w]);
      }
      reach[k + 1] += count;
    }
  }
}

using CountReach = void (*)(const uint64_t*, const uint64_t*, int64_t, int64_t, int64_t, int64_t*);

void count_reach_anywhere(const uint64_t* here, const uint64_t* fire, int64_t words, int64_t first, int64_t exits,
                          int64_t* reach) {
  count_reach_inline(here, fire, words, first, exits, reach);
}

#ifdef E2CM_POPCNT  // the instruction is younger than x86-64
__attribute__((target("popcnt"))) void count_reach_popcnt(const uint64_t* here, const uint64_t* fire, int64_t words,
                                                          int64_t first, int64_t exits, int64_t* reach) {
  count_reach_inline(here, fire, words, first, exits, reach);
}
const CountReach count_reach = __builtin_cpu_supports("popcnt") ? count_reach_popcnt : count_reach_anywhere;
#else
const CountReach count_reach = count_reach_anywhere;
#endif

uint64_t mixed(uint64_t z) {  // the finaliser of splitmix64
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

// One of 0 ... most, from nothing but these numbers.
int64_t random_number(uint64_t seed, int64_t target, int64_t exit, int64_t most) {
  constexpr uint64_t kStep = 0x9e3779b97f4a7c15;
  const uint64_t stream = mixed(seed + kStep * static_cast<uint64_t>(target + 1));
  const uint64_t bits = mixed(stream + kStep * static_cast<uint64_t>(exit + 1));
  return static_cast<int64_t>((bits >> 32) * static_cast<uint64_t>(most + 1) >> 32);
}

// Numbers in the order of the floats they are made from, highest float first.
uint32_t descending(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits >> 31 ? bits : ~bits & 0x7fffffff;
}

// Halfway from the highest that stays to the lowest that leaves; where no float lies between, the one that stays.
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
  const std::unique_ptr<uint64_t[]> room(new uint64_t[static_cast<size_t>(useful * rows_)]);
  parallel_for(count, useful, [&](int64_t piece, int thread) {
    const int64_t exit = first + piece;
    uint64_t* const keys = room.get() + thread * rows_;
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

// A threshold vector, who leaves where under it, and what that costs. One per thread.
class Thresholds {
 public:
  explicit Thresholds(const ThresholdSearch& search)
      : all_(search),
        words_(search.words_),
        exits_(search.exits_),
        fire_(static_cast<size_t>(exits_ * words_)),
        here_(static_cast<size_t>((exits_ + 1) * words_), ~uint64_t{0}),
        group_(static_cast<size_t>(exits_)),
        on_(static_cast<size_t>(exits_)),
        reach_(static_cast<size_t>(exits_ + 1)),
        spent_(static_cast<size_t>(exits_ + 1)),
        low_(static_cast<size_t>(exits_)),
        high_(static_cast<size_t>(exits_)),
        value_(static_cast<size_t>(search.rows_)) {
    if (const int64_t rest = all_.rows_ % 64) here_[static_cast<size_t>(words_ - 1)] = (uint64_t{1} << rest) - 1;
  }

  void search(int64_t number, int64_t targets, uint64_t seed) {
    target_ = static_cast<double>(number) / static_cast<double>(targets);
    start_at_random(number, seed);
    alternate();
    for (int round = 0; round < kRounds && !met(); ++round)
      if (!search_each()) break;
  }

  // Coordinate ascent from the vector that has been set: sweeps over the exits, each time giving each the threshold
  // that is best as the others are now.
  void ascend(int64_t number, int64_t prices) {
    price_ = static_cast<double>(number);
    worth_ = static_cast<double>(prices - number);
    for (int64_t j = 0; j < exits_; ++j) set(j, group_[static_cast<size_t>(j)]);  // off, where nobody leaves
    bool improved = true;
    for (int sweep = 0; sweep < kSweeps && improved; ++sweep) {
      for (int64_t j = 0; j < exits_; ++j) advance(j);
      improved = improve_each();
    }
    evaluate(0);
  }

  void set_thresholds(const float* thresholds) {
    for (int64_t j = 0; j < exits_; ++j) {
      const float* const values = all_.value_.get() + j * all_.rows_;
      const float* const end = values + all_.groups_at(j);
      move(j, std::partition_point(values, end, [&](float value) { return value > thresholds[j]; }) - values);
      on(j) = thresholds[j] < kInfinity;  // and be it too high for anybody
    }
    evaluate(0);
  }

  void write_thresholds(float* out) const {
    for (int64_t j = 0; j < exits_; ++j) {
      const int64_t g = group_[static_cast<size_t>(j)];
      const float* const values = all_.value_.get() + j * all_.rows_;
      out[j] = g == 0 ? kInfinity : g == all_.groups_at(j) ? -kInfinity : between(values[g], values[g - 1]);
    }
  }

  double flops() const { return flops_; }

  double accuracy() {
    int64_t right = 0;
    for (int64_t j = 0; j < exits_; ++j) {
      advance(j);
      for (int64_t w = 0; w < words_; ++w) right += bits_in(here(j)[w] & fire(j)[w] & correct(j)[w]);
    }
    for (int64_t w = 0; w < words_; ++w) right += bits_in(here(exits_)[w] & correct(exits_)[w]);
    return static_cast<double>(right) / static_cast<double>(all_.rows_);
  }

 private:
  // ---- the search

  void start_at_random(int64_t number, uint64_t seed) {
    for (int64_t j = 0; j < exits_; ++j) {
      const uint32_t* const begin = all_.begin_.get() + j * (all_.rows_ + 1);
      const uint32_t* const end = begin + all_.groups_at(j) + 1;
      const int64_t leavers = random_number(seed, number, j, end[-1]);
      set(j, std::upper_bound(begin, end, static_cast<uint32_t>(leavers)) - begin - 1);
    }
    evaluate(0);
  }

  // A binary search at every exit, all at the same time: one step of the first, one of the second, and so on, each in
  // the direction that the FLOPs of the whole vector ask for, until the target is met or no exit has anywhere to go.
  void alternate() {
    std::fill(low_.begin(), low_.end(), int64_t{0});
    high_ = all_.groups_;
    for (bool moved = true; moved;) {
      moved = false;
      for (int64_t j = 0; j < exits_; ++j) {
        if (met()) return;
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

  // One exit after the other, its binary search done to the end. Returns whether anything has changed.
  bool search_each() {
    bool changed = false;
    for (int64_t j = 0; j < exits_ && !met(); ++j) {
      const int64_t before = group_[static_cast<size_t>(j)];
      search_one(j);
      changed = changed || group_[static_cast<size_t>(j)] != before;
      advance(j);
    }
    return changed;
  }

  // The highest FLOPs within the target that this exit can bring about, or the lowest there are.
  void search_one(int64_t j) {
    const auto flops_at = [&](int64_t g) {
      set(j, g);
      return evaluate(j);
    };
    int64_t low = 1, high = all_.groups_at(j);
    if (high == 0) return;
    if (flops_at(high) > target_) low = high;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (flops_at(middle) <= target_)
        high = middle;
      else
        low = middle + 1;
    }
    // Within the target more is better, beyond it less.
    const auto score = [&](double flops) { return flops <= target_ ? flops : -flops; };
    const double with = score(flops_at(low));
    const bool off = score(flops_at(0)) >= with;
    if (!off) flops_at(low);
  }

  bool met() const { return flops_ <= target_ && flops_ >= target_ - kTolerance; }

  // ---- coordinate ascent

  // From the last exit to the first: what becomes of those who go on depends on later exits only, who arrives depends
  // on earlier ones only, and these have not moved since here() was made. Returns whether any has.
  bool improve_each() {
    bool moved = false;
    for (int64_t i = 0; i < all_.rows_; ++i) value_[static_cast<size_t>(i)] = worth_ * bit(correct(exits_), i);
    for (int64_t j = exits_ - 1; j >= 0; --j) {
      const double next = price_ * weight(j + 1) / all_.base_;
      for (double& value : value_) value -= next;
      const int64_t g = best_group(j);
      moved = moved || g != group_[static_cast<size_t>(j)];
      set(j, g);
      const uint32_t* const order = all_.order_.get() + j * all_.rows_;
      const uint32_t leavers = all_.begin_[static_cast<size_t>(j * (all_.rows_ + 1) + g)];
      for (uint32_t p = 0; p < leavers; ++p) value_[order[p]] = worth_ * bit(correct(j), order[p]);
    }
    return moved;
  }

  // With value_[i] for every sample that goes on.
  int64_t best_group(int64_t j) {
    const uint32_t* const begin = all_.begin_.get() + j * (all_.rows_ + 1);
    const uint32_t* const order = all_.order_.get() + j * all_.rows_;
    const uint64_t *const arrived = here(j), *const right = correct(j);
    int64_t arrivals = 0;
    for (int64_t w = 0; w < words_; ++w) arrivals += bits_in(arrived[w]);
    // Against an exit that is off: first what its head costs, then what each group brings by leaving.
    double gain = -price_ * all_.head_[static_cast<size_t>(j)] / all_.base_ * static_cast<double>(arrivals);
    double most = 0;
    int64_t best = 0;
    for (int64_t g = 1; g <= all_.groups_at(j); ++g) {
      for (uint32_t p = begin[g - 1]; p < begin[g]; ++p)
        gain += bit(arrived, order[p]) * (worth_ * bit(right, order[p]) - value_[order[p]]);
      if (gain > most) {
        most = gain;
        best = g;
      }
    }
    return best;
  }

  static double bit(const uint64_t* bits, int64_t i) { return static_cast<double>(bits[i / 64] >> (i % 64) & 1); }

  // ---- the state

  uint64_t* fire(int64_t j) { return fire_.data() + j * words_; }
  uint64_t* here(int64_t j) { return here_.data() + j * words_; }
  const uint64_t* correct(int64_t j) const { return all_.correct_.data() + j * words_; }
  uint8_t& on(int64_t j) { return on_[static_cast<size_t>(j)]; }

  void set(int64_t j, int64_t g) {
    move(j, g);
    on(j) = g > 0;
  }

  void move(int64_t j, int64_t g) {
    int64_t& now = group_[static_cast<size_t>(j)];
    const uint32_t* const begin = all_.begin_.get() + j * (all_.rows_ + 1);
    const uint32_t* const order = all_.order_.get() + j * all_.rows_;
    uint64_t* const bits = fire(j);
    const uint32_t end = begin[std::max(now, g)];
    for (uint32_t p = begin[std::min(now, g)]; p < end; ++p) bits[order[p] / 64] ^= uint64_t{1} << (order[p] % 64);
    now = g;
  }

  // FLOPs of the whole vector. here(j) and spent(j) must be up to date: they depend on the exits before j only.
  double evaluate(int64_t j) {
    count_reach(here(j), fire_.data(), words_, j, exits_, reach_.data());
    double sum = spent_[static_cast<size_t>(j)];
    for (int64_t k = j; k <= exits_; ++k) sum += cost(k);
    return flops_ = sum / all_.base_;
  }

  void advance(int64_t j) {
    for (int64_t w = 0; w < words_; ++w) here(j + 1)[w] = here(j)[w] & ~fire(j)[w];
    spent_[static_cast<size_t>(j + 1)] = spent_[static_cast<size_t>(j)] + cost(j);
  }

  // What stage k, and the exit behind it if it is on, cost per sample of the record; weight: of those who get there.
  double cost(int64_t k) const {
    return static_cast<double>(reach_[static_cast<size_t>(k)]) / static_cast<double>(all_.rows_) * weight(k);
  }

  double weight(int64_t k) const {
    const size_t i = static_cast<size_t>(k);
    return k < exits_ && on_[i] ? all_.stage_[i] + all_.head_[i] : all_.stage_[i];
  }

  const ThresholdSearch& all_;
  const int64_t words_, exits_;
  std::vector<uint64_t> fire_;  // [exits, words]: whose confidence is above the threshold
  std::vector<uint64_t> here_;  // [exits + 1, words]: who reaches the exit
  std::vector<int64_t> group_;  // [exits]: the thresholds
  std::vector<uint8_t> on_;     // [exits]: is the head computed?
  std::vector<int64_t> reach_;  // [exits + 1]: how many reach the exit
  std::vector<double> spent_;   // [exits + 1]: FLOPs before stage j, per sample
  std::vector<int64_t> low_, high_;
  std::vector<double> value_;  // [rows]: in coordinate ascent, what a sample is worth if it goes on
  double target_ = 0, flops_ = 0, price_ = 0, worth_ = 0;
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
