// Distances and logits of a batch: sums over D for all pairs of a row and a class, split over threads.
//
// Up to kMaxDirectClasses classes: sums of (x - m)^2 or x * m, of features in their storage type (direct.inl).
// More: products x . m (gemm.inl); distance^2 = |x|^2 - 2 x.m + |m|^2, with the center subtracted from both so that
// less cancels. Rows go to scratch and class vectors to panels, float32, centred and padded, small enough for the first
// two levels of cache. Panels are made per call, or once by `pack` (panels.h).
//
// Reads   B * D features and K * D class vectors. Products: the features once per part of the classes, the class
//         vectors once per group of kGroupRows rows.
// Writes  B * K double sums per split of D, and for distances from products the norms.
// Does    see direct.inl and gemm.inl. Pairs whose subtraction cancels too much are computed again from the
// differences.
//
// The result has the same bits for any number of threads and any batch: the way depends on the number of classes alone,
// and the splits on D alone; blocks are added in order within a split, in double, and splits in order; within a block
// every pair goes through the same instructions.
#include "distances.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "half.h"
#include "kernels.h"
#include "parallel.h"

namespace e2cm {
namespace {

constexpr int64_t kGroupRows = 128;      // rows per task: they share the preparation of the class vectors
constexpr int64_t kMaxInPlaceRows = 16;  // up to here float32 class vectors are not copied to scratch: it costs more

}  // namespace

// How the work is divided: splits of D, groups of rows, parts of the classes.
struct PairSums::Plan {
  int threads;
  int64_t group_rows, groups;
  int64_t part_classes, parts;
  int64_t scratch;  // floats per thread

  Plan(const Rows& x, int64_t classes, int64_t splits, int allowed)
      // Products: preparing a row or a class vector costs about as much as four comparisons.
      : threads(useful_threads(
            allowed, x.dim * (x.rows * classes + (classes <= kMaxDirectClasses ? 0 : 4 * (x.rows + classes))))),
        group_rows(std::min(kGroupRows, round_up(x.rows, 4))),
        part_classes(classes) {
    const auto tasks = [&] { return ceil_div(x.rows, group_rows) * ceil_div(classes, part_classes) * splits; };
    const int64_t panel = kernels().panel, wanted = threads > 1 ? 2 * threads : 1;
    // Smaller parts of the classes mean that rows are prepared more often, and the other way round.
    while (tasks() < wanted && part_classes > 2 * panel && part_classes > kMaxDirectClasses)
      part_classes = round_up(part_classes / 2, panel);
    while (tasks() < wanted && group_rows > 4) group_rows = round_up(group_rows / 2, 4);
    groups = ceil_div(x.rows, group_rows);
    parts = ceil_div(classes, part_classes);
    const int64_t direct = classes * kScratchStride * kDirectBlocks;
    const int64_t products = group_rows * kScratchStride + kBlock * panel;
    scratch = round_up(classes <= kMaxDirectClasses ? direct : products, 1024);
  }
};

PairSums::PairSums(HeadKind kind, const Rows& x, const Rows& classes, const float* center, const void* packed,
                   int threads)
    : isa_(kernels()),  // a wrong E2CM_ISA throws here, on the calling thread
      x_(x),
      classes_(classes),
      center_(center),
      kind_(kind),
      direct_(classes.rows <= kMaxDirectClasses),
      norms_(kind == HeadKind::distances && !direct_),
      splits_(x.dim),
      packed_(classes.rows, x.dim, direct_ ? nullptr : const_cast<void*>(packed)),
      row_stride_(round_up(x.rows, kLanes)),
      class_stride_(direct_ ? row_stride_ : 1),
      ld_(direct_ ? 1 : round_up(classes.rows, kLanes)),
      split_stride_(row_stride_ * (direct_ ? classes.rows : ld_)),
      size_(splits_.count * (split_stride_ + (norms_ ? row_stride_ + ld_ : 0))),
      memory_(size_),
      sums_(memory_.get()),
      row_norms_(norms_ ? sums_ + splits_.count * split_stride_ : nullptr),
      class_norms_(norms_ ? row_norms_ + splits_.count * row_stride_ : nullptr) {
  if (x.rows > 0) compute(Plan(x, classes.rows, splits_.count, threads));
}

int64_t PairSums::rows_that_fit(int64_t dim, int64_t classes) {
  const int64_t sums = int64_t{1} << 23;
  return std::max(kGroupRows, sums / (Splits(dim).count * classes) / kGroupRows * kGroupRows);
}

void PairSums::compute(const Plan& plan) {
  Buffer<float> scratch(plan.threads * plan.scratch);
  std::fill_n(memory_.get(), size_, 0.0);
  if (packed_ && norms_) std::copy_n(packed_.norms(), packed_.norms_size(), class_norms_);
  parallel_for(splits_.count * plan.groups * plan.parts, plan.threads, [&](int64_t index, int thread) {
    const int64_t first_row = index / plan.parts % plan.groups * plan.group_rows;
    const int64_t first_class = index % plan.parts * plan.part_classes;
    const Task task{index / plan.parts / plan.groups, first_row, std::min(plan.group_rows, x_.rows - first_row),
                    first_class, std::min(plan.part_classes, classes_.rows - first_class)};
    float* const own = scratch.get() + thread * plan.scratch;
    direct_ ? add_direct(task, own) : add_products(task, own);
  });
}

// body(first feature, number of features) for all blocks of a split, `blocks_each` at a time.
template <class Body>
void PairSums::for_blocks(int64_t split, int64_t blocks_each, const Body& body) const {
  const int64_t end = splits_.first_block(split + 1);
  for (int64_t block = splits_.first_block(split); block < end; block += blocks_each) {
    const int64_t at = block * kBlock;
    body(at, std::min({blocks_each * kBlock, end * kBlock - at, x_.dim - at}));
  }
}

void PairSums::add_direct(const Task& task, float* scratch) {
  const bool in_place = task.rows <= kMaxInPlaceRows && classes_.dtype == DType::f32;
  double* const sums = sums_ + task.split * split_stride_ + task.first_row;
  const auto run = kind_ == HeadKind::distances ? isa_.add_squares : isa_.add_dots;
  const auto add = [&](int64_t at, int64_t n, const DirectMeans& means) {
    run(element(x_, task.first_row, at), x_.dtype, x_.stride, task.rows, n, means, sums, row_stride_);
  };
  const int64_t block = classes_.rows * kScratchStride, size = size_of(classes_.dtype);
  for_blocks(task.split, kDirectBlocks, [&](int64_t at, int64_t n) {
    const int64_t whole = in_place ? n / kPad * kPad : 0, rest = n - whole;
    if (whole) {
      const float* const means = reinterpret_cast<const float*>(element(classes_, 0, at));
      add(at, whole, {means, classes_.rows, classes_.stride, kBlock, nullptr, 0, 0});
    }
    if (!rest) return;
    for (int64_t i = 0; i < rest; i += kBlock)
      isa_.load_block(element(classes_, 0, at + whole + i), classes_.dtype, classes_.stride, nullptr, classes_.rows,
                      std::min(kBlock, rest - i), scratch + i / kBlock * block, nullptr);
    const char* const next = in_place || at + n == x_.dim ? nullptr : element(classes_, 0, at + n);
    add(at + whole, rest, {scratch, classes_.rows, kScratchStride, block, next, classes_.stride * size, size});
  });
}

void PairSums::add_products(const Task& task, float* scratch) {
  const int64_t x_size = size_of(x_.dtype);
  const int64_t end = task.first_class + task.classes;
  float *const panel = scratch, *const rows = scratch + kBlock * isa_.panel;
  double* const products = sums_ + task.split * split_stride_ + task.first_row * ld_;
  // Tasks that share rows or classes compute the same norms: the first of them writes.
  double* const row_norms =
      norms_ && !task.first_class ? row_norms_ + task.split * row_stride_ + task.first_row : nullptr;
  double* const class_norms = norms_ && !packed_ && !task.first_row ? class_norms_ + task.split * ld_ : nullptr;

  for_blocks(task.split, 1, [&](int64_t at, int64_t n) {
    const float* const center = center_ ? center_ + at : nullptr;
    const bool last = at + n == x_.dim;
    PrefetchQueue next_rows{element(x_, task.first_row, at + n), last ? 0 : task.rows, x_.stride * x_size,
                            kBlock * x_size};
    isa_.load_block(element(x_, task.first_row, at), x_.dtype, x_.stride, center, task.rows, n, rows, row_norms);
    for (int64_t k = task.first_class; k < end; k += isa_.panel) {
      const int64_t count = std::min(isa_.panel, end - k);
      const bool last_panel = k + isa_.panel >= end;
      PrefetchQueue next_means{};
      if (!last_panel)
        next_means = next_classes(at, k + isa_.panel, end);
      else if (!last)
        next_means = next_classes(at + n, task.first_class, end);
      if (!packed_)
        isa_.pack_means(element(classes_, k, at), classes_.dtype, classes_.stride, center, count, n, panel,
                        class_norms ? class_norms + k : nullptr);
      isa_.add_products(rows, task.rows, packed_ ? packed_.at(at / kBlock, k) : panel, count, n, products + k, ld_,
                        next_means, next_rows);
    }
  });
}

// The block that starts at feature `at`, of the panel that starts at class k.
PrefetchQueue PairSums::next_classes(int64_t at, int64_t k, int64_t end) const {
  if (packed_) {
    constexpr int64_t bytes = kBlock * sizeof(float);
    const int64_t numbers = std::min(isa_.panel, round_up(end - k, kLanes)) * splits_.block_size(at / kBlock);
    return {reinterpret_cast<const char*>(packed_.at(at / kBlock, k)), numbers / kBlock, bytes, bytes};
  }
  const int64_t size = size_of(classes_.dtype);
  return {element(classes_, k, at), std::min(isa_.panel, end - k), classes_.stride * size, kBlock * size};
}

Distances::Distances(const Rows& x, const HeadParams& head, int threads)
    : PairSums(HeadKind::distances, x, head.vectors, head.center, head.packed, threads), scale_(head.per_class) {}

// For pairs that distance_lanes calls inaccurate: the sum of squared differences; in double if float32 cannot hold it.
float Distances::exact_distance(int64_t row, int64_t mean) const {
  const void *const x = element(x_, row, 0), *const m = element(classes_, mean, 0);
  if (!direct_) {
    const double square = isa_.squared_distance(x, x_.dtype, m, classes_.dtype, x_.dim);
    if (square >= kMinSquare && square <= kMaxSquare) return static_cast<float>(std::sqrt(square));
  }
  return visit(x, x_.dtype, [&](const auto* a) {
    return visit(m, classes_.dtype, [&](const auto* b) {
      double total = 0;
      for (int64_t i = 0; i < x_.dim; ++i) {
        const double difference = static_cast<double>(to_float(a[i])) - to_float(b[i]);
        total += difference * difference;
        if (!(total <= std::numeric_limits<double>::max())) break;  // NaN or infinity: further terms change nothing
      }
      return static_cast<float>(std::sqrt(total));
    });
  });
}

void Distances::lanes(int64_t first, float* out) const {
  direct_ ? lanes_from_squares(first, out) : lanes_from_products(first, out);
}

void Distances::lanes_from_squares(int64_t first, float* out) const {
  float scale[kLanes];
  for (int64_t k = 0; k < classes_.rows; ++k) {
    std::fill_n(scale, kLanes, scale_ ? scale_[k] : 1.f);
    float* const distances = out + k * kLanes;
    const uint32_t inaccurate = isa_.distance_lanes(sums_ + k * row_stride_ + first, splits_.count, split_stride_,
                                                    nullptr, 0, scale, distances);
    for (int64_t j = 0; inaccurate >> j; ++j)
      if (inaccurate >> j & 1 && first + j < x_.rows) distances[j] = exact_distance(first + j, k) / scale[j];
  }
}

// Products are stored row by row: a class per lane, and the result is transposed.
void Distances::lanes_from_products(int64_t first, float* out) const {
  const auto over_splits = [&](const double* norms, int64_t stride, double (&sum)[kLanes]) {
    std::fill_n(sum, kLanes, 0.0);
    for (int64_t s = 0; s < splits_.count; ++s, norms += stride)
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
      const uint32_t inaccurate = isa_.distance_lanes(sums_ + (first + j) * ld_ + k, splits_.count, split_stride_,
                                                      class_norms, row_norms[j], scale, distances);
      for (int64_t i = 0; inaccurate >> i; ++i)
        if (inaccurate >> i & 1 && i < count && first + j < x_.rows)
          distances[i] = exact_distance(first + j, k + i) / scale[i];
    }
    isa_.transpose(square, DType::f32, kLanes, kLanes, count, out + k * kLanes, kLanes);
  }
}

Logits::Logits(const Rows& x, const HeadParams& head, int threads)
    : PairSums(HeadKind::logits, x, head.vectors, nullptr, head.packed, threads), bias_(head.per_class) {}

void Logits::lanes(int64_t first, float* out) const {
  for (int64_t k = 0; k < classes_.rows; ++k) {
    double logits[kLanes];
    std::fill_n(logits, kLanes, static_cast<double>(bias_[k]));
    const double* sums = sums_ + first * ld_ + k * class_stride_;
    for (int64_t s = 0; s < splits_.count; ++s, sums += split_stride_)
      for (int64_t j = 0; j < kLanes; ++j) logits[j] += sums[j * ld_];
    for (int64_t j = 0; j < kLanes; ++j) out[k * kLanes + j] = -static_cast<float>(logits[j]);
  }
}

}  // namespace e2cm
