// Chooses the unit: the best one of this machine and this build, or the one that E2CM_ISA names. Decided on first use.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

#if defined(_MSC_VER) && defined(_M_X64)
#include <immintrin.h>
#include <intrin.h>
#elif defined(E2CM_HAVE_AVX2) || defined(E2CM_HAVE_AVX512)
#include <cpuid.h>
#endif

namespace e2cm {
namespace {

#if defined(E2CM_HAVE_AVX2) || defined(E2CM_HAVE_AVX512)
#ifdef _MSC_VER
bool bit(int value, int at) { return value >> at & 1; }

bool has(bool avx512) {
  int leaf[4];
  __cpuid(leaf, 1);
  if (!(bit(leaf[2], 27) && bit(leaf[2], 28) && bit(leaf[2], 12) && bit(leaf[2], 29))) return false;
  const unsigned long long saved = _xgetbv(0);  // register states that the operating system saves
  __cpuidex(leaf, 7, 0);
  if ((saved & 0x6) != 0x6 || !bit(leaf[1], 5)) return false;
  if (!avx512) return true;
  return (saved & 0xE6) == 0xE6 && bit(leaf[1], 16) && bit(leaf[1], 17) && bit(leaf[1], 30) && bit(leaf[1], 31);
}
bool has_avx2() { return has(false); }
bool has_avx512() { return has(true); }
#else
bool has_f16c() {  // not every compiler's __builtin_cpu_supports knows this name
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif
#endif

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> tables;
#ifdef E2CM_HAVE_AVX512
  if (has_avx512()) tables.push_back(avx512_kernels());
#endif
#ifdef E2CM_HAVE_AVX2
  if (has_avx2()) tables.push_back(avx2_kernels());
#endif
#ifdef E2CM_HAVE_NEON
  tables.push_back(neon_kernels());
#endif
  tables.push_back(scalar_kernels());
  return tables;
}

std::string names() {
  std::string all;
  for (const Kernels* table : available()) all += (all.empty() ? "" : ",") + std::string(table->name);
  return all;
}

const Kernels* choose() {
  const char* const wanted = std::getenv("E2CM_ISA");
  if (!wanted || !*wanted) return available().front();
  for (const Kernels* table : available())
    if (wanted == std::string(table->name)) return table;
  throw std::runtime_error("E2CM_ISA=" + std::string(wanted) + ": this machine and this build have " + names() +
                           "; unset it to take the first of them");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const chosen = choose();
  return *chosen;
}

const char* isa_in_use() { return kernels().name; }

const char* isa_available() {
  static const std::string all = names();
  return all.c_str();
}

}  // namespace e2cm
