// Which instruction sets run here. Decided once; a test may choose a lower one by name.
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moestro {

const Kernels* table_scalar();
#if defined(__x86_64__)
const Kernels* table_amx();
const Kernels* table_avx512();
const Kernels* table_avxvnni();
const Kernels* table_avx2();
#endif

#if defined(__aarch64__)
const Kernels* table_neondot();
#endif

static const Kernels* found[8];
static const Kernels* chosen = nullptr;

#if defined(__x86_64__)
static unsigned leaf7(unsigned sub, int reg) {
  unsigned r[4] = {0, 0, 0, 0};
  if (!__get_cpuid_count(7, sub, &r[0], &r[1], &r[2], &r[3])) return 0;
  return r[reg];
}

// The kernel saves tile registers only for processes that asked for them.
static bool tiles_permitted() {
#if defined(__linux__)
  return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#else
  return false;
#endif
}
#endif

const Kernels* const* available() {
  if (found[0]) return found;
  int n = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // all of these have f16c
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  const unsigned edx = leaf7(0, 3);
  if (avx512 && (edx >> 24 & 1) && (edx >> 25 & 1) && tiles_permitted()) found[n++] = table_amx();
  if (avx512) found[n++] = table_avx512();
  if (avx2 && (leaf7(1, 0) >> 4 & 1)) found[n++] = table_avxvnni();
  if (avx2) found[n++] = table_avx2();
#endif
#if defined(__aarch64__)
#if defined(__linux__)
  if (getauxval(AT_HWCAP) >> 20 & 1) found[n++] = table_neondot();  // HWCAP_ASIMDDP
#elif defined(__ARM_FEATURE_DOTPROD)
  found[n++] = table_neondot();
#endif
#endif
  found[n++] = table_scalar();
  return found;
}

const Kernels* current() {
  if (!chosen) chosen = available()[0];
  return chosen;
}

bool choose(const char* name) {
  for (const Kernels* const* k = available(); *k; ++k)
    if (!std::strcmp((*k)->name, name)) {
      chosen = *k;
      return true;
    }
  return false;
}

}  // namespace moestro
