// Which sources this library was built from, and the highest architecture level that this processor has.
#include "common.h"

#define CDM_STRING_(text) #text
#define CDM_STRING(text) CDM_STRING_(text)

CDM_EXPORT const char* cdm_source_hash() { return CDM_STRING(CDM_SOURCE_HASH); }

CDM_EXPORT const char* cdm_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? "v4bf16" : "v4";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return "v3";
#endif
  return "base";
}
