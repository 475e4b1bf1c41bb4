// Inputs and expected results: memory of exact size, 16-bit floats, random features, and the equations in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <new>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "check.h"

#if defined(__SANITIZE_ADDRESS__) || defined(_WIN32)
#define E2CM_TEST_HEAP
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define E2CM_TEST_HEAP
#endif
#endif
#ifndef E2CM_TEST_HEAP
#include <sys/mman.h>
#endif

namespace e2cm::test {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr float kInff = std::numeric_limits<float>::infinity();
constexpr float kNanf = std::numeric_limits<float>::quiet_NaN();
constexpr double kUlp = 1.0 / (1 << 24);  // half the distance from 1 to the next float

// ---- memory ---------------------------------------------------------------------------------------------------------

// Memory for exactly `count` values, aligned for a single value only. An access beyond the end ends the process: with
// AddressSanitizer it is outside of the heap block, otherwise in a protected page.
template <class T>
class Exact {
  static_assert(std::is_trivially_copyable<T>::value, "plain numbers");

 public:
  explicit Exact(int64_t count, T value = T{}) : count_(count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
#ifdef E2CM_TEST_HEAP
    memory_ = new char[sizeof(T) + bytes];
    data_ = reinterpret_cast<T*>(memory_ + sizeof(T));
#else
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), whole = (bytes + page - 1) / page * page;
    length_ = whole + page;
    void* const at = mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(at);
    mprotect(memory_ + whole, page, PROT_NONE);
    data_ = reinterpret_cast<T*>(memory_ + whole - bytes);
#endif
    for (int64_t i = 0; i < count; ++i) data_[i] = value;
  }
  Exact(const std::vector<T>& values) : Exact(static_cast<int64_t>(values.size())) {
    for (int64_t i = 0; i < count_; ++i) data_[i] = values[static_cast<size_t>(i)];
  }
  ~Exact() {
#ifdef E2CM_TEST_HEAP
    delete[] memory_;
#else
    munmap(memory_, length_);
#endif
  }
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;
  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return count_; }
  std::vector<T> values() const { return std::vector<T>(data_, data_ + count_); }

 private:
  int64_t count_;
  size_t length_ = 0;
  char* memory_;
  T* data_;
};

// ---- numbers --------------------------------------------------------------------------------------------------------

// A 16-bit float format with that many explicit mantissa bits, from its definition.
struct Format {
  int mantissa, least;  // least: the exponent of the smallest normal number
  uint32_t infinity() const { return 0x7fffu >> mantissa << mantissa; }

  uint16_t encode(double value) const {  // to nearest, ties to even
    const uint32_t sign = std::signbit(value) ? 0x8000u : 0u;
    if (std::isnan(value)) return static_cast<uint16_t>(sign | infinity() | 1u << (mantissa - 1));
    if (std::isinf(value)) return static_cast<uint16_t>(sign | infinity());
    const double magnitude = std::fabs(value);
    const int exponent = magnitude > 0 && std::ilogb(magnitude) > least ? std::ilogb(magnitude) : least;
    const uint32_t steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, mantissa - exponent)));
    const uint64_t bits = (static_cast<uint64_t>(exponent - least) << mantissa) + steps;
    return static_cast<uint16_t>(sign | (bits < infinity() ? static_cast<uint32_t>(bits) : infinity()));
  }

  double decode(uint16_t bits) const {
    const uint32_t rest = bits & 0x7fffu, fraction = rest & ((1u << mantissa) - 1);
    const int exponent = static_cast<int>(rest >> mantissa);
    double magnitude;
    if (rest >= infinity())
      magnitude = fraction ? kNan : kInf;
    else if (exponent == 0)
      magnitude = std::ldexp(fraction, least - mantissa);
    else
      magnitude = std::ldexp(fraction + (1u << mantissa), least - mantissa + exponent - 1);
    return bits & 0x8000u ? -magnitude : magnitude;
  }
};

constexpr Format kBf16{7, -126}, kF16{10, -14};
inline const Format& format_of(DType dtype) { return dtype == DType::bf16 ? kBf16 : kF16; }
inline const char* name_of(DType dtype) { return dtype == DType::f32 ? "f32" : dtype == DType::bf16 ? "bf16" : "f16"; }
constexpr DType kDTypes[] = {DType::f32, DType::bf16, DType::f16};

class Random {  // the same values on every platform, which the distributions of <random> do not guarantee
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }
  bool chance(double p) { return uniform() < p; }
  double uniform() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }
  double normal() {  // approximately
    double sum = -2;
    for (int i = 0; i < 4; ++i) sum += uniform();
    return sum * 1.7320508;
  }
  template <class T, size_t N>
  T pick(const T (&list)[N]) {
    return list[below(static_cast<int64_t>(N))];
  }

 private:
  std::mt19937_64 engine_;
};

// ---- features -------------------------------------------------------------------------------------------------------

// Rows of features in their storage type. The gaps between rows are NaN; nothing follows the last row.
class Matrix {
 public:
  Matrix(DType dtype, int64_t rows, int64_t dim, int64_t stride)
      : dtype_(dtype),
        rows_(rows),
        dim_(dim),
        stride_(stride),
        f32_(dtype == DType::f32 ? extent() : 0, kNanf),
        half_(dtype == DType::f32 ? 0 : extent(), format_of(dtype).encode(kNan)) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < dim; ++c) set(r, c, 0);
  }
  DType dtype() const { return dtype_; }
  int64_t rows() const { return rows_; }
  int64_t dim() const { return dim_; }

  void set(int64_t row, int64_t column, double value) const {
    const int64_t i = row * stride_ + column;
    if (dtype_ == DType::f32)
      f32_[i] = static_cast<float>(value);
    else
      half_[i] = format_of(dtype_).encode(value);
  }
  void set_bits(int64_t row, int64_t column, uint16_t bits) const { half_[row * stride_ + column] = bits; }
  double at(int64_t row, int64_t column) const {
    const int64_t i = row * stride_ + column;
    return dtype_ == DType::f32 ? static_cast<double>(f32_[i]) : format_of(dtype_).decode(half_[i]);
  }
  void copy_row(int64_t from, const Matrix& source, int64_t to) const {
    for (int64_t c = 0; c < dim_; ++c) set(to, c, source.at(from, c));
  }
  Rows view() const { return view(0, rows_); }
  Rows view(int64_t first, int64_t count) const {
    if (dtype_ == DType::f32) return {f32_.data() + first * stride_, dtype_, count, dim_, stride_};
    return {half_.data() + first * stride_, dtype_, count, dim_, stride_};
  }

 private:
  int64_t extent() const { return rows_ > 0 ? (rows_ - 1) * stride_ + dim_ : 0; }
  DType dtype_;
  int64_t rows_, dim_, stride_;
  Exact<float> f32_;
  Exact<uint16_t> half_;
};

// A batch and a head: what class_distances, scores and step take.
struct Problem {
  Matrix x, means;
  Exact<float> center, scale;
  bool centered;

  Problem(int64_t batch, int64_t classes, int64_t dim, DType x_type = DType::f32, DType mean_type = DType::f32,
          bool with_center = true, int64_t x_gap = 0, int64_t mean_gap = 0)
      : x(x_type, batch, dim, dim + x_gap),
        means(mean_type, classes, dim, dim + mean_gap),
        center(with_center ? dim : 0),
        scale(classes, 1.f),
        centered(with_center) {}

  // Means near `offset`, each row near one of the means, the center near both.
  void fill(Random& random, double offset, double unit = 1) {
    for (int64_t k = 0; k < means.rows(); ++k)
      for (int64_t i = 0; i < means.dim(); ++i) means.set(k, i, unit * (offset + random.normal()));
    for (int64_t b = 0; b < x.rows(); ++b) {
      const int64_t k = random.below(means.rows());
      const double spread = random.uniform();
      for (int64_t i = 0; i < x.dim(); ++i) x.set(b, i, means.at(k, i) + unit * spread * random.normal());
    }
    for (int64_t i = 0; i < center.size(); ++i) center[i] = static_cast<float>(unit * (offset + 0.2 * random.normal()));
    const double distance = unit * std::sqrt(static_cast<double>(x.dim()));
    for (int64_t k = 0; k < scale.size(); ++k) scale[k] = static_cast<float>(distance * (0.1 + 0.2 * random.uniform()));
  }

  HeadParams head() const {
    return {HeadKind::distances, means.view(), scale.data(), centered ? center.data() : nullptr};
  }

  double distance(int64_t row, int64_t mean) const {
    double sum = 0;
    for (int64_t i = 0; i < x.dim(); ++i) {
      const double difference = x.at(row, i) - means.at(mean, i);
      sum += difference * difference;
    }
    return std::sqrt(sum);
  }

  std::string text() const {
    char line[200];
    std::snprintf(line, sizeof line, "B=%lld K=%lld D=%lld x %s means %s%s strides %lld %lld",
                  static_cast<long long>(x.rows()), static_cast<long long>(means.rows()),
                  static_cast<long long>(x.dim()), name_of(x.dtype()), name_of(means.dtype()),
                  centered ? " centered" : "", static_cast<long long>(x.view().stride),
                  static_cast<long long>(means.view().stride));
    return line;
  }
};

// ---- answers --------------------------------------------------------------------------------------------------------

constexpr float kUnsetFloat = -7.f;  // the initial contents of answers
constexpr int64_t kUnset = -7;

struct Out {
  int64_t rows, classes;
  Exact<float> confidence;
  Exact<int64_t> prediction, exit;
  Exact<float> log_probs;

  Out(int64_t row_count, int64_t class_count)
      : rows(row_count),
        classes(class_count),
        confidence(row_count, kUnsetFloat),
        prediction(row_count, kUnset),
        exit(row_count, kUnset),
        log_probs(row_count * class_count, kUnsetFloat) {}

  Answers view(bool with_exit = true, bool with_log_probs = true) const {
    return {rows,
            classes,
            confidence.data(),
            prediction.data(),
            with_exit ? exit.data() : nullptr,
            with_log_probs ? log_probs.data() : nullptr};
  }
  std::vector<double> log_probs_of(int64_t row) const {
    return std::vector<double>(log_probs.data() + row * classes, log_probs.data() + (row + 1) * classes);
  }
  bool untouched(int64_t row) const {
    bool same = confidence[row] == kUnsetFloat && prediction[row] == kUnset && exit[row] == kUnset;
    for (int64_t k = 0; k < classes; ++k) same = same && log_probs[row * classes + k] == kUnsetFloat;
    return same;
  }
  bool untouched() const {
    for (int64_t row = 0; row < rows; ++row)
      if (!untouched(row)) return false;
    return true;
  }
};

// The same bits. All NaNs are equal.
inline bool same_bits(float a, float b) { return (a != a && b != b) || std::memcmp(&a, &b, sizeof a) == 0; }
inline bool same_bits(const float* a, const float* b, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!same_bits(a[i], b[i])) return false;
  return true;
}
inline bool same_row(const Out& a, int64_t i, const Out& b, int64_t j) {
  return same_bits(a.confidence[i], b.confidence[j]) && a.prediction[i] == b.prediction[j] &&
         same_bits(a.log_probs.data() + i * a.classes, b.log_probs.data() + j * b.classes, a.classes);
}

// ---- the equations --------------------------------------------------------------------------------------------------

// p = softmax(-z): its maximum and its entropy.
struct Truth {
  bool valid = true;  // no NaN, and a finite minimum
  int64_t prediction = 0;
  double best = kInf, log_confidence = kNan, entropy = kNan;
  std::vector<double> log_probs;

  explicit Truth(const std::vector<double>& z) : log_probs(z.size(), kNan) {
    for (size_t k = 0; k < z.size(); ++k) {
      if (std::isnan(z[k])) valid = false;
      if (z[k] < best) best = z[k], prediction = static_cast<int64_t>(k);
    }
    if (!std::isfinite(best)) valid = false;
    if (!valid) return;
    double sum = 0;
    for (const double penalty : z) sum += std::exp(best - penalty);
    log_confidence = -std::log(sum);
    entropy = 0;
    for (size_t k = 0; k < z.size(); ++k) {
      log_probs[k] = best - z[k] - std::log(sum);
      const double p = std::exp(log_probs[k]);
      if (p > 0) entropy -= p * log_probs[k];
    }
  }
};

// Bounds of float32 rounding errors. slack: the error of each penalty before the softmax.
inline double slack_of_sum(size_t classes) { return 1e-6 + 2 * kUlp * static_cast<double>(classes); }
inline double slack_of_entropy(size_t classes, double slack) {
  const double size = 1 + std::log(static_cast<double>(classes));
  return (4 * slack + 2 * slack_of_sum(classes)) * size * 2;
}

inline void check_answer(const Out& out, int64_t row, const std::vector<double>& z, double slack) {
  const Truth truth(z);
  if (!truth.valid) {
    CHECK(std::isnan(out.confidence[row]));
    CHECK(out.prediction[row] == 0);
    return;
  }
  const double allowed = 2 * slack + slack_of_sum(z.size());
  CHECK(out.confidence[row] >= 0 && out.confidence[row] <= 1);
  CHECK_CLOSE(std::log(static_cast<double>(out.confidence[row])), truth.log_confidence, allowed);
  const int64_t prediction = out.prediction[row];
  CHECK(prediction >= 0 && prediction < out.classes);
  if (prediction < 0 || prediction >= out.classes) return;
  CHECK(z[static_cast<size_t>(prediction)] <= truth.best + 2 * slack);
  if (slack == 0) CHECK(prediction == truth.prediction);
  const std::vector<double> log_probs = out.log_probs_of(row);
  for (size_t k = 0; k < z.size(); ++k)
    CHECK_CLOSE(log_probs[k], truth.log_probs[k], allowed + 4 * kUlp * std::fabs(truth.log_probs[k]));
}

// ---- shapes ---------------------------------------------------------------------------------------------------------

constexpr int64_t kBatches[] = {0, 1, 2, 3, 5, 16, 17, 64, 65, 130};
constexpr int64_t kClasses[] = {1, 2, 5, 7, 10, 13, 24, 25, 32, 33, 49, 97, 1000};
constexpr int64_t kDims[] = {1, 2, 15, 16, 17, 511, 512, 513, 1030, 8191, 20000};

struct Shape {
  int64_t batch, classes, dim;
};

// Each batch size, class count and dim of the lists `times` times, combined with others so that batch * classes * dim
// stays below `most`.
inline std::vector<Shape> shapes(Random& random, int times, int64_t most) {
  std::vector<Shape> all;
  const auto add = [&](int64_t batch, int64_t classes, int64_t dim) {
    for (int attempt = 0; attempt < 1000; ++attempt) {
      const Shape shape{batch < 0 ? random.pick(kBatches) : batch, classes < 0 ? random.pick(kClasses) : classes,
                        dim < 0 ? random.pick(kDims) : dim};
      if ((shape.batch * shape.classes + shape.batch + shape.classes) * shape.dim > most) continue;
      all.push_back(shape);
      return;
    }
  };
  for (int i = 0; i < times; ++i) {
    for (const int64_t batch : kBatches) add(batch, -1, -1);
    for (const int64_t classes : kClasses) add(-1, classes, -1);
    for (const int64_t dim : kDims) add(-1, -1, dim);
  }
  return all;
}

inline int times(double full) { return static_cast<int>(std::ceil(full * effort())); }
inline int64_t at_most(double full) { return static_cast<int64_t>(full * effort()); }

}  // namespace e2cm::test
