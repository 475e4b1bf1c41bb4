// kept_rows and gather_rows against plain loops.
#include "data.h"

using namespace e2cm;
using namespace e2cm::test;

TEST(kept_rows_of_masks) {
  Random random(1);
  const uint8_t truths[] = {1, 2, 128, 255};
  for (int i = 0; i < 2000; ++i) {
    const int64_t rows = random.chance(0.5) ? random.below(20) : random.below(600);
    const double share = random.chance(0.2) ? 0 : random.chance(0.2) ? 1 : random.uniform();
    const Exact<uint8_t> mask(rows);
    const Exact<int64_t> keep(rows, kUnset);
    std::vector<int64_t> wanted;
    for (int64_t r = 0; r < rows; ++r) {
      mask[r] = random.uniform() < share ? random.pick(truths) : uint8_t{0};
      if (mask[r]) wanted.push_back(r);
    }
    const int64_t count = kept_rows(mask.data(), rows, keep.data());
    CHECK(count == static_cast<int64_t>(wanted.size()));
    if (count <= rows) CHECK(std::vector<int64_t>(keep.data(), keep.data() + count) == wanted);
  }
  CHECK(kept_rows(nullptr, 0, nullptr) == 0);
}

TEST(gathered_rows) {
  Random random(2);
  const int64_t sizes[] = {1, 2, 3, 4, 7, 8, 63, 64, 65, 1000, 4099};
  for (int i = 0; i < times(400); ++i) {
    const int64_t bytes = random.pick(sizes), stride = bytes + (random.chance(0.5) ? random.below(100) : 0);
    const int64_t rows = 1 + random.below(130), count = random.chance(0.1) ? 0 : random.below(2 * rows);
    const int threads = static_cast<int>(1 + random.below(8));
    const Exact<unsigned char> source((rows - 1) * stride + bytes), target(count * bytes, 0xEE);
    for (int64_t j = 0; j < source.size(); ++j) source[j] = static_cast<unsigned char>(random.below(256));
    const Exact<int64_t> index(count);
    for (int64_t j = 0; j < count; ++j) index[j] = random.below(rows);
    gather_rows(source.data(), bytes, stride, index.data(), count, target.data(), threads);
    bool same = true;
    for (int64_t j = 0; j < count; ++j)
      same = same &&
             std::memcmp(target.data() + j * bytes, source.data() + index[j] * stride, static_cast<size_t>(bytes)) == 0;
    CHECK(same);
  }
  gather_rows(nullptr, 8, 8, nullptr, 0, nullptr, 4);
}

TEST(rows_gathered_by_several_threads) {
  const int64_t bytes = 100003, rows = 130;
  const Exact<unsigned char> source(rows * bytes), target(rows * bytes);
  for (int64_t i = 0; i < rows * bytes; ++i) source[i] = static_cast<unsigned char>(i * 2654435761 >> 13);
  const Exact<int64_t> index(rows);
  for (int64_t i = 0; i < rows; ++i) index[i] = rows - 1 - i;
  gather_rows(source.data(), bytes, bytes, index.data(), rows, target.data(), 8);
  for (int64_t i = 0; i < rows; ++i)
    CHECK(std::memcmp(target.data() + i * bytes, source.data() + (rows - 1 - i) * bytes, bytes) == 0);
}

int main() { return run_tests(); }
