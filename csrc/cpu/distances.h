// All squared norms and products between the rows of a batch and the class means, and the distances they give.
#pragma once

#include "../exit_step.h"
#include "buffer.h"
#include "kernels.h"

namespace e2cm {

class Distances {
 public:
  Distances(const Rows& x, const ClassMeans& head, int threads);

  // How many rows take no more than some tens of megabytes.
  static int64_t rows_that_fit(int64_t dim, int64_t means);

  // out[k * kLanes + lane] = distance of row first + lane to mean k, over scale[k] if there are scales. `first` is a
  // multiple of kLanes; lanes behind the last row hold nothing of meaning.
  void lanes(int64_t first, float* out) const;

 private:
  struct Plan;
  struct Piece {  // of the work: one split of D, some rows, some means
    int64_t split, first, rows, first_mean, means;
  };
  void compute(const Plan& plan);
  template <class Body>
  void for_blocks(int64_t split, const Body& body) const;
  void add_squares(const Piece& piece, float* scratch);
  void add_products(const Piece& piece, float* scratch);
  float the_long_way(int64_t row, int64_t mean) const;

  const Kernels& isa_;
  const Rows x_;
  const ClassMeans head_;
  const bool few_;            // classes: sums are squares of distances, else products
  const int64_t splits_;      // D is cut into this many parts, a number that depends on D alone
  const int64_t row_stride_;  // rows, rounded up to whole lanes
  const int64_t ld_;          // means, rounded up to whole vectors where they are packed
  const int64_t size_;        // of all sums together: one piece of memory, since a small call is mostly allocation
  Buffer<double> memory_;
  double* const sums_;        // [splits, row_stride, ld]
  double* const row_norms_;   // [splits, row_stride]
  double* const mean_norms_;  // [splits, ld]
};

}  // namespace e2cm
