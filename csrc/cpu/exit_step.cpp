// From scores to answers: softmax, rule, which rows leave, and where their answers go. Works on kLanes rows at a time,
// one per lane.
//
// For K classes: reads 4 K bytes of penalties a row, twice if log-probabilities are written, from cache; writes 20
// bytes a row that leaves, and 4 K bytes of log-probabilities; about 16 operations a class.
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
constexpr int64_t kInCache = int64_t{1} << 18;  // statistics that are made before a head reads them

bool usable(float scale) { return scale > 0 && scale < kInfinity; }

// The softmax of kLanes rows, and how their answers are written.
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

// The common end of step and decide, for the rows from `begin` on.
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

// body(penalties) with penalties(first row, out) for kLanes rows of x: minus the logits, or distances over scales (if
// there are scales) with +inf for the classes that have no mean.
template <class Body>
void with_penalties(const Rows& x, const HeadParams& head, int threads, const Body& body) {
  if (head.kind == HeadKind::logits) {
    const Logits logits(x, head, threads);
    body([&](int64_t first, float* out) { logits.lanes(first, out); });
    return;
  }
  const Distances distances(x, head, threads);
  body([&](int64_t first, float* out) {
    distances.lanes(first, out);
    for (int64_t k = 0; head.per_class && k < head.vectors.rows; ++k)
      if (!usable(head.per_class[k])) std::fill_n(out + k * kLanes, kLanes, kInfinity);
  });
}

// body(first row, rows): what a head reads. Statistics are made for as many samples as stay in cache.
template <class Body>
void for_features(const HeadInput& input, int threads, const Body& body) {
  const Pooled* const pooled = std::get_if<Pooled>(&input);
  if (!pooled) {
    body(0, std::get<Rows>(input));
    return;
  }
  const Maps& all = pooled->maps;
  const int64_t size = pooled->wanted.size(all.channels);
  const int64_t most = std::max(kLanes, kInCache / std::max<int64_t>(1, size) / kLanes * kLanes);
  Buffer<float> features(std::min(most, all.rows) * size);
  for (int64_t first = 0; first < all.rows; first += most) {
    Maps maps = all;
    maps.data = static_cast<const char*>(all.data) + first * all.stride * size_of(all.dtype);
    maps.rows = std::min(most, all.rows - first);
    statistics(maps, pooled->wanted, features.get(), threads);
    body(first, Rows{features.get(), DType::f32, maps.rows, size, size});
  }
}

// body(first row, number of rows, penalties). Sums need room for every pair, several times over for a large D: so many
// rows at a time that it stays small.
template <class Body>
void for_chunks(const HeadInput& input, const HeadParams& head, int threads, const Body& body) {
  for_features(input, threads, [&](int64_t begin, const Rows& x) {
    const int64_t most = PairSums::rows_that_fit(x.dim, head.vectors.rows);
    for (int64_t first = 0; first < x.rows; first += most) {
      const Rows chunk{static_cast<const char*>(x.data) + first * x.stride * size_of(x.dtype), x.dtype,
                       std::min(most, x.rows - first), x.dim, x.stride};
      with_penalties(chunk, head, threads, [&](const auto& penalties) { body(begin + first, chunk.rows, penalties); });
    }
  });
}

}  // namespace

void class_distances(const Rows& x, const HeadParams& head, float* out, int threads) {
  const int64_t classes = head.vectors.rows;
  HeadParams unscaled = head;
  unscaled.per_class = nullptr;
  for_chunks(x, unscaled, threads, [&](int64_t begin, int64_t rows, const auto& distances) {
    for_lanes(rows, classes, threads, distances, [&](int64_t first, int64_t count, const float* z) {
      for (int64_t j = 0; j < count; ++j)
        for (int64_t k = 0; k < classes; ++k) out[(begin + first + j) * classes + k] = z[k * kLanes + j];
    });
  });
}

void scores(const HeadInput& x, const HeadParams& head, const Answers& out, int threads) {
  for_chunks(x, head, threads, [&](int64_t begin, int64_t rows, const auto& penalties_of) {
    for_lanes(rows, out.classes, threads, penalties_of, [&](int64_t first, int64_t count, const float* penalties) {
      const LaneAnswers answers(penalties, out.classes);
      int64_t target[kLanes];
      for (int j = 0; j < kLanes; ++j) target[j] = j < count ? begin + first + j : -1;
      answers.write(penalties, target, 0, out);
    });
  });
}

int64_t step(const HeadInput& x, const HeadParams& head, const Departure& departure, const Answers& out, int64_t* keep,
             int threads) {
  const int64_t rows = rows_of(x);
  check_ids(departure.ids, rows, out.rows);
  Buffer<uint8_t> stays(rows);
  for_chunks(x, head, threads, [&](int64_t begin, int64_t count, const auto& penalties_of) {
    depart(count, begin, departure, out, stays.get(), threads, penalties_of);
  });
  return kept_rows(stays.get(), rows, keep);
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
