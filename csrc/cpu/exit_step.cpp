// Scores to answers: softmax, rule, who leaves, whose answer goes where. Works on kLanes rows at a time, one per lane.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "../api.h"
#include "buffer.h"
#include "distances.h"
#include "kernels.h"
#include "parallel.h"

namespace e2cm {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kInCache = int64_t{1} << 18;  // statistics that are made before a head looks at them

bool usable(float scale) { return scale > 0 && scale < kInfinity; }

// What softmax_lanes says of kLanes rows, and how to write it down.
struct LaneAnswers {
  float best[kLanes], sum[kLanes], weighted[kLanes];
  int64_t prediction[kLanes];

  LaneAnswers(const float* penalties, int64_t classes) {
    kernels().softmax_lanes(penalties, classes, best, prediction, sum, weighted);
  }

  bool leaves(int lane, Rule rule, float threshold) const {  // false for a NaN, whatever the threshold
    if (rule == Rule::confidence) return 1 / sum[lane] > threshold;
    return std::log(sum[lane]) - weighted[lane] / sum[lane] < threshold;
  }

  // rows[lane] is the row of `out` that this lane's answer goes to, or -1.
  void write(const float* penalties, const int64_t* rows, int64_t exit_number, const Answers& out) const {
    for (int j = 0; j < kLanes; ++j) {
      if (rows[j] < 0) continue;
      out.confidence[rows[j]] = 1 / sum[j];
      out.prediction[rows[j]] = prediction[j];
      if (out.exit) out.exit[rows[j]] = exit_number;
    }
    if (!out.log_probs) return;
    float log_sum[kLanes];
    for (int j = 0; j < kLanes; ++j) log_sum[j] = std::log(sum[j]);
    for (int64_t begin = 0; begin < out.classes; begin += kLanes) {
      const int64_t count = std::min(kLanes, out.classes - begin);
      float square[kLanes * kLanes], turned[kLanes * kLanes];
      for (int64_t k = 0; k < count; ++k)
        for (int j = 0; j < kLanes; ++j)
          square[k * kLanes + j] = (best[j] - penalties[(begin + k) * kLanes + j]) - log_sum[j];
      std::fill(square + count * kLanes, square + kLanes * kLanes, 0.f);
      kernels().transpose(square, DType::f32, kLanes, kLanes, kLanes, turned, kLanes);
      for (int j = 0; j < kLanes; ++j)
        if (rows[j] >= 0) std::copy_n(turned + j * kLanes, count, out.log_probs + rows[j] * out.classes + begin);
    }
  }
};

// Calls body(first row, number of rows, penalties) for every kLanes rows; fill(first row, penalties) makes them.
template <class Fill, class Body>
void for_lanes(int64_t rows, int64_t classes, int threads, const Fill& fill, const Body& body) {
  kernels();  // a wrong E2CM_ISA throws here and not on another thread
  const int useful = useful_threads(threads, rows * classes * 16);
  Buffer<float> penalties(useful * classes * kLanes);
  parallel_for((rows + kLanes - 1) / kLanes, useful, [&](int64_t piece, int thread) {
    float* const z = penalties.get() + thread * classes * kLanes;
    const int64_t first = piece * kLanes;
    fill(first, z);
    body(first, std::min(kLanes, rows - first), z);
  });
}

void check_ids(const int64_t* ids, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= rows)
      throw std::out_of_range("`ids` holds " + std::to_string(ids[i]) + " at place " + std::to_string(i) +
                              ", but `out` has rows 0 to " + std::to_string(rows - 1));
}

// The common end of exit_step and decide, for the rows from `begin` on.
template <class Fill>
void depart(int64_t rows, int64_t begin, const Departure& departure, const Answers& out, uint8_t* stays, int threads,
            const Fill& fill) {
  for_lanes(rows, out.classes, threads, fill, [&](int64_t first, int64_t count, const float* penalties) {
    const LaneAnswers answers(penalties, out.classes);
    int64_t target[kLanes];
    for (int j = 0; j < kLanes; ++j) {
      const bool leaves = j < count && answers.leaves(j, departure.rule, departure.threshold);
      target[j] = leaves ? departure.ids[begin + first + j] : -1;
      if (j < count) stays[begin + first + j] = !leaves;
    }
    answers.write(penalties, target, departure.exit_number, out);
  });
}

const Rows& vectors_of(const ClassMeans& head) { return head.means; }
const Rows& vectors_of(const Linear& head) { return head.weight; }

Distances compare(const Rows& x, const ClassMeans& head, int threads) { return {x, head, threads}; }
Logits compare(const Rows& x, const Linear& head, int threads) { return {x, head, threads}; }

// Distances over scales, with the classes that have no mean made impossible.
auto penalties_of(const Distances& distances, const ClassMeans& head) {
  return [&distances, scale = head.scale, classes = head.means.rows](int64_t first, float* out) {
    distances.lanes(first, out);
    for (int64_t k = 0; k < classes; ++k)
      if (!usable(scale[k])) std::fill_n(out + k * kLanes, kLanes, kInfinity);
  };
}

auto penalties_of(const Logits& logits, const Linear&) {
  return [&logits](int64_t first, float* out) { logits.lanes(first, out); };
}

// body(first row, rows): what a head looks at. Statistics are made for as many samples as stay in cache.
template <class Body>
void for_features(const Rows& x, int, const Body& body) {
  body(0, x);
}

template <class Body>
void for_features(const Pooled& x, int threads, const Body& body) {
  const int64_t size = x.wanted.size(x.maps.channels);
  const int64_t most = std::max(kLanes, kInCache / std::max<int64_t>(1, size) / kLanes * kLanes);
  Buffer<float> features(std::min(most, x.maps.rows) * size);
  for (int64_t first = 0; first < x.maps.rows; first += most) {
    Maps maps = x.maps;
    maps.data = static_cast<const char*>(x.maps.data) + first * x.maps.stride * size_of(x.maps.dtype);
    maps.rows = std::min(most, x.maps.rows - first);
    statistics(maps, x.wanted, features.get(), threads);
    body(first, Rows{features.get(), DType::f32, maps.rows, size, size});
  }
}

// body(first row, number of rows, sums). Sums need room for every pair, several times over for a large D: so many rows
// at a time that it stays small.
template <class Features, class Head, class Body>
void for_chunks(const Features& features, const Head& head, int threads, const Body& body) {
  for_features(features, threads, [&](int64_t begin, const Rows& x) {
    const int64_t most = PairSums::rows_that_fit(x.dim, vectors_of(head).rows);
    for (int64_t first = 0; first < x.rows; first += most) {
      const Rows chunk{static_cast<const char*>(x.data) + first * x.stride * size_of(x.dtype), x.dtype,
                       std::min(most, x.rows - first), x.dim, x.stride};
      body(begin + first, chunk.rows, compare(chunk, head, threads));
    }
  });
}

template <class Features, class Head>
void scores_of(const Features& x, const Head& head, const Answers& out, int threads) {
  for_chunks(x, head, threads, [&](int64_t begin, int64_t rows, const auto& sums) {
    for_lanes(rows, out.classes, threads, penalties_of(sums, head),
              [&](int64_t first, int64_t count, const float* penalties) {
                const LaneAnswers answers(penalties, out.classes);
                int64_t target[kLanes];
                for (int j = 0; j < kLanes; ++j) target[j] = j < count ? begin + first + j : -1;
                answers.write(penalties, target, 0, out);
              });
  });
}

template <class Features, class Head>
int64_t step(const Features& x, int64_t rows, const Head& head, const Departure& departure, const Answers& out,
             int64_t* keep, int threads) {
  check_ids(departure.ids, rows, out.rows);
  Buffer<uint8_t> stays(rows);
  for_chunks(x, head, threads, [&](int64_t begin, int64_t count, const auto& sums) {
    depart(count, begin, departure, out, stays.get(), threads, penalties_of(sums, head));
  });
  return kept_rows(stays.get(), rows, keep);
}

}  // namespace

void class_distances(const Rows& x, const ClassMeans& head, float* out, int threads) {
  const int64_t classes = head.means.rows;
  for_chunks(x, ClassMeans{head.means, head.center, nullptr, head.packed}, threads,
             [&](int64_t begin, int64_t rows, const Distances& distances) {
               const auto fill = [&](int64_t first, float* z) { distances.lanes(first, z); };
               for_lanes(rows, classes, threads, fill, [&](int64_t first, int64_t count, const float* z) {
                 for (int64_t j = 0; j < count; ++j)
                   for (int64_t k = 0; k < classes; ++k) out[(begin + first + j) * classes + k] = z[k * kLanes + j];
               });
             });
}

void class_scores(const Rows& x, const ClassMeans& head, const Answers& out, int threads) {
  scores_of(x, head, out, threads);
}

void class_scores(const Pooled& x, const ClassMeans& head, const Answers& out, int threads) {
  scores_of(x, head, out, threads);
}

void linear_scores(const Rows& x, const Linear& head, const Answers& out, int threads) {
  scores_of(x, head, out, threads);
}

void linear_scores(const Pooled& x, const Linear& head, const Answers& out, int threads) {
  scores_of(x, head, out, threads);
}

int64_t exit_step(const Rows& x, const ClassMeans& head, const Departure& departure, const Answers& out, int64_t* keep,
                  int threads) {
  return step(x, x.rows, head, departure, out, keep, threads);
}

int64_t exit_step(const Pooled& x, const ClassMeans& head, const Departure& departure, const Answers& out,
                  int64_t* keep, int threads) {
  return step(x, x.maps.rows, head, departure, out, keep, threads);
}

int64_t linear_step(const Rows& x, const Linear& head, const Departure& departure, const Answers& out, int64_t* keep,
                    int threads) {
  return step(x, x.rows, head, departure, out, keep, threads);
}

int64_t linear_step(const Pooled& x, const Linear& head, const Departure& departure, const Answers& out, int64_t* keep,
                    int threads) {
  return step(x, x.maps.rows, head, departure, out, keep, threads);
}

int64_t decide(const Rows& scores, const float* scale, const Departure& departure, const Answers& out, int64_t* keep,
               int threads) {
  check_ids(departure.ids, scores.rows, out.rows);
  const int64_t classes = scores.dim, size = size_of(scores.dtype);
  const auto fill = [&](int64_t first, float* z) {
    const int64_t count = std::min(kLanes, scores.rows - first);
    float row[kBlock];
    for (int64_t begin = 0; begin < classes; begin += kBlock) {
      const int64_t n = std::min(kBlock, classes - begin);
      for (int64_t j = 0; j < count; ++j) {
        kernels().load_block(static_cast<const char*>(scores.data) + ((first + j) * scores.stride + begin) * size,
                             scores.dtype, 0, nullptr, 1, n, row, nullptr);
        float* const column = z + begin * kLanes + j;
        for (int64_t k = 0; k < n; ++k) column[k * kLanes] = scale ? row[k] / scale[begin + k] : -row[k];
      }
    }
    for (int64_t k = 0; k < classes; ++k) {
      if (scale && !usable(scale[k])) std::fill_n(z + k * kLanes, kLanes, kInfinity);
      std::fill(z + k * kLanes + count, z + (k + 1) * kLanes, 0.f);  // lanes without a row: anything finite
    }
  };
  Buffer<uint8_t> stays(scores.rows);
  depart(scores.rows, 0, departure, out, stays.get(), threads, fill);
  return kept_rows(stays.get(), scores.rows, keep);
}

}  // namespace e2cm
