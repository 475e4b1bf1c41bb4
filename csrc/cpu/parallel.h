// A parallel loop over independent tasks, on at most as many threads as the caller allows. Without OpenMP: one thread.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace e2cm {

// Starting threads costs some microseconds: only as many as the work repays. `work` is in multiply-adds.
inline int useful_threads(int allowed, int64_t work) {
  const int64_t most = 1 + work / (int64_t{1} << 19);
  const int64_t threads = allowed < most ? allowed : most;
  return threads > 1 ? static_cast<int>(threads) : 1;
}

// body(index, thread) for every index below count; must not throw.
template <class Body>
void parallel_for(int64_t count, int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && count > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < count; ++i) body(i, omp_get_thread_num());
    return;
  }
#else
  static_cast<void>(threads);
#endif
  for (int64_t i = 0; i < count; ++i) body(i, 0);
}

}  // namespace e2cm
