// Statistics of feature maps: means, root mean squares and maxima of the cells of grids, and mean products of pairs of
// channels (channel_pairs.cpp), in one pass over the features.
//
// Reads   B * C * H * W features once, from memory. A chunk of kChunk elements stays in the first level of cache while
//         its cells and pairs are computed.
// Writes  the statistics, float32. Per thread: double sums and float32 maxima of all cells of a sample, and a
//         transposed chunk.
// Does    see pooling.inl.
//
// The cuts of all grids together divide the map into segments that no grid divides further. Their pixels are summed
// with a channel per lane. channels_last maps are read in place. Of contiguous maps, a chunk of some planes is
// transposed first, so that channels are contiguous: both memory formats take the same code and give the same bits, and
// nothing is reduced over lanes, however narrow a cell is. The last group of channels overlaps the one before it;
// fewer channels than kLanes are copied.
//
// The result has the same bits for any number of threads and any batch: how a sample is divided depends on its shape
// and on the grids alone.
//
// Tried: kernels for fewer than the three statistics of cells took the same time, memory is the limit. Pairs do enough
// arithmetic to prefetch the next chunk meanwhile, so neighbouring samples go to one thread.
#include <algorithm>
#include <limits>
#include <utility>

#include "../api.h"
#include "buffer.h"
#include "channel_pairs.h"
#include "half.h"
#include "kernels.h"
#include "parallel.h"

namespace e2cm {
namespace {

enum Kind { kMean = 0, kRms = 1, kMax = 2, kKinds = 3 };

// A part of an axis between neighbouring cuts, and the cell of each grid that it belongs to.
struct Segment {
  int64_t begin, end;
  int64_t cell[kKinds];
};

// Divides an axis of length n at the cuts of all grids; returns the number of segments. A grid without cells cuts
// nothing.
int64_t cut_axis(int64_t n, const int64_t (&cells)[kKinds], Segment* out) {
  int64_t count = 0, current[kKinds] = {};
  const auto end_of = [&](int kind) { return cells[kind] ? (current[kind] + 1) * n / cells[kind] : n; };
  for (int64_t at = 0; at < n; at = out[count++].end) {
    Segment& segment = out[count];
    segment = {at, std::min({end_of(kMean), end_of(kRms), end_of(kMax)}), {current[0], current[1], current[2]}};
    for (int kind = 0; kind < kKinds; ++kind) current[kind] += cells[kind] && end_of(kind) == segment.end;
  }
  return count;
}

// How the samples of a call are divided, and the work on one of them.
class Pooling {
 public:
  Pooling(const Maps& maps, const Statistics& wanted)
      : isa_(kernels()),  // a wrong E2CM_ISA throws here, on the calling thread
        maps_(maps),
        grids_{wanted.mean, wanted.rms, wanted.max},
        height_(maps.height),
        width_(maps.width),
        lanes_(kLanes * (maps.channels < 2 * kLanes   ? 1
                         : maps.channels < 4 * kLanes ? 2
                                                      : 4)),
        groups_((maps.channels + lanes_ - 1) / lanes_),
        pairs_(maps, wanted.pairs, kChunk / lanes_,
               maps.channels % kLanes == 0 && (maps.channels_last || groups_ == 1)),
        segments_(count(&Grid::rows) + count(&Grid::columns)),
        weights_(wanted.mean.cells() + wanted.rms.cells()) {
    const int64_t rows[] = {wanted.mean.rows, wanted.rms.rows, wanted.max.rows};
    const int64_t columns[] = {wanted.mean.columns, wanted.rms.columns, wanted.max.columns};
    rows_ = segments_.get();
    row_count_ = cut_axis(height_, rows, rows_);
    columns_ = rows_ + row_count_;
    column_count_ = cut_axis(width_, columns, columns_);
    if (column_count_ == 1) merge_rows();
    double* weight = weights_.get();
    for (const Grid& grid : {wanted.mean, wanted.rms})
      for (int64_t i = 0; i < grid.rows; ++i)
        for (int64_t j = 0; j < grid.columns; ++j)
          *weight++ =
              1.0 / static_cast<double>(length(maps.height, grid.rows, i) * length(maps.width, grid.columns, j));
  }

  // The memory of one thread.
  struct Scratch {
    double* sums;       // [groups, cells of mean and rms, lanes]
    float* maxima;      // [groups, cells of max, lanes]
    float* averages;    // [cells, lanes] of one group
    float* transposed;  // [pixels of a chunk, lanes]
    CellSums* cells;    // of a strip
    int64_t* edges;     // of its cells
    ChannelPairs::Scratch pairs;
  };

  Scratch scratch_in(char* memory) const { return lay_out(memory).first; }
  int64_t scratch_bytes() const { return lay_out(nullptr).second; }

  // out: the statistics of sample b.
  void run(int64_t b, float* out, const Scratch& scratch) const {
    std::fill_n(scratch.sums, groups_ * sums_per_group(), 0.0);
    std::fill_n(scratch.maxima, groups_ * grids_[kMax].cells() * lanes_, -std::numeric_limits<float>::infinity());
    if (maps_.channels < kLanes) std::fill_n(scratch.transposed, kChunk, 0.f);  // lanes without a channel
    if (pairs_.wanted()) pairs_.begin(scratch.pairs);
    const int64_t pixels = kChunk / lanes_, rows = std::max<int64_t>(1, pixels / width_);
    for (int64_t r = 0; r < height_; r += rows)
      for (int64_t c = 0; c < width_; c += pixels)
        add({b, r, std::min(height_, r + rows), c, std::min(width_, c + pixels)}, scratch);
    for (int64_t group = 0; group < groups_; ++group) write(group, out, scratch);
    if (pairs_.wanted()) pairs_.write(out + maps_.channels * cells(), scratch.pairs);
  }

 private:
  struct Chunk {  // whole rows of a sample, or a part of one row
    int64_t sample, top, bottom, left, right;
    int64_t width() const { return right - left; }
    int64_t pixels() const { return (bottom - top) * width(); }
  };

  // Scratch laid out in `memory` (null: only its size is wanted), and the size in bytes.
  std::pair<Scratch, int64_t> lay_out(char* memory) const {
    int64_t bytes = 0;
    const auto next = [&](auto type, int64_t count) {
      const auto at = memory ? reinterpret_cast<decltype(type)*>(memory + bytes) : nullptr;
      bytes += (count * static_cast<int64_t>(sizeof type) + 63) / 64 * 64;
      return at;
    };
    Scratch scratch;
    scratch.sums = next(double{}, groups_ * sums_per_group());
    scratch.maxima = next(float{}, groups_ * grids_[kMax].cells() * lanes_);
    scratch.averages = next(float{}, std::max(grids_[kMean].cells(), grids_[kRms].cells()) * lanes_);
    scratch.transposed = next(float{}, kChunk);
    scratch.cells = next(CellSums{}, column_count_);
    scratch.edges = next(int64_t{}, column_count_ + 1);
    scratch.pairs.sums = next(double{}, pairs_.sum_count());
    scratch.pairs.copy = next(float{}, pairs_.copy_count());
    return {scratch, bytes};
  }

  int64_t count(int64_t Grid::* axis) const { return 1 + grids_[0].*axis + grids_[1].*axis + grids_[2].*axis; }
  static int64_t length(int64_t n, int64_t cells, int64_t i) { return (i + 1) * n / cells - i * n / cells; }

  // No grid cuts between columns: the map is processed as a single row, whose segments are the segments of rows.
  void merge_rows() {
    std::swap(rows_, columns_);
    std::swap(row_count_, column_count_);
    rows_->begin = 0, rows_->end = 1;
    for (int64_t j = 0; j < column_count_; ++j) columns_[j].begin *= width_, columns_[j].end *= width_;
    width_ *= height_;
    height_ = 1;
  }

  int64_t cells() const { return grids_[kMean].cells() + grids_[kRms].cells() + grids_[kMax].cells(); }
  int64_t sums_per_group() const { return (grids_[kMean].cells() + grids_[kRms].cells()) * lanes_; }
  double* sums_of(int64_t group, Kind kind, const Scratch& scratch) const {
    return scratch.sums + group * sums_per_group() + (kind == kRms ? grids_[kMean].cells() * lanes_ : 0);
  }
  float* maxima_of(int64_t group, const Scratch& scratch) const {
    return scratch.maxima + group * grids_[kMax].cells() * lanes_;
  }

  int64_t first_channel(int64_t group) const {
    return std::max<int64_t>(0, std::min(group * lanes_, maps_.channels - lanes_));
  }
  int64_t channels() const { return std::min(lanes_, maps_.channels); }  // of a group

  const char* address(int64_t sample, int64_t channel, int64_t pixel) const {
    const int64_t at = maps_.channels_last ? pixel * maps_.channels + channel : channel * height_ * width_ + pixel;
    return static_cast<const char*>(maps_.data) + (sample * maps_.stride + at) * size_of(maps_.dtype);
  }

  void add(const Chunk& chunk, const Scratch& scratch) const {
    for (int64_t j = 0; j <= column_count_; ++j)
      scratch.edges[j] = std::clamp(j ? columns_[j - 1].end : 0, chunk.left, chunk.right) - chunk.left;
    for (int64_t group = 0; group < groups_; ++group) {
      Strip strip = strip_of(chunk, group, scratch);
      if (group == 0 && pairs_.wanted()) add_pairs(chunk, strip, scratch);
      if (cells() == 0) break;
      strip.cells = column_count_;
      strip.edges = scratch.edges;
      const char* const top = static_cast<const char*>(strip.x);
      for (int64_t i = 0; i < row_count_; ++i) {
        const int64_t begin = std::max(chunk.top, rows_[i].begin), end = std::min(chunk.bottom, rows_[i].end);
        if (begin >= end) continue;
        strip.x = top + (begin - chunk.top) * strip.row_stride * size_of(strip.dtype);
        strip.rows = end - begin;
        add_strip(strip, rows_[i], group, scratch);
      }
    }
  }

  // The address of the chunk that follows; without one, of the sample itself.
  const char* next_chunk(const Chunk& chunk) const {
    const int64_t next = chunk.bottom * width_ - (width_ - chunk.right);
    if (next < height_ * width_) return address(chunk.sample, 0, next);
    return chunk.sample + 1 < maps_.rows ? address(chunk.sample + 1, 0, 0) : address(chunk.sample, 0, 0);
  }

  // Before the cells, while the chunk is in the first level of cache.
  void add_pairs(const Chunk& chunk, const Strip& first_group, const Scratch& scratch) const {
    if (pairs_.in_place())
      pairs_.add_in_place(first_group.x, maps_.channels_last ? next_chunk(chunk) : first_group.x, first_group.dtype,
                          first_group.pixel_stride, chunk.pixels(), scratch.pairs);
    else
      pairs_.add(chunk.sample, chunk.top * width_ + chunk.left, chunk.pixels(), scratch.pairs);
  }

  // The features of a chunk with contiguous channels of one group: in place, or transposed.
  Strip strip_of(const Chunk& chunk, int64_t group, const Scratch& scratch) const {
    const int64_t channel = first_channel(group), first = chunk.top * width_ + chunk.left;
    const char* const x = address(chunk.sample, channel, first);
    if (maps_.channels_last && maps_.channels >= kLanes)
      return {x, maps_.dtype, lanes_, maps_.channels, width_ * maps_.channels, 0, 0, nullptr};
    const int64_t pixels = chunk.pixels();
    float* const to = scratch.transposed;
    if (maps_.channels_last)
      copy_to_lanes(x, pixels, to);
    else
      isa_.transpose(x, maps_.dtype, height_ * width_, channels(), pixels, to, lanes_);
    return {to, DType::f32, lanes_, lanes_, chunk.width() * lanes_, 0, 0, nullptr};
  }

  void copy_to_lanes(const char* x, int64_t pixels, float* to) const {
    visit(x, maps_.dtype, [&](const auto* from) {
      for (int64_t i = 0; i < pixels; ++i)
        for (int64_t c = 0; c < maps_.channels; ++c) to[i * lanes_ + c] = to_float(from[i * maps_.channels + c]);
    });
  }

  void add_strip(const Strip& strip, const Segment& row, int64_t group, const Scratch& scratch) const {
    const auto offset = [&](Kind kind, const Segment& column) {
      return (row.cell[kind] * grids_[kind].columns + column.cell[kind]) * lanes_;
    };
    for (int64_t j = 0; j < strip.cells; ++j) {
      const Segment& column = columns_[j];
      scratch.cells[j] = {grids_[kMean].cells() ? sums_of(group, kMean, scratch) + offset(kMean, column) : nullptr,
                          grids_[kRms].cells() ? sums_of(group, kRms, scratch) + offset(kRms, column) : nullptr,
                          grids_[kMax].cells() ? maxima_of(group, scratch) + offset(kMax, column) : nullptr};
    }
    isa_.add_cells(strip, scratch.cells);
  }

  // From [cells, lanes] to [channels, cells].
  void write(int64_t group, float* out, const Scratch& scratch) const {
    const double* weights = weights_.get();
    for (const Kind kind : {kMean, kRms, kMax}) {
      const int64_t cells = grids_[kind].cells();
      if (cells == 0) continue;
      const float* from = maxima_of(group, scratch);
      if (kind != kMax) {
        isa_.average(sums_of(group, kind, scratch), weights, cells, lanes_, kind == kRms, scratch.averages);
        weights += cells;
        from = scratch.averages;
      }
      isa_.transpose(from, DType::f32, lanes_, cells, channels(), out + first_channel(group) * cells, cells);
      out += maps_.channels * cells;
    }
  }

  const Kernels& isa_;
  const Maps maps_;
  const Grid grids_[kKinds];
  int64_t height_, width_;
  const int64_t lanes_;   // channels of a group
  const int64_t groups_;  // of channels
  const ChannelPairs pairs_;
  Buffer<Segment> segments_;
  Buffer<double> weights_;  // 1 / pixels of each cell
  Segment *rows_, *columns_;
  int64_t row_count_, column_count_;
};

}  // namespace

void statistics(const Maps& maps, const Statistics& wanted, float* out, int threads) {
  if (maps.rows == 0) return;
  const Pooling pooling(maps, wanted);
  const int64_t numbers = maps.channels * maps.height * maps.width, size = wanted.size(maps.channels);
  const int useful = useful_threads(threads, (2 + wanted.pairs) * maps.rows * numbers);
  const int64_t bytes = pooling.scratch_bytes();
  Buffer<char> scratch(useful * bytes);
  // Neighbouring samples go to one thread, which prefetches the next one.
  const int64_t each = std::max<int64_t>(1, maps.rows / (8 * useful));
  parallel_for((maps.rows + each - 1) / each, useful, [&](int64_t item, int thread) {
    const Pooling::Scratch own = pooling.scratch_in(scratch.get() + thread * bytes);
    for (int64_t b = item * each; b < std::min(maps.rows, (item + 1) * each); ++b) pooling.run(b, out + b * size, own);
  });
}

}  // namespace e2cm
