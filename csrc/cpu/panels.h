// How D is split, and the layout of packed class vectors: the panels of gemm.inl, made once for many calls. A call
// without them makes the same panels block by block.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace e2cm {

constexpr int64_t kMaxDirectClasses = 24;  // up to here direct sums are faster than products, and nothing is packed

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline const char* element(const Rows& rows, int64_t row, int64_t column) {
  return static_cast<const char*>(rows.data) + (row * rows.stride + column) * size_of(rows.dtype);
}

// D in blocks, and the blocks in splits that threads may share. The number of splits depends on D alone.
struct Splits {
  int64_t dim, blocks, count;

  explicit Splits(int64_t d)
      : dim(d), blocks(ceil_div(d, kBlock)), count(std::max<int64_t>(1, std::min(kMaxSplits, ceil_div(d, kMinDim)))) {}
  int64_t first_block(int64_t split) const { return blocks * split / count; }
  int64_t block_size(int64_t block) const { return std::min(kBlock, dim - block * kBlock); }  // in features

 private:
  static constexpr int64_t kMaxSplits = 16;
  static constexpr int64_t kMinDim = 4096;  // fewer features do not repay a thread
};

// [splits, ld] double norms, followed by the panels of all classes for every block. Without memory: false.
struct Panels {
  const Splits splits;
  const int64_t ld;

  Panels(int64_t classes, int64_t dim, void* memory) : splits(dim), ld(round_up(classes, kLanes)), memory_(memory) {}

  explicit operator bool() const { return memory_; }
  double* norms() const { return static_cast<double*>(memory_); }
  int64_t norms_size() const { return splits.count * ld; }
  int64_t values_size() const { return splits.dim * ld; }
  // The panel that starts at class k, a multiple of the panel width.
  float* at(int64_t block, int64_t k) const {
    float* const values = reinterpret_cast<float*>(norms() + norms_size());
    return values + block * kBlock * ld + k * splits.block_size(block);
  }

 private:
  void* const memory_;
};

}  // namespace e2cm
