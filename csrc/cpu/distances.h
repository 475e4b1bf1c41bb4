// What the rows of a batch have with each of the classes: distances to their means, or products with their weights.
#pragma once

#include "../api.h"
#include "buffer.h"
#include "kernels.h"
#include "panels.h"

namespace e2cm {

// Sums over D for all pairs of a row and a class. Of what, see distances.cpp.
class PairSums {
 public:
  // How many rows take no more than some tens of megabytes.
  static int64_t rows_that_fit(int64_t dim, int64_t classes);

 protected:
  enum class Of { distances, products };
  PairSums(Of what, const Rows& x, const Rows& classes, const float* center, const void* packed, int threads);

  const Kernels& isa_;
  const Rows x_;
  const Rows classes_;  // a vector each
  const float* const center_;
  const Of what_;
  const bool few_;              // classes: what is wanted is summed up directly
  const bool norms_;            // or distances must be made of products and norms
  const Cuts cuts_;             // of D
  const Panels packed_;         // classes, perhaps
  const int64_t row_stride_;    // rows, rounded up to whole lanes
  const int64_t class_stride_;  // of the sums, which lie as the tiles write them: of few classes, class by class,
  const int64_t ld_;            // of many, row by row, these rounded up to whole vectors
  const int64_t split_stride_;
  const int64_t size_;  // of all sums together: one piece of memory, since a small call is mostly allocation
  Buffer<double> memory_;
  double* const sums_;         // [splits, classes, row_stride] or [splits, row_stride, ld]
  double* const row_norms_;    // [splits, row_stride]
  double* const class_norms_;  // [splits, ld]

 private:
  struct Plan;
  struct Piece {  // of the work: one split of D, some rows, some classes
    int64_t split, first, rows, first_class, classes;
  };
  void compute(const Plan& plan);
  template <class Body>
  void for_blocks(int64_t split, int64_t each, const Body& body) const;
  void add_directly(const Piece& piece, float* scratch);
  void add_products(const Piece& piece, float* scratch);
  Ahead classes_ahead(int64_t at, int64_t k, int64_t end) const;
};

class Distances : public PairSums {
 public:
  Distances(const Rows& x, const HeadParams& head, int threads);

  // out[k * kLanes + lane] = distance of row first + lane to mean k, over scale[k] if there are scales. `first` is a
  // multiple of kLanes; lanes behind the last row hold nothing of meaning.
  void lanes(int64_t first, float* out) const;

 private:
  void lanes_of_few(int64_t first, float* out) const;
  void lanes_of_many(int64_t first, float* out) const;
  float the_long_way(int64_t row, int64_t mean) const;
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
