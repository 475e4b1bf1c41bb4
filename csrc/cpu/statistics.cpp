// Means, root mean squares and maxima of the cells of feature maps, and mean products of pairs of channels (pairs.cpp):
// one pass over the features for all of them.
//
// Every grid cuts the map; between all cuts of all grids lie cells that no grid divides further, and these are summed
// up: a channel per lane, no more than kPiece numbers at a time. Channels_last maps are read as they are. Of others, a
// piece of some planes is turned first, so that channels lie side by side: both orders then go the same way and have
// the same bits, and no lanes have to be added up, however narrow a cell is. The last channels go back over their
// neighbours to fill a group; less than kLanes channels are copied.
//
// Same bits whatever the threads and the batch: how a sample is cut depends on its shape and on the grids alone.
//
// Sums of less than three kinds take the same time as all three: it is memory that is waited for. Pairs are arithmetic
// enough to ask for the next piece meanwhile, and neighbouring samples go to one thread, so that there is a next piece.
#include <algorithm>
#include <limits>
#include <utility>

#include "../api.h"
#include "buffer.h"
#include "half.h"
#include "kernels.h"
#include "pairs.h"
#include "parallel.h"

namespace e2cm {
namespace {

enum Kind { kMean = 0, kRms = 1, kMax = 2, kKinds = 3 };

// Between two neighbouring cuts of an axis: the cell of each grid that it is part of.
struct Stretch {
  int64_t begin, end;
  int64_t cell[kKinds];
};

// The n numbers of an axis, cut by all the grids; returns the number of stretches. A grid without cells cuts nothing.
int64_t cut(int64_t n, const int64_t (&cells)[kKinds], Stretch* out) {
  int64_t count = 0, current[kKinds] = {};
  const auto end_of = [&](int kind) { return cells[kind] ? (current[kind] + 1) * n / cells[kind] : n; };
  for (int64_t at = 0; at < n; at = out[count++].end) {
    Stretch& stretch = out[count];
    stretch = {at, std::min({end_of(kMean), end_of(kRms), end_of(kMax)}), {current[0], current[1], current[2]}};
    for (int kind = 0; kind < kKinds; ++kind) current[kind] += cells[kind] && end_of(kind) == stretch.end;
  }
  return count;
}

// How the samples of a call are cut, and what a thread needs to work on one.
class Pooling {
 public:
  Pooling(const Maps& maps, const Statistics& wanted)
      : isa_(kernels()),  // here, where a wrong E2CM_ISA may still throw
        maps_(maps),
        grids_{wanted.mean, wanted.rms, wanted.max},
        height_(maps.height),
        width_(maps.width),
        lanes_(kLanes * (maps.channels < 2 * kLanes   ? 1
                         : maps.channels < 4 * kLanes ? 2
                                                      : 4)),
        groups_((maps.channels + lanes_ - 1) / lanes_),
        pairs_(maps, wanted.pairs, kPiece / lanes_,
               maps.channels % kLanes == 0 && (maps.channels_last || groups_ == 1)),
        stretches_(count(&Grid::rows) + count(&Grid::columns)),
        shares_(wanted.mean.cells() + wanted.rms.cells()) {
    const int64_t rows[] = {wanted.mean.rows, wanted.rms.rows, wanted.max.rows};
    const int64_t columns[] = {wanted.mean.columns, wanted.rms.columns, wanted.max.columns};
    rows_ = stretches_.get();
    row_count_ = cut(height_, rows, rows_);
    columns_ = rows_ + row_count_;
    column_count_ = cut(width_, columns, columns_);
    if (column_count_ == 1) make_one_row();
    double* share = shares_.get();
    for (const Grid& grid : {wanted.mean, wanted.rms})
      for (int64_t i = 0; i < grid.rows; ++i)
        for (int64_t j = 0; j < grid.columns; ++j)
          *share++ = 1.0 / static_cast<double>(length(maps.height, grid.rows, i) * length(maps.width, grid.columns, j));
  }

  // What one thread works with.
  struct Scratch {
    double* sums;     // [groups, cells of mean and rms, lanes]
    float* most;      // [groups, cells of max, lanes]
    float* averages;  // [cells, lanes] of one group
    float* turned;    // [pixels of a piece, lanes]
    CellSums* cells;  // of a strip
    int64_t* cuts;
    Pairs::Scratch pairs;
  };

  Scratch scratch_in(char* memory) const { return lay_out(memory).first; }
  int64_t scratch_bytes() const { return lay_out(nullptr).second; }

  // out: the statistics of sample b.
  void run(int64_t b, float* out, const Scratch& scratch) const {
    std::fill_n(scratch.sums, groups_ * sums_per_group(), 0.0);
    std::fill_n(scratch.most, groups_ * grids_[kMax].cells() * lanes_, -std::numeric_limits<float>::infinity());
    if (maps_.channels < kLanes) std::fill_n(scratch.turned, kPiece, 0.f);  // lanes without a channel
    if (pairs_.wanted()) pairs_.begin(scratch.pairs);
    const int64_t pixels = kPiece / lanes_, rows = std::max<int64_t>(1, pixels / width_);
    for (int64_t r = 0; r < height_; r += rows)
      for (int64_t c = 0; c < width_; c += pixels)
        add({b, r, std::min(height_, r + rows), c, std::min(width_, c + pixels)}, scratch);
    for (int64_t group = 0; group < groups_; ++group) write(group, out, scratch);
    if (pairs_.wanted()) pairs_.write(out + maps_.channels * cells(), scratch.pairs);
  }

 private:
  struct Piece {  // of a sample: whole rows, or a part of one
    int64_t sample, top, bottom, left, right;
    int64_t width() const { return right - left; }
    int64_t pixels() const { return (bottom - top) * width(); }
  };

  // The scratch in that memory, if there is any, and its size.
  std::pair<Scratch, int64_t> lay_out(char* memory) const {
    int64_t bytes = 0;
    const auto next = [&](auto type, int64_t count) {
      const auto at = memory ? reinterpret_cast<decltype(type)*>(memory + bytes) : nullptr;
      bytes += (count * static_cast<int64_t>(sizeof type) + 63) / 64 * 64;
      return at;
    };
    Scratch scratch;
    scratch.sums = next(double{}, groups_ * sums_per_group());
    scratch.most = next(float{}, groups_ * grids_[kMax].cells() * lanes_);
    scratch.averages = next(float{}, std::max(grids_[kMean].cells(), grids_[kRms].cells()) * lanes_);
    scratch.turned = next(float{}, kPiece);
    scratch.cells = next(CellSums{}, column_count_);
    scratch.cuts = next(int64_t{}, column_count_ + 1);
    scratch.pairs.sums = next(double{}, pairs_.sum_count());
    scratch.pairs.copy = next(float{}, pairs_.copy_count());
    return {scratch, bytes};
  }

  int64_t count(int64_t Grid::* axis) const { return 1 + grids_[0].*axis + grids_[1].*axis + grids_[2].*axis; }
  static int64_t length(int64_t n, int64_t cells, int64_t i) { return (i + 1) * n / cells - i * n / cells; }

  // Rows that no grid cuts are one stretch of memory.
  void make_one_row() {
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
  float* most_of(int64_t group, const Scratch& scratch) const {
    return scratch.most + group * grids_[kMax].cells() * lanes_;
  }

  int64_t first_channel(int64_t group) const {
    return std::max<int64_t>(0, std::min(group * lanes_, maps_.channels - lanes_));
  }
  int64_t channels() const { return std::min(lanes_, maps_.channels); }  // in a group

  const char* address(int64_t sample, int64_t channel, int64_t pixel) const {
    const int64_t at = maps_.channels_last ? pixel * maps_.channels + channel : channel * height_ * width_ + pixel;
    return static_cast<const char*>(maps_.data) + (sample * maps_.stride + at) * size_of(maps_.dtype);
  }

  void add(const Piece& piece, const Scratch& scratch) const {
    for (int64_t j = 0; j <= column_count_; ++j)
      scratch.cuts[j] = std::clamp(j ? columns_[j - 1].end : 0, piece.left, piece.right) - piece.left;
    for (int64_t group = 0; group < groups_; ++group) {
      Strip strip = strip_of(piece, group, scratch);
      if (group == 0 && pairs_.wanted()) add_pairs(piece, strip, scratch);
      if (cells() == 0) break;
      strip.cells = column_count_;
      strip.cuts = scratch.cuts;
      const char* const top = static_cast<const char*>(strip.x);
      for (int64_t i = 0; i < row_count_; ++i) {
        const int64_t begin = std::max(piece.top, rows_[i].begin), end = std::min(piece.bottom, rows_[i].end);
        if (begin >= end) continue;
        strip.x = top + (begin - piece.top) * strip.row_stride * size_of(strip.dtype);
        strip.rows = end - begin;
        add_strip(strip, rows_[i], group, scratch);
      }
    }
  }

  // Where the piece lies that comes after this one; without one: itself.
  const char* ahead_of(const Piece& piece) const {
    const int64_t next = piece.bottom * width_ - (width_ - piece.right);
    if (next < height_ * width_) return address(piece.sample, 0, next);
    return piece.sample + 1 < maps_.rows ? address(piece.sample + 1, 0, 0) : address(piece.sample, 0, 0);
  }

  // While the piece is in the first level of cache.
  void add_pairs(const Piece& piece, const Strip& first_group, const Scratch& scratch) const {
    if (pairs_.whole())
      pairs_.add_whole(first_group.x, maps_.channels_last ? ahead_of(piece) : first_group.x, first_group.dtype,
                       first_group.pixel_stride, piece.pixels(), scratch.pairs);
    else
      pairs_.add(piece.sample, piece.top * width_ + piece.left, piece.pixels(), scratch.pairs);
  }

  // The features of a piece with the channels of a group side by side: where they lie, or turned.
  Strip strip_of(const Piece& piece, int64_t group, const Scratch& scratch) const {
    const int64_t channel = first_channel(group), first = piece.top * width_ + piece.left;
    const char* const x = address(piece.sample, channel, first);
    if (maps_.channels_last && maps_.channels >= kLanes)
      return {x, maps_.dtype, lanes_, maps_.channels, width_ * maps_.channels, 0, 0, nullptr};
    const int64_t pixels = piece.pixels();
    float* const to = scratch.turned;
    if (maps_.channels_last)
      spread(x, pixels, to);
    else
      isa_.turn(x, maps_.dtype, height_ * width_, channels(), pixels, to, lanes_);
    return {to, DType::f32, lanes_, lanes_, piece.width() * lanes_, 0, 0, nullptr};
  }

  void spread(const char* x, int64_t pixels, float* to) const {
    visit(x, maps_.dtype, [&](const auto* from) {
      for (int64_t i = 0; i < pixels; ++i)
        for (int64_t c = 0; c < maps_.channels; ++c) to[i * lanes_ + c] = to_float(from[i * maps_.channels + c]);
    });
  }

  void add_strip(const Strip& strip, const Stretch& row, int64_t group, const Scratch& scratch) const {
    const auto place = [&](Kind kind, const Stretch& column) {
      return (row.cell[kind] * grids_[kind].columns + column.cell[kind]) * lanes_;
    };
    for (int64_t j = 0; j < strip.cells; ++j) {
      const Stretch& column = columns_[j];
      scratch.cells[j] = {grids_[kMean].cells() ? sums_of(group, kMean, scratch) + place(kMean, column) : nullptr,
                          grids_[kRms].cells() ? sums_of(group, kRms, scratch) + place(kRms, column) : nullptr,
                          grids_[kMax].cells() ? most_of(group, scratch) + place(kMax, column) : nullptr};
    }
    isa_.add_cells(strip, scratch.cells);
  }

  // From [cells, lanes] to [channels, cells].
  void write(int64_t group, float* out, const Scratch& scratch) const {
    const double* share = shares_.get();
    for (const Kind kind : {kMean, kRms, kMax}) {
      const int64_t cells = grids_[kind].cells();
      if (cells == 0) continue;
      const float* from = most_of(group, scratch);
      if (kind != kMax) {
        isa_.average(sums_of(group, kind, scratch), share, cells, lanes_, kind == kRms, scratch.averages);
        share += cells;
        from = scratch.averages;
      }
      isa_.turn(from, DType::f32, lanes_, cells, channels(), out + first_channel(group) * cells, cells);
      out += maps_.channels * cells;
    }
  }

  const Kernels& isa_;
  const Maps maps_;
  const Grid grids_[kKinds];
  int64_t height_, width_;
  const int64_t lanes_;   // a channel each, in a group
  const int64_t groups_;  // of channels
  const Pairs pairs_;
  Buffer<Stretch> stretches_;
  Buffer<double> shares_;  // of a pixel in the mean of a cell
  Stretch *rows_, *columns_;
  int64_t row_count_, column_count_;
};

}  // namespace

void statistics(const Maps& maps, const Statistics& wanted, float* out, int threads) {
  if (maps.rows == 0) return;
  const Pooling pooling(maps, wanted);
  const int64_t numbers = maps.channels * maps.height * maps.width, size = wanted.size(maps.channels);
  const int useful = useful_threads(threads, (2 + wanted.pairs) * maps.rows * numbers);
  const int64_t own = pooling.scratch_bytes();
  Buffer<char> scratch(useful * own);
  // Some neighbours at a time: while one is worked on, the next is asked for.
  const int64_t each = std::max<int64_t>(1, maps.rows / (8 * useful));
  parallel_for((maps.rows + each - 1) / each, useful, [&](int64_t item, int thread) {
    const Pooling::Scratch own_scratch = pooling.scratch_in(scratch.get() + thread * own);
    for (int64_t b = item * each; b < std::min(maps.rows, (item + 1) * each); ++b)
      pooling.run(b, out + b * size, own_scratch);
  });
}

}  // namespace e2cm
