// Sets of samples as rows of bits, 64 to a word.
#pragma once

#include <cstdint>

namespace e2cm {

inline int64_t popcount(uint64_t word) {
#ifdef __GNUC__
  return __builtin_popcountll(word);
#else
  word -= word >> 1 & 0x5555555555555555;
  word = (word & 0x3333333333333333) + (word >> 2 & 0x3333333333333333);
  return static_cast<int64_t>(((word + (word >> 4)) & 0x0f0f0f0f0f0f0f0f) * 0x0101010101010101 >> 56);
#endif
}

// counts[k] = the number of samples that reach exit k, for k = first ... exits. reaching: [words], the samples that
// reach exit `first`; firing: [exits, words], the samples that leave at an exit if they reach it.
using CountReach = void (*)(const uint64_t* reaching, const uint64_t* firing, int64_t words, int64_t first,
                            int64_t exits, int64_t* counts);
extern const CountReach count_reach;

}  // namespace e2cm
