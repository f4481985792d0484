// What every instruction set provides, and the layouts they all read.
//
// A quantised matrix [N, K] is stored in blocks of 16 output rows x 64 inputs; a row block (16 rows, all inputs) is
// contiguous. Lane = output row. All functions compute the same bits on every instruction set: integers are exact,
// float operations are written as single IEEE operations in one order (see "simd_*.h" and "lanes.inc").
#pragma once
#include <cstddef>
#include <cstdint>

namespace moestro {

constexpr int kLanes = 16;   // output rows of a block; lanes of a vector; positions of a page
constexpr int kGroup = 64;   // inputs of a block: they share one scale
constexpr int kFewRows = 8;  // up to here weights are read as stored; above, unpacked once for all rows

enum Layout : int { F32 = 0, F16 = 1, Q8 = 2, Q4 = 3, Q3 = 4, Q2 = 5, Q1 = 6, S1 = 7, T1 = 8 };

constexpr bool is_quantised(int layout) { return layout >= Q8; }
// Bytes of one block of 16 x 64 weights, but for T1, whose row blocks differ in size: see "ternary.inc". 16 half-precision scales follow the codes; 3, 2 and 1 bits
// add 16 zero points, but for S1, whose codes 0 and 1 mean -1 and 1.
constexpr size_t block_bytes(int layout) {
  return layout == F32   ? 4096
         : layout == F16 ? 2048
         : layout == Q8  ? 1024 + 32
         : layout == Q4  ? 512 + 32
         : layout == Q3  ? 384 + 48
         : layout == Q2  ? 256 + 48
         : layout == Q1  ? 128 + 48
                         : 128 + 32;
}
constexpr size_t code_bytes(int layout) {
  return layout == Q8 ? 1024 : layout == Q4 ? 512 : layout == Q3 ? 384 : layout == Q2 ? 256 : 128;
}

// Rows of activations quantised per group of 64: x = scale * code. Row-major, or in tiles of 16 rows:
// codes [tile][group][16][64], scales [tile][group][16].
struct QRows {
  int8_t* codes = nullptr;
  float* scales = nullptr;
  int32_t* sums = nullptr;  // of the codes of a group; row-major only
  int groups = 0;
  bool tiled = false;
};

struct Rope {
  const float* cos;  // [rotary / 2] of one position
  const float* sin;
  int rotary;        // leading dimensions that turn
  bool interleaved;  // pairs (2i, 2i+1) instead of (i, i + rotary/2)
};

enum Activation : int { SILU = 0, GELU_TANH = 1, RELU = 2, IDENTITY = 3, GELU_ERF = 4 };

// One query tile of attention: `count` query vectors [count, dim] that share a KV head and a page table.
struct AttendArgs {
  const float* q;        // [count, dim]
  float* out;            // [count, dim]
  float* scores;         // scratch [count, blocks * 16]
  const float* const* k; // per page: [dim][16]
  const float* const* v; // per page: [16][dim]
  const int* last;       // position of each query: it sees first..last
  int count, dim, window;  // window 0: everything before it
  float scale, softcap;
};

struct Kernels {
  const char* name;
  bool tiles;  // many rows are wanted in tiles of 16
  void (*enter)();
  void (*leave)();
  // Quantise one row of `k` floats; group g goes to codes + g * code_stride. Returns false for NaN or infinity.
  bool (*quantise)(const float* x, int k, int8_t* codes, size_t code_stride, float* scales, size_t scale_stride,
                   int32_t* sums);
  // y[r * ldy + lane] for one row block. index: rows to take (row-major only), or null. panel: scratch of
  // groups * (1024 + 64) bytes, 64-aligned.
  void (*block)(int layout, const uint8_t* w, const QRows& x, const int32_t* index, int rows, float* y, size_t ldy,
                uint8_t* panel);
  // The same for a row block of coded ternary weights that ends before `end`; `words`: see "ternary.inc". NaN where the
  // block is damaged.
  void (*coded)(const uint8_t* w, const uint8_t* end, const uint64_t* words, const QRows& x, const int32_t* index, int rows,
                float* y, size_t ldy, uint8_t* panel);
  // The same for float layouts over `blocks` row blocks; block b writes to y + b * 16.
  void (*block_float)(int layout, const uint8_t* w, int k, const float* x, size_t ldx, const int32_t* index, int rows,
                      int blocks, float* y, size_t ldy);
  // out = x / rms(x) * (weight + add); k a multiple of 16 is not required.
  void (*rms_norm)(const float* x, const float* weight, int k, float eps, float add, float* out);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, int k, float eps, float* out);
  void (*rope)(float* x, const Rope& rope);
  void (*attend)(const AttendArgs& args);
  // out = act(gate) * up * weight, 64-padded; up may be null (no gate: out = act(gate) * weight).
  void (*activate)(int act, const float* gate, const float* up, int n, float weight, float* out);
  void (*softmax)(float* x, int n);
  void (*sigmoid)(float* x, int n);
  void (*add)(float* y, const float* x, int n, float scale);  // y += scale * x (fma)
  void (*softcap)(float* x, int n, float cap);
  void (*embed)(int layout, const uint8_t* table, int64_t row, int k, float scale, float* out);
};

// Best first; null-terminated. Entries exist only where compiled in and supported by this processor.
const Kernels* const* available();
const Kernels* current();
bool choose(const char* name);

}  // namespace moestro
