// How the work is cut: host arithmetic, without a GPU. D is cut by D alone, so that the bits of a sample do not depend
// on the batch it sits in; the batch is cut so that there are enough blocks.
#pragma once

#include <algorithm>
#include <cstdint>

namespace e2cm {
namespace cuda {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr int64_t kMaxDirectClasses = 32;  // up to here all classes of a row are summed up directly, see direct.cu

// D in parts of `each` numbers, the last one shorter.
struct Splits {
  int64_t each, count;
};

constexpr Splits splits_of(int64_t dim, int64_t step, int64_t most) {
  const int64_t each = std::max(step, round_up(ceil_div(dim, most), step));
  return {each, std::max<int64_t>(1, ceil_div(dim, each))};
}

constexpr int64_t kDirectStep = 1024, kDirectSplits = 128;
constexpr int64_t kDirectRows = 8;  // that a thread works on at the same time
constexpr int64_t kGemmStep = 512, kGemmSplits = 32;
constexpr int64_t kGemmTile = 64;  // rows and classes of a block of gemm.cu

constexpr Splits splits_of(int64_t dim, int64_t classes) {
  return classes <= kMaxDirectClasses ? splits_of(dim, kDirectStep, kDirectSplits)
                                      : splits_of(dim, kGemmStep, kGemmSplits);
}

// Rows of a block of direct.cu: as many as leave some blocks for each multiprocessor, since means are read once for all
// of them; a multiple of kDirectRows.
constexpr int64_t direct_block_rows(int64_t rows, int64_t splits, int64_t processors) {
  int64_t each = 4 * kDirectRows;
  while (each > kDirectRows && ceil_div(rows, each) * splits < 2 * processors) each /= 2;
  return each;
}

// Rows whose sums are held at a time: some tens of megabytes. A multiple of every tile.
constexpr int64_t rows_that_fit(int64_t dim, int64_t classes) {
  const int64_t sums = int64_t{1} << 23;
  return std::max(kGemmTile, sums / (splits_of(dim, classes).count * classes) / kGemmTile * kGemmTile);
}

// What a call needs in device memory beside its arguments, in bytes from the beginning, each on a multiple of 256.
struct Workspace {
  int64_t features = 0;               // statistics, [rows, dim] float32, if that is what a head reads
  int64_t sums = 0;                   // [splits, rows, classes] float32
  int64_t row_norms = 0;              // [splits, rows]
  int64_t class_norms = 0;            // [splits, classes]
  int64_t counters = 0, counted = 0;  // one for each tile of rows; so many
  int64_t rows = 0;                   // at a time
  int64_t bytes = 0;
};

// features: of a sample, if they are statistics, else 0.
inline Workspace workspace_for(int64_t rows, int64_t dim, int64_t classes, bool statistics) {
  Workspace w;
  const int64_t splits = splits_of(dim, classes).count;
  const bool few = classes <= kMaxDirectClasses;
  w.rows = std::max<int64_t>(1, std::min(rows, rows_that_fit(dim, classes)));
  w.counted = few ? ceil_div(w.rows, kDirectRows) : 0;
  const auto take = [&](int64_t bytes) {
    const int64_t at = w.bytes;
    w.bytes += round_up(bytes, 256);
    return at;
  };
  w.features = take(statistics ? w.rows * dim * 4 : 0);
  w.sums = take(splits * w.rows * classes * 4);
  w.row_norms = take(few ? 0 : splits * w.rows * 4);
  w.class_norms = take(few ? 0 : splits * classes * 4);
  w.counters = take(w.counted * 4);
  return w;
}

constexpr int64_t kScanRows = 8192;  // that one block of compact.cu reads

}  // namespace cuda
}  // namespace e2cm
