// `pack`: class vectors of many classes transposed into panels, once for many calls. The result has the same bits as
// that of calls which pack their own panels.
//
// Reads   K * D class vectors and the center.
// Writes  D * K float32, K rounded up to kLanes, and K double norms per split of D.
#include "panels.h"

#include <cstring>

#include "parallel.h"

namespace e2cm {

int64_t packed_bytes(int64_t classes, int64_t dim) {
  if (classes <= kMaxDirectClasses) return 0;
  const Panels panels(classes, dim, nullptr);
  return panels.norms_size() * int64_t{sizeof(double)} + panels.values_size() * int64_t{sizeof(float)};
}

void pack(const Rows& vectors, const float* center, void* packed, int threads) {
  const Panels panels(vectors.rows, vectors.dim, packed);
  const Splits& splits = panels.splits;
  const int64_t width = kernels().panel;
  std::fill_n(panels.norms(), panels.norms_size(), 0.0);
  parallel_for(ceil_div(vectors.rows, width), useful_threads(threads, vectors.rows * vectors.dim),
               [&](int64_t panel, int) {
                 const int64_t k = panel * width, count = std::min(width, vectors.rows - k);
                 for (int64_t split = 0; split < splits.count; ++split) {
                   for (int64_t block = splits.first_block(split); block < splits.first_block(split + 1); ++block) {
                     const int64_t at = block * kBlock;
                     kernels().pack_means(element(vectors, k, at), vectors.dtype, vectors.stride,
                                          center ? center + at : nullptr, count, splits.block_size(block),
                                          panels.at(block, k), panels.norms() + split * panels.ld + k);
                   }
                 }
               });
}

uint64_t sampled_hash(const void* data, int64_t bytes) {
  constexpr int64_t samples = 64, word = sizeof(uint64_t);
  uint64_t hash = 0;
  for (int64_t i = 0; i < samples && bytes >= word; ++i) {
    uint64_t sample;
    std::memcpy(&sample, static_cast<const char*>(data) + (bytes - word) / (samples - 1) * i, sizeof sample);
    hash = (hash ^ sample) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 32;
  }
  return hash;
}

}  // namespace e2cm
