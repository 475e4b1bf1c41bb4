// Compaction: the indices of the rows that stay, then the rows themselves, in their old order.
//
// Reads   the mask, and count * row_bytes.
// Writes  count indices, and count * row_bytes. No arithmetic.
#include <algorithm>
#include <cstring>

#include "../api.h"
#include "parallel.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace e2cm {
namespace {

// A large buffer is fresh memory from the system, which clears each page when it is first written. That takes longer
// than the copy; with huge pages it is cleared 2 MiB at a time. Only a hint: errors are ignored.
void advise_huge_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / page * page;
  if (bytes >= int64_t{1} << 25) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(memory), static_cast<void>(bytes);
#endif
}

}  // namespace

int64_t kept_rows(const uint8_t* mask, int64_t rows, int64_t* keep) {
  int64_t count = 0;
  for (int64_t i = 0; i < rows; ++i) {  // always written, counted if kept: no branch to mispredict
    keep[count] = i;
    count += mask[i] != 0;
  }
  return count;
}

void gather_rows(const void* source, int64_t row_bytes, int64_t source_stride, const int64_t* index, int64_t count,
                 void* target, int threads) {
  const char* const from = static_cast<const char*>(source);
  char* const to = static_cast<char*>(target);
  if (row_bytes == 0) return;
  advise_huge_pages(target, count * row_bytes);
  const int64_t rows_each = 1 + (int64_t{1} << 16) / row_bytes;  // of a task: a single row may be too little
  parallel_for((count + rows_each - 1) / rows_each, useful_threads(threads, count * row_bytes / 2),
               [&](int64_t task, int) {
                 const int64_t end = std::min(count, (task + 1) * rows_each);
                 for (int64_t i = task * rows_each; i < end; ++i)
                   std::memcpy(to + i * row_bytes, from + index[i] * source_stride, static_cast<size_t>(row_bytes));
               });
}

}  // namespace e2cm
