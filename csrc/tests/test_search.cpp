// The threshold search: its FLOPs and accuracy against a loop over samples, its targets, threads, unusual records.
#include <algorithm>
#include <stdexcept>
#include <thread>

#include "data.h"
#include "search.h"

using namespace e2cm;
using namespace e2cm::test;

namespace {

struct Record {
  int64_t rows, exits;
  Exact<float> confidence;
  Exact<uint8_t> correct;
  Exact<double> stage, head;

  Record(int64_t n, int64_t m)
      : rows(n), exits(m), confidence(n * (m + 1)), correct(n * (m + 1)), stage(m + 1, 1.0), head(m, 0.01) {}

  // values: the number of different confidences at an exit, 0 for continuous ones; odd: the share of NaN and +-inf.
  void fill(Random& random, int64_t values, double odd) const {
    for (int64_t i = 0; i < rows * (exits + 1); ++i) {
      const double value = values ? static_cast<double>(random.below(values) - values / 2) : random.normal();
      confidence[i] =
          random.chance(odd) ? static_cast<float>(random.pick({kNan, kInf, -kInf})) : static_cast<float>(value);
      if (confidence[i] == 0 && random.chance(0.5)) confidence[i] = -0.f;
      correct[i] = random.chance(0.3 + 0.6 * static_cast<double>(i % (exits + 1)) / static_cast<double>(exits + 1));
    }
    for (int64_t j = 0; j <= exits; ++j) stage[j] = static_cast<double>(1 + random.below(1000));
    for (int64_t j = 0; j < exits; ++j) head[j] = random.chance(0.2) ? 0 : static_cast<double>(random.below(200));
  }

  RecordView view() const { return {confidence.data(), correct.data(), rows, exits, stage.data(), head.data()}; }

  ThresholdSearch sorted(int threads = 1) const {
    ThresholdSearch search(view());
    if (exits > 0) search.sort(0, exits, threads);
    return search;
  }

  double base() const {
    double sum = 0;
    for (int64_t j = 0; j <= exits; ++j) sum += stage[j];
    return sum;
  }

  struct Outcome {
    double flops, accuracy;
  };

  Outcome outcome(const float* thresholds) const {
    double spent = 0;
    int64_t right = 0;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j <= exits; ++j) {
        spent += stage[j];
        if (j < exits && thresholds[j] != kInff) spent += head[j];
        if (j < exits && !(confidence[i * (exits + 1) + j] > thresholds[j])) continue;
        right += correct[i * (exits + 1) + j];
        break;
      }
    return {spent / static_cast<double>(rows) / base(), static_cast<double>(right) / static_cast<double>(rows)};
  }
};

struct Found {
  Exact<float> thresholds;
  Exact<double> flops, accuracy;
  Found(int64_t count, int64_t exits) : thresholds(count * exits), flops(count, kNan), accuracy(count, kNan) {}
  Points view() const { return {thresholds.data(), flops.data(), accuracy.data()}; }
  Points from(int64_t first, int64_t exits) const {
    return {thresholds.data() + first * exits, flops.data() + first, accuracy.data() + first};
  }
};

constexpr int64_t kTargets = 20;

bool same(const Found& a, const Found& b) {
  return same_bits(a.thresholds.data(), b.thresholds.data(), a.thresholds.size()) &&
         a.flops.values() == b.flops.values() && a.accuracy.values() == b.accuracy.values();
}

}  // namespace

TEST(reported_flops_and_accuracy) {
  Random random(1);
  const int64_t sizes[] = {1, 2, 3, 7, 63, 64, 65, 127, 128, 200, 2047, 2048, 2049, 4200};
  for (int trial = 0; trial < times(400); ++trial) {
    const Record record(random.pick(sizes), random.below(9));
    record.fill(random, random.pick({int64_t{0}, int64_t{0}, int64_t{1}, int64_t{2}, int64_t{5}}),
                random.pick({0.0, 0.0, 0.1, 0.9}));
    const ThresholdSearch search = record.sorted();
    const Found found(kTargets + 1, record.exits), replayed(kTargets + 1, record.exits);
    search.search(0, kTargets + 1, kTargets, static_cast<uint64_t>(trial), found.view(), 1);
    for (int64_t i = 0; i < found.thresholds.size(); ++i) {
      CHECK(found.thresholds[i] == found.thresholds[i]);
      replayed.thresholds[i] = found.thresholds[i];
    }
    search.replay(kTargets + 1, replayed.view(), 1);
    CHECK(same(found, replayed));
    for (int64_t i = 0; i <= kTargets; ++i) {
      const Record::Outcome wanted = record.outcome(found.thresholds.data() + i * record.exits);
      CHECK_CLOSE(found.flops[i], wanted.flops, 1e-12);
      CHECK(found.accuracy[i] == wanted.accuracy);
    }
  }
}

TEST(replay_of_any_thresholds) {
  Random random(2);
  for (int trial = 0; trial < times(400); ++trial) {
    const Record record(1 + random.below(300), random.below(6));
    record.fill(random, random.chance(0.5) ? 0 : 5, random.chance(0.5) ? 0 : 0.2);
    const ThresholdSearch search = record.sorted();
    const Found given(30, record.exits);
    for (int64_t i = 0; i < given.thresholds.size(); ++i)
      given.thresholds[i] =
          static_cast<float>(random.pick({kInf, -kInf, 0.0, 1.0, -2.0, 1e30, -1e30, random.normal(), random.normal()}));
    search.replay(30, given.view(), 1);
    for (int64_t i = 0; i < 30; ++i) {
      const Record::Outcome wanted = record.outcome(given.thresholds.data() + i * record.exits);
      CHECK_CLOSE(given.flops[i], wanted.flops, 1e-12);
      CHECK(given.accuracy[i] == wanted.accuracy);
    }
  }
}

TEST(targets_are_met) {
  Random random(3);
  for (const int64_t rows : {5000, 20000}) {
    const Record record(rows, 7);
    record.fill(random, 0, 0);
    const ThresholdSearch search = record.sorted();
    const Found found(kTargets + 1, record.exits);
    search.search(0, kTargets + 1, kTargets, 0, found.view(), 1);
    const double least = (record.stage[0] + record.head[0]) / record.base();
    for (int64_t i = 0; i <= kTargets; ++i) {
      const double target = static_cast<double>(i) / kTargets;
      if (target < least)
        CHECK_CLOSE(found.flops[i], least, 1e-12);
      else
        CHECK(found.flops[i] <= target && found.flops[i] >= target - 0.0005);
    }
  }
}

TEST(ascent_ends_in_a_coordinatewise_maximum) {
  Random random(7);
  constexpr int64_t kPrices = 8;
  for (int trial = 0; trial < times(150); ++trial) {
    const Record record(1 + random.below(70), random.below(5));
    record.fill(random, random.chance(0.5) ? 0 : 4, random.chance(0.5) ? 0 : 0.2);
    const ThresholdSearch search = record.sorted();
    const Found found(kPrices + 1, record.exits);
    std::vector<Record::Outcome> before;
    for (int64_t i = 0; i <= kPrices; ++i) {
      float* const row = found.thresholds.data() + i * record.exits;
      for (int64_t j = 0; j < record.exits; ++j)
        row[j] = random.chance(0.3) ? kInff : static_cast<float>(random.normal());
      before.push_back(record.outcome(row));
    }
    search.ascend(0, kPrices + 1, kPrices, found.view(), 1);
    for (int64_t i = 0; i <= kPrices; ++i) {
      float* const row = found.thresholds.data() + i * record.exits;
      const double price = static_cast<double>(i), worth = static_cast<double>(kPrices - i);
      const auto value = [&](const Record::Outcome& o) { return worth * o.accuracy - price * o.flops; };
      const Record::Outcome reached = record.outcome(row);
      CHECK_CLOSE(found.flops[i], reached.flops, 1e-12);
      CHECK(found.accuracy[i] == reached.accuracy);
      CHECK(value(reached) >= value(before[static_cast<size_t>(i)]) - 1e-9);
      for (int64_t j = 0; j < record.exits; ++j) {
        const float kept = row[j];
        for (int64_t s = -2; s < record.rows; ++s) {
          row[j] = s == -2 ? kInff : s == -1 ? -kInff : record.confidence[s * (record.exits + 1) + j];
          if (row[j] == row[j]) CHECK(value(record.outcome(row)) <= value(reached) + 1e-9);
        }
        row[j] = kept;
      }
    }
  }
}

TEST(the_base_network_costs_one) {
  Random random(4);
  const Record record(77, 5);
  record.fill(random, 0, 0.1);
  const Found off(1, 5);
  for (int64_t j = 0; j < 5; ++j) off.thresholds[j] = kInff;
  record.sorted().replay(1, off.view(), 1);
  CHECK(off.flops[0] == 1);
  for (int64_t j = 0; j < 5; ++j) off.thresholds[j] = 1e30f;  // computed, and too high for any confidence but +inf
  record.sorted().replay(1, off.view(), 1);
  CHECK(off.flops[0] > 1 || record.head.values() == std::vector<double>(5));
}

TEST(thresholds_are_halfway_between_neighbours) {
  const Record record(4, 1);
  const float confidence[] = {0.5f, 1.f, 0.25f, 1.f};
  for (int64_t i = 0; i < 4; ++i) record.confidence[2 * i] = confidence[i];
  record.head[0] = 0;  // leaving at exit 0 costs 0.5, so two of four cost 0.75 and three 0.625
  const ThresholdSearch search = record.sorted();
  const Found found(9, 1);
  search.search(0, 9, 8, 0, found.view(), 1);
  const float wanted[] = {-kInff, -kInff, -kInff, -kInff, -kInff, 0.375f, 0.75f, 0.75f, kInff};
  for (int64_t i = 0; i < 9; ++i) CHECK(found.thresholds[i] == wanted[i]);
}

TEST(neighbouring_floats) {
  const Record record(2, 1);
  record.head[0] = 0;  // one of the two leaving costs 0.75
  record.confidence[0] = 1.f;
  record.confidence[2] = std::nextafter(1.f, 2.f);
  const Found found(5, 1);
  record.sorted().search(0, 5, 4, 0, found.view(), 1);
  CHECK(found.thresholds[3] == 1.f);
  record.confidence[0] = -3e38f;
  record.confidence[2] = kInff;
  record.sorted().search(0, 5, 4, 0, found.view(), 1);
  CHECK(found.thresholds[3] == -3e38f);
}

TEST(same_bits_for_any_threads_and_any_division) {
  Random random(5);
  const Record record(700, 6);
  record.fill(random, 0, 0.01);
  const Found whole(kTargets + 1, 6);
  record.sorted(1).search(0, kTargets + 1, kTargets, 9, whole.view(), 1);
  for (const int threads : {2, 3, 8}) {
    const Found other(kTargets + 1, 6);
    record.sorted(threads).search(0, kTargets + 1, kTargets, 9, other.view(), threads);
    CHECK(same(whole, other));
    const Found pieces(kTargets + 1, 6);
    const ThresholdSearch search = record.sorted(threads);
    for (int64_t first = 0, count; first <= kTargets; first += count) {
      count = std::min(1 + random.below(6), kTargets + 1 - first);
      search.search(first, count, kTargets, 9, pieces.from(first, 6), threads);
    }
    CHECK(same(whole, pieces));
  }
  const Found another_seed(kTargets + 1, 6);
  record.sorted(1).search(0, kTargets + 1, kTargets, 10, another_seed.view(), 1);
  CHECK(!same(whole, another_seed));
}

TEST(concurrent_callers_of_one_search) {
  Random random(6);
  const Record record(2000, 5);
  record.fill(random, 0, 0);
  const ThresholdSearch search = record.sorted();
  const Found alone(kTargets + 1, 5);
  search.search(0, kTargets + 1, kTargets, 0, alone.view(), 1);
  bool good[4] = {};
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([&, i] {
      const Found found(kTargets + 1, 5);
      search.search(0, kTargets + 1, kTargets, 0, found.view(), 1 + i % 2);
      good[i] = same(alone, found);
    });
  for (std::thread& caller : callers) caller.join();
  for (const bool each : good) CHECK(each);
}

TEST(invalid_sizes) {
  const Record none(0, 2);
  CHECK_THROWS(std::invalid_argument, ThresholdSearch{none.view()});
  RecordView view = Record(1, 1).view();
  view.rows = int64_t{1} << 31;
  CHECK_THROWS(std::invalid_argument, ThresholdSearch{view});
  view.rows = 1;
  view.exits = -1;
  CHECK_THROWS(std::invalid_argument, ThresholdSearch{view});
}

int main() { return run_tests(); }
