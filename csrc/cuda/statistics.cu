// Statistics of feature maps: means, root mean squares and maxima of the cells of grids, and mean products of pairs of
// channels.
//
// Reads   B * C * H * W features once for all cells, from memory; once more for every kOffsets offsets of pairs, from
//         the second level of cache.
// Writes  the statistics, float32; per segment of pixels a double per cell statistic, in the workspace.
// Does    an addition, an FMA and a maximum per feature for the cells; an FMA per feature and offset for the pairs.
//
// A block has a sample and up to kBlockChannels channels, a thread a channel. kPixels pixels at a time go through
// shared memory, where channels are kPixels + 1 floats apart. So both memory formats are read coalesced and in place,
// and neither direction has bank conflicts. A segment of pixels, up to kPixels of one row of a cell, is summed in
// float32; segments are added in double.
//
// The result has the same bits in any batch and for both memory formats: the order of the sums depends on the shape of
// a map and on the grids.
//
// Divisions are in 32 bits, and cuts of an axis are advanced without any: a 64-bit division is a function call, around
// which registers spill.
#include "epilogue.h"
#include "plan.h"

namespace e2cm {
namespace cuda {
namespace {

constexpr int kBlockChannels = 128;
constexpr int kPixels = 32;               // in shared memory
constexpr int kTileStride = kPixels + 1;  // floats between channels there
constexpr int kOffsets = 8;               // offsets of pairs per block
constexpr int kKinds = 3;                 // means, root mean squares, maxima

// An axis of length n = cells * each + rest.
struct Axis {
  int cells, each, rest;
};

Axis axis_of(int64_t n, int64_t cells) {
  if (cells == 0) return {1, static_cast<int>(n), 0};
  return {static_cast<int>(cells), static_cast<int>(n / cells), static_cast<int>(n % cells)};
}

struct StatisticsArgs {
  Maps maps;
  bool wanted[kKinds];
  Axis rows[kKinds], columns[kKinds];
  int64_t before[kKinds];  // cells of the previous kinds
  int64_t cells, pairs, size;
  double pixel_weight;  // 1 / pixels of a map
  double* sums;         // [rows, cells, channels]
  float* out;           // [rows, size]
};

// The cell of a position that advances along an axis; without cells, one cell that is the whole axis. The cuts are at
// floor(i * n / cells), computed one after the other without a division.
struct AxisCursor {
  Axis axis;
  int cell, begin, end, remainder;

  __device__ explicit AxisCursor(const Axis& axis_) : axis(axis_) { restart(); }
  __device__ void restart() { cell = 0, begin = 0, end = axis.each, remainder = axis.rest; }
  __device__ void advance_to(int at) {
    if (at < end) return;
    remainder += axis.rest;
    const bool longer = remainder >= axis.cells;
    ++cell, begin = end, end += axis.each + longer;
    if (longer) remainder -= axis.cells;
  }
};

__device__ inline int64_t address(const Maps& maps, int64_t sample, int64_t channel, int64_t pixel) {
  const int64_t pixels = maps.height * maps.width;
  return sample * maps.stride + (maps.channels_last ? pixel * maps.channels + channel : channel * pixels + pixel);
}

// After the last channel comes the first. In 32 bits: see above.
__device__ inline int64_t wrap_channel(int64_t channel, int64_t channels) {
  return static_cast<uint32_t>(channel) % static_cast<uint32_t>(channels);
}

// tile[c * kTileStride + p] = channel (first + c) of pixel (at + p), c < channels, p < pixels.
template <class T>
__device__ void load_tile(const Maps& maps, int64_t sample, int64_t first, int channels, int64_t at, int pixels,
                          float* tile) {
  const T* const x = static_cast<const T*>(maps.data);
  const int threads = blockDim.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = threads / kWarp;
  if (maps.channels_last) {
    for (int c = threadIdx.x; c < channels; c += threads) {
      const int64_t channel = wrap_channel(first + c, maps.channels);
      E2CM_UNROLL_8 for (int p = 0; p < kPixels; ++p) {
        if (p < pixels) tile[c * kTileStride + p] = widen(x[address(maps, sample, channel, at + p)]);
      }
    }
  } else if (lane < pixels) {
    E2CM_UNROLL_8 for (int c = warp; c < channels; c += warps) {
      tile[c * kTileStride + lane] = widen(x[address(maps, sample, wrap_channel(first + c, maps.channels), at + lane)]);
    }
  }
}

// One kind of statistic of one channel, while a thread goes over the pixels.
struct CellAccumulator {
  AxisCursor row, column;
  double* sums;  // [cells, channels], at this channel
  float* out;    // [channels, cells], at this channel
  float value, nan_or_zero;

  __device__ CellAccumulator(const StatisticsArgs& args, int kind, int64_t sample, int64_t channel)
      : row(args.rows[kind]), column(args.columns[kind]) {
    const int64_t channels = args.maps.channels, before = args.before[kind];
    sums = args.sums + (sample * args.cells + before) * channels + channel;
    out = args.out + sample * args.size + before * channels + channel * row.axis.cells * column.axis.cells;
    restart(kind);
  }
  __device__ void restart(int kind) { value = kind == 2 ? -kInfinity : 0.f, nan_or_zero = 0; }

  __device__ void add(int kind, float x) {
    if (kind == 0) value += x;
    if (kind == 1) value = fmaf(x, x, value);
    if (kind == 2) value = fmaxf(value, x), nan_or_zero += x - x;  // 0 or NaN
  }

  // Ends the segment whose last pixel is (i, j). first_segment: of its cell.
  __device__ void close(int kind, int i, int j, bool first_segment, int64_t channels) {
    const int64_t cell = int64_t{row.cell} * column.axis.cells + column.cell;
    double total = kind == 2 ? value + nan_or_zero : value;
    if (!first_segment) {
      const double before = sums[cell * channels];
      total = kind < 2 ? before + total : before != before || before > total ? before : total;
    }
    sums[cell * channels] = total;
    if (i + 1 == row.end && j + 1 == column.end) {
      const double weight = 1. / (static_cast<double>(row.end - row.begin) * (column.end - column.begin));
      const float mean = static_cast<float>(kind == 2 ? total : total * weight);
      out[cell] = kind == 1 ? sqrtf(mean) : mean;
    }
    restart(kind);
  }
};

template <class T>
__global__ void __launch_bounds__(kBlockChannels, 5) cell_statistics(const StatisticsArgs args) {
  const Maps& maps = args.maps;
  const int64_t sample = blockIdx.x, first = int64_t{blockIdx.y} * kBlockChannels, pixels = maps.height * maps.width;
  const int channels =
      static_cast<int>(maps.channels - first < kBlockChannels ? maps.channels - first : kBlockChannels);
  float* const tile = reinterpret_cast<float*>(shared_memory());
  const bool exists = static_cast<int>(threadIdx.x) < channels;
  const int64_t channel = first + threadIdx.x;
  CellAccumulator kinds[kKinds] = {{args, 0, sample, channel}, {args, 1, sample, channel}, {args, 2, sample, channel}};
  int i = 0, j = 0, begin = 0;  // row and column of the pixel; the column at which this tile enters the row
  for (int64_t at = 0; at < pixels; at += kPixels) {
    const int count = static_cast<int>(pixels - at < kPixels ? pixels - at : kPixels);
    begin = j;
    __syncthreads();
    load_tile<T>(maps, sample, first, channels, at, count, tile);
    __syncthreads();
    if (!exists) continue;
    for (int p = 0; p < count; ++p) {
      const float x = tile[threadIdx.x * kTileStride + p];
      E2CM_UNROLL for (int kind = 0; kind < kKinds; ++kind) {
        if (!args.wanted[kind]) continue;
        CellAccumulator& cells = kinds[kind];
        cells.add(kind, x);
        if (j + 1 == cells.column.end || p + 1 == count) {
          // Not the first segment if the cell has pixels above, or to the left in an earlier tile.
          const bool first_segment = i == cells.row.begin && (begin <= cells.column.begin || begin == 0);
          cells.close(kind, i, j, first_segment, maps.channels);
        }
        cells.column.advance_to(j + 1);
      }
      if (++j < maps.width) continue;
      j = begin = 0;
      ++i;
      E2CM_UNROLL for (int kind = 0; kind < kKinds; ++kind) {
        kinds[kind].column.restart();
        kinds[kind].row.advance_to(i);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kBlockChannels, 6) pair_statistics(const StatisticsArgs args) {
  const Maps& maps = args.maps;
  const int64_t sample = blockIdx.x, first = int64_t{blockIdx.y} * kBlockChannels, pixels = maps.height * maps.width;
  const int64_t offset = int64_t{blockIdx.z} * kOffsets;
  const int channels =
      static_cast<int>(maps.channels - first < kBlockChannels ? maps.channels - first : kBlockChannels);
  float* const tile = reinterpret_cast<float*>(shared_memory());
  float* const partners = tile + blockDim.x * kTileStride;
  const bool exists = static_cast<int>(threadIdx.x) < channels;
  double totals[kOffsets] = {};
  for (int64_t at = 0; at < pixels; at += kPixels) {
    const int count = static_cast<int>(pixels - at < kPixels ? pixels - at : kPixels);
    __syncthreads();
    load_tile<T>(maps, sample, first, channels, at, count, tile);
    load_tile<T>(maps, sample, first + offset, channels + kOffsets - 1, at, count, partners);
    __syncthreads();
    if (!exists) continue;
    float sums[kOffsets] = {};
    for (int p = 0; p < count; ++p) {
      const float x = tile[threadIdx.x * kTileStride + p];
      E2CM_UNROLL for (int o = 0; o < kOffsets; ++o) sums[o] =
          fmaf(x, partners[(threadIdx.x + o) * kTileStride + p], sums[o]);
    }
    E2CM_UNROLL for (int o = 0; o < kOffsets; ++o) totals[o] += sums[o];
  }
  if (!exists) return;
  float* const out = args.out + sample * args.size + args.cells * maps.channels;
  E2CM_UNROLL for (int o = 0; o < kOffsets; ++o) {
    const float mean = static_cast<float>(totals[o] * args.pixel_weight);
    if (offset + o < args.pairs)
      out[(offset + o) * maps.channels + first + threadIdx.x] = copysignf(sqrtf(fabsf(mean)), mean);
  }
}

template <class T>
cudaError_t launch_as(const StatisticsArgs& args, cudaStream_t stream) {
  const int64_t channels = args.maps.channels;
  const unsigned threads =
      static_cast<unsigned>(round_up(channels < kBlockChannels ? channels : kBlockChannels, kWarp));
  const dim3 grid(static_cast<unsigned>(args.maps.rows), static_cast<unsigned>(ceil_div(channels, kBlockChannels)));
  const size_t tile = threads * kTileStride * sizeof(float);
  if (args.cells > 0) {
    const cudaError_t error = launch(cell_statistics<T>, grid, dim3(threads), tile, stream, args);
    if (error != cudaSuccess) return error;
  }
  if (args.pairs == 0) return cudaSuccess;
  const dim3 with_offsets(grid.x, grid.y, static_cast<unsigned>(ceil_div(args.pairs, kOffsets)));
  return launch(pair_statistics<T>, with_offsets, dim3(threads),
                2 * tile + (kOffsets - 1) * kTileStride * sizeof(float), stream, args);
}

}  // namespace

int64_t statistics_workspace(int64_t rows, int64_t channels, const Statistics& wanted) {
  return rows * channels * wanted.cells() * static_cast<int64_t>(sizeof(double));
}

cudaError_t launch_statistics(const Maps& maps, const Statistics& wanted, float* out, void* workspace,
                              cudaStream_t stream) {
  if (maps.rows <= 0 || maps.channels <= 0) return cudaSuccess;
  const StatisticsArgs args{maps,
                            {wanted.mean.cells() > 0, wanted.rms.cells() > 0, wanted.max.cells() > 0},
                            {axis_of(maps.height, wanted.mean.rows), axis_of(maps.height, wanted.rms.rows),
                             axis_of(maps.height, wanted.max.rows)},
                            {axis_of(maps.width, wanted.mean.columns), axis_of(maps.width, wanted.rms.columns),
                             axis_of(maps.width, wanted.max.columns)},
                            {0, wanted.mean.cells(), wanted.mean.cells() + wanted.rms.cells()},
                            wanted.cells(),
                            wanted.pairs,
                            wanted.size(maps.channels),
                            1 / static_cast<double>(maps.height * maps.width),
                            static_cast<double*>(workspace),
                            out};
  if (maps.dtype == DType::bf16) return launch_as<bf16>(args, stream);
  if (maps.dtype == DType::f16) return launch_as<f16>(args, stream);
  return launch_as<float>(args, stream);
}

}  // namespace cuda
}  // namespace e2cm
