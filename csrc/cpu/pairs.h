// Mean products of pairs of channels over the whole map: see Statistics::pairs.
#pragma once

#include <algorithm>

#include "../api.h"
#include "buffer.h"
#include "kernels.h"

namespace e2cm {

class Pairs {
 public:
  // pixels: of a piece, at most; whole: add_whole will be used, and not add.
  Pairs(const Maps& maps, int64_t offsets, int64_t pixels, bool whole);

  bool wanted() const { return offsets_ > 0; }
  bool whole() const { return whole_; }

  // What one thread works with, on cache line boundaries.
  int64_t sum_count() const { return offsets_ * lanes_; }
  int64_t copy_count() const { return std::max(whole_ || !wanted() ? 0 : pixels_ * stride_, sum_count()); }
  struct Scratch {
    double* sums;  // [offsets, lanes]
    float* copy;   // [pixels, stride], and later the results
  };

  // Of a sample: begin, its pieces in order, and write: out[o * channels + c].
  void begin(const Scratch& scratch) const;
  void add(int64_t b, int64_t pixel, int64_t count, const Scratch& scratch) const;
  void write(float* out, const Scratch& scratch) const;

  // The same for pixels that lie at x with all their channels, a multiple of kLanes, side by side.
  void add_whole(const void* x, const void* ahead, DType dtype, int64_t stride, int64_t count,
                 const Scratch& scratch) const;

 private:
  void load(int64_t b, int64_t pixel, int64_t count, float* to) const;

  const Kernels& isa_;
  const Maps maps_;
  const int64_t offsets_;
  const int64_t lanes_;  // channels, rounded up to whole lanes
  const bool whole_;
  const int64_t again_;   // of the first channels of a pixel, behind its last in a copy
  const int64_t stride_;  // of a pixel in a copy: its channels, the first of them again, and what fills up lanes
  const int64_t pixels_;  // of a copy
  Buffer<double> shares_;
};

}  // namespace e2cm
