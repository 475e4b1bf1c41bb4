// AVX-512: 32 registers of 16 floats, so a tile of 14 rows x 2 vectors keeps 28 sums.
#include "avx512.h"

#include "kernels.h"

namespace e2cm {
namespace {

constexpr int kSquareRows = 4, kSquareSums = 24, kTileRows = 14;

}  // namespace
}  // namespace e2cm

#include "kernels.inl"

namespace e2cm {
const Kernels* avx512_kernels() {
  static constexpr Kernels kernels = table("avx512");
  return &kernels;
}
}  // namespace e2cm
