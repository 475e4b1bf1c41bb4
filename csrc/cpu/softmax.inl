// From sums to answers, on data in cache: distances from the sums over D, and the softmax over the classes.
//
// Reads   per pair of a row and a class, `splits` double sums; then the float32 penalty, twice.
// Writes  a float32 distance per pair; per row the least penalty, its class and two sums.
// Does    a square root and a division per pair; per penalty an exponential (a polynomial of degree 7).
//
// One row per lane (distances of many classes: one class per lane), so that nothing is reduced over lanes.

namespace e2cm {
namespace {

uint32_t distance_lanes(const double* sums, int64_t splits, int64_t split_stride, const double* lane_norms, double norm,
                        const float* scale, float* out) {
  double sum[kLanes], norms[kLanes];
  for (int j = 0; j < kLanes; ++j) sum[j] = sums[j];
  for (int64_t s = 1; s < splits; ++s) E2CM_SIMD for (int j = 0; j < kLanes; ++j) sum[j] += sums[s * split_stride + j];
  // Rounding errors have gone through one chain and the sum of the chains of a block, relative to the norms. Where the
  // subtraction leaves less than this share of the norms, it amplifies them too much.
  constexpr double least = static_cast<double>(kChain) / kBlock;
  for (int j = 0; j < kLanes; ++j) norms[j] = lane_norms ? lane_norms[j] + norm : sum[j];
  if (lane_norms)
    for (int j = 0; j < kLanes; ++j) sum[j] = norms[j] - 2 * sum[j];
  int32_t inaccurate[kLanes];
  E2CM_SIMD for (int j = 0; j < kLanes; ++j) {
    inaccurate[j] = !(sum[j] >= norms[j] * least) | !(norms[j] >= kMinSquare) | !(norms[j] <= kMaxSquare);
    out[j] = std::sqrt(static_cast<float>(sum[j])) / scale[j];
  }
  uint32_t mask = 0;
  for (int j = 0; j < kLanes; ++j) mask |= static_cast<uint32_t>(inaccurate[j]) << j;
  return mask;
}

// exp(x) for -87 <= x <= 0, to 2 ulp: 2^n times a polynomial. Adding 1.5 * 2^23 rounds x / log(2) to an integer in the
// low bits, from where add_exponent moves it into the exponent.
inline Vec exp_of_negative(Vec x) {
  const Vec magic = Vec::set(12582912.f);
  const Vec shifted = Vec::fma(x, Vec::set(1.44269504088896341f), magic);
  const Vec n = Vec::sub(shifted, magic);
  const Vec r = Vec::fma(n, Vec::set(2.12194440e-4f), Vec::fma(n, Vec::set(-0.693359375f), x));
  Vec p = Vec::set(1.9875691500e-4f);
  p = Vec::fma(p, r, Vec::set(1.3981999507e-3f));
  p = Vec::fma(p, r, Vec::set(8.3334519073e-3f));
  p = Vec::fma(p, r, Vec::set(4.1665795894e-2f));
  p = Vec::fma(p, r, Vec::set(1.6666665459e-1f));
  p = Vec::fma(p, r, Vec::set(5.0000001201e-1f));
  p = Vec::add(Vec::fma(Vec::mul(p, r), r, r), Vec::set(1.f));
  return Vec::add_exponent(p, shifted);
}

void softmax_lanes(const float* z, int64_t classes, float* best, int64_t* prediction, float* sum, float* weighted) {
  constexpr float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const Vec zero = Vec::zero(), least = Vec::set(-87.f);
  for (int64_t j = 0; j < kLanes; j += Vec::lanes) {
    Vec low = Vec::set(inf), winner = zero, has_nan = zero;
    for (int64_t k = 0; k < classes; ++k) {
      const Vec value = Vec::load(z + k * kLanes + j);
      winner = Vec::select_less(value, low, Vec::set(static_cast<float>(k)), winner);
      low = Vec::select_less(value, low, value, low);
      has_nan = Vec::select_nan(value, Vec::set(1.f), has_nan);
    }
    Vec total = zero, moment = zero;
    for (int64_t k = 0; k < classes; ++k) {
      const Vec x = Vec::sub(low, Vec::load(z + k * kLanes + j));
      const Vec e = Vec::select_less(x, least, zero, exp_of_negative(Vec::select_less(x, least, least, x)));
      total = Vec::add(total, e);
      moment = Vec::fma(e, Vec::select_less(x, least, zero, x), moment);
    }
    float lows[Vec::lanes], winners[Vec::lanes], nans[Vec::lanes];
    Vec::store(lows, low), Vec::store(winners, winner), Vec::store(nans, has_nan);
    Vec::store(sum + j, total), Vec::store(weighted + j, moment);
    for (int i = 0; i < Vec::lanes; ++i) {
      const bool valid = nans[i] == 0.f && lows[i] < inf && lows[i] > -inf;
      best[j + i] = valid ? lows[i] : nan;
      prediction[j + i] = valid ? static_cast<int64_t>(winners[i]) : 0;
      if (!valid) sum[j + i] = weighted[j + i] = nan;
    }
  }
}

}  // namespace
}  // namespace e2cm
