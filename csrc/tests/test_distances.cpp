// class_distances against the equation in double.
#include <algorithm>

#include "data.h"

using namespace e2cm;
using namespace e2cm::test;

namespace {

constexpr double kAllowed = 1e-5;  // the relative error that the documentation guarantees
double worst = 0;                  // of this test

struct Report {  // prints the largest error at the end of a test
  const char* name;
  explicit Report(const char* test) : name(test) { worst = 0; }
  ~Report() { std::printf("%s: %s: largest relative error %.2e\n", isa_in_use(), name, worst); }
};

// Distances of all rows; checks about `samples` of them.
void check_distances(const Problem& problem, Random& random, int threads, int64_t samples, double least = 0) {
  const int64_t batch = problem.x.rows(), classes = problem.means.rows();
  const Exact<float> out(batch * classes, kUnsetFloat);
  class_distances(problem.x.view(), problem.head(), out.data(), threads);
  const int64_t all = batch * classes, step = std::max<int64_t>(1, all / std::max<int64_t>(1, samples));
  for (int64_t i = all > 0 ? random.below(step) : 0; i < all; i += step) {
    const double wanted = problem.distance(i / classes, i % classes);
    CHECK_CLOSE(out[i], wanted, kAllowed * wanted + least);
    if (std::isfinite(wanted) && wanted > least) worst = std::max(worst, std::fabs(out[i] - wanted) / wanted);
  }
}

void check_shapes(int how_often, int64_t most, double offset) {
  const Report report(offset == 0 ? "shapes near the origin" : "shapes with an offset");
  Random random(1 + static_cast<uint64_t>(offset));
  for (const Shape& shape : shapes(random, times(how_often), most)) {
    Problem problem(shape.batch, shape.classes, shape.dim, random.pick(kDTypes), random.pick(kDTypes),
                    random.chance(0.6), random.chance(0.5) ? random.below(40) : 0,
                    random.chance(0.3) ? random.below(40) : 0);
    problem.fill(random, offset, random.chance(0.7) ? 1 : random.chance(0.5) ? 1e-3 : 30);
    state().context = problem.text();
    check_distances(problem, random, static_cast<int>(1 + random.below(4)), 400000 / shape.dim);
  }
}

}  // namespace

TEST(reference_conversions) {  // of the tests themselves
  for (const Format* format : {&kBf16, &kF16})
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
      const double value = format->decode(static_cast<uint16_t>(bits));
      if (std::isnan(value))
        CHECK(std::isnan(format->decode(format->encode(value))));
      else
        CHECK(format->encode(value) == bits);
      if (format == &kBf16 && !std::isnan(value)) {
        const uint32_t wide = bits << 16;
        float same;
        std::memcpy(&same, &wide, sizeof same);
        CHECK(static_cast<double>(same) == value);
      }
      const uint32_t magnitude = bits & 0x7fffu;
      if (magnitude + 1 < format->infinity()) {  // halfway to the next: to the even one
        const double next = format->decode(static_cast<uint16_t>(bits + 1)), half = (value + next) / 2;
        CHECK(format->encode(half) == (bits & 1 ? bits + 1 : bits));
        CHECK(format->encode(std::nextafter(half, value)) == bits);
        CHECK(format->encode(std::nextafter(half, next)) == bits + 1);
      }
    }
  CHECK(kF16.decode(0x0001) == 0x1p-24 && kF16.decode(0x3c00) == 1 && kF16.decode(0x7bff) == 65504);
  CHECK(kF16.encode(65519.9) == 0x7bff && kF16.encode(65520) == 0x7c00 && kF16.encode(-1e300) == 0xfc00);
}

TEST(shapes_near_the_origin) { check_shapes(4, at_most(3e7), 0); }
TEST(shapes_with_an_offset_of_100) { check_shapes(4, at_most(3e7), 100); }

// Every 16-bit value, in every lane of a vector and in a tail: its distances to 0 and to 1.
TEST(every_16_bit_value) {
  Random random(3);
  const int64_t step = effort() < 1 ? 7 : 1, batch = (0x10000 + step - 1) / step;
  for (const DType dtype : {DType::bf16, DType::f16})
    for (const int64_t dim : {1, 5, 16, 21})
      for (int64_t place = dim > 16 ? 16 : 0; place < dim; place += dim > 16 || effort() < 1 ? 3 : 1) {
        Problem problem(batch, 2, dim, dtype, DType::f32, false, 3);
        problem.means.set(1, place, 1);
        for (int64_t b = 0; b < batch; ++b) problem.x.set_bits(b, place, static_cast<uint16_t>(b * step));
        state().context = problem.text();
        const Exact<float> out(batch * 2, kUnsetFloat);
        class_distances(problem.x.view(), problem.head(), out.data(), 1);
        for (int64_t b = 0; b < batch; ++b) {
          const double value = format_of(dtype).decode(static_cast<uint16_t>(b * step));
          if (std::fabs(value) > 1e18 || (value != 0 && std::fabs(value) < 1e-17)) {
            if (!std::isfinite(value)) CHECK(!std::isfinite(out[2 * b]) && !std::isfinite(out[2 * b + 1]));
            continue;  // the squares leave the range of float
          }
          CHECK_CLOSE(out[2 * b], std::fabs(value), 4 * kUlp * std::fabs(value));
          CHECK_CLOSE(out[2 * b + 1], std::fabs(value - 1), 8 * kUlp * (1 + std::fabs(value)));
        }
      }
}

// Rows at any distance from their mean, down to where |x|^2 - 2 x.m + |m|^2 cancels completely.
TEST(cancellation) {
  const Report report("cancellation");
  Random random(4);
  const double offsets[] = {0, 1, 100, -3000};
  for (int i = 0; i < times(150); ++i) {
    const int64_t dim = random.pick(kDims), classes = 1 + random.below(8), batch = 1 + random.below(20);
    Problem problem(batch, classes, dim, DType::f32, DType::f32, random.chance(0.3));
    const double offset = random.pick(offsets);
    problem.fill(random, offset);
    for (int64_t b = 0; b < batch; ++b) {
      const double spread = std::pow(10, -6 * random.uniform());
      for (int64_t d = 0; d < dim; ++d)
        problem.x.set(b, d, problem.means.at(b % classes, d) * (1 + spread * random.normal()));
    }
    state().context = problem.text() + ", offset " + std::to_string(offset);
    check_distances(problem, random, 1, 400000 / dim);
  }
}

constexpr int64_t kDirectAndProducts[] = {7, 40};  // class counts: direct sums, and products

// Equal features always round in the same direction: rounding errors accumulate as far as they can.

TEST(accumulated_rounding) {
  const Report report("drift");
  Random random(5);
  for (int i = 0; i < times(300); ++i) {
    const int64_t dim = random.pick(kDims), batch = 1 + random.below(5);
    const int64_t classes = random.pick(kDirectAndProducts);
    Problem problem(batch, classes, dim, DType::f32, DType::f32, false);
    const double level = 1 + 200 * random.uniform();
    for (int64_t k = 0; k < classes; ++k)
      for (int64_t d = 0; d < dim; ++d) problem.means.set(k, d, k ? -level * 0.9 : level);
    for (int64_t b = 0; b < batch; ++b) {
      const double away = 1 + (random.chance(0.5) ? -1 : 1) * std::pow(10, -2 * random.uniform());
      for (int64_t d = 0; d < dim; ++d) problem.x.set(b, d, level * away);
    }
    state().context = problem.text() + ", level " + std::to_string(level);
    check_distances(problem, random, 1, 10);
  }
}

TEST(a_row_that_is_a_mean) {
  Random random(6);
  for (const DType dtype : kDTypes)
    for (const int64_t dim : kDims)
      for (const int64_t classes : kDirectAndProducts) {
        Problem problem(5, classes, dim, dtype, dtype, random.chance(0.5));
        problem.fill(random, 100);
        for (int64_t b = 0; b < 5; ++b) problem.x.copy_row(b + 1, problem.means, b);
        state().context = problem.text();
        const Exact<float> out(5 * classes, kUnsetFloat);
        class_distances(problem.x.view(), problem.head(), out.data(), 1);
        for (int64_t b = 0; b < 5; ++b) CHECK(out[b * classes + b + 1] == 0);
      }
}

TEST(magnitudes) {
  const Report report("magnitudes");
  Random random(7);
  for (const double unit : {1e-15, 1e-12, 1e-6, 1e6, 1e12, 1e15})
    for (const int64_t dim : {1, 17, 513, 8191}) {
      Problem problem(5, random.pick(kDirectAndProducts), dim, random.chance(0.5) ? DType::f32 : DType::bf16,
                      DType::f32, random.chance(0.5));
      problem.fill(random, random.chance(0.5) ? 0 : 10, unit);
      state().context = problem.text() + ", unit " + std::to_string(unit);
      check_distances(problem, random, 1, 35);
    }
}

// NaN or infinity in a row: none of its distances is finite, the distances of other rows do not change.
TEST(non_finite_rows) {
  Random random(8);
  for (const DType dtype : kDTypes)
    for (const int64_t dim : {1, 16, 17, 513, 8191})
      for (const double bad : {kNan, kInf, -kInf})
        for (const bool centered : {false, true}) {
          const int64_t batch = 19, classes = random.pick(kDirectAndProducts);
          Problem problem(batch, classes, dim, dtype, DType::f32, centered);
          problem.fill(random, 1);
          state().context = problem.text() + ", with " + std::to_string(bad);
          const Exact<float> before(batch * classes), after(batch * classes);
          class_distances(problem.x.view(), problem.head(), before.data(), 2);
          for (const int64_t row : {0, 6, 18}) problem.x.set(row, random.below(dim), bad);
          class_distances(problem.x.view(), problem.head(), after.data(), 2);
          for (int64_t i = 0; i < batch * classes; ++i) {
            const int64_t row = i / classes;
            if (row == 0 || row == 6 || row == 18)
              CHECK(!std::isfinite(after[i]));
            else
              CHECK(same_bits(before[i], after[i]));
          }
        }
}

int main() { return run_tests(); }
