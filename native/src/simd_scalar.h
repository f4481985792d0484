// 16 lanes as plain arrays; a compiler for a machine with vectors turns the loops into vectors.
struct F { float v[16]; };
struct I { int32_t v[16]; };

#define LANES for (int i = 0; i < 16; ++i)
#define MAKE_F(e) F o; LANES o.v[i] = (e); return o
#define MAKE_I(e) I o; LANES o.v[i] = (e); return o
static inline float s_bits(uint32_t u) { float f; __builtin_memcpy(&f, &u, 4); return f; }
static inline uint32_t s_word(float f) { uint32_t u; __builtin_memcpy(&u, &f, 4); return u; }
static inline float s_half(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 31) return s_bits(sign | 0x7F800000u | (mantissa << 13));
  if (exponent == 0) {
    const float tiny = (float)mantissa * 5.9604644775390625e-08f;  // 2^-24, exact
    return sign ? -tiny : tiny;
  }
  return s_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
}
static inline int32_t s_round(float x) {
  if (!(x < 2147483648.0f && x >= -2147483648.0f)) return INT32_MIN;
  return (int32_t)__builtin_rintf(x);
}
static inline F f_zero() { MAKE_F(0.0f); }
static inline F f_set(float x) { MAKE_F(x); }
static inline F f_load(const float* p) { MAKE_F(p[i]); }
static inline void f_store(float* p, F a) { LANES p[i] = a.v[i]; }
static inline F f_half(const void* p) {
  F o;
  for (int i = 0; i < 16; ++i) { uint16_t h; __builtin_memcpy(&h, (const char*)p + 2 * i, 2); o.v[i] = s_half(h); }
  return o;
}
static inline F f_add(F a, F b) { MAKE_F(a.v[i] + b.v[i]); }
static inline F f_sub(F a, F b) { MAKE_F(a.v[i] - b.v[i]); }
static inline F f_mul(F a, F b) { MAKE_F(a.v[i] * b.v[i]); }
static inline F f_div(F a, F b) { MAKE_F(a.v[i] / b.v[i]); }
static inline F f_fma(F a, F b, F c) { MAKE_F(__builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
static inline F f_max(F a, F b) { MAKE_F(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
static inline F f_min(F a, F b) { MAKE_F(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
static inline F f_choose(F t, F l, F y, F z) { MAKE_F(t.v[i] < l.v[i] ? y.v[i] : z.v[i]); }
static inline F f_below(F x, F l, F y) { MAKE_F(x.v[i] < l.v[i] ? y.v[i] : x.v[i]); }
static inline F f_lanes(F a, int from, int to, F fill) { MAKE_F(i >= from && i < to ? a.v[i] : fill.v[i]); }
static inline I i_set(int32_t x) { MAKE_I(x); }
static inline I i_load(const int32_t* p) { MAKE_I(p[i]); }
static inline void i_store(int32_t* p, I a) { LANES p[i] = a.v[i]; }
static inline I i_add(I a, I b) { MAKE_I(a.v[i] + b.v[i]); }
static inline I i_sub(I a, I b) { MAKE_I(a.v[i] - b.v[i]); }
static inline I i_mul(I a, I b) { MAKE_I((int32_t)((uint32_t)a.v[i] * (uint32_t)b.v[i])); }
static inline I i_umax(I a, I b) { MAKE_I((uint32_t)a.v[i] > (uint32_t)b.v[i] ? a.v[i] : b.v[i]); }
static inline I i_and(I a, I b) { MAKE_I(a.v[i] & b.v[i]); }
static inline I i_bits(F a) { MAKE_I((int32_t)s_word(a.v[i])); }
static inline I i_bytes(const uint8_t* p) { MAKE_I(p[i]); }
static inline F f_from(I a) { MAKE_F((float)a.v[i]); }
static inline I i_round(F a) { MAKE_I(s_round(a.v[i])); }
static inline F f_pow2(I n) { MAKE_F(s_bits((uint32_t)(n.v[i] + 127) << 23)); }
static inline F f_sqrt(F a) { MAKE_F(__builtin_sqrtf(a.v[i])); }
static inline void i_store_bytes(int8_t* p, I a) { LANES p[i] = (int8_t)a.v[i]; }
#undef LANES
#undef MAKE_F
#undef MAKE_I
