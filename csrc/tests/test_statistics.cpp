// Statistics of feature maps, and linear heads, against the equations in double; same bits for any threads and batch.
#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "data.h"

using namespace e2cm;
using namespace e2cm::test;

namespace {

constexpr int64_t kChannels[] = {1, 3, 8, 15, 16, 17, 24, 31, 32, 40, 63, 64, 65, 130};
constexpr int64_t kSides[] = {1, 2, 3, 4, 7, 8, 9, 16, 33, 300};
// The error of a sum relative to the sum of the magnitudes: chains of 256 values, and the sum of their sums.
constexpr double kSlack = 260 * kUlp;

// Maps in a matrix of exact size, one sample per row.
struct Case {
  Matrix x;
  Maps maps;
  Statistics wanted;

  Case(Random& random, int64_t rows, int64_t channels, int64_t height, int64_t width, DType dtype, bool last)
      : x(dtype, rows, channels * height * width, channels * height * width + random.below(4)),
        maps{x.view().data, dtype, rows, channels, height, width, x.view().stride, last} {
    const auto grid = [&]() -> Grid {
      if (random.chance(0.25)) return {0, 0};
      return {1 + random.below(std::min<int64_t>(height, 6)), 1 + random.below(std::min<int64_t>(width, 6))};
    };
    wanted = {grid(), grid(), grid(),
              random.chance(0.3) ? 0 : random.below(std::min<int64_t>((channels + 1) / 2, 40) + 1)};
    for (int64_t b = 0; b < rows; ++b)
      for (int64_t i = 0; i < x.dim(); ++i) x.set(b, i, 0.5 + random.normal());
  }

  double at(int64_t row, int64_t c, int64_t i, int64_t j) const {
    const int64_t h = maps.height, w = maps.width;
    return x.at(row, maps.channels_last ? (i * w + j) * maps.channels + c : (c * h + i) * w + j);
  }
  int64_t size() const { return wanted.size(maps.channels); }
  Maps part(int64_t first, int64_t count) const {
    Maps some = maps;
    some.data = x.view(first, count).data;
    some.rows = count;
    return some;
  }
  std::vector<float> run(int64_t first, int64_t count, int threads) const {
    const Exact<float> out(count * size(), kUnsetFloat);
    statistics(part(first, count), wanted, out.data(), threads);
    return out.values();
  }
  std::string text() const {
    char line[200];
    std::snprintf(line, sizeof line, "%lld x [%lld, %lld, %lld] %s%s, grids %lldx%lld %lldx%lld %lldx%lld, pairs %lld",
                  static_cast<long long>(maps.rows), static_cast<long long>(maps.channels),
                  static_cast<long long>(maps.height), static_cast<long long>(maps.width), name_of(maps.dtype),
                  maps.channels_last ? " channels_last" : "", static_cast<long long>(wanted.mean.rows),
                  static_cast<long long>(wanted.mean.columns), static_cast<long long>(wanted.rms.rows),
                  static_cast<long long>(wanted.rms.columns), static_cast<long long>(wanted.max.rows),
                  static_cast<long long>(wanted.max.columns), static_cast<long long>(wanted.pairs));
    return line;
  }
};

struct Cell {
  double sum = 0, magnitude = 0, squares = 0, most = -kInf;
  int64_t count = 0;
  bool finite = true;
};

Cell cell_of(const Case& c, const Grid& grid, int64_t row, int64_t channel, int64_t i, int64_t j) {
  const int64_t h = c.maps.height, w = c.maps.width;
  Cell cell;
  for (int64_t y = i * h / grid.rows; y < (i + 1) * h / grid.rows; ++y)
    for (int64_t x = j * w / grid.columns; x < (j + 1) * w / grid.columns; ++x) {
      const double value = c.at(row, channel, y, x);
      cell.sum += value, cell.magnitude += std::fabs(value), cell.squares += value * value, ++cell.count;
      cell.most = std::max(cell.most, value);
      cell.finite = cell.finite && std::isfinite(value);
    }
  return cell;
}

// check(expected cell, result) for every cell of a grid, in the order of the results.
template <class Check>
const float* for_cells(const Case& c, const Grid& grid, int64_t row, const float* got, const Check& check) {
  for (int64_t channel = 0; channel < c.maps.channels; ++channel)
    for (int64_t i = 0; i < grid.rows; ++i)
      for (int64_t j = 0; j < grid.columns; ++j) check(cell_of(c, grid, row, channel, i, j), *got++);
  return got;
}

void check_pairs(const Case& c, int64_t row, const float* got) {
  const int64_t channels = c.maps.channels;
  const double n = static_cast<double>(c.maps.height * c.maps.width);
  for (int64_t o = 0; o < c.wanted.pairs; ++o)
    for (int64_t channel = 0; channel < channels; ++channel, ++got) {
      double sum = 0, magnitude = 0;
      for (int64_t y = 0; y < c.maps.height; ++y)
        for (int64_t x = 0; x < c.maps.width; ++x) {
          const double product = c.at(row, channel, y, x) * c.at(row, (channel + o) % channels, y, x);
          sum += product, magnitude += std::fabs(product);
        }
      const double root = *got;
      CHECK_CLOSE(root * std::fabs(root), sum / n, kSlack * magnitude / n);
    }
}

void check_row(const Case& c, int64_t row, const float* got) {
  got = for_cells(c, c.wanted.mean, row, got, [](const Cell& cell, float mean) {
    const double n = static_cast<double>(cell.count);
    CHECK_CLOSE(mean, cell.sum / n, kSlack * cell.magnitude / n);
  });
  got = for_cells(c, c.wanted.rms, row, got, [](const Cell& cell, float rms) {
    const double expected = std::sqrt(cell.squares / static_cast<double>(cell.count));
    CHECK_CLOSE(rms, expected, kSlack * expected);
  });
  got = for_cells(c, c.wanted.max, row, got, [](const Cell& cell, float most) {
    CHECK(cell.finite ? static_cast<double>(most) == cell.most : std::isnan(most));
  });
  check_pairs(c, row, got);
}

bool same(const std::vector<float>& a, int64_t first, const std::vector<float>& b) {
  return same_bits(a.data() + first, b.data(), static_cast<int64_t>(b.size()));
}

Case random_case(Random& random, int64_t rows) {
  int64_t height = random.pick(kSides), width = random.pick(kSides), channels = random.pick(kChannels);
  while (height * width * channels > at_most(6e4)) height = random.pick(kSides), channels = random.pick(kChannels);
  return Case(random, rows, channels, height, width, random.pick(kDTypes), random.chance(0.5));
}

}  // namespace

TEST(statistics_match_the_equations) {
  Random random(1);
  for (int i = 0; i < times(300); ++i) {
    const Case c = random_case(random, 1 + random.below(3));
    state().context = c.text();
    const std::vector<float> got = c.run(0, c.maps.rows, 1);
    for (int64_t b = 0; b < c.maps.rows; ++b) check_row(c, b, got.data() + b * c.size());
  }
}

TEST(statistics_at_any_number_of_threads_and_alone) {
  Random random(2);
  for (int i = 0; i < times(40); ++i) {
    const Case c = random_case(random, 40);
    state().context = c.text();
    const std::vector<float> whole = c.run(0, 40, 1);
    for (const int threads : {2, 3, 8}) CHECK(same(whole, 0, c.run(0, 40, threads)));
    for (int64_t b = 0; b < 40; b += 7) CHECK(same(whole, b * c.size(), c.run(b, 1, 2)));
  }
}

TEST(non_finite_values_reach_only_their_cells_and_pairs) {
  Random random(3);
  for (int i = 0; i < times(100); ++i) {
    const Case c = random_case(random, 1);
    state().context = c.text();
    const std::vector<float> before = c.run(0, 1, 1);
    const int64_t place = random.below(c.x.dim()), channels = c.maps.channels;
    const int64_t spoiled = c.maps.channels_last ? place % channels : place / (c.maps.height * c.maps.width);
    c.x.set(0, place, random.pick({kNan, kInf, -kInf}));
    const std::vector<float> after = c.run(0, 1, 1);
    const float *old = before.data(), *now = after.data();
    for (const Grid& grid : {c.wanted.mean, c.wanted.rms, c.wanted.max})
      now = for_cells(c, grid, 0, now, [&](const Cell& cell, float value) {
        CHECK(cell.finite ? same_bits(value, *old) : !std::isfinite(value));
        ++old;
      });
    for (int64_t o = 0; o < c.wanted.pairs; ++o)
      for (int64_t channel = 0; channel < channels; ++channel, ++now, ++old)
        CHECK(channel == spoiled || (channel + o) % channels == spoiled ? !std::isfinite(*now) : same_bits(*now, *old));
  }
}

TEST(an_empty_batch) {
  Random random(4);
  const Case c(random, 0, 16, 8, 8, DType::f32, true);
  CHECK(c.run(0, 0, 4).empty());
}

TEST(linear_scores_match_the_equations) {
  Random random(5);
  for (const Shape& shape : shapes(random, times(3), at_most(4e6))) {
    Problem problem(shape.batch, shape.classes, shape.dim, random.pick(kDTypes), random.pick(kDTypes), false,
                    random.below(5));
    problem.fill(random, 0);
    state().context = problem.text();
    const Exact<float> bias(shape.classes);
    for (int64_t k = 0; k < shape.classes; ++k) bias[k] = static_cast<float>(random.normal());
    if (shape.classes > 1) bias[random.below(shape.classes)] = -kInff;
    const HeadParams head{HeadKind::logits, problem.means.view(), bias.data()};
    const Out out(shape.batch, shape.classes);
    scores(problem.x.view(), head, out.view(), 3);
    for (int64_t b = 0; b < shape.batch; ++b) {
      std::vector<double> penalties;
      double magnitude = 0;
      for (int64_t k = 0; k < shape.classes; ++k) {
        double logit = bias[k], size = 0;
        for (int64_t i = 0; i < shape.dim; ++i) {
          logit += problem.x.at(b, i) * problem.means.at(k, i);
          size += std::fabs(problem.x.at(b, i) * problem.means.at(k, i));
        }
        penalties.push_back(-logit);
        magnitude = std::max(magnitude, size);
      }
      check_answer(out, b, penalties, 80 * kUlp * (1 + magnitude));
    }
  }
}

TEST(steps_of_heads_on_statistics) {
  Random random(6);
  for (int i = 0; i < times(40); ++i) {
    const Case c = random_case(random, 1 + random.below(60));
    if (c.size() == 0) continue;
    const int64_t rows = c.maps.rows, classes = random.pick({int64_t{3}, int64_t{10}, int64_t{40}});
    state().context = c.text();
    const std::vector<float> features = c.run(0, rows, 1);
    const Exact<float> all(features), weight(classes * c.size()), ones(classes, 1.f);
    for (int64_t j = 0; j < weight.size(); ++j)
      weight[j] = static_cast<float>(random.normal() / std::sqrt(static_cast<double>(c.size())));
    const Rows seen{all.data(), DType::f32, rows, c.size(), c.size()};
    const Rows vectors{weight.data(), DType::f32, classes, c.size(), c.size()};
    const Pooled pooled{c.maps, c.wanted};
    const Exact<int64_t> ids(rows), keep(rows), other(rows);
    for (int64_t b = 0; b < rows; ++b) ids[b] = rows - 1 - b;

    for (const HeadKind kind : {HeadKind::logits, HeadKind::distances}) {
      const HeadParams head{kind, vectors, ones.data()};
      const Out expected(rows, classes), got(rows, classes), one(rows, classes), two(rows, classes);
      scores(seen, head, expected.view(false), 1);
      scores(pooled, head, got.view(false), 3);
      for (int64_t b = 0; b < rows; ++b) CHECK(same_row(expected, b, got, b));
      const Departure departure{Rule::confidence, expected.confidence[rows / 2], 5, ids.data()};
      const int64_t stay = step(seen, head, departure, one.view(), keep.data(), 1);
      CHECK(step(pooled, head, departure, two.view(), other.data(), 3) == stay);
      for (int64_t j = 0; j < stay; ++j) CHECK(keep[j] == other[j]);
      for (int64_t b = 0; b < rows; ++b) {
        CHECK(same_row(one, b, two, b));
        CHECK(one.untouched(ids[b]) == !(expected.confidence[b] > departure.threshold));
      }
    }
  }
}

int main() { return run_tests(); }
