// The kernels of one instruction set, as a table of function pointers. Each unit (scalar, avx2, avx512, neon) compiles
// kernels.inl with its own vector type and fills one table. Only plain pointers and integers cross translation units.
#pragma once

#include <cstdint>

#include "../api.h"

namespace e2cm {

// D is processed in blocks of this many features: float32 sums within a block, double sums of blocks.
constexpr int64_t kBlock = 512;
// The direct kernels read this many blocks of a few rows in sequence, since DRAM favours long contiguous reads. The
// class vectors of that many blocks should fit into the second level of cache.
constexpr int64_t kDirectBlocks = 4;
// Floats between two rows of scratch. Not kBlock: a load whose address agrees with that of a recent store in the low 12
// bits waits for the store (4K aliasing), and rows 2 KiB apart would always agree.
constexpr int64_t kScratchStride = kBlock + 16;
// Scores of this many rows are processed together, one row per lane.
constexpr int64_t kLanes = 16;
// Blocks in scratch (kBlock floats per row) are zero-padded to a multiple of this, so that inner loops have no tail.
constexpr int64_t kPad = 16;
// The product of a row and a class vector is accumulated in chains of this many additions; the chains are then summed.
constexpr int64_t kChain = 64;
// Feature maps are processed in chunks of this many elements: float32 sums over the pixels of a chunk, double above.
constexpr int64_t kChunk = 4096;
// Pairs of channels are formed by shifting both operands: one by less than this, the other by multiples of it.
constexpr int kPairShifts = 4;
// Outside of this range a sum of squares may contain squares that float32 cannot represent.
constexpr double kMinSquare = 1e-25, kMaxSquare = 1e38;

// Rows of memory of which one block each will be read next. The kernels prefetch some of them per tile.
struct PrefetchQueue {
  const char* address;
  int64_t rows, row_stride, block_bytes;  // row_stride in bytes
};

// Class vectors for the direct kernels: element i of block b of vector k is data[k * stride + b * block_stride + i],
// zero-padded to a multiple of kPad. next: the elements needed after these, or null if they need no prefetch; vector k
// starts at next + k * next_stride (bytes) and has elements of next_size bytes.
struct DirectMeans {
  const float* data;
  int64_t count, stride, block_stride;
  const char* next;
  int64_t next_stride, next_size;
};

// A row of cells of a feature map, for a group of channels (1, 2 or 4 times kLanes). The channels of pixel (r, i) are
// contiguous at x + r * row_stride + i * pixel_stride. Cell j has the columns edges[j] to edges[j + 1].
struct Strip {
  const void* x;
  DType dtype;
  int64_t channels;
  int64_t pixel_stride, row_stride;
  int64_t rows, cells;
  const int64_t* edges;
};

// Accumulators of a cell, one element per channel. Null: not needed.
struct CellSums {
  double *sum, *squares;
  float* max;
};

struct Kernels {
  const char* name;
  int64_t panel;  // the most class vectors that one panel holds

  // rows[r * kScratchStride + i] = source[r * stride + i] - center[i] for i < n <= kBlock, zero-padded to a multiple of
  // kPad. center may be null: nothing is subtracted. norms[r] += |row|^2, unless norms is null.
  void (*load_block)(const void* source, DType dtype, int64_t stride, const float* center, int64_t row_count, int64_t n,
                     float* rows, double* norms);

  // squares[k * ld + r] += |x_r - mean_k|^2 over n features, at most kDirectBlocks blocks. x in its storage type.
  void (*add_squares)(const void* x, DType dtype, int64_t stride, int64_t row_count, int64_t n,
                      const DirectMeans& means, double* squares, int64_t ld);

  // sums[k * ld + r] += x_r . mean_k. Otherwise as add_squares.
  void (*add_dots)(const void* x, DType dtype, int64_t stride, int64_t row_count, int64_t n, const DirectMeans& means,
                   double* sums, int64_t ld);

  // Packs at most `panel` class vectors, less the center, transposed: element i of all of them is contiguous,
  // zero-padded to whole vector registers. norms[k] += |mean_k|^2, unless norms is null.
  void (*pack_means)(const void* source, DType dtype, int64_t stride, const float* center, int64_t mean_count,
                     int64_t n, float* panel, double* norms);

  // products[r * ld + k] += row_r . mean_k for rows from load_block and means from pack_means. Writes whole vector
  // registers: ld is a multiple of kLanes. Prefetches from the queues, next_means first.
  void (*add_products)(const float* rows, int64_t row_count, const float* panel, int64_t mean_count, int64_t n,
                       double* products, int64_t ld, PrefetchQueue& next_means, PrefetchQueue& next_rows);

  // || x - mean ||^2 as the sum of squared differences: no cancellation.
  double (*squared_distance)(const void* x, DType x_dtype, const void* mean, DType mean_dtype, int64_t n);

  // out[lane] = sqrt(square) / scale[lane], where sum[lane] is the sum over splits of sums[split * split_stride + lane]
  // and square is sum[lane] or, with lane_norms, lane_norms[lane] + norm - 2 * sum[lane]. Returns a bit mask of the
  // lanes whose result is inaccurate: the subtraction cancelled too much, or the squares left the range of float32.
  uint32_t (*distance_lanes)(const double* sums, int64_t splits, int64_t split_stride, const double* lane_norms,
                             double norm, const float* scale, float* out);

  // Softmax over penalties z[k * kLanes + lane] (smaller is likelier; +inf: impossible; NaN: the row has no answer).
  // Per lane: the least penalty `best`, its class (the lowest of equals), and the sums of e and of e * (best - z) with
  // e = exp(best - z). A lane with a NaN, or without a finite best, gets NaN and class 0.
  void (*softmax_lanes)(const float* z, int64_t classes, float* best, int64_t* prediction, float* sum, float* weighted);

  // Adds the pixels of each cell of a strip to sums[cell]: sum, sum of squares and maximum (NaN if the cell has a NaN
  // or an infinity). A strip has at most kChunk elements.
  void (*add_cells)(const Strip& strip, const CellSums* sums);

  // to[i * to_stride + c] = source[i * stride + c] for each pixel i, followed by `padding` channels that start again
  // from the first one (as often as needed). Writes whole vector registers. `to` may be `source`.
  void (*pad_circular)(const void* source, DType dtype, int64_t stride, int64_t pixels, int64_t channels,
                       int64_t padding, float* to, int64_t to_stride);

  // sums[o * channels + c] += x[c + s] * x[c + s + o] with s = kPairShifts - 1 - o % kPairShifts, summed over the
  // pixels of a chunk, `stride` elements apart. channels is a multiple of kLanes. The channel after the last one is
  // x[wrap], then x[wrap + 1], ...; wrap = 0 makes the channels a ring. Prefetches as many elements at `next`.
  void (*add_pairs)(const void* x, const void* next, DType dtype, int64_t stride, int64_t pixels, int64_t channels,
                    int64_t wrap, int64_t offsets, double* sums);

  // out[i * channels + j] = sums[i * channels + j] * weights[i]; with root, the square root of its magnitude with its
  // sign. channels as in Strip.
  void (*average)(const double* sums, const double* weights, int64_t cells, int64_t channels, bool root, float* out);

  // target[j * target_stride + i] = source[i * stride + j] for i < rows, j < columns.
  void (*transpose)(const void* source, DType dtype, int64_t stride, int64_t rows, int64_t columns, float* target,
                    int64_t target_stride);
};

const Kernels& kernels();  // the table in use, chosen on the first call

const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();

}  // namespace e2cm
