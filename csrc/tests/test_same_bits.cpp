// The same bits for any number of threads, any batch, any position in it, and for concurrent callers.
#include <thread>

#include "data.h"

using namespace e2cm;
using namespace e2cm::test;

namespace {

struct Result {
  Exact<float> distances;
  Out every, out;
  Exact<int64_t> keep;
  int64_t kept = 0;

  Result(const Problem& problem, int64_t first, int64_t count, int threads, const void* packed = nullptr)
      : distances(count * problem.means.rows()),
        every(count, problem.means.rows()),
        out(count, problem.means.rows()),
        keep(count, kUnset) {
    const Rows x = problem.x.view(first, count);
    HeadParams head = problem.head();
    head.packed = packed;
    const Exact<int64_t> ids(count);
    for (int64_t i = 0; i < count; ++i) ids[i] = count - 1 - i;
    class_distances(x, head, distances.data(), threads);
    scores(x, head, every.view(), threads);
    kept = step(x, head, {Rule::confidence, 0.4f, 3, ids.data()}, out.view(), keep.data(), threads);
  }
};

// The rows of `part` are those of `whole` from `first` on.
bool agree(const Result& whole, int64_t first, const Result& part) {
  const int64_t count = part.every.rows, classes = part.every.classes, last = whole.every.rows - 1;
  if (!same_bits(whole.distances.data() + first * classes, part.distances.data(), count * classes)) return false;
  for (int64_t i = 0; i < count; ++i) {
    if (!same_row(whole.every, first + i, part.every, i)) return false;
    if (!same_row(whole.out, last - first - i, part.out, count - 1 - i)) return false;
  }
  return true;
}

bool equal(const Result& a, const Result& b) {
  if (a.kept != b.kept) return false;
  for (int64_t i = 0; i < a.kept; ++i)
    if (a.keep[i] != b.keep[i]) return false;
  return agree(a, 0, b);
}

// Rows so near a mean that they need the exact distance, rows with NaN, and ordinary ones.
void spoil(Random& random, const Problem& problem) {
  for (int64_t b = 0; b < problem.x.rows(); ++b) {
    if (random.chance(0.2)) problem.x.copy_row(random.below(problem.means.rows()), problem.means, b);
    if (random.chance(0.05)) problem.x.set(b, random.below(problem.x.dim()), random.pick({kNan, kInf}));
  }
}

}  // namespace

TEST(any_number_of_threads) {
  Random random(1);
  const Shape shapes[] = {{130, 10, 8191}, {130, 97, 1030}, {130, 1000, 64},
                          {1, 97, 20000},  {65, 7, 8191},   {3, 49, 8191}};
  for (const Shape& shape : shapes) {
    if (shape.batch * shape.classes * shape.dim > at_most(4e7)) continue;
    Problem problem(shape.batch, shape.classes, shape.dim, random.pick(kDTypes), random.pick(kDTypes),
                    random.chance(0.5), random.below(5));
    problem.fill(random, 3);
    spoil(random, problem);
    state().context = problem.text();
    const Result one(problem, 0, shape.batch, 1);
    for (const int threads : {2, 3, 4, 5, 6, 7, 8, 64}) CHECK(equal(one, Result(problem, 0, shape.batch, threads)));
  }
}

TEST(alone_or_in_a_batch) {
  Random random(2);
  for (int i = 0; i < times(60); ++i) {
    const int64_t dim = random.pick(kDims), classes = random.pick(kClasses);
    const int64_t batch = 2 + random.below(dim * classes > at_most(1e5) ? 7 : 140);
    if (dim * classes * batch > at_most(1e7)) continue;
    Problem problem(batch, classes, dim, random.pick(kDTypes), random.pick(kDTypes), random.chance(0.5),
                    random.below(5));
    problem.fill(random, random.chance(0.5) ? 0 : 100);
    spoil(random, problem);
    state().context = problem.text();
    const Result whole(problem, 0, batch, 2);
    for (int64_t b = 0; b < batch; ++b) CHECK(agree(whole, b, Result(problem, b, 1, 1)));
    for (int j = 0; j < 6; ++j) {
      const int64_t first = random.below(batch), count = 1 + random.below(batch - first);
      CHECK(agree(whole, first, Result(problem, first, count, static_cast<int>(1 + random.below(4)))));
    }
  }
}

TEST(packed_once_or_per_call) {
  Random random(5);
  CHECK(packed_bytes(24, 5000) == 0);
  for (int i = 0; i < times(40); ++i) {
    const int64_t dim = random.pick(kDims), classes = 25 + random.below(random.chance(0.5) ? 100 : 1000);
    const int64_t batch = 1 + random.below(dim * classes > at_most(1e5) ? 7 : 140);
    if (dim * classes * batch > at_most(1e7)) continue;
    Problem problem(batch, classes, dim, random.pick(kDTypes), random.pick(kDTypes), random.chance(0.5), 0,
                    random.below(5));
    problem.fill(random, random.chance(0.5) ? 0 : 100);
    spoil(random, problem);
    state().context = problem.text();
    const int threads = static_cast<int>(1 + random.below(4));
    const int64_t doubles = packed_bytes(classes, dim) / int64_t{sizeof(double)};
    const Exact<double> means(doubles), weights(doubles);
    pack(problem.means.view(), problem.head().center, means.data(), threads);
    CHECK(equal(Result(problem, 0, batch, 2), Result(problem, 0, batch, threads, means.data())));

    pack(problem.means.view(), nullptr, weights.data(), 3);
    const Out without(batch, classes), with(batch, classes);
    HeadParams linear{HeadKind::logits, problem.means.view(), problem.scale.data()};
    scores(problem.x.view(), linear, without.view(), 2);
    linear.packed = weights.data();
    scores(problem.x.view(), linear, with.view(), threads);
    for (int64_t b = 0; b < batch; ++b) CHECK(same_row(without, b, with, b));
  }
}

TEST(decide_at_any_number_of_threads_and_alone) {
  Random random(3);
  for (const DType dtype : kDTypes) {
    const int64_t batch = 300, classes = 1000;
    const Matrix logits(dtype, batch, classes, classes + 3);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t k = 0; k < classes; ++k) logits.set(b, k, static_cast<double>(1 + b % 5) * random.normal());
    const Exact<int64_t> ids(batch), keep(batch);
    for (int64_t b = 0; b < batch; ++b) ids[b] = b;
    const auto run = [&](int64_t first, int64_t count, const Out& out, Rule rule, int threads) {
      return decide(logits.view(first, count), nullptr, {rule, rule == Rule::confidence ? 0.2f : 3.f, 1, ids.data()},
                    out.view(), keep.data(), threads);
    };
    for (const Rule rule : {Rule::confidence, Rule::entropy}) {
      const Out one(batch, classes);
      const int64_t kept = run(0, batch, one, rule, 1);
      CHECK(kept > 0 && kept < batch);
      for (const int threads : {2, 3, 5, 8}) {
        const Out many(batch, classes);
        CHECK(run(0, batch, many, rule, threads) == kept);
        for (int64_t b = 0; b < batch; ++b) CHECK(same_row(one, b, many, b));
      }
      for (int64_t b = 0; b < batch; b += 7) {
        const Out alone(1, classes);
        run(b, 1, alone, rule, 1);
        CHECK(same_row(one, b, alone, 0));
      }
    }
  }
}

TEST(concurrent_callers) {
  Random random(4);
  const int64_t batch = 65, classes = 10, dim = effort() < 1 ? 1030 : 8191;
  Problem problem(batch, classes, dim);
  problem.fill(random, 1);
  spoil(random, problem);
  const Result alone(problem, 0, batch, 1);
  bool same[8] = {};
  std::vector<std::thread> callers;
  for (int i = 0; i < 8; ++i)
    callers.emplace_back([&, i] {
      same[i] = true;
      for (int j = 0; j < 3; ++j) same[i] = same[i] && equal(alone, Result(problem, 0, batch, 1 + i % 3));
    });
  for (std::thread& caller : callers) caller.join();
  for (const bool each : same) CHECK(each);
}

int main() { return run_tests(); }
