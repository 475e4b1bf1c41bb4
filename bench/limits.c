/* What one core can do at best: read memory, multiply and add. Built by limits.py with -O3 for the machine it runs on. */

#include <stddef.h>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define CHAINS 16 /* independent sums, enough to cover the latency of an addition and few enough for the registers */
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#define CHAINS 12
#else
#define VECTOR_BYTES 16
#define CHAINS 16
#endif

#define UNROLL _Pragma("GCC unroll 16")

typedef float vector __attribute__((vector_size(VECTOR_BYTES)));
typedef float unaligned_vector __attribute__((vector_size(VECTOR_BYTES), aligned(4)));

static float total(const vector *sums) {
  float sum = 0;
  for (int i = 0; i < CHAINS; ++i) {
    for (int j = 0; j < (int)(VECTOR_BYTES / sizeof(float)); ++j) {
      sum += sums[i][j];
    }
  }
  return sum;
}

/* Reads `bytes` from `source` `times` times, as `streams` (1, 2, 4 or 8) sequences side by side: hardware prefetches every
 * sequence by itself. `ahead` > 0: asks for the line that many bytes ahead, too. */
#define READ(STREAMS)                                                                                             \
  static float read_##STREAMS(const char *source, size_t bytes, long times, size_t ahead) {                       \
    enum { STEP = 8 / STREAMS }; /* vectors from one stream at a time */                                          \
    const size_t length = bytes / STREAMS / (STEP * VECTOR_BYTES) * (STEP * VECTOR_BYTES);                        \
    vector sums[CHAINS] = {0};                                                                                    \
    for (long t = 0; t < times; ++t) {                                                                            \
      __asm__ volatile("" ::: "memory");                                                                          \
      for (size_t at = 0; at < length; at += STEP * VECTOR_BYTES) {                                               \
        UNROLL for (int s = 0; s < STREAMS; ++s) {                                                                \
          UNROLL for (int i = 0; i < STEP; ++i) {                                                                 \
            const char *p = source + s * length + at + i * VECTOR_BYTES;                                          \
            if (ahead) __builtin_prefetch(p + ahead);                                                             \
            sums[s * STEP + i] += *(const unaligned_vector *)p;                                                   \
          }                                                                                                       \
        }                                                                                                         \
      }                                                                                                           \
    }                                                                                                             \
    return total(sums);                                                                                           \
  }

READ(1)
READ(2)
READ(4)
READ(8)

float limits_read(const char *source, size_t bytes, long times, int streams, size_t ahead) {
  switch (streams) {
  case 1:
    return ahead ? read_1(source, bytes, times, ahead) : read_1(source, bytes, times, 0);
  case 2:
    return ahead ? read_2(source, bytes, times, ahead) : read_2(source, bytes, times, 0);
  case 4:
    return ahead ? read_4(source, bytes, times, ahead) : read_4(source, bytes, times, 0);
  default:
    return ahead ? read_8(source, bytes, times, ahead) : read_8(source, bytes, times, 0);
  }
}

/* Multiplies and adds `times` times in every lane of every chain; returns how many operations that were. */
double limits_multiply_add(long times, float *result) {
  vector sums[CHAINS], a, b;
  for (int j = 0; j < (int)(VECTOR_BYTES / sizeof(float)); ++j) {
    a[j] = 0.999f;
    b[j] = 0.001f * (float)(j + 1); /* sums tend to 1000 b: never to a denormal number */
    for (int i = 0; i < CHAINS; ++i) sums[i][j] = (float)i; /* equal chains would be merged into one */
  }
  for (long t = 0; t < times; ++t) {
    UNROLL for (int i = 0; i < CHAINS; ++i) sums[i] = sums[i] * a + b;
  }
  *result = total(sums);
  return 2.0 * (double)times * CHAINS * (VECTOR_BYTES / sizeof(float));
}
