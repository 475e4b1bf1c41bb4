#include "panels.h"

#include "parallel.h"

namespace e2cm {

int64_t packed_bytes(int64_t classes, int64_t dim) {
  if (classes <= kFewMeans) return 0;
  const Panels panels(classes, dim, nullptr);
  return panels.cuts.splits * panels.ld * int64_t{sizeof(double)} +
         panels.cuts.blocks * panels.across * kernels().panel_floats * int64_t{sizeof(float)};
}

void pack(const Rows& vectors, const float* center, void* packed, int threads) {
  const Panels panels(vectors.rows, vectors.dim, packed);
  const Cuts& cuts = panels.cuts;
  const int64_t width = kernels().panel;
  std::fill_n(panels.norms(), cuts.splits * panels.ld, 0.0);
  parallel_for(panels.across, useful_threads(threads, vectors.rows * vectors.dim), [&](int64_t panel, int) {
    const int64_t k = panel * width, count = std::min(width, vectors.rows - k);
    for (int64_t split = 0; split < cuts.splits; ++split) {
      for (int64_t block = cuts.first_block(split); block < cuts.first_block(split + 1); ++block) {
        const int64_t at = block * kBlock;
        kernels().pack_means(element(vectors, k, at), vectors.dtype, vectors.stride, center ? center + at : nullptr,
                             count, std::min(kBlock, vectors.dim - at), panels.at(block, k),
                             panels.norms() + split * panels.ld + k);
      }
    }
  });
}

}  // namespace e2cm
