#include <immintrin.h>

#include "kernels.h"
namespace moestro {
namespace MOESTRO_ISA {
#include "simd_avx2.h"
#include "dot_avx2.inc"
template <int L>
static void tiles_block(const uint8_t*, const QRows&, int, float*, size_t, uint8_t*) {}
static void enter() {}
static void leave() {}
#ifdef __AVXVNNI__
#define NAME "avxvnni"
#else
#define NAME "avx2"
#endif
#define TILES false
#define CHUNK 4
#include "lanes.inc"
}  // namespace MOESTRO_ISA
#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)
const Kernels* JOIN(table_, MOESTRO_ISA)() { return &MOESTRO_ISA::kTable; }
}  // namespace moestro
