#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"
namespace moestro {
namespace scalar {
#include "simd_scalar.h"
#include "dot_scalar.inc"
template <int L>
static void tiles_block(const uint8_t*, const QRows&, int, float*, size_t, uint8_t*) {}
static void enter() {}
static void leave() {}
#ifdef __aarch64__
#define NAME "neon"
#else
#define NAME "scalar"
#endif
#define TILES false
#define CHUNK 4
#include "lanes.inc"
}  // namespace scalar
const Kernels* table_scalar() { return &scalar::kTable; }
}  // namespace moestro
