// 16 lanes as two AVX2 registers.
struct F { __m256 a, b; };
struct I { __m256i a, b; };

#define PAIR(f, x, y) {f(x.a, y.a), f(x.b, y.b)}
static inline F f_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline F f_set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline F f_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void f_store(float* p, F x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
static inline F f_half(const void* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
}
static inline F f_add(F x, F y) { return PAIR(_mm256_add_ps, x, y); }
static inline F f_sub(F x, F y) { return PAIR(_mm256_sub_ps, x, y); }
static inline F f_mul(F x, F y) { return PAIR(_mm256_mul_ps, x, y); }
static inline F f_div(F x, F y) { return PAIR(_mm256_div_ps, x, y); }
static inline F f_fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
static inline F f_max(F x, F y) { return PAIR(_mm256_max_ps, x, y); }
static inline F f_min(F x, F y) { return PAIR(_mm256_min_ps, x, y); }
static inline F f_choose(F t, F l, F y, F z) {
  return {_mm256_blendv_ps(z.a, y.a, _mm256_cmp_ps(t.a, l.a, _CMP_LT_OQ)),
          _mm256_blendv_ps(z.b, y.b, _mm256_cmp_ps(t.b, l.b, _CMP_LT_OQ))};
}
static inline F f_below(F x, F limit, F y) { return f_choose(x, limit, y, x); }
static inline F f_lanes(F x, int from, int to, F fill) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i low = _mm256_set1_epi32(from - 1), high = _mm256_set1_epi32(to), eight = _mm256_set1_epi32(8);
  const __m256i up = _mm256_add_epi32(lane, eight);
  const __m256i ka = _mm256_and_si256(_mm256_cmpgt_epi32(lane, low), _mm256_cmpgt_epi32(high, lane));
  const __m256i kb = _mm256_and_si256(_mm256_cmpgt_epi32(up, low), _mm256_cmpgt_epi32(high, up));
  return {_mm256_blendv_ps(fill.a, x.a, _mm256_castsi256_ps(ka)), _mm256_blendv_ps(fill.b, x.b, _mm256_castsi256_ps(kb))};
}
static inline I i_set(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
static inline I i_load(const int32_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
static inline void i_store(int32_t* p, I x) {
  _mm256_storeu_si256((__m256i*)p, x.a);
  _mm256_storeu_si256((__m256i*)p + 1, x.b);
}
static inline I i_add(I x, I y) { return PAIR(_mm256_add_epi32, x, y); }
static inline I i_sub(I x, I y) { return PAIR(_mm256_sub_epi32, x, y); }
static inline I i_mul(I x, I y) { return PAIR(_mm256_mullo_epi32, x, y); }
static inline I i_umax(I x, I y) { return PAIR(_mm256_max_epu32, x, y); }
static inline I i_and(I x, I y) { return PAIR(_mm256_and_si256, x, y); }
static inline I i_bits(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
static inline I i_bytes(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
          _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
static inline F f_from(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
static inline I i_round(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
static inline F f_pow2(I n) {
  const __m256i bias = _mm256_set1_epi32(127);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.a, bias), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.b, bias), 23))};
}
static inline F f_sqrt(F x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
static inline void i_store_bytes(int8_t* p, I x) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xD8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128((__m128i*)p, bytes);
}
#undef PAIR
