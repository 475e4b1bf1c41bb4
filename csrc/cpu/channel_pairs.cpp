// Mean products of channel c and channel c + o, the first channels following the last: a channel per lane, an offset
// per register.
//
// Reads   the chunks of statistics.cpp, from cache. Channels that fill their lanes are read in place, as a ring. Others
//         are copied, with the first channels repeated after the last.
// Writes  double sums per channel and offset, then float32 results.
// Does    an FMA per element and offset; see pooling.inl, also for what was tried.
//
// The result has the same bits for any number of threads, any batch and either memory format: how a sample is divided
// depends on its shape alone.
#include "channel_pairs.h"

#include <algorithm>
#include <cstring>

namespace e2cm {
namespace {

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

}  // namespace

ChannelPairs::ChannelPairs(const Maps& maps, int64_t offsets, int64_t pixels, bool in_place)
    : isa_(kernels()),
      maps_(maps),
      offsets_(offsets),
      lanes_(round_up(maps.channels, kLanes)),
      in_place_(in_place),
      padding_(offsets - 1 + kPairShifts - 1),
      stride_(lanes_ + round_up(padding_, kLanes)),
      pixels_(std::min(pixels, maps.height * maps.width)),
      weights_(offsets) {
  std::fill_n(weights_.get(), offsets, 1.0 / static_cast<double>(maps.height * maps.width));
}

void ChannelPairs::begin(const Scratch& scratch) const {
  std::fill_n(scratch.sums, sum_count(), 0.0);
  if (!in_place_) std::fill_n(scratch.copy, copy_count(), 0.f);  // lanes without a channel
}

void ChannelPairs::add(int64_t sample, int64_t pixel, int64_t count, const Scratch& scratch) const {
  float* const copy = scratch.copy;
  load(sample, pixel, count, copy);
  isa_.add_pairs(copy, copy, DType::f32, stride_, count, lanes_, lanes_, offsets_, scratch.sums);
}

void ChannelPairs::add_in_place(const void* x, const void* next, DType dtype, int64_t stride, int64_t count,
                                const Scratch& scratch) const {
  isa_.add_pairs(x, next, dtype, stride, count, lanes_, 0, offsets_, scratch.sums);
}

void ChannelPairs::write(float* out, const Scratch& scratch) const {
  const int64_t channels = maps_.channels;
  const float* roots = scratch.copy;
  isa_.average(scratch.sums, weights_.get(), offsets_, lanes_, true, scratch.copy);
  for (int64_t o = 0; o < offsets_; ++o, roots += lanes_, out += channels) {
    const int64_t first = (kPairShifts - 1 - o % kPairShifts) % channels;  // add_pairs starts at this channel
    std::memcpy(out + first, roots, (channels - first) * sizeof(float));
    std::memcpy(out, roots + channels - first, first * sizeof(float));
  }
}

void ChannelPairs::load(int64_t sample, int64_t pixel, int64_t count, float* to) const {
  const int64_t channels = maps_.channels;
  const int64_t at = sample * maps_.stride + (maps_.channels_last ? pixel * channels : pixel);
  const char* const x = static_cast<const char*>(maps_.data) + at * size_of(maps_.dtype);
  if (maps_.channels_last) return isa_.pad_circular(x, maps_.dtype, channels, count, channels, padding_, to, stride_);
  isa_.transpose(x, maps_.dtype, maps_.height * maps_.width, channels, count, to, stride_);
  isa_.pad_circular(to, DType::f32, stride_, count, channels, padding_, to, stride_);
}

}  // namespace e2cm
