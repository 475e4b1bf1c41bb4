// Products of channel c and channel c + o, the first channels following the last: a channel per lane, an offset per
// register. Channels that fill their lanes are a ring of registers, read where they lie. Others are copied to where the
// first of them can stand behind the last, some pixels at a time.
//
// Same bits whatever the threads, the batch and the memory order: how a sample is cut depends on its shape alone.
//
// Tried and left: a load for each offset, instead of joining registers (it crosses a cache line, and the copy that it
// needs is written and read once more); asking for what is ahead into the first level of cache; roots by a guess and a
// step of Newton's (2% less).
#include "channel_pairs.h"

#include <algorithm>
#include <cstring>

namespace e2cm {
namespace {

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

}  // namespace

Pairs::Pairs(const Maps& maps, int64_t offsets, int64_t pixels, bool whole)
    : isa_(kernels()),
      maps_(maps),
      offsets_(offsets),
      lanes_(round_up(maps.channels, kLanes)),
      whole_(whole),
      again_(offsets - 1 + kPairShifts - 1),
      stride_(lanes_ + round_up(again_, kLanes)),
      pixels_(std::min(pixels, maps.height * maps.width)),
      shares_(offsets) {
  std::fill_n(shares_.get(), offsets, 1.0 / static_cast<double>(maps.height * maps.width));
}

void Pairs::begin(const Scratch& scratch) const {
  std::fill_n(scratch.sums, sum_count(), 0.0);
  if (!whole_) std::fill_n(scratch.copy, copy_count(), 0.f);  // lanes without a channel
}

void Pairs::add(int64_t b, int64_t pixel, int64_t count, const Scratch& scratch) const {
  float* const copy = scratch.copy;
  load(b, pixel, count, copy);
  isa_.add_pairs(copy, copy, DType::f32, stride_, count, lanes_, lanes_, offsets_, scratch.sums);
}

void Pairs::add_whole(const void* x, const void* ahead, DType dtype, int64_t stride, int64_t count,
                      const Scratch& scratch) const {
  isa_.add_pairs(x, ahead, dtype, stride, count, lanes_, 0, offsets_, scratch.sums);
}

void Pairs::write(float* out, const Scratch& scratch) const {
  const int64_t channels = maps_.channels;
  const float* roots = scratch.copy;
  isa_.average(scratch.sums, shares_.get(), offsets_, lanes_, true, scratch.copy);
  for (int64_t o = 0; o < offsets_; ++o, roots += lanes_, out += channels) {
    const int64_t first = (kPairShifts - 1 - o % kPairShifts) % channels;  // where add_pairs has begun
    std::memcpy(out + first, roots, (channels - first) * sizeof(float));
    std::memcpy(out, roots + channels - first, first * sizeof(float));
  }
}

void Pairs::load(int64_t b, int64_t pixel, int64_t count, float* to) const {
  const int64_t channels = maps_.channels;
  const int64_t at = b * maps_.stride + (maps_.channels_last ? pixel * channels : pixel);
  const char* const x = static_cast<const char*>(maps_.data) + at * size_of(maps_.dtype);
  if (maps_.channels_last) return isa_.repeat(x, maps_.dtype, channels, count, channels, again_, to, stride_);
  isa_.turn(x, maps_.dtype, maps_.height * maps_.width, channels, count, to, stride_);
  isa_.repeat(to, DType::f32, stride_, count, channels, again_, to, stride_);
}

}  // namespace e2cm
