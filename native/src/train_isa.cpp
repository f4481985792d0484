// The kernels of training for one instruction set: MR rows x NB vectors of 16 lanes are held in registers.
#include <math.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "train.h"

namespace moestro {
namespace MOESTRO_ISA {
#if defined(__AVX512F__)
#include "simd_avx512.h"
#define NAME "avx512"
#define MR 12
#define NB 2
static inline float f_sum(F a) { return _mm512_reduce_add_ps(a.v); }
static inline void f_stream(float* p, F a) { _mm512_stream_ps(p, a.v); }
static inline void f_fence() { _mm_sfence(); }
static inline F f_madd(F a, F b, F c) { return f_fma(a, b, c); }
#elif defined(__AVX2__)
#include "simd_avx2.h"
#define NAME "avx2"
#define MR 6
#define NB 1
static inline void f_stream(float* p, F x) {
  _mm256_stream_ps(p, x.a);
  _mm256_stream_ps(p + 8, x.b);
}
static inline void f_fence() { _mm_sfence(); }
static inline float f_sum(F x) {
  const __m256 s = _mm256_add_ps(x.a, x.b);
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_shuffle_ps(t, t, 1)));
}
static inline F f_madd(F a, F b, F c) { return f_fma(a, b, c); }
#else
#include "simd_scalar.h"
#define NAME "scalar"
#define NB 1
static inline void f_stream(float* p, F a) { f_store(p, a); }
static inline void f_fence() {}
static inline float f_sum(F a) {
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  return a.v[0];
}
#if defined(__aarch64__)
#define MR 4
static inline F f_madd(F a, F b, F c) { return f_fma(a, b, c); }
#else
#define MR 2
static inline F f_madd(F a, F b, F c) { return f_add(f_mul(a, b), c); }  // no fused form in the baseline: a slow call
#endif
#endif
#include "functions.inc"
#include "train_product.inc"
#include "train_experts.inc"
}  // namespace MOESTRO_ISA
#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)
const TrainKernels* JOIN(table_, MOESTRO_ISA)() { return &MOESTRO_ISA::kTrain; }
}  // namespace moestro
