// Means, root mean squares and maxima of the cells of feature maps, and mean products of pairs of channels.
//
// It must move B C H W numbers once for all cells, and once more, from the second level of cache, for every 8 offsets
// of pairs. A block has a sample and up to 128 channels, a thread a channel: 32 pixels at a time go through shared
// memory, where channels lie a pixel apart plus one, so that both memory orders are read as they are, the threads of a
// warp next to each other, and neither direction meets a bank twice. A stretch of pixels, up to 32 of one row of a
// cell, is summed up in float32, and stretches in double, in the workspace.
//
// Same bits whatever the batch and the memory order: who adds what up depends on the shape of a map and on the grids.
#include "epilogue.h"
#include "plan.h"

namespace e2cm {
namespace cuda {
namespace {

constexpr int kMost = 128;           // channels of a block
constexpr int kPixels = 32;          // in shared memory
constexpr int kApart = kPixels + 1;  // of a channel there
constexpr int kOffsets = 8;          // of pairs, that a block makes
constexpr int kKinds = 3;            // means, root mean squares, maxima

// An axis of n = cells * each + rest numbers.
struct Axis {
  int cells, each, rest;
};

Axis axis_of(int64_t n, int64_t cells) {
  if (cells == 0) return {1, static_cast<int>(n), 0};
  return {static_cast<int>(cells), static_cast<int>(n / cells), static_cast<int>(n % cells)};
}

struct Map {
  Maps maps;
  bool wanted[kKinds];
  Axis rows[kKinds], columns[kKinds];
  int64_t before[kKinds];  // cells of the kinds before
  int64_t cells, pairs, size;
  double share;  // of a pixel in the mean of a map
  double* sums;  // [rows, cells, channels]
  float* out;    // [rows, size]
};

// Where on an axis that is cut into cells something is that goes along it; without cells: in one that has no end. The
// cuts, at i n / cells, rounded down, come one after the other without a division.
struct Place {
  Axis axis;
  int cell, begin, end, left;

  __device__ explicit Place(const Axis& axis_) : axis(axis_) { restart(); }
  __device__ void restart() { cell = 0, begin = 0, end = axis.each, left = axis.rest; }
  __device__ void on_to(int at) {
    if (at < end) return;
    left += axis.rest;
    const bool longer = left >= axis.cells;
    ++cell, begin = end, end += axis.each + longer;
    if (longer) left -= axis.cells;
  }
};

__device__ inline int64_t address(const Maps& maps, int64_t sample, int64_t channel, int64_t pixel) {
  const int64_t pixels = maps.height * maps.width;
  return sample * maps.stride + (maps.channels_last ? pixel * maps.channels + channel : channel * pixels + pixel);
}

// Channels come round again. In 32 bits: a 64-bit division is a call, around which registers would go to memory.
__device__ inline int64_t come_round(int64_t channel, int64_t channels) {
  return static_cast<uint32_t>(channel) % static_cast<uint32_t>(channels);
}

// tile[c * kApart + p] = channel (first + c) of pixel (at + p), c < channels, p < pixels.
template <class T>
__device__ void load_tile(const Maps& maps, int64_t sample, int64_t first, int channels, int64_t at, int pixels,
                          float* tile) {
  const T* const x = static_cast<const T*>(maps.data);
  const int threads = blockDim.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = threads / kWarp;
  if (maps.channels_last) {
    for (int c = threadIdx.x; c < channels; c += threads) {
      const int64_t channel = come_round(first + c, maps.channels);
      E2CM_LOOP_8 for (int p = 0; p < kPixels; ++p) {
        if (p < pixels) tile[c * kApart + p] = widen(x[address(maps, sample, channel, at + p)]);
      }
    }
  } else if (lane < pixels) {
    E2CM_LOOP_8 for (int c = warp; c < channels; c += warps) {
      tile[c * kApart + lane] = widen(x[address(maps, sample, come_round(first + c, maps.channels), at + lane)]);
    }
  }
}

// One kind of statistic of one channel, as a thread goes over the pixels.
struct Cells {
  Place row, column;
  double* sums;  // [cells, channels], at this channel
  float* out;    // [channels, cells], at this channel
  float value, spoiled;

  __device__ Cells(const Map& m, int kind, int64_t sample, int64_t channel)
      : row(m.rows[kind]), column(m.columns[kind]) {
    const int64_t channels = m.maps.channels, before = m.before[kind];
    sums = m.sums + (sample * m.cells + before) * channels + channel;
    out = m.out + sample * m.size + before * channels + channel * row.axis.cells * column.axis.cells;
    restart(kind);
  }
  __device__ void restart(int kind) { value = kind == 2 ? -kInfinity : 0.f, spoiled = 0; }

  __device__ void add(int kind, float x) {
    if (kind == 0) value += x;
    if (kind == 1) value = fmaf(x, x, value);
    if (kind == 2) value = fmaxf(value, x), spoiled += x - x;  // 0 or NaN
  }

  // The end of a stretch, behind pixel (i, j). begins: it was the first one of its cell.
  __device__ void close(int kind, int i, int j, bool begins, int64_t channels) {
    const int64_t cell = int64_t{row.cell} * column.axis.cells + column.cell;
    double total = kind == 2 ? value + spoiled : value;
    if (!begins) {
      const double before = sums[cell * channels];
      total = kind < 2 ? before + total : before != before || before > total ? before : total;
    }
    sums[cell * channels] = total;
    if (i + 1 == row.end && j + 1 == column.end) {
      const double share = 1. / (static_cast<double>(row.end - row.begin) * (column.end - column.begin));
      const float mean = static_cast<float>(kind == 2 ? total : total * share);
      out[cell] = kind == 1 ? sqrtf(mean) : mean;
    }
    restart(kind);
  }
};

template <class T>
__global__ void __launch_bounds__(kMost, 5) cell_statistics(const Map m) {
  const Maps& maps = m.maps;
  const int64_t sample = blockIdx.x, first = int64_t{blockIdx.y} * kMost, pixels = maps.height * maps.width;
  const int left = static_cast<int>(maps.channels - first < kMost ? maps.channels - first : kMost);
  float* const tile = reinterpret_cast<float*>(shared_memory());
  const bool exists = static_cast<int>(threadIdx.x) < left;
  const int64_t channel = first + threadIdx.x;
  Cells kinds[kKinds] = {{m, 0, sample, channel}, {m, 1, sample, channel}, {m, 2, sample, channel}};
  int i = 0, j = 0, begin = 0;  // the pixel's row and column; the column where these 32 pixels have come into the row
  for (int64_t at = 0; at < pixels; at += kPixels) {
    const int count = static_cast<int>(pixels - at < kPixels ? pixels - at : kPixels);
    begin = j;
    __syncthreads();
    load_tile<T>(maps, sample, first, left, at, count, tile);
    __syncthreads();
    if (!exists) continue;
    for (int p = 0; p < count; ++p) {
      const float x = tile[threadIdx.x * kApart + p];
      E2CM_LOOP for (int kind = 0; kind < kKinds; ++kind) {
        if (!m.wanted[kind]) continue;
        Cells& cells = kinds[kind];
        cells.add(kind, x);
        if (j + 1 == cells.column.end || p + 1 == count) {
          // The stretch began with its cell, unless the cell had pixels above or, in 32 pixels before, to the left.
          const bool begins = i == cells.row.begin && (begin <= cells.column.begin || begin == 0);
          cells.close(kind, i, j, begins, maps.channels);
        }
        cells.column.on_to(j + 1);
      }
      if (++j < maps.width) continue;
      j = begin = 0;
      ++i;
      E2CM_LOOP for (int kind = 0; kind < kKinds; ++kind) {
        kinds[kind].column.restart();
        kinds[kind].row.on_to(i);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kMost, 6) pair_statistics(const Map m) {
  const Maps& maps = m.maps;
  const int64_t sample = blockIdx.x, first = int64_t{blockIdx.y} * kMost, pixels = maps.height * maps.width;
  const int64_t offset = int64_t{blockIdx.z} * kOffsets;
  const int left = static_cast<int>(maps.channels - first < kMost ? maps.channels - first : kMost);
  float* const tile = reinterpret_cast<float*>(shared_memory());
  float* const others = tile + blockDim.x * kApart;
  const bool exists = static_cast<int>(threadIdx.x) < left;
  double totals[kOffsets] = {};
  for (int64_t at = 0; at < pixels; at += kPixels) {
    const int count = static_cast<int>(pixels - at < kPixels ? pixels - at : kPixels);
    __syncthreads();
    load_tile<T>(maps, sample, first, left, at, count, tile);
    load_tile<T>(maps, sample, first + offset, left + kOffsets - 1, at, count, others);
    __syncthreads();
    if (!exists) continue;
    float sums[kOffsets] = {};
    for (int p = 0; p < count; ++p) {
      const float x = tile[threadIdx.x * kApart + p];
      E2CM_LOOP for (int o = 0; o < kOffsets; ++o) sums[o] = fmaf(x, others[(threadIdx.x + o) * kApart + p], sums[o]);
    }
    E2CM_LOOP for (int o = 0; o < kOffsets; ++o) totals[o] += sums[o];
  }
  if (!exists) return;
  float* const out = m.out + sample * m.size + m.cells * maps.channels;
  E2CM_LOOP for (int o = 0; o < kOffsets; ++o) {
    const float mean = static_cast<float>(totals[o] * m.share);
    if (offset + o < m.pairs)
      out[(offset + o) * maps.channels + first + threadIdx.x] = copysignf(sqrtf(fabsf(mean)), mean);
  }
}

template <class T>
cudaError_t launch_as(const Map& map, cudaStream_t stream) {
  const int64_t channels = map.maps.channels;
  const unsigned threads = static_cast<unsigned>(round_up(channels < kMost ? channels : kMost, kWarp));
  const dim3 grid(static_cast<unsigned>(map.maps.rows), static_cast<unsigned>(ceil_div(channels, kMost)));
  const size_t tile = threads * kApart * sizeof(float);
  if (map.cells > 0) {
    const cudaError_t error = launch(cell_statistics<T>, grid, dim3(threads), tile, stream, map);
    if (error != cudaSuccess) return error;
  }
  if (map.pairs == 0) return cudaSuccess;
  const dim3 with_offsets(grid.x, grid.y, static_cast<unsigned>(ceil_div(map.pairs, kOffsets)));
  return launch(pair_statistics<T>, with_offsets, dim3(threads), 2 * tile + (kOffsets - 1) * kApart * sizeof(float),
                stream, map);
}

}  // namespace

int64_t statistics_workspace(int64_t rows, int64_t channels, const Statistics& wanted) {
  return rows * channels * wanted.cells() * static_cast<int64_t>(sizeof(double));
}

cudaError_t launch_statistics(const Maps& maps, const Statistics& wanted, float* out, void* workspace,
                              cudaStream_t stream) {
  if (maps.rows <= 0 || maps.channels <= 0) return cudaSuccess;
  const Map map{maps,
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
  if (maps.dtype == DType::bf16) return launch_as<bf16>(map, stream);
  if (maps.dtype == DType::f16) return launch_as<f16>(map, stream);
  return launch_as<float>(map, stream);
}

}  // namespace cuda
}  // namespace e2cm
