#include <immintrin.h>

#include "kernels.h"
namespace moestro {
namespace MOESTRO_ISA {
#include "simd_avx512.h"
#include "dot_avx512.inc"
#ifdef MOESTRO_AMX
#include "tiles.inc"
#define NAME "amx"
#define TILES true
#else
template <int L>
static void tiles_block(const uint8_t*, const QRows&, int, float*, size_t, uint8_t*) {}
static void enter() {}
static void leave() {}
#define NAME "avx512vnni"
#define TILES false
#endif
#define CHUNK 8
#include "lanes.inc"
}  // namespace MOESTRO_ISA
#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)
const Kernels* JOIN(table_, MOESTRO_ISA)() { return &MOESTRO_ISA::kTable; }
}  // namespace moestro
