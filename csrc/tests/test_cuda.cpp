// The CUDA kernels, run block by block on the CPU (emulation/cuda_runtime.h): against the equations, and with threads
// and blocks in different orders, which must not change results. Memory has exact sizes: an access beyond it ends the
// process.
#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "cuda/plan.h"
#include "data.h"

using namespace e2cm;
using namespace e2cm::test;
using emulation::Order;

namespace {

constexpr Order kOrders[] = {Order::forwards, Order::backwards, Order::shuffled};

void in_order(Order order, unsigned seed = 1) {
  emulation::state().order = order;
  emulation::state().seed = seed;
}

// Device memory, aligned to 256 bytes. It starts as NaN.
struct Workspace {
  explicit Workspace(int64_t bytes) : memory(bytes + 256, 0xFF) {}
  void* at() const { return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 255) / 256 * 256); }
  Exact<uint8_t> memory;
};

// Rows that start at multiples of 16 bytes, as those of most tensors do. Those of a Matrix do not.
struct Aligned {
  explicit Aligned(const Matrix& from) : stride(cuda::round_up(from.dim(), 8)), memory(from.rows() * stride * 4 + 16) {
    const int64_t size = size_of(from.dtype());
    at = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 15) / 16 * 16);
    std::memset(memory.data(), 0xFF, static_cast<size_t>(memory.size()));
    for (int64_t r = 0; r < from.rows(); ++r)
      std::memcpy(at + r * stride * size, row_of(from, r), static_cast<size_t>(from.dim() * size));
    rows = {at, from.dtype(), from.rows(), from.dim(), stride};
  }
  static const char* row_of(const Matrix& m, int64_t r) { return static_cast<const char*>(m.view(r, 1).data); }
  int64_t stride;
  Exact<char> memory;
  char* at;
  Rows rows;
};

void launch(cuda::Exit exit) {
  const Workspace workspace(cuda::exit_workspace(exit));
  CHECK(cuda::launch_exit(exit, workspace.at(), nullptr) == cudaSuccess);
}

cuda::Exit exit_of(const Problem& p, const Rows& x, const Rows& vectors, HeadKind kind) {
  cuda::Exit exit{};
  exit.input = x;
  exit.head = p.head();
  exit.head.kind = kind;
  exit.head.vectors = vectors;
  return exit;
}

std::vector<double> penalties_of(const Problem& p, int64_t row) {
  std::vector<double> z;
  for (int64_t k = 0; k < p.means.rows(); ++k) {
    const float scale = p.scale[k];
    z.push_back(scale > 0 && scale < kInff ? p.distance(row, k) / scale : kInf);
  }
  return z;
}

double largest_finite(const std::vector<double>& z) {
  double most = 0;
  for (const double value : z)
    if (std::isfinite(value)) most = std::max(most, value);
  return most;
}

}  // namespace

TEST(splits_cover_every_number_once) {
  for (const int64_t classes : {int64_t{1}, int64_t{10}, int64_t{32}, int64_t{33}, int64_t{1000}, int64_t{1} << 40}) {
    for (const int64_t dim : {int64_t{0}, int64_t{1}, int64_t{511}, int64_t{512}, int64_t{513}, int64_t{1024},
                              int64_t{1025}, int64_t{65537}, int64_t{131071}, int64_t{131072}, int64_t{131073},
                              int64_t{802816}, (int64_t{1} << 31) + 7, (int64_t{1} << 40) + 1}) {
      const cuda::Splits splits = cuda::splits_of(dim, classes);
      const bool few = classes <= cuda::kMaxDirectClasses;
      CHECK(splits.count >= 1 && splits.count <= (few ? cuda::kDirectSplits : cuda::kGemmSplits));
      CHECK(splits.each % (few ? cuda::kDirectStep : cuda::kGemmStep) == 0 && splits.each > 0);
      CHECK(splits.count * splits.each >= dim);
      CHECK(dim == 0 || (splits.count - 1) * splits.each < dim);  // none is empty
    }
  }
}

TEST(workspaces_do_not_overlap_and_grids_are_legal) {
  for (const int64_t rows : {int64_t{0}, int64_t{1}, int64_t{63}, int64_t{64}, int64_t{1000003}, int64_t{1} << 33}) {
    for (const int64_t classes : {int64_t{1}, int64_t{10}, int64_t{32}, int64_t{33}, int64_t{1000}, int64_t{1} << 21}) {
      for (const int64_t dim : {int64_t{0}, int64_t{1}, int64_t{4096}, int64_t{802816}}) {
        const cuda::Workspace w = cuda::workspace_for(rows, dim, classes, true);
        const int64_t splits = cuda::splits_of(dim, classes).count;
        CHECK(w.rows >= 1 && (w.rows == rows || w.rows % cuda::kGemmTile == 0 || rows == 0));
        CHECK(w.features == 0 && w.sums >= w.rows * dim * 4);
        CHECK(w.row_norms >= w.sums + splits * w.rows * classes * 4);
        CHECK(w.bytes >= w.counters + w.counted * 4);
        CHECK(w.counters % 256 == 0 && w.sums % 256 == 0 && w.bytes % 256 == 0);
        CHECK(cuda::ceil_div(classes, cuda::kGemmTile) <= 65535 && splits <= 65535);
        CHECK(cuda::ceil_div(w.rows, cuda::kDirectRows) < int64_t{1} << 31);
        for (const int64_t processors : {1, 4, 132, 1000}) {
          const int64_t each = cuda::direct_block_rows(w.rows, splits, processors);
          CHECK(each % cuda::kDirectRows == 0 && each > 0);
          if (classes <= cuda::kMaxDirectClasses) CHECK(cuda::ceil_div(w.rows, each) <= w.counted);
        }
      }
    }
  }
}

TEST(distances_of_all_shapes_in_any_order) {
  Random random(1);
  int turn = 0;
  for (const Shape& shape : shapes(random, times(1), at_most(3e5))) {
    const DType type = random.pick(kDTypes);
    Problem p(shape.batch, shape.classes, shape.dim, type, DType::f32, random.chance(0.5), random.chance(0.5) ? 3 : 0);
    p.fill(random, random.chance(0.5) ? 0 : 3);
    state().context = "distances " + p.text();
    const Aligned x(p.x), vectors(p.means);
    std::vector<std::vector<float>> seen;
    for (const bool aligned : {false, true}) {
      in_order(kOrders[turn++ % 3]);
      const Exact<float> distances(shape.batch * shape.classes, kUnsetFloat);
      cuda::Exit exit = exit_of(p, aligned ? x.rows : p.x.view(), p.means.view(), HeadKind::distances);
      // The class vectors of a call are dense; padded ones are as good.
      if (aligned) exit.head.vectors = vectors.rows;
      exit.head.per_class = nullptr;
      exit.distances = distances.data();
      launch(exit);
      for (int64_t b = 0; b < shape.batch; ++b)
        for (int64_t k = 0; k < shape.classes; ++k)
          CHECK_CLOSE(distances[b * shape.classes + k], p.distance(b, k), 1e-5 * p.distance(b, k));
      seen.push_back(distances.values());
    }
    CHECK(seen[0] == seen[1]);
  }
}

TEST(steps_match_the_equations) {
  Random random(2);
  int turn = 0;
  for (const Shape& shape : shapes(random, times(0.5), at_most(2e5))) {
    Problem p(shape.batch, shape.classes, shape.dim, random.pick(kDTypes), DType::f32, random.chance(0.5));
    p.fill(random, 0);
    if (random.chance(0.3)) p.scale[random.below(shape.classes)] = random.chance(0.5) ? 0.f : kNanf;
    if (shape.batch > 2 && random.chance(0.5)) p.x.set(1, random.below(shape.dim), random.chance(0.5) ? kNan : kInf);
    state().context = "steps " + p.text();
    in_order(kOrders[turn++ % 3]);
    const Out all(shape.batch, shape.classes), some(shape.batch + 2, shape.classes);
    cuda::Exit exit = exit_of(p, p.x.view(), p.means.view(), HeadKind::distances);
    exit.epilogue.out = all.view(false);
    launch(exit);

    // Rows with a confidence above the median leave; the output rows of the others must not change.
    std::vector<float> order = all.confidence.values();
    std::sort(order.begin(), order.end(), [](float a, float b) { return a < b || (b != b && a == a); });
    const float threshold = shape.batch ? order[static_cast<size_t>(shape.batch / 2)] : 0;
    const Exact<int64_t> ids(shape.batch), bad(1, 0);
    for (int64_t b = 0; b < shape.batch; ++b) ids[b] = (b + 1) % shape.batch + 2;
    const Exact<uint8_t> stays(shape.batch, 7);
    exit.epilogue.out = some.view();
    exit.epilogue.ids = ids.data();
    exit.epilogue.threshold = threshold;
    exit.epilogue.exit_number = 5;
    exit.epilogue.stays = stays.data();
    exit.epilogue.bad_ids = bad.data();
    launch(exit);
    CHECK(bad[0] == 0 && some.untouched(0) && some.untouched(1));
    for (int64_t b = 0; b < shape.batch; ++b) {
      const std::vector<double> z = penalties_of(p, b);
      check_answer(all, b, z, 1e-5 * largest_finite(z));
      const bool leaves = all.confidence[b] > threshold;
      CHECK(stays[b] == !leaves);
      CHECK(leaves ? same_row(some, ids[b], all, b) && some.exit[ids[b]] == 5 : some.untouched(ids[b]));
    }
  }
}

TEST(logits_of_few_and_many_classes) {
  Random random(3);
  for (const int64_t classes : {1, 3, 10, 32, 33, 100}) {
    for (const int64_t dim : {1, 37, 1100}) {
      Problem p(5, classes, dim, random.pick(kDTypes), DType::f32, false);
      p.fill(random, 0, 0.1);
      state().context = "logits " + p.text();
      const Out out(5, classes);
      cuda::Exit exit = exit_of(p, p.x.view(), p.means.view(), HeadKind::logits);
      exit.epilogue.out = out.view(false);
      launch(exit);
      for (int64_t b = 0; b < 5; ++b) {
        std::vector<double> z;
        double size = 1;
        for (int64_t k = 0; k < classes; ++k) {
          double logit = p.scale[k], magnitude = 0;
          for (int64_t i = 0; i < dim; ++i) {
            logit += p.x.at(b, i) * p.means.at(k, i);
            magnitude += std::fabs(p.x.at(b, i) * p.means.at(k, i));
          }
          z.push_back(-logit);
          size = std::max(size, magnitude);
        }
        check_answer(out, b, z, 2e-6 * size);
      }
    }
  }
}

TEST(invalid_ids_are_reported_and_not_written) {
  Random random(4);
  Problem p(5, 3, 20);
  p.fill(random, 0);
  for (const int64_t wrong : {int64_t{-1}, int64_t{5}, int64_t{1} << 40}) {
    const Out out(5, 3);
    const Exact<int64_t> ids(std::vector<int64_t>{0, 1, wrong, 3, 4}), bad(1, 0);
    const Exact<uint8_t> stays(5);
    cuda::Exit exit = exit_of(p, p.x.view(), p.means.view(), HeadKind::distances);
    exit.epilogue.out = out.view();
    exit.epilogue.ids = ids.data();
    exit.epilogue.threshold = -1;
    exit.epilogue.stays = stays.data();
    exit.epilogue.bad_ids = bad.data();
    launch(exit);
    CHECK(bad[0] == 1 && out.untouched(2) && !out.untouched(1));
  }
}

TEST(exited_rows_are_skipped) {
  Random random(5);
  Matrix scores(DType::f32, 40, 7, 7);
  for (int64_t b = 0; b < 40; ++b)
    for (int64_t k = 0; k < 7; ++k) scores.set(b, k, 3 * random.normal());
  const Out out(40, 7);
  const Exact<uint8_t> stays(40);
  for (int64_t b = 0; b < 40; ++b) stays[b] = b % 3 != 0;
  cuda::Epilogue epilogue{};
  epilogue.out = out.view();
  epilogue.threshold = 0.7f;
  epilogue.stays = stays.data();
  epilogue.marked = true;
  CHECK(cuda::launch_decide(scores.view(), nullptr, epilogue, nullptr) == cudaSuccess);
  for (int64_t b = 0; b < 40; ++b) {
    std::vector<double> z;
    for (int64_t k = 0; k < 7; ++k) z.push_back(-scores.at(b, k));
    const bool leaves = b % 3 != 0 && std::exp(Truth(z).log_confidence) > 0.7;
    CHECK(out.untouched(b) == !leaves);
    CHECK(stays[b] == (b % 3 != 0 && !leaves));
    if (leaves) check_answer(out, b, z, 0);
  }
}

TEST(statistics_match_the_cpu_kernels) {
  Random random(6);
  for (int i = 0; i < times(60); ++i) {
    const int64_t channels = random.pick({1, 2, 3, 16, 31, 33, 64, 127, 129, 150}), height = 1 + random.below(9);
    const int64_t width = random.chance(0.2) ? 40 + random.below(60) : 1 + random.below(9);
    const DType type = random.pick(kDTypes);
    const int64_t rows = random.below(4), numbers = channels * height * width, gap = random.below(3);
    Matrix x(type, rows, numbers, numbers + gap);
    for (int64_t b = 0; b < rows; ++b)
      for (int64_t j = 0; j < numbers; ++j) x.set(b, j, random.normal());
    if (rows > 1 && random.chance(0.3)) x.set(1, random.below(numbers), random.chance(0.5) ? kNan : -kInf);
    const auto grid = [&]() -> Grid {
      if (random.chance(0.3)) return {0, 0};
      return {1 + random.below(height), 1 + random.below(std::min<int64_t>(width, 50))};
    };
    Statistics wanted{grid(), grid(), grid(), random.below((channels + 1) / 2 + 1)};
    if (wanted.size(1) == 0) wanted.max = {1, 1};
    const Maps maps{x.view().data, type, rows, channels, height, width, numbers + gap, random.chance(0.5)};
    const int64_t size = wanted.size(channels);
    const Exact<float> expected(rows * size), got(rows * size, kUnsetFloat);
    statistics(maps, wanted, expected.data(), 1);
    in_order(kOrders[i % 3]);
    const Workspace workspace(cuda::statistics_workspace(rows, channels, wanted));
    CHECK(cuda::launch_statistics(maps, wanted, got.data(), workspace.at(), nullptr) == cudaSuccess);
    const int64_t pairs = channels * wanted.cells();
    for (int64_t j = 0; j < rows * size; ++j) {
      const bool root = j % size >= pairs;  // of a mean product: only as exact as the product
      const double a = root ? std::fabs(got[j]) * got[j] : got[j];
      const double b = root ? std::fabs(expected[j]) * expected[j] : expected[j];
      CHECK_CLOSE(a, b, 1e-5);
    }
  }
}

TEST(heads_on_statistics) {
  Random random(7);
  const int64_t rows = 9, channels = 20, height = 6, width = 5;
  Matrix x(DType::f16, rows, channels * height * width, channels * height * width);
  for (int64_t b = 0; b < rows; ++b)
    for (int64_t j = 0; j < x.dim(); ++j) x.set(b, j, random.normal());
  const Statistics wanted{{2, 2}, {1, 1}, {2, 1}, 3};
  const Maps maps{x.view().data, DType::f16, rows, channels, height, width, x.dim(), true};
  for (const int64_t classes : {4, 40}) {
    Problem p(rows, classes, wanted.size(channels));
    p.fill(random, 0, 0.05);
    const Exact<float> features(rows * p.x.dim());
    statistics(maps, wanted, features.data(), 1);
    for (int64_t b = 0; b < rows; ++b)
      for (int64_t j = 0; j < p.x.dim(); ++j) p.x.set(b, j, features[b * p.x.dim() + j]);
    const Out out(rows, classes);
    cuda::Exit exit = exit_of(p, Rows{}, p.means.view(), HeadKind::distances);
    exit.input = Pooled{maps, wanted};
    exit.epilogue.out = out.view(false);
    launch(exit);
    for (int64_t b = 0; b < rows; ++b) {
      const std::vector<double> z = penalties_of(p, b);
      check_answer(out, b, z, 2e-5 * largest_finite(z));
    }
  }
}

TEST(kept_rows_of_any_number_of_rows) {
  Random random(8);
  int turn = 0;
  for (const int64_t rows : {0, 1, 7, 8, 31, 32, 33, 255, 256, 8191, 8192, 8193, 16385, 20000}) {
    if (rows > 9000 && effort() < 0.1) continue;
    for (const double share : {0.0, 0.5, 1.0}) {
      const Exact<uint8_t> mask(rows);
      const Exact<int64_t> ids(rows), keep(rows, kUnset), kept(rows, kUnset), count(1, kUnset);
      for (int64_t i = 0; i < rows; ++i) mask[i] = random.uniform() < share ? 3 : 0, ids[i] = 1000 - i;
      in_order(kOrders[turn++ % 3]);
      const Workspace workspace(cuda::kept_rows_workspace(rows));
      CHECK(cuda::launch_kept_rows(mask.data(), rows, ids.data(), keep.data(), kept.data(), count.data(),
                                   workspace.at(), nullptr) == cudaSuccess);
      int64_t wanted = 0;
      for (int64_t i = 0; i < rows; ++i) {
        if (!mask[i]) continue;
        CHECK(keep[wanted] == i && kept[wanted] == ids[i]);
        ++wanted;
      }
      CHECK(count[0] == wanted);
      for (int64_t i = wanted; i < rows; ++i) CHECK(keep[i] == kUnset && kept[i] == kUnset);
    }
  }
}

TEST(gathered_rows_of_any_alignment) {
  Random random(9);
  const int64_t sizes[] = {1, 2, 3, 4, 8, 16, 48, 100, 1000, 4096, 17000};
  for (int i = 0; i < times(60); ++i) {
    const int64_t bytes = random.pick(sizes), step = random.pick({1, 4, 16});
    const int64_t stride = bytes + step * random.below(4), offset = step * random.below(3), rows = 1 + random.below(20);
    const int64_t count = random.below(rows + 1);
    const Exact<unsigned char> memory(16 + offset + (rows - 1) * stride + bytes),
        room(16 + offset + rows * bytes, 0xEE);
    const auto from = [&](const Exact<unsigned char>& m) {
      return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(m.data()) + 15) / 16 * 16 + offset);
    };
    // The 15 bytes for the alignment are at the beginning: the end is exact only for aligned rows.
    for (int64_t j = 0; j < memory.size(); ++j) memory[j] = static_cast<unsigned char>(random.below(256));
    const Exact<int64_t> index(rows), counted(1, count);
    for (int64_t j = 0; j < rows; ++j) index[j] = random.below(rows);
    in_order(kOrders[i % 3]);
    const bool told = random.chance(0.5);
    CHECK(cuda::launch_gather_rows(from(memory), bytes, stride, index.data(), told ? counted.data() : nullptr, rows,
                                   from(room), nullptr) == cudaSuccess);
    const int64_t wanted = !told ? rows : count < rows ? count : 0;  // if all rows are kept, nothing is copied
    for (int64_t j = 0; j < wanted; ++j)
      CHECK(std::memcmp(from(room) + j * bytes, from(memory) + index[j] * stride, static_cast<size_t>(bytes)) == 0);
    for (int64_t j = wanted * bytes; j < rows * bytes; ++j) CHECK(from(room)[j] == 0xEE);
  }
}

TEST(empty_launches_are_no_error) {
  cuda::Exit exit{};
  exit.head = {HeadKind::distances, {nullptr, DType::f32, 3, 4, 4}, nullptr};
  exit.input = Rows{nullptr, DType::f32, 0, 4, 4};
  launch(exit);
  CHECK(cuda::launch_decide({nullptr, DType::f32, 0, 3, 3}, nullptr, {}, nullptr) == cudaSuccess);
  CHECK(cuda::launch_gather_rows(nullptr, 0, 0, nullptr, nullptr, 9, nullptr, nullptr) == cudaSuccess);
  CHECK(cuda::launch_gather_rows(nullptr, 8, 8, nullptr, nullptr, 0, nullptr, nullptr) == cudaSuccess);
}

// The CPU instruction set does not matter here.
int main() { return run_tests_here(); }
