// Mean products of pairs of channels over the whole map. See Statistics::pairs.
#pragma once

#include <algorithm>

#include "../api.h"
#include "buffer.h"
#include "kernels.h"

namespace e2cm {

class ChannelPairs {
 public:
  // pixels: the most of a chunk. in_place: the caller will use add_in_place instead of add.
  ChannelPairs(const Maps& maps, int64_t offsets, int64_t pixels, bool in_place);

  bool wanted() const { return offsets_ > 0; }
  bool in_place() const { return in_place_; }

  // Memory of one thread, aligned to cache lines.
  int64_t sum_count() const { return offsets_ * lanes_; }
  int64_t copy_count() const { return std::max(in_place_ || !wanted() ? 0 : pixels_ * stride_, sum_count()); }
  struct Scratch {
    double* sums;  // [offsets, lanes]
    float* copy;   // [pixels, stride], in the end the results
  };

  // For each sample: begin, add its chunks in order, write out[o * channels + c].
  void begin(const Scratch& scratch) const;
  void add(int64_t sample, int64_t pixel, int64_t count, const Scratch& scratch) const;
  void write(float* out, const Scratch& scratch) const;

  // As add, for pixels at x with all channels (a multiple of kLanes) contiguous.
  void add_in_place(const void* x, const void* next, DType dtype, int64_t stride, int64_t count,
                    const Scratch& scratch) const;

 private:
  void load(int64_t sample, int64_t pixel, int64_t count, float* to) const;

  const Kernels& isa_;
  const Maps maps_;
  const int64_t offsets_;
  const int64_t lanes_;  // channels, rounded up to whole lanes
  const bool in_place_;
  const int64_t padding_;  // first channels repeated after the last one, in a copy
  const int64_t stride_;   // of a pixel in a copy: channels, padding, rounded up to whole lanes
  const int64_t pixels_;   // of a copy
  Buffer<double> weights_;
};

}  // namespace e2cm
