#include "levels.h"

#include <atomic>
#include <cstring>

#if defined(FUSEDNORM_X86)
#include <cpuid.h>
#endif

namespace fusednorm::cpu {
namespace {

// The widest first.
const Kernels* const levels[] = {
#if defined(FUSEDNORM_X86)
    &avx512_bf16_kernels,
    &avx512_kernels,
    &avx2_kernels,
#endif
    &portable_kernels,
};

#if defined(FUSEDNORM_X86)
// GCC's __builtin_cpu_supports knows it by name, and Clang's does not.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

bool runs_here(const Kernels* level) {
#if defined(FUSEDNORM_X86)
  if (level == &avx512_bf16_kernels)
    return runs_here(&avx512_kernels) && __builtin_cpu_supports("avx512bf16");
  if (level == &avx512_kernels)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (level == &avx2_kernels)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
#endif
  return true;
}

const Kernels* widest() {
  for (const Kernels* level : levels)
    if (runs_here(level)) return level;
  return nullptr;
}

std::atomic<const Kernels*>& in_use() {
  static std::atomic<const Kernels*> level{widest()};
  return level;
}

}  // namespace

const Kernels& kernels() { return *in_use().load(std::memory_order_relaxed); }

bool use_level(const char* name) {
  for (const Kernels* level : levels)
    if (strcmp(level->level, name) == 0 && runs_here(level)) {
      in_use().store(level, std::memory_order_relaxed);
      return true;
    }
  return false;
}

}  // namespace fusednorm::cpu
