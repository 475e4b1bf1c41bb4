// What one instruction set offers to the rest of the core. Each unit (scalar, avx2, avx512, neon) compiles kernels.inl
// with its own vector type and fills one table; only plain pointers and numbers cross between translation units.
#pragma once

#include <cstdint>

#include "../api.h"

namespace e2cm {

// Features are worked on in blocks of this many numbers: sums inside a block are float32, sums of blocks are double.
constexpr int64_t kBlock = 512;
// With few means, some rows at a time are worked on for this many blocks: the memory that they come from likes long
// stretches. The means of so many blocks should stay in the second level of cache.
constexpr int64_t kRun = 4;
// Rows of scratch start this many floats apart. Not kBlock: a load whose address agrees with that of a recent store in
// its last 12 bits waits for it, and rows 2 KiB apart would agree all the time.
constexpr int64_t kStride = kBlock + 16;
// Rows of answers are worked on side by side, one row per lane.
constexpr int64_t kLanes = 16;
// Blocks in scratch (kBlock floats a row) are filled up with zeros to a multiple of this: no tail in any inner loop.
constexpr int64_t kPad = 16;
// A product of a row and a mean is summed up in chains of this many additions, one after the other.
constexpr int64_t kChain = 64;
// Numbers of a map that are worked on at a time: sums over their pixels are float32, sums of these sums double.
constexpr int64_t kPiece = 4096;
// Pairs of channels are found by shifting both of them, one by less than this, the other by multiples of it.
constexpr int kPairShifts = 4;
// Sums of squares outside of this range may have met squares that float32 cannot hold.
constexpr double kTiny = 1e-25, kHuge = 1e38;

// Rows of memory of which a block each will be needed soon: they are asked for, a few at a time, during other work.
struct Ahead {
  static constexpr int64_t few = kBlock / kChain;
  const char* at;
  int64_t rows, stride, block;  // stride and block in bytes

  Ahead take_few() {
    const Ahead taken = *this;
    at += few * stride;
    rows -= few;
    return taken;
  }
};

// Means to compare rows with: number i of block b of mean k is data[k * stride + b * block + i]; zeros stand behind the
// last one up to a multiple of kPad. ahead: those that will be needed next, null if they need not be asked for, mean k
// of them at ahead + k * ahead_stride (bytes) in numbers of ahead_size bytes.
struct FewMeans {
  const float* data;
  int64_t count, stride, block;
  const char* ahead;
  int64_t ahead_stride, ahead_size;
};

// Some channels (kLanes, twice or four times as many) of a row of cells: those of pixel (r, i) are side by side at
// x + r * row_stride + i * pixel_stride. Cell j goes from column cuts[j] to cuts[j + 1].
struct Strip {
  const void* x;
  DType dtype;
  int64_t channels;
  int64_t pixel_stride, row_stride;
  int64_t rows, cells;
  const int64_t* cuts;
};

// Where a cell's sums are gathered, a number per channel; null: nobody wants to know.
struct CellSums {
  double *sum, *squares;
  float* most;
};

struct Kernels {
  const char* name;
  int64_t panel;  // means that are packed side by side, at most

  // rows[r * kStride + i] = source[r * stride + i] - center[i] for i < n <= kBlock, zeros behind it up to a multiple of
  // kPad; center may be null (nothing is subtracted). norms[r] += |row|^2, if norms is not null.
  void (*load_block)(const void* source, DType dtype, int64_t stride, const float* center, int64_t row_count, int64_t n,
                     float* rows, double* norms);

  // squares[k * ld + r] += |x_r - mean_k|^2 over n numbers, kRun blocks at most, x as it arrives.
  void (*add_squares)(const void* x, DType dtype, int64_t stride, int64_t row_count, int64_t n, const FewMeans& means,
                      double* squares, int64_t ld);

  // sums[k * ld + r] += x_r . mean_k: the same, of products.
  void (*add_dots)(const void* x, DType dtype, int64_t stride, int64_t row_count, int64_t n, const FewMeans& means,
                   double* sums, int64_t ld);

  // At most `panel` means, less the center, turned so that number i of all of them stands side by side, in vectors
  // filled up with zeros. norms[k] += |mean|^2, if norms is not null.
  void (*pack_means)(const void* source, DType dtype, int64_t stride, const float* center, int64_t mean_count,
                     int64_t n, float* panel, double* norms);

  // products[r * ld + k] += row_r . mean_k, of rows that load_block has left in scratch and means that pack_means has
  // packed. Writes whole vectors: ld is a multiple of kLanes. What is ahead is asked for meanwhile: means, then rows.
  void (*add_products)(const float* rows, int64_t row_count, const float* panel, int64_t mean_count, int64_t n,
                       double* products, int64_t ld, Ahead& means_ahead, Ahead& rows_ahead);

  // || x - mean ||^2 the long way, which no cancellation can hurt.
  double (*squared_distance)(const void* x, DType x_dtype, const void* mean, DType mean_dtype, int64_t n);

  // With sum[lane] = sum over splits of sums[split * split_stride + lane], the square of a distance is sum[lane], or,
  // if there are lane norms, lane_norms[lane] + norm - 2 * sum[lane]. out[lane] = sqrt(square) / scale[lane]. Returns
  // the lanes, a bit each, that are not to be believed: the subtraction has cancelled too much, or float32 was too
  // narrow for the squares.
  uint32_t (*distance_lanes)(const double* sums, int64_t splits, int64_t split_stride, const double* lane_norms,
                             double norm, const float* scale, float* out);

  // Penalties z[k * kLanes + lane] (smaller is likelier; +inf: impossible; NaN: spoils the row) become, per lane, the
  // best penalty and its class (the lowest of equals), sum e and sum e * (best - z) with e = exp(best - z); a lane that
  // is spoiled or has no finite best gets NaN, and class 0.
  void (*softmax_lanes)(const float* z, int64_t classes, float* best, int64_t* prediction, float* sum, float* weighted);

  // Adds the pixels of each cell to sums[cell]: their sum, the sum of their squares and their maximum, NaN if there is
  // a NaN or an infinity among them. No strip has more than kPiece numbers.
  void (*add_cells)(const Strip& strip, const CellSums* sums);

  // to[i * to_stride + c] = source[i * stride + c] for the `channels` of some pixels, and once more, behind them, for
  // the first `again` ones, over and over if there are less. Writes whole vectors. `to` may be `source`.
  void (*repeat)(const void* source, DType dtype, int64_t stride, int64_t pixels, int64_t channels, int64_t again,
                 float* to, int64_t to_stride);

  // sums[o * channels + c] += x[c + s] * x[c + s + o], with s = kPairShifts - 1 - o % kPairShifts, over the pixels of a
  // piece, `stride` numbers apart; channels a multiple of kLanes. What follows the last of them is x[behind],
  // x[behind + 1], ...: `behind` 0 makes a ring of them. Meanwhile asks for as many numbers at `ahead`: those that will
  // be needed next, or x once more.
  void (*add_pairs)(const void* x, const void* ahead, DType dtype, int64_t stride, int64_t pixels, int64_t channels,
                    int64_t behind, int64_t offsets, double* sums);

  // out[i * channels + j] = sums[i * channels + j] * shares[i], or its root, with its sign; channels as in a strip.
  void (*average)(const double* sums, const double* shares, int64_t cells, int64_t channels, bool root, float* out);

  // target[j * target_stride + i] = source[i * stride + j] for i < rows, j < columns.
  void (*turn)(const void* source, DType dtype, int64_t stride, int64_t rows, int64_t columns, float* target,
               int64_t target_stride);
};

const Kernels& kernels();  // the table in use, chosen once

const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();

}  // namespace e2cm
