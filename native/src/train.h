// Training: forward and backward of stacked feed-forward experts in float32, over assignments sorted by expert.
//
//   y[t] = sum over the assignments n of token t, in ascending order of expert, of weight[n] * expert(x[t])
//   expert(x) = down act(up x + b) + c; gated: `up` has two halves, gate and up, and the hidden state is act(g) * u
//
// No sum depends on how work is shared among threads: every row of outputs and every element of a gradient is written
// by one thread in one order.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace moestro {

enum TrainActivation : int { T_SILU = 0, T_GELU = 1, T_GELU_TANH = 2, T_RELU = 3, T_SWIGLU_OSS = 4 };

// Element (i, k) at p[i * rs + k * cs]; with `index`, row i is row index[i].
struct View {
  const float* p;
  int64_t rs, cs;
  const int32_t* index = nullptr;
};
struct Out {
  float* p;
  int64_t rs, cs;
};
// [E, R, C] with any strides.
struct Stack {
  float* p = nullptr;
  int64_t e = 0, r = 0, c = 0;
};

struct Bank {
  int experts, dim, inner, out, act;
  bool gated, interleaved;
  Stack up, down;                         // [E, J, D], [E, O, I]
  const float *up_bias = nullptr, *down_bias = nullptr;  // [E, J], [E, O]
  int halves() const { return gated ? 2 : 1; }
  int wide() const { return halves() * inner; }  // J
  // Row i of a half is this row of the stack.
  int64_t row(int half, int64_t i) const { return interleaved && gated ? 2 * i + half : half * (int64_t)inner + i; }
  int64_t step() const { return interleaved && gated ? 2 : 1; }
  Out half(const Stack& s, int expert, int half) const { return {s.p + expert * s.e + row(half, 0) * s.r, step() * s.r, s.c}; }
};

// Assignments sorted by expert, stably, and the sorted rows of each token in ascending order.
struct Route {
  std::vector<int32_t> order, token, offsets, bag, bag_offsets;
  int rows() const { return (int)order.size(); }
  int tokens() const { return (int)bag_offsets.size() - 1; }
  int experts() const { return (int)offsets.size() - 1; }
};

struct Gradients {
  const float* y = nullptr;                    // [T, O], given
  const float* pre = nullptr;                  // [N', J] of the forward pass
  float* rows = nullptr;                       // [N', D] scratch; null: x needs none
  float* x = nullptr;                          // [T, D]
  float* weight = nullptr;                     // [N]
  Stack up, down;
  float *up_bias = nullptr, *down_bias = nullptr;
  bool past = false;                           // rows are written past the caches
  bool wants_pre() const { return rows || up.p || up_bias; }
};

// Buffers of one block of at most kBlock rows.
struct BlockBuffers {
  float *grad, *hidden, *pre;  // [rows, O], [rows, I], [rows, J]
};

constexpr int kBlock = 512;
constexpr int kWide = 512;   // columns of a gradient at work at a time
constexpr int kPanel = kBlock * (kWide + 16) + 16 * 32;  // floats of scratch of a product: packed operands and a tile

struct TrainKernels {
  const char* name;
  int columns;  // of a register tile; rows of a forward panel
  // Rows row .. row + count of one expert. pre [N', J] may be null; rows [N', O]; past: both are written past the caches.
  void (*forward)(const Bank&, int expert, const float* x, const int32_t* token, int row, int count, float* pre,
                  float* rows, bool past, float* scratch);
  // Everything a block's rows need: gradients of pre-activations and hidden rows into the buffers (whose first row is
  // `first`), of the routing weights, and of x by row.
  void (*backward_rows)(const Bank&, const Gradients&, const Route&, int expert, const float* weight, int row, int count,
                        int first, const BlockBuffers&, float* panel);
  // Rows from .. to of the gradient of `down` (part 0) or of a half of `up` (1, 2), and the same of its bias.
  void (*backward_weights)(const Bank&, const Gradients&, const Route&, int expert, const float* x, const float* weight,
                           int row, int count, const BlockBuffers&, int part, int from, int to, bool add, float* panel);
  // y[t] = sum of rows[n] * weight[order[n]] for tokens from .. to.
  void (*combine)(const Route&, const float* rows, int wide, const float* weight, int from, int to, float* y);
};

const TrainKernels* train_kernels();  // of the instruction set in use

size_t train_scratch(const Bank& bank, int threads, bool backward);  // floats
Route train_route(const int64_t* token, const int64_t* expert, size_t count, int experts, int tokens);
void train_forward(const Bank&, const Route&, const float* x, const float* weight, float* pre, float* rows, float* y,
                   float* scratch, int threads);
void train_backward(const Bank&, Gradients, const Route&, const float* x, const float* weight, size_t assignments,
                    float* scratch, int threads);

// f(thread) for each of at most `threads` threads of the OpenMP runtime this process has loaded (PyTorch's, where it
// is), or of a pool of our own.
void team_run(int threads, void (*call)(const void*, int), const void* arg);
const char* team_name();
template <class Function> void team(int threads, const Function& f) {
  team_run(threads, [](const void* arg, int thread) { (*static_cast<const Function*>(arg))(thread); }, &f);
}

}  // namespace moestro
