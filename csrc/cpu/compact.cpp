// Survivors move together: their numbers first, then their rows, in their old order.
#include <algorithm>
#include <cstring>

#include "../api.h"
#include "parallel.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace e2cm {
namespace {

// Memory of this size comes fresh from the system, which clears it page by page as it is first written: that takes
// longer than the copy. With large pages it is cleared 512 at a time.
void prefer_large_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / page * page;
  if (bytes >= int64_t{1} << 25) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // or not: a wish
#else
  static_cast<void>(memory), static_cast<void>(bytes);
#endif
}

}  // namespace

int64_t kept_rows(const uint8_t* mask, int64_t rows, int64_t* keep) {
  int64_t count = 0;
  for (int64_t i = 0; i < rows; ++i) {  // written always, counted if kept: no branch to mispredict
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
  prefer_large_pages(target, count * row_bytes);
  const int64_t together = 1 + (int64_t{1} << 16) / row_bytes;  // rows: a single one may be too little to hand out
  parallel_for((count + together - 1) / together, useful_threads(threads, count * row_bytes / 2),
               [&](int64_t piece, int) {
                 const int64_t end = std::min(count, (piece + 1) * together);
                 for (int64_t i = piece * together; i < end; ++i)
                   std::memcpy(to + i * row_bytes, from + index[i] * source_stride, static_cast<size_t>(row_bytes));
               });
}

}  // namespace e2cm
