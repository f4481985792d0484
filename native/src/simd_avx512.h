// 16 lanes as one AVX-512 register.
struct F { __m512 v; };
struct I { __m512i v; };

static inline F f_zero() { return {_mm512_setzero_ps()}; }
static inline F f_set(float x) { return {_mm512_set1_ps(x)}; }
static inline F f_load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline void f_store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
static inline F f_half(const void* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
static inline F f_add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline F f_sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline F f_mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline F f_div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline F f_fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline F f_max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }  // a > b ? a : b
static inline F f_min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }  // a < b ? a : b
// x < limit ? y : x
static inline F f_below(F x, F limit, F y) {
  return {_mm512_mask_mov_ps(x.v, _mm512_cmp_ps_mask(x.v, limit.v, _CMP_LT_OQ), y.v)};
}
// test < limit ? y : z
static inline F f_choose(F test, F limit, F y, F z) {
  return {_mm512_mask_mov_ps(z.v, _mm512_cmp_ps_mask(test.v, limit.v, _CMP_LT_OQ), y.v)};
}
// lanes from..to-1 of a, fill elsewhere
static inline F f_lanes(F a, int from, int to, F fill) {
  const __mmask16 keep = (__mmask16)((to >= 16 ? 0xFFFFu : ((1u << to) - 1u)) & ~((1u << from) - 1u));
  return {_mm512_mask_mov_ps(fill.v, keep, a.v)};
}
static inline I i_set(int32_t x) { return {_mm512_set1_epi32(x)}; }
static inline I i_load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
static inline void i_store(int32_t* p, I a) { _mm512_storeu_si512(p, a.v); }
static inline I i_add(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
static inline I i_sub(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
static inline I i_mul(I a, I b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
static inline I i_umax(I a, I b) { return {_mm512_max_epu32(a.v, b.v)}; }
static inline I i_bits(F a) { return {_mm512_castps_si512(a.v)}; }
static inline I i_and(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
static inline I i_bytes(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
static inline F f_from(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
static inline I i_round(F a) { return {_mm512_cvtps_epi32(a.v)}; }  // half to even
static inline F f_pow2(I n) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n.v, _mm512_set1_epi32(127)), 23))};
}
static inline F f_sqrt(F a) { return {_mm512_sqrt_ps(a.v)}; }
// 16 int32 -> 16 int8 (values fit)
static inline void i_store_bytes(int8_t* p, I a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a.v)); }
