// scores, step and decide: answers, who leaves, and what may not be touched.
#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "data.h"

using namespace e2cm;
using namespace e2cm::test;

namespace {

bool usable(float scale) { return scale > 0 && scale < kInff; }

std::vector<int64_t> some_ids(Random& random, int64_t count, int64_t rows) {  // all different
  std::vector<int64_t> all(static_cast<size_t>(rows));
  std::iota(all.begin(), all.end(), 0);
  for (int64_t i = 0; i < count; ++i) std::swap(all[i], all[i + random.below(rows - i)]);
  all.resize(static_cast<size_t>(count));
  return all;
}

// Which rows leave, from the answers of all rows. `entropy` is known up to `slack` only.
void check_departure(const Departure& departure, const Out& every, const std::vector<double>& entropy, double slack,
                     const Out& out, const Exact<int64_t>& keep, int64_t kept) {
  const int64_t batch = every.rows;
  std::vector<bool> stays(static_cast<size_t>(batch), false), written(static_cast<size_t>(out.rows), false);
  CHECK(kept >= 0 && kept <= batch);
  int64_t last = -1;
  for (int64_t i = 0; i < kept; ++i) {
    CHECK(keep[i] > last && keep[i] < batch);
    if (keep[i] > last && keep[i] < batch) stays[static_cast<size_t>(keep[i])] = true;
    last = keep[i];
  }
  for (int64_t b = 0; b < batch; ++b) {
    const size_t at = static_cast<size_t>(b);
    if (departure.rule == Rule::confidence)
      CHECK(stays[at] == !(every.confidence[b] > departure.threshold));
    else if (!(std::fabs(entropy[at] - departure.threshold) <= slack))
      CHECK(stays[at] == !(entropy[at] < departure.threshold));
    if (stays[at]) continue;
    CHECK(!std::isnan(every.confidence[b]));
    const int64_t row = departure.ids[b];
    written[static_cast<size_t>(row)] = true;
    CHECK(same_row(out, row, every, b));
    CHECK(out.exit[row] == departure.exit_number);
  }
  for (int64_t row = 0; row < out.rows; ++row)
    if (!written[static_cast<size_t>(row)]) CHECK(out.untouched(row));
}

std::vector<float> thresholds(Random& random, const Out& every, const std::vector<double>& entropy, Rule rule) {
  std::vector<float> all{-kInff, kInff, kNanf, 0.f, 1.f, 0.5f};
  if (every.rows > 0 && rule == Rule::confidence)
    for (int i = 0; i < 3; ++i) {
      const float exactly = every.confidence[random.below(every.rows)];
      all.insert(all.end(), {exactly, std::nextafter(exactly, -kInff), std::nextafter(exactly, kInff)});
    }
  if (every.rows > 0 && rule == Rule::entropy)
    for (int i = 0; i < 3; ++i) all.push_back(static_cast<float>(entropy[random.below(every.rows)] * (0.5 + i)));
  return all;
}

// step(departure, answers, keep) must match the answers of all rows (`every`) and the rule, for many thresholds.
template <class Step>
void check_steps(Random& random, const Out& every, const std::vector<double>& entropy, double slack, const Step& step) {
  const int64_t batch = every.rows, classes = every.classes;
  const int64_t rows = batch + (random.chance(0.5) ? random.below(20) : 0);
  for (const Rule rule : {Rule::confidence, Rule::entropy})
    for (const float threshold : thresholds(random, every, entropy, rule)) {
      const Exact<int64_t> ids(some_ids(random, batch, rows)), keep(batch, kUnset);
      const Out out(rows, classes);
      const Departure departure{rule, threshold, 40 + random.below(9), ids.data()};
      check_departure(departure, every, entropy, slack, out, keep, step(departure, out.view(), keep.data()));
    }
}

std::vector<double> penalties_of(const Exact<float>& distances, const Exact<float>& scale, int64_t row) {
  std::vector<double> z;
  for (int64_t k = 0; k < scale.size(); ++k)
    z.push_back(usable(scale[k]) ? static_cast<double>(distances[row * scale.size() + k]) / scale[k] : kInf);
  return z;
}

double largest_finite(const std::vector<double>& z) {
  double largest = 0;
  for (const double value : z)
    if (std::isfinite(value)) largest = std::max(largest, std::fabs(value));
  return largest;
}

// scores and step of a problem, from its class_distances (which have a test of their own).
void check_problem(Random& random, const Problem& problem, int64_t sampled_rows) {
  const int64_t batch = problem.x.rows(), classes = problem.means.rows();
  const Exact<float> distances(batch * classes);
  class_distances(problem.x.view(), problem.head(), distances.data(), 1);
  const Out every(batch, classes);
  scores(problem.x.view(), problem.head(), every.view(false), static_cast<int>(1 + random.below(3)));
  std::vector<double> entropy;
  double slack = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const std::vector<double> z = penalties_of(distances, problem.scale, b);
    const double lost = 4 * kUlp * largest_finite(z);
    slack = std::max(slack, lost);
    entropy.push_back(Truth(z).entropy);
    if (b < sampled_rows) check_answer(every, b, z, lost);
    CHECK(every.exit[b] == kUnset);
  }
  check_steps(random, every, entropy, slack_of_entropy(static_cast<size_t>(classes), slack),
              [&](const Departure& departure, const Answers& out, int64_t* keep) {
                return step(problem.x.view(), problem.head(), departure, out, keep,
                            static_cast<int>(1 + random.below(3)));
              });
}

}  // namespace

TEST(shapes_of_exit_step) {
  Random random(1);
  for (const Shape& shape : shapes(random, times(1.5), at_most(2e6))) {
    Problem problem(shape.batch, shape.classes, shape.dim, random.pick(kDTypes), random.pick(kDTypes),
                    random.chance(0.6), random.below(3) * 5, random.below(2) * 3);
    problem.fill(random, random.chance(0.5) ? 0 : 100);
    for (int64_t k = 0; k < shape.classes; ++k)
      if (random.chance(0.1)) problem.scale[k] = random.pick({0.f, -1.f, kNanf, kInff, -kInff});
    if (shape.batch > 3) problem.x.set(2, random.below(shape.dim), random.pick({kNan, kInf, -kInf}));
    state().context = problem.text();
    check_problem(random, problem, 40);
  }
}

// Compared with the equations, not with class_distances.
TEST(scores_from_the_equations) {
  Random random(2);
  for (int i = 0; i < times(40); ++i) {
    const int64_t batch = 1 + random.below(20), classes = random.pick({1, 2, 5, 10, 49});
    Problem problem(batch, classes, random.pick({1, 16, 17, 513, 1030}), random.pick(kDTypes), DType::f32,
                    random.chance(0.7));
    problem.fill(random, 100);
    state().context = problem.text();
    const Out out(batch, classes);
    scores(problem.x.view(), problem.head(), out.view(), 1);
    for (int64_t b = 0; b < batch; ++b) {
      std::vector<double> z;
      for (int64_t k = 0; k < classes; ++k) z.push_back(problem.distance(b, k) / problem.scale[k]);
      check_answer(out, b, z, 1e-5 * largest_finite(z));
    }
  }
}

TEST(ties_go_to_the_lowest_class) {
  Random random(3);
  for (const int64_t dim : {1, 16, 17, 513, 8191})
    for (const int64_t classes : {2, 7, 48, 97, 1000})
      for (const bool centered : {false, true}) {
        if (classes * dim > at_most(4e6)) continue;
        const int64_t batch = 21, first = random.below(classes - 1),
                      second = first + 1 + random.below(classes - first - 1);
        Problem problem(batch, classes, dim, random.pick(kDTypes), DType::f32, centered);
        problem.fill(random, 10);
        problem.means.copy_row(second, problem.means, first);
        for (int64_t k = 0; k < classes; ++k) problem.scale[k] = 3;
        for (int64_t b = 0; b < batch; ++b)
          for (int64_t i = 0; i < dim; ++i)
            problem.x.set(b, i, problem.means.at(first, i) + (b % 3) * 1e-3 * random.normal());
        state().context = problem.text();
        const Out out(batch, classes);
        scores(problem.x.view(), problem.head(), out.view(), 2);
        for (int64_t b = 0; b < batch; ++b) {
          CHECK(out.prediction[b] != second);
          CHECK(same_bits(out.log_probs[b * classes + first], out.log_probs[b * classes + second]));
          if (dim > 1) CHECK(out.prediction[b] == first);
        }
      }
}

TEST(all_the_same_mean) {
  for (const int64_t classes : {1, 2, 6, 49, 1000}) {
    const Problem problem(18, classes, 33);
    const Out out(18, classes);
    scores(problem.x.view(), problem.head(), out.view(), 1);
    for (int64_t b = 0; b < 18; ++b) check_answer(out, b, std::vector<double>(static_cast<size_t>(classes), 0.), 0);
    for (int64_t b = 0; b < 18; ++b) CHECK(out.prediction[b] == 0);
  }
}

// A class without samples: its mean may be anything, the scores of the others are as without it.
TEST(unusable_scales) {
  Random random(4);
  for (const float bad : {0.f, -0.f, -1.f, kNanf, kInff, -kInff})
    for (const double mean : {0., 1e30, kNan, kInf, -kInf})
      for (const int64_t classes : {1, 2, 7, 49}) {
        const int64_t batch = 17, dim = 37;
        Problem problem(batch, classes, dim);
        problem.fill(random, 1);
        std::vector<int64_t> missing{random.below(classes)};
        if (classes > 2) missing.push_back(random.below(classes));
        for (const int64_t k : missing) {
          problem.scale[k] = bad;
          for (int64_t i = 0; i < dim; ++i) problem.means.set(k, i, mean);
        }
        state().context = problem.text() + ", scale " + std::to_string(bad) + ", mean " + std::to_string(mean);
        check_problem(random, problem, batch);
        const Out out(batch, classes);
        scores(problem.x.view(), problem.head(), out.view(), 1);
        for (int64_t b = 0; b < batch; ++b)
          for (const int64_t k : missing) {
            if (classes == 1)
              CHECK(std::isnan(out.confidence[b]));
            else
              CHECK(out.prediction[b] != k && out.log_probs[b * classes + k] == -kInff);
          }
      }
}

TEST(non_finite_rows_never_leave) {
  Random random(5);
  for (const DType dtype : kDTypes)
    for (const double bad : {kNan, kInf, -kInf})
      for (const int64_t dim : {1, 17, 64, 513}) {
        const int64_t batch = 35, classes = 5;
        Problem problem(batch, classes, dim, dtype);
        problem.fill(random, 0);
        for (const int64_t row : {0, 15, 16, 34}) problem.x.set(row, random.below(dim), bad);
        state().context = problem.text() + ", with " + std::to_string(bad);
        const Exact<int64_t> ids(some_ids(random, batch, batch)), keep(batch);
        for (const Rule rule : {Rule::confidence, Rule::entropy}) {
          const Out out(batch, classes);
          const Departure all{rule, rule == Rule::confidence ? -kInff : kInff, 1, ids.data()};
          CHECK(step(problem.x.view(), problem.head(), all, out.view(), keep.data(), 2) == 4);
          CHECK(keep[0] == 0 && keep[1] == 15 && keep[2] == 16 && keep[3] == 34);
        }
      }
}

TEST(one_class_and_its_entropy_of_zero) {  // the only entropy that is known exactly
  Problem problem(3, 1, 4);
  for (int64_t i = 0; i < 4; ++i) problem.x.set(1, i, 5);
  const Exact<int64_t> ids(std::vector<int64_t>{0, 1, 2}), keep(3);
  const auto stay = [&](Rule rule, float threshold) {
    const Out out(3, 1);
    return step(problem.x.view(), problem.head(), {rule, threshold, 1, ids.data()}, out.view(), keep.data(), 1);
  };
  CHECK(stay(Rule::entropy, 0.f) == 3);
  CHECK(stay(Rule::entropy, -1.f) == 3);
  CHECK(stay(Rule::entropy, 1e-30f) == 0);
  CHECK(stay(Rule::confidence, 1.f) == 3);
  CHECK(stay(Rule::confidence, std::nextafter(1.f, 0.f)) == 0);
}

TEST(null_outputs_are_skipped) {  // exit and log_probs may be null
  Random random(6);
  Problem problem(40, 10, 64);
  problem.fill(random, 0);
  const Out full(40, 10), part(40, 10);
  const Exact<int64_t> ids(some_ids(random, 40, 40)), keep(40), keep_too(40);
  const Departure departure{Rule::confidence, 0.3f, 2, ids.data()};
  const int64_t kept = step(problem.x.view(), problem.head(), departure, full.view(), keep.data(), 1);
  CHECK(step(problem.x.view(), problem.head(), departure, part.view(false, false), keep_too.data(), 1) == kept);
  for (int64_t i = 0; i < kept; ++i) CHECK(keep[i] == keep_too[i]);
  for (int64_t row = 0; row < 40; ++row) {
    CHECK(full.confidence[row] == part.confidence[row] && full.prediction[row] == part.prediction[row]);
    CHECK(part.exit[row] == kUnset && part.log_probs[row * 10 + 3] == kUnsetFloat);
  }
}

TEST(empty_batches) {
  const Exact<float> nothing(0);
  const Exact<int64_t> nobody(0);
  for (const int64_t rows : {0, 3}) {
    const Problem problem(0, 10, 64);
    const Out out(rows, 10);
    const Departure departure{Rule::confidence, 0.f, 1, nobody.data()};
    class_distances(problem.x.view(), problem.head(), nothing.data(), 4);
    scores(Rows{nullptr, DType::f32, 0, 64, 64}, problem.head(), out.view(), 4);
    CHECK(step(problem.x.view(), problem.head(), departure, out.view(), nobody.data(), 4) == 0);
    CHECK(step(Rows{nullptr, DType::f16, 0, 64, 64}, problem.head(), {Rule::entropy, 0.f, 1, nullptr}, out.view(),
               nullptr, 4) == 0);
    CHECK(decide({nullptr, DType::f32, 0, 10, 10}, nullptr, departure, out.view(), nullptr, 4) == 0);
    CHECK(out.untouched());
  }
}

TEST(ids_out_of_range) {
  Random random(7);
  Problem problem(40, 3, 16);
  problem.fill(random, 0);
  const int64_t big = std::numeric_limits<int64_t>::max(), small = std::numeric_limits<int64_t>::min();
  for (const int64_t bad : {int64_t{-1}, int64_t{40}, int64_t{1} << 31, int64_t{1} << 32, big, small})
    for (const int64_t place : {0, 1, 17, 39})
      for (const Rule rule : {Rule::confidence, Rule::entropy})
        for (const int threads : {1, 4}) {
          const Exact<int64_t> ids(some_ids(random, 40, 40)), keep(40, kUnset);
          ids[place] = bad;
          const Out out(40, 3);
          // Also if no row leaves: a wrong id is an error of the caller, whatever the data.
          const Departure departure{rule, random.pick({-kInff, 0.5f, kInff}), 1, ids.data()};
          const Matrix logits(DType::f32, 40, 3, 3);
          CHECK_THROWS(std::out_of_range,
                       step(problem.x.view(), problem.head(), departure, out.view(), keep.data(), threads));
          CHECK_THROWS(std::out_of_range, decide(logits.view(), nullptr, departure, out.view(), keep.data(), threads));
          CHECK(out.untouched());
          for (int64_t i = 0; i < 40; ++i) CHECK(keep[i] == kUnset);
        }
  const Out none(0, 3);
  const Exact<int64_t> ids(1), keep(1, kUnset);
  CHECK_THROWS(std::out_of_range, step(problem.x.view(0, 1), problem.head(), {Rule::confidence, 0.f, 1, ids.data()},
                                       none.view(), keep.data(), 1));
  CHECK(keep[0] == kUnset);
}

// ---- decide ---------------------------------------------------------------------------------------------------------

namespace {

std::vector<double> penalties_of(const Matrix& scores, const float* scale, int64_t row) {
  std::vector<double> z;
  for (int64_t k = 0; k < scores.dim(); ++k) {
    const double score = scores.at(row, k);
    z.push_back(!scale ? -score : usable(scale[k]) ? score / scale[k] : kInf);
  }
  return z;
}

void check_decide(Random& random, const Matrix& scores, const float* scale) {
  const int64_t batch = scores.rows(), classes = scores.dim();
  const Out every(batch, classes);
  const Exact<int64_t> ids(static_cast<int64_t>(batch)), keep(batch);
  for (int64_t b = 0; b < batch; ++b) ids[b] = b;
  const Departure all{Rule::confidence, -kInff, 5, ids.data()};
  const int64_t kept = decide(scores.view(), scale, all, every.view(), keep.data(), 1);
  std::vector<double> entropy;
  double slack = 0;
  int64_t invalid = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const std::vector<double> z = penalties_of(scores, scale, b);
    const Truth truth(z);
    entropy.push_back(truth.entropy);
    const double lost = scale ? 2 * kUlp * largest_finite(z) : 0;
    slack = std::max(slack, lost);
    if (truth.valid) {
      check_answer(every, b, z, lost);
      CHECK(every.exit[b] == 5);
    } else {
      CHECK(every.untouched(b));
      CHECK(invalid < kept && keep[invalid] == b);
      ++invalid;
      every.confidence[b] = kNanf;  // what scores would say
    }
  }
  CHECK(kept == invalid);
  check_steps(random, every, entropy, slack_of_entropy(static_cast<size_t>(classes), slack),
              [&](const Departure& departure, const Answers& out, int64_t* keep_too) {
                return decide(scores.view(), scale, departure, out, keep_too, static_cast<int>(1 + random.below(3)));
              });
}

}  // namespace

TEST(decide_from_logits) {
  Random random(8);
  const int64_t more[] = {15, 16, 17, 511, 512, 513, 1030};
  for (int i = 0; i < times(150); ++i) {
    const int64_t classes = random.chance(0.5) ? random.pick(kClasses) : random.pick(more);
    const Matrix scores(random.pick(kDTypes), random.pick(kBatches), classes, classes + random.below(2) * 7);
    const double size = random.pick({0.1, 3., 30., 1000., 1e30}), shift = random.pick({0., 50., -1000.});
    for (int64_t b = 0; b < scores.rows(); ++b) {
      for (int64_t k = 0; k < classes; ++k)
        scores.set(b, k, random.chance(0.05) ? -kInf : shift + size * random.normal());
      if (random.chance(0.05)) scores.set(b, random.below(classes), random.pick({kNan, kInf}));
      if (random.chance(0.05))
        for (int64_t k = 0; k < classes; ++k) scores.set(b, k, -kInf);
      if (random.chance(0.2)) scores.set(b, random.below(classes), scores.at(b, random.below(classes)));
    }
    state().context = std::string("logits ") + name_of(scores.dtype()) + " B=" + std::to_string(scores.rows()) +
                      " K=" + std::to_string(classes) + " size " + std::to_string(size);
    check_decide(random, scores, nullptr);
  }
}

TEST(decide_from_distances) {
  Random random(9);
  for (int i = 0; i < times(150); ++i) {
    const int64_t classes = random.pick(kClasses);
    const Matrix scores(random.pick(kDTypes), random.pick(kBatches), classes, classes + random.below(2) * 7);
    const Exact<float> scale(classes);
    for (int64_t k = 0; k < classes; ++k)
      scale[k] =
          random.chance(0.05) ? random.pick({0.f, -2.f, kNanf, kInff}) : static_cast<float>(0.5 + random.uniform());
    for (int64_t b = 0; b < scores.rows(); ++b) {
      for (int64_t k = 0; k < classes; ++k) scores.set(b, k, random.chance(0.03) ? kInf : 20 * random.uniform());
      if (random.chance(0.05)) scores.set(b, random.below(classes), kNan);
    }
    state().context = std::string("distances ") + name_of(scores.dtype()) + " B=" + std::to_string(scores.rows()) +
                      " K=" + std::to_string(classes);
    check_decide(random, scores, scale.data());
  }
}

TEST(zeros_of_both_signs_tie) {
  const Matrix logits(DType::f32, 2, 3, 3);
  logits.set(0, 0, -0.), logits.set(0, 1, 0.), logits.set(1, 0, 0.), logits.set(1, 1, -0.);
  const Exact<int64_t> ids(std::vector<int64_t>{0, 1}), keep(2);
  const Out out(2, 3);
  CHECK(decide(logits.view(), nullptr, {Rule::confidence, 0.f, 1, ids.data()}, out.view(), keep.data(), 1) == 0);
  CHECK(out.prediction[0] == 0 && out.prediction[1] == 0);
}

// exp for all gaps from 0 to beyond the last that contributes.
TEST(exp_at_any_gap) {
  const int64_t rows = effort() < 1 ? 2000 : 20000;
  const Matrix logits(DType::f32, rows, 2, 2);
  for (int64_t b = 0; b < rows; ++b) logits.set(b, 1, -110. * static_cast<double>(b) / static_cast<double>(rows));
  const Exact<int64_t> ids(rows), keep(rows);
  for (int64_t b = 0; b < rows; ++b) ids[b] = b;
  const Out out(rows, 2);
  CHECK(decide(logits.view(), nullptr, {Rule::confidence, 0.f, 1, ids.data()}, out.view(), keep.data(), 1) == 0);
  for (int64_t b = 0; b < rows; ++b) check_answer(out, b, {0., -logits.at(b, 1)}, 0);
}

int main() { return run_tests(); }
