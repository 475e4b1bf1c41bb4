// How D is cut, and vectors of many classes packed ahead of all calls: the same panels that a call without them makes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace e2cm {

constexpr int64_t kFewMeans = 24;  // up to here the direct sum is the faster way, and nothing is packed

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline const char* element(const Rows& rows, int64_t row, int64_t column) {
  return static_cast<const char*>(rows.data) + (row * rows.stride + column) * size_of(rows.dtype);
}

// D in blocks, and the blocks in splits: parts that threads may share. Their number depends on D alone.
struct Cuts {
  int64_t dim, blocks, splits;

  explicit Cuts(int64_t d)
      : dim(d), blocks(ceil_div(d, kBlock)), splits(std::max<int64_t>(1, std::min(kMost, ceil_div(d, kLeast)))) {}
  int64_t first_block(int64_t split) const { return blocks * split / splits; }
  int64_t numbers_in(int64_t block) const { return std::min(kBlock, dim - block * kBlock); }

 private:
  static constexpr int64_t kMost = 16;
  static constexpr int64_t kLeast = 4096;  // less is not worth a thread of its own
};

// [splits, ld] norms (double), then for every block the panels of all classes, of as many numbers as it has; of
// nothing, if there is no memory.
struct Panels {
  const Cuts cuts;
  const int64_t ld;

  Panels(int64_t classes, int64_t dim, void* memory) : cuts(dim), ld(round_up(classes, kLanes)), memory_(memory) {}

  explicit operator bool() const { return memory_; }
  double* norms() const { return static_cast<double*>(memory_); }
  int64_t norms_size() const { return cuts.splits * ld; }
  int64_t numbers_size() const { return cuts.dim * ld; }
  // Of class k, a multiple of a panel's width, and of those that follow.
  float* at(int64_t block, int64_t k) const {
    float* const numbers = reinterpret_cast<float*>(norms() + norms_size());
    return numbers + block * kBlock * ld + k * cuts.numbers_in(block);
  }

 private:
  void* const memory_;
};

}  // namespace e2cm
