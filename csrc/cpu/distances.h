// Distances or logits of all pairs of a row of the batch and a class.
#pragma once

#include "../api.h"
#include "buffer.h"
#include "kernels.h"
#include "panels.h"

namespace e2cm {

// The sums over D from which they are made. See distances.cpp for the two ways to compute them.
class PairSums {
 public:
  // The number of rows whose sums take some tens of megabytes.
  static int64_t rows_that_fit(int64_t dim, int64_t classes);

 protected:
  PairSums(HeadKind kind, const Rows& x, const Rows& classes, const float* center, const void* packed, int threads);

  const Kernels& isa_;
  const Rows x_;
  const Rows classes_;  // a vector per class
  const float* const center_;
  const HeadKind kind_;
  const bool direct_;  // few classes: direct sums; else products
  const bool norms_;   // distances from products also need the norms
  const Splits splits_;
  const Panels packed_;         // of the classes, if the caller has packed them
  const int64_t row_stride_;    // rows, rounded up to whole lanes
  const int64_t class_stride_;  // sums are stored as the tiles write them: direct sums class by class,
  const int64_t ld_;            // products row by row, padded to whole vector registers
  const int64_t split_stride_;
  const int64_t size_;  // of all sums: one allocation, since allocations dominate the time of a small call
  Buffer<double> memory_;
  double* const sums_;         // [splits, classes, row_stride] or [splits, row_stride, ld]
  double* const row_norms_;    // [splits, row_stride]
  double* const class_norms_;  // [splits, ld]

 private:
  struct Plan;
  struct Task {  // one split of D, some rows, some classes
    int64_t split, first_row, rows, first_class, classes;
  };
  void compute(const Plan& plan);
  template <class Body>
  void for_blocks(int64_t split, int64_t blocks_each, const Body& body) const;
  void add_direct(const Task& task, float* scratch);
  void add_products(const Task& task, float* scratch);
  PrefetchQueue next_classes(int64_t at, int64_t k, int64_t end) const;
};

class Distances : public PairSums {
 public:
  Distances(const Rows& x, const HeadParams& head, int threads);

  // out[k * kLanes + lane] = distance of row first + lane to mean k, divided by scale[k] if the head has scales.
  // `first` is a multiple of kLanes. Lanes after the last row are undefined.
  void lanes(int64_t first, float* out) const;

 private:
  void lanes_from_squares(int64_t first, float* out) const;
  void lanes_from_products(int64_t first, float* out) const;
  float exact_distance(int64_t row, int64_t mean) const;
  const float* const scale_;
};

class Logits : public PairSums {
 public:
  Logits(const Rows& x, const HeadParams& head, int threads);

  // out[k * kLanes + lane] = minus the logit of row first + lane for class k. `first` as above.
  void lanes(int64_t first, float* out) const;

 private:
  const float* const bias_;
};

}  // namespace e2cm
