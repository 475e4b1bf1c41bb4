// The eight tile registers of AMX, each of some rows of 64 bytes: products of signed bytes, summed up in 32 bits.
#pragma once

#include <cstdint>

#ifdef E2CM_EMULATE_TILES
#include "../tests/tiles.h"
#else

namespace e2cm {
namespace {

// The registers are ours from here to the end of the scope. `height`: rows of all tiles but the last two, which
// have 16. In assembler, since compilers' own functions take the numbers of registers from macros, and some forget that
// tiles are memory that the code before has written.
class Tiles {
 public:
  explicit Tiles(int64_t height) {
    Shape shape;
    for (int t = 0; t < 8; ++t) {
      shape.row_bytes[t] = 64;
      shape.rows[t] = t < 6 ? static_cast<uint8_t>(height) : 16;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~Tiles() { __asm__ volatile("tilerelease"); }  // or every switch of threads would have to save them
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int tile>
  void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(tile));
  }
  template <int tile>
  void load(const void* from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
  }
  template <int tile>
  void store(void* to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
  }
  // sums[i][j] += the four bytes of row i at 4 k times the four bytes of row k at 4 j, over k.
  template <int sums, int a, int b>
  void add_products() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(a), "i"(b));
  }

 private:
  struct Shape {  // as the instruction reads it
    uint8_t palette = 1, start = 0, none[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
};

}  // namespace
}  // namespace e2cm
#endif
