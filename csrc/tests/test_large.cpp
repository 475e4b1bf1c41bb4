// Offsets beyond 2^31 elements and 2^32 bytes, in address space that is reserved and mostly untouched.
#include "data.h"

using namespace e2cm;
using namespace e2cm::test;

#ifndef _WIN32
#include <sys/mman.h>

namespace {

class Sparse {  // zeros; only touched pages take memory
 public:
  explicit Sparse(int64_t bytes) : bytes_(static_cast<size_t>(bytes)) {
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  ~Sparse() {
    if (there()) munmap(memory_, bytes_);
  }
  Sparse(const Sparse&) = delete;
  Sparse& operator=(const Sparse&) = delete;
  bool there() const {
    if (memory_ == MAP_FAILED) std::printf("no address space of %zu bytes: skipped\n", bytes_);
    return memory_ != MAP_FAILED;
  }
  template <class T>
  T* at() const {
    return static_cast<T*>(memory_);
  }

 private:
  size_t bytes_;
  void* memory_;
};

constexpr int64_t kGap = (int64_t{1} << 30) + 3;

}  // namespace

TEST(large_row_strides) {
  const int64_t batch = 5, classes = 3, dim = 530;
  const Sparse rows((batch - 1) * kGap * 2 + dim * 2), far_means((classes - 1) * kGap * 4 + dim * 4);
  if (!rows.there() || !far_means.there()) return;
  Random random(1);
  Problem filled(batch, classes, dim, DType::bf16, DType::f32, false);
  filled.fill(random, 1);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < dim; ++i) rows.at<uint16_t>()[b * kGap + i] = kBf16.encode(filled.x.at(b, i));
  for (int64_t k = 0; k < classes; ++k)
    for (int64_t i = 0; i < dim; ++i) far_means.at<float>()[k * kGap + i] = static_cast<float>(filled.means.at(k, i));
  const Rows x{rows.at<void>(), DType::bf16, batch, dim, kGap};
  const HeadParams head{
      HeadKind::distances, {far_means.at<void>(), DType::f32, classes, dim, kGap}, filled.scale.data()};
  const Exact<float> wanted(batch * classes), got(batch * classes);
  class_distances(filled.x.view(), filled.head(), wanted.data(), 1);
  class_distances(x, head, got.data(), 1);
  CHECK(same_bits(wanted.data(), got.data(), batch * classes));

  const Exact<int64_t> index(std::vector<int64_t>{4, 1});
  const Exact<uint16_t> target(2 * dim);
  gather_rows(rows.at<void>(), dim * 2, kGap * 2, index.data(), 2, target.data(), 2);
  for (int64_t i = 0; i < dim; ++i) {
    CHECK(target[i] == kBf16.encode(filled.x.at(4, i)));
    CHECK(target[dim + i] == kBf16.encode(filled.x.at(1, i)));
  }
}

TEST(large_answer_offsets) {  // rows * classes of the answers beyond 2^32
  const int64_t rows = 4400000, classes = 1000, batch = 3;
  const Sparse confidence(rows * 4), prediction(rows * 8), exit(rows * 8), log_probs(rows * classes * 4);
  if (!confidence.there() || !prediction.there() || !exit.there() || !log_probs.there()) return;
  const Answers out{
      rows, classes, confidence.at<float>(), prediction.at<int64_t>(), exit.at<int64_t>(), log_probs.at<float>()};
  const Matrix logits(DType::f32, batch, classes, classes);
  for (int64_t b = 0; b < batch; ++b) logits.set(b, 10 * b, 20);
  const Exact<int64_t> ids(std::vector<int64_t>{rows - 1, 0, rows - 2}), keep(batch);
  CHECK(decide(logits.view(), nullptr, {Rule::confidence, 0.5f, 9, ids.data()}, out, keep.data(), 1) == 0);
  for (int64_t b = 0; b < batch; ++b) {
    CHECK(out.prediction[ids[b]] == 10 * b && out.exit[ids[b]] == 9 && out.confidence[ids[b]] > 0.99f);
    CHECK(out.log_probs[ids[b] * classes + 10 * b] > -0.01f);
    CHECK_CLOSE(out.log_probs[ids[b] * classes + classes - 1], -20, 1e-4);
  }
}
#endif

int main() { return run_tests(); }
