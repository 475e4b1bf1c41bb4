// The vocabulary that every backend implements: plain structs of pointers and sizes, no torch, no Python.
//
// A sample is one row of features. What an exit does with a batch of them:
//
//   distance     d[b][k] = || x[b] - means[k] ||
//   probability  p[b]    = softmax over k of ( -d[b][k] / scale[k] )
//   rule         leave if max p > threshold            (Rule::confidence)
//                or if -sum p log p < threshold        (Rule::entropy)
//   compaction   the rows that stay, moved together in their old order
//
// A class whose scale is not a positive finite number has no mean: its probability is 0. A row with a NaN among its
// distances, or with no finite distance at all, gets NaN for a confidence and never leaves. Ties go to the lowest
// class.
#pragma once

#include <cstdint>

namespace e2cm {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };
inline int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }  // in bytes

enum class Rule : int { confidence = 0, entropy = 1 };

// A matrix whose rows are dense; `stride` is the distance between two rows, in elements.
struct Rows {
  const void* data;
  DType dtype;
  int64_t rows;
  int64_t dim;
  int64_t stride;
};

// means: [classes, dim] in the memory order of the features. center: [dim] or null, any vector near the data; it
// changes no result, only what rounding does to it (null: the average of the means is taken). scale: [classes].
struct ClassMeans {
  Rows means;
  const float* center;
  const float* scale;
};

// Where answers go. log_probs may be null. Row i belongs to sample i.
struct Answers {
  int64_t rows;
  int64_t classes;
  float* confidence;    // [rows]
  int64_t* prediction;  // [rows]
  int64_t* exit;        // [rows] or null: the number of the exit that answered
  float* log_probs;     // [rows, classes] or null
};

// When to leave and as whom: row b of the batch is sample ids[b], its answer goes to row ids[b] of the Answers. The ids
// must be distinct: threads write without asking each other.
struct Departure {
  Rule rule;
  float threshold;
  int64_t exit_number;
  const int64_t* ids;  // [batch]
};

// All functions: `threads` is an upper bound; the results are the same bits for any of them, and for any batch a row
// sits in. They throw std::bad_alloc when memory runs out and std::out_of_range for an id outside the Answers, before
// anything is written.

// distances: [x.rows, means.rows], dense.
void class_distances(const Rows& x, const ClassMeans& head, float* distances, int threads);

// Answers for every row, in order.
void class_scores(const Rows& x, const ClassMeans& head, const Answers& out, int threads);

// Answers for the rows that leave; the numbers of the rows that stay go to `keep` ([x.rows]), their count is returned.
int64_t exit_step(const Rows& x, const ClassMeans& head, const Departure& departure, const Answers& out, int64_t* keep,
                  int threads);

// The same for scores that some other head has made: logits if `scale` is null, else distances to be divided by it.
int64_t decide(const Rows& scores, const float* scale, const Departure& departure, const Answers& out, int64_t* keep,
               int threads);

// The numbers of the true bytes of mask[rows]; returns their count.
int64_t kept_rows(const uint8_t* mask, int64_t rows, int64_t* keep);

// target[i] = source[index[i]] for rows of row_bytes bytes that start source_stride bytes apart; target is dense.
void gather_rows(const void* source, int64_t row_bytes, int64_t source_stride, const int64_t* index, int64_t count,
                 void* target, int threads);

// The instruction set in use, and all that this machine and this build have, best first, separated by commas.
const char* isa_in_use();
const char* isa_available();

}  // namespace e2cm
