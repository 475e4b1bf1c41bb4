// The whole API that every backend implements: plain structs of pointers and sizes, no torch, no Python.
//
// A sample is one row of features. What an exit does with a batch of them:
//
//   distance     d[b][k] = || x[b] - means[k] ||
//   probability  p[b]    = softmax over k of ( -d[b][k] / scale[k] )
//   rule         leave if max p > threshold            (Rule::confidence)
//                or if -sum p log p < threshold        (Rule::entropy)
//   compaction   the rows that stay, moved together in their old order
//
// A linear head has logits weight . x + bias in the place of -d / scale. Either head may read statistics of feature
// maps, see Statistics, in the place of the features themselves.
//
// A class whose scale is not a positive finite number has no mean: its probability is 0. A row with a NaN among its
// distances, or with no finite distance at all, gets NaN for a confidence and never leaves. Ties go to the lowest
// class.
#pragma once

#include <cstdint>
#include <variant>

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

enum class HeadKind : int { distances = 0, logits = 1 };

// The parameters of a head, in the memory order of the features that it reads. The score of row b for class k is
//
//   distances: || x[b] - vectors[k] || / per_class[k]     class means and their scales
//   logits:    vectors[k] . x[b] + per_class[k]           weights and biases; -inf: the class is never predicted
struct HeadParams {
  HeadKind kind;
  Rows vectors;                   // [classes, dim]
  const float* per_class;         // [classes]
  const float* center = nullptr;  // [dim] or null, for distances: any vector near the data. It changes no result, only
                                  // what rounding does to it
  const void* packed = nullptr;   // what `pack` has made of the vectors and the center, or null
};

// Feature maps: every sample is dense, [channels, height, width] or, with channels_last, [height, width, channels];
// `stride` is the distance between two samples, in elements.
struct Maps {
  const void* data;
  DType dtype;
  int64_t rows;
  int64_t channels, height, width;
  int64_t stride;
  bool channels_last;
};

// Cells that a map is cut into: cell i of n numbers on an axis of g cells goes from i n / g to (i + 1) n / g, rounded
// down. At most as many cells as numbers, or 0 x 0: none.
struct Grid {
  int64_t rows, columns;
  int64_t cells() const { return rows * columns; }
};

// Per channel: the mean, the root mean square and the maximum of each cell of a grid of its own; and, for `pairs`
// offsets o = 0, 1, ..., the mean product of channels c and c + o over the whole map, the first channels following the
// last: its root, with its sign. A sample's statistics are [channels, cells of mean], then [channels, cells of rms],
// then [channels, cells of max], then [pairs, channels], float32. A cell with a NaN or an infinity in it has NaN for a
// maximum: it would hide -inf. Squares above 3e38 are infinite.
struct Statistics {
  Grid mean, rms, max;
  int64_t pairs;  // at most half the channels, rounded up: more would be the same ones again
  int64_t cells() const { return mean.cells() + rms.cells() + max.cells(); }
  int64_t size(int64_t channels) const { return channels * (cells() + pairs); }
};

// Statistics of maps, for a head to read.
struct Pooled {
  Maps maps;
  Statistics wanted;
};

// What a head reads: rows of features as they are, or statistics of feature maps.
using HeadInput = std::variant<Rows, Pooled>;
inline int64_t rows_of(const HeadInput& input) {
  const Pooled* const pooled = std::get_if<Pooled>(&input);
  return pooled ? pooled->maps.rows : std::get<Rows>(input).rows;
}

// Where answers go. log_probs may be null. Row i belongs to sample i.
struct Answers {
  int64_t rows;
  int64_t classes;
  float* confidence;    // [rows]
  int64_t* prediction;  // [rows]
  int64_t* exit;        // [rows] or null: the number of the exit that answered
  float* log_probs;     // [rows, classes] or null
};

// When a row leaves, and under which number: row b of the batch is sample ids[b], its answer goes to row ids[b] of the
// Answers. The ids must be distinct: threads write without synchronization.
struct Departure {
  Rule rule;
  float threshold;
  int64_t exit_number;
  const int64_t* ids;  // [batch]
};

// All functions: `threads` is an upper bound; the results are the same bits for any of them, and for any batch a row
// sits in. They throw std::bad_alloc when memory runs out and std::out_of_range for an id outside the Answers, before
// anything is written.

// distances: [x.rows, classes], dense. head.kind is HeadKind::distances; head.per_class is not read.
void class_distances(const Rows& x, const HeadParams& head, float* distances, int threads);

// Answers for every row, in order.
void scores(const HeadInput& x, const HeadParams& head, const Answers& out, int threads);

// Answers for the rows that leave; the numbers of the rows that stay go to `keep` ([rows]), their count is returned.
int64_t step(const HeadInput& x, const HeadParams& head, const Departure& departure, const Answers& out, int64_t* keep,
             int threads);

// out: [maps.rows, wanted.size(maps.channels)], dense.
void statistics(const Maps& maps, const Statistics& wanted, float* out, int threads);

// step for scores that some other head has made: logits if `scale` is null, else distances to be divided by it.
int64_t decide(const Rows& scores, const float* scale, const Departure& departure, const Answers& out, int64_t* keep,
               int threads);

// Means or weights of many classes in the form that rows are multiplied with here, made once for many calls: no result
// changes. packed_bytes: the room that it takes; 0 for so few classes that there is nothing to be made.
int64_t packed_bytes(int64_t classes, int64_t dim);
void pack(const Rows& vectors, const float* center, void* packed, int threads);

// A number made of some of the bytes, spread over all of them: if it differs, so do they.
uint64_t sampled_hash(const void* data, int64_t bytes);

// The numbers of the true bytes of mask[rows]; returns their count.
int64_t kept_rows(const uint8_t* mask, int64_t rows, int64_t* keep);

// target[i] = source[index[i]] for rows of row_bytes bytes that start source_stride bytes apart; target is dense.
void gather_rows(const void* source, int64_t row_bytes, int64_t source_stride, const int64_t* index, int64_t count,
                 void* target, int threads);

// The instruction set in use, and all that this machine and this build have, best first, separated by commas.
const char* isa_in_use();
const char* isa_available();

}  // namespace e2cm
