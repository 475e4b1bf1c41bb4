// Few classes: distance^2 = sum of (x - m)^2, of features as they arrive. Two operations a pair of numbers, but nothing
// cancels, nothing is prepared and each feature is read once: at ten classes memory is as slow as the arithmetic.
//
// Logits of few classes are products, summed up in the same way.
//
// Many classes: distance^2 = |x|^2 - 2 x.m + |m|^2, one operation, with x and m brought near the origin (`center`).
// Rows go into scratch and means into panels (if panels.h has not packed them ahead), converted, centred and padded,
// small enough for the first two cache levels; while a panel is multiplied, what comes next is asked for.
//
// Logits of many classes are these products, of rows and weights as they are.
//
// Same bits whatever the threads and the batch: which way is taken depends on the number of classes alone, D is cut
// into splits by D alone, a split's blocks are added in order (double), splits are added in order, and inside a block
// every (row, mean) pair goes through the same instructions.
//
// Tried and left: products for few classes (the work around them costs more than it saves where sums have units of
// their own; where they have not, it takes 10% less time), dot products of rows and means in tiles of 4 x 6 (a quarter
// of the time went into adding up lanes), blocks of 256, 1024 and 2048 numbers; few means in tiles of 2 x 10 (as fast
// in cache, half as fast from memory), and for 8 blocks at a time (no faster); dot products for the last few of many
// classes (9% at 100 of them, but equal means must have equal bits); products of 24-bit numbers in int8 digits on AMX
// (1.6 times as fast where a core is not shared, but an outlier takes digits from all that stand in its block:
// distances off by up to 7e-4, logits by any amount).
#include "distances.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "half.h"
#include "kernels.h"
#include "parallel.h"

namespace e2cm {
namespace {

constexpr int64_t kGroupRows = 128;  // rows per work item: means are prepared once for all of them
constexpr int64_t kFewRows = 16;     // up to here means are used where they lie: copying them would cost more

}  // namespace

// How the work is cut: into splits of D, groups of rows, and parts of the means.
struct PairSums::Plan {
  int threads;
  int64_t group_rows, groups;
  int64_t part_means, parts;
  int64_t scratch;  // floats per thread

  Plan(const Rows& x, int64_t means, int64_t splits, int allowed)
      // A row or mean of many costs about as much to prepare as four comparisons.
      : threads(useful_threads(allowed, x.dim * (x.rows * means + (means <= kFewMeans ? 0 : 4 * (x.rows + means))))),
        group_rows(std::min(kGroupRows, round_up(x.rows, 4))),
        part_means(means) {
    const auto pieces = [&] { return ceil_div(x.rows, group_rows) * ceil_div(means, part_means) * splits; };
    const int64_t panel = kernels().panel, wanted = threads > 1 ? 2 * threads : 1;
    // Whatever is cut more finely, the others are prepared once for each of its pieces.
    while (pieces() < wanted && part_means > 2 * panel && part_means > kFewMeans)
      part_means = round_up(part_means / 2, panel);
    while (pieces() < wanted && group_rows > 4) group_rows = round_up(group_rows / 2, 4);
    groups = ceil_div(x.rows, group_rows);
    parts = ceil_div(means, part_means);
    const int64_t few = means * kStride * kRun, many = group_rows * kStride + kBlock * panel;
    scratch = round_up(means <= kFewMeans ? few : many, 1024);
  }
};

PairSums::PairSums(Of what, const Rows& x, const Rows& classes, const float* center, const void* packed, int threads)
    : isa_(kernels()),  // here, where a wrong E2CM_ISA may still throw
      x_(x),
      classes_(classes),
      center_(center),
      what_(what),
      few_(classes.rows <= kFewMeans),
      norms_(what == Of::distances && !few_),
      cuts_(x.dim),
      packed_(classes.rows, x.dim, few_ ? nullptr : const_cast<void*>(packed)),
      row_stride_(round_up(x.rows, kLanes)),
      class_stride_(few_ ? row_stride_ : 1),
      ld_(few_ ? 1 : round_up(classes.rows, kLanes)),
      split_stride_(row_stride_ * (few_ ? classes.rows : ld_)),
      size_(cuts_.splits * (split_stride_ + (norms_ ? row_stride_ + ld_ : 0))),
      memory_(size_),
      sums_(memory_.get()),
      row_norms_(norms_ ? sums_ + cuts_.splits * split_stride_ : nullptr),
      class_norms_(norms_ ? row_norms_ + cuts_.splits * row_stride_ : nullptr) {
  if (x.rows > 0) compute(Plan(x, classes.rows, cuts_.splits, threads));
}

int64_t PairSums::rows_that_fit(int64_t dim, int64_t classes) {
  const int64_t sums = int64_t{1} << 23;
  return std::max(kGroupRows, sums / (Cuts(dim).splits * classes) / kGroupRows * kGroupRows);
}

void PairSums::compute(const Plan& plan) {
  Buffer<float> scratch(plan.threads * plan.scratch);
  std::fill_n(memory_.get(), size_, 0.0);
  if (packed_ && norms_) std::copy_n(packed_.norms(), packed_.norms_size(), class_norms_);
  parallel_for(cuts_.splits * plan.groups * plan.parts, plan.threads, [&](int64_t item, int thread) {
    const int64_t first_row = item / plan.parts % plan.groups * plan.group_rows;
    const int64_t first_class = item % plan.parts * plan.part_means;
    const Piece piece{item / plan.parts / plan.groups, first_row, std::min(plan.group_rows, x_.rows - first_row),
                      first_class, std::min(plan.part_means, classes_.rows - first_class)};
    float* const own = scratch.get() + thread * plan.scratch;
    few_ ? add_directly(piece, own) : add_products(piece, own);
  });
}

// body(first number, how many) for all blocks of a split, `each` of them at a time.
template <class Body>
void PairSums::for_blocks(int64_t split, int64_t each, const Body& body) const {
  const int64_t end = cuts_.first_block(split + 1);
  for (int64_t block = cuts_.first_block(split); block < end; block += each) {
    const int64_t at = block * kBlock;
    body(at, std::min({each * kBlock, end * kBlock - at, x_.dim - at}));
  }
}

void PairSums::add_directly(const Piece& piece, float* scratch) {
  const bool in_place = piece.rows <= kFewRows && classes_.dtype == DType::f32;
  double* const sums = sums_ + piece.split * split_stride_ + piece.first;
  const auto run = what_ == Of::distances ? isa_.add_squares : isa_.add_dots;
  const auto add = [&](int64_t at, int64_t n, const FewMeans& means) {
    run(element(x_, piece.first, at), x_.dtype, x_.stride, piece.rows, n, means, sums, row_stride_);
  };
  const int64_t block = classes_.rows * kStride, size = size_of(classes_.dtype);
  for_blocks(piece.split, kRun, [&](int64_t at, int64_t n) {
    const int64_t whole = in_place ? n / kPad * kPad : 0, rest = n - whole;
    if (whole) {
      const float* const means = reinterpret_cast<const float*>(element(classes_, 0, at));
      add(at, whole, {means, classes_.rows, classes_.stride, kBlock, nullptr, 0, 0});
    }
    if (!rest) return;
    for (int64_t i = 0; i < rest; i += kBlock)
      isa_.load_block(element(classes_, 0, at + whole + i), classes_.dtype, classes_.stride, nullptr, classes_.rows,
                      std::min(kBlock, rest - i), scratch + i / kBlock * block, nullptr);
    const char* const ahead = in_place || at + n == x_.dim ? nullptr : element(classes_, 0, at + n);
    add(at + whole, rest, {scratch, classes_.rows, kStride, block, ahead, classes_.stride * size, size});
  });
}

void PairSums::add_products(const Piece& piece, float* scratch) {
  const int64_t x_size = size_of(x_.dtype);
  const int64_t end = piece.first_class + piece.classes;
  float *const panel = scratch, *const rows = scratch + kBlock * isa_.panel;
  double* const products = sums_ + piece.split * split_stride_ + piece.first * ld_;
  // Norms are the same for all pieces that share the rows or the classes: one of them writes.
  double* const row_norms =
      norms_ && !piece.first_class ? row_norms_ + piece.split * row_stride_ + piece.first : nullptr;
  double* const class_norms = norms_ && !packed_ && !piece.first ? class_norms_ + piece.split * ld_ : nullptr;

  for_blocks(piece.split, 1, [&](int64_t at, int64_t n) {
    const float* const center = center_ ? center_ + at : nullptr;
    const bool last = at + n == x_.dim;
    Ahead rows_ahead{element(x_, piece.first, at + n), last ? 0 : piece.rows, x_.stride * x_size, kBlock * x_size};
    isa_.load_block(element(x_, piece.first, at), x_.dtype, x_.stride, center, piece.rows, n, rows, row_norms);
    for (int64_t k = piece.first_class; k < end; k += isa_.panel) {
      const int64_t count = std::min(isa_.panel, end - k);
      const bool wraps = k + isa_.panel >= end;
      Ahead ahead{};
      if (!wraps)
        ahead = classes_ahead(at, k + isa_.panel, end);
      else if (!last)
        ahead = classes_ahead(at + n, piece.first_class, end);
      if (!packed_)
        isa_.pack_means(element(classes_, k, at), classes_.dtype, classes_.stride, center, count, n, panel,
                        class_norms ? class_norms + k : nullptr);
      isa_.add_products(rows, piece.rows, packed_ ? packed_.at(at / kBlock, k) : panel, count, n, products + k, ld_,
                        ahead, rows_ahead);
    }
  });
}

// A block from `at` on of the classes from k on.
Ahead PairSums::classes_ahead(int64_t at, int64_t k, int64_t end) const {
  if (packed_) {
    constexpr int64_t stretch = kBlock * sizeof(float);
    const int64_t numbers = std::min(isa_.panel, round_up(end - k, kLanes)) * cuts_.numbers_in(at / kBlock);
    return {reinterpret_cast<const char*>(packed_.at(at / kBlock, k)), numbers / kBlock, stretch, stretch};
  }
  const int64_t size = size_of(classes_.dtype);
  return {element(classes_, k, at), std::min(isa_.panel, end - k), classes_.stride * size, kBlock * size};
}

Distances::Distances(const Rows& x, const HeadParams& head, int threads)
    : PairSums(Of::distances, x, head.vectors, head.center, head.packed, threads), scale_(head.per_class) {}

// For the few pairs that distance_lanes doubts: the direct sum of squares; in double, where float32 cannot hold them.
float Distances::the_long_way(int64_t row, int64_t mean) const {
  const void *const x = element(x_, row, 0), *const m = element(classes_, mean, 0);
  if (!few_) {
    const double square = isa_.squared_distance(x, x_.dtype, m, classes_.dtype, x_.dim);
    if (square >= kTiny && square <= kHuge) return static_cast<float>(std::sqrt(square));
  }
  return visit(x, x_.dtype, [&](const auto* a) {
    return visit(m, classes_.dtype, [&](const auto* b) {
      double total = 0;
      for (int64_t i = 0; i < x_.dim; ++i) {
        const double difference = static_cast<double>(to_float(a[i])) - to_float(b[i]);
        total += difference * difference;
        if (!(total <= std::numeric_limits<double>::max())) break;  // NaN or infinite: it stays so
      }
      return static_cast<float>(std::sqrt(total));
    });
  });
}

void Distances::lanes(int64_t first, float* out) const { few_ ? lanes_of_few(first, out) : lanes_of_many(first, out); }

void Distances::lanes_of_few(int64_t first, float* out) const {
  float scale[kLanes];
  for (int64_t k = 0; k < classes_.rows; ++k) {
    std::fill_n(scale, kLanes, scale_ ? scale_[k] : 1.f);
    float* const distances = out + k * kLanes;
    const uint32_t doubtful =
        isa_.distance_lanes(sums_ + k * row_stride_ + first, cuts_.splits, split_stride_, nullptr, 0, scale, distances);
    for (int64_t j = 0; doubtful >> j; ++j)
      if (doubtful >> j & 1 && first + j < x_.rows) distances[j] = the_long_way(first + j, k) / scale[j];
  }
}

// A class per lane, as the sums lie, and turned afterwards.
void Distances::lanes_of_many(int64_t first, float* out) const {
  const auto over_splits = [&](const double* norms, int64_t stride, double (&sum)[kLanes]) {
    std::fill_n(sum, kLanes, 0.0);
    for (int64_t s = 0; s < cuts_.splits; ++s, norms += stride)
      for (int64_t j = 0; j < kLanes; ++j) sum[j] += norms[j];
  };
  double row_norms[kLanes];
  over_splits(row_norms_ + first, row_stride_, row_norms);
  for (int64_t k = 0; k < classes_.rows; k += kLanes) {
    const int64_t count = std::min(kLanes, classes_.rows - k);
    double class_norms[kLanes];
    over_splits(class_norms_ + k, ld_, class_norms);
    float scale[kLanes], square[kLanes * kLanes];
    std::fill_n(scale, kLanes, 1.f);
    if (scale_) std::copy_n(scale_ + k, count, scale);
    for (int64_t j = 0; j < kLanes; ++j) {
      float* const distances = square + j * kLanes;
      const uint32_t doubtful = isa_.distance_lanes(sums_ + (first + j) * ld_ + k, cuts_.splits, split_stride_,
                                                    class_norms, row_norms[j], scale, distances);
      for (int64_t i = 0; doubtful >> i; ++i)
        if (doubtful >> i & 1 && i < count && first + j < x_.rows)
          distances[i] = the_long_way(first + j, k + i) / scale[i];
    }
    isa_.turn(square, DType::f32, kLanes, kLanes, count, out + k * kLanes, kLanes);
  }
}

Logits::Logits(const Rows& x, const HeadParams& head, int threads)
    : PairSums(Of::products, x, head.vectors, nullptr, head.packed, threads), bias_(head.per_class) {}

void Logits::lanes(int64_t first, float* out) const {
  for (int64_t k = 0; k < classes_.rows; ++k) {
    double logits[kLanes];
    std::fill_n(logits, kLanes, static_cast<double>(bias_[k]));
    const double* sums = sums_ + first * ld_ + k * class_stride_;
    for (int64_t s = 0; s < cuts_.splits; ++s, sums += split_stride_)
      for (int64_t j = 0; j < kLanes; ++j) logits[j] += sums[j * ld_];
    for (int64_t j = 0; j < kLanes; ++j) out[k * kLanes + j] = -static_cast<float>(logits[j]);
  }
}

}  // namespace e2cm
