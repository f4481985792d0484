// Plain loops for any processor; on ARM the compiler turns them into NEON.
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"
namespace moestro {
namespace MOESTRO_ISA {
#include "simd_scalar.h"
#include "dot_scalar.inc"
template <int L>
static void tiles_block(const uint8_t*, const QRows&, int, float*, size_t, uint8_t*) {}
static void enter() {}
static void leave() {}
#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#define NAME "neondot"
#elif defined(__aarch64__)
#define NAME "neon"
#else
#define NAME "scalar"
#endif
#define TILES false
#define CHUNK 4
#include "lanes.inc"
}  // namespace MOESTRO_ISA
#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)
const Kernels* JOIN(table_, MOESTRO_ISA)() { return &MOESTRO_ISA::kTable; }
}  // namespace moestro
