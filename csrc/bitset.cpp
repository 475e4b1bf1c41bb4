// Counts the samples that reach each exit, from sets of bits.
//
// Reads   (exits - first + 1) * words words, in blocks that go through all exits while they are in registers or in the
//         first level of cache.
// Writes  a count per exit.
// Does    an and-not and a popcount per word.
#include "bitset.h"

#include <algorithm>

// The popcnt instruction is younger than x86-64: compiled for it, and used if the processor has it.
#if defined(__GNUC__) && defined(__x86_64__)
#define E2CM_POPCNT 1
#endif

#ifdef __GNUC__
#define E2CM_INLINE inline __attribute__((always_inline))
#else
#define E2CM_INLINE inline
#endif

namespace e2cm {
namespace {

constexpr int64_t kBlockWords = 32;

E2CM_INLINE void count_reach_inline(const uint64_t* reaching, const uint64_t* firing, int64_t words, int64_t first,
                                    int64_t exits, int64_t* counts) {
  std::fill(counts + first, counts + exits + 1, int64_t{0});
  uint64_t left[kBlockWords];
  for (int64_t begin = 0; begin < words; begin += kBlockWords) {
    const int64_t n = std::min(kBlockWords, words - begin);
    int64_t count = 0;
    for (int64_t w = 0; w < n; ++w) {
      left[w] = reaching[begin + w];
      count += popcount(left[w]);
    }
    counts[first] += count;
    for (int64_t k = first; k < exits && count; ++k) {
      const uint64_t* const leaving = firing + k * words + begin;
      count = 0;
      for (int64_t w = 0; w < n; ++w) {
        left[w] &= ~leaving[w];
        count += popcount(left[w]);
      }
      counts[k + 1] += count;
    }
  }
}

void count_reach_portable(const uint64_t* reaching, const uint64_t* firing, int64_t words, int64_t first, int64_t exits,
                          int64_t* counts) {
  count_reach_inline(reaching, firing, words, first, exits, counts);
}

#ifdef E2CM_POPCNT
__attribute__((target("popcnt"))) void count_reach_popcnt(const uint64_t* reaching, const uint64_t* firing,
                                                          int64_t words, int64_t first, int64_t exits,
                                                          int64_t* counts) {
  count_reach_inline(reaching, firing, words, first, exits, counts);
}
#endif

}  // namespace

#ifdef E2CM_POPCNT
const CountReach count_reach = __builtin_cpu_supports("popcnt") ? count_reach_popcnt : count_reach_portable;
#else
const CountReach count_reach = count_reach_portable;
#endif

}  // namespace e2cm
