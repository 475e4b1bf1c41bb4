// The tile registers of cpu/tiles.h in memory, for machines without them and for the sanitizers, which do not see what
// tile instructions read and write.
#pragma once

#include <cstdint>
#include <cstring>

namespace e2cm {
namespace {

class Tiles {
 public:
  explicit Tiles(int64_t height) : height_(height) {}
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int tile>
  void zero() {
    std::memset(tiles_[tile], 0, sizeof tiles_[tile]);
  }
  template <int tile>
  void load(const void* from, int64_t stride) {
    zero<tile>();
    for (int64_t r = 0; r < rows_of(tile); ++r)
      std::memcpy(tiles_[tile][r], static_cast<const char*>(from) + r * stride, sizeof tiles_[tile][r]);
  }
  template <int tile>
  void store(void* to, int64_t stride) {
    for (int64_t r = 0; r < rows_of(tile); ++r)
      std::memcpy(static_cast<char*>(to) + r * stride, tiles_[tile][r], sizeof tiles_[tile][r]);
  }
  template <int sums, int a, int b>
  void add_products() {
    for (int64_t i = 0; i < rows_of(sums); ++i) {
      int32_t row[16];
      std::memcpy(row, tiles_[sums][i], sizeof row);
      for (int k = 0; k < 16; ++k)
        for (int j = 0; j < 16; ++j)
          for (int byte = 0; byte < 4; ++byte) row[j] += tiles_[a][i][4 * k + byte] * tiles_[b][k][4 * j + byte];
      std::memcpy(tiles_[sums][i], row, sizeof row);
    }
  }

 private:
  int64_t rows_of(int tile) const { return tile < 6 ? height_ : 16; }

  const int64_t height_;
  int8_t tiles_[8][16][64];
};

}  // namespace
}  // namespace e2cm
