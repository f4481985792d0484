// The token step of a decoder with mixtures of experts: what runs between embedding and logits.
#pragma once
#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace moestro {

// A matrix [n, k] at an address, or at an offset into an expert's slab.
struct Matrix {
  int layout = F32, n = 0, k = 0;
  uintptr_t at = 0;
  size_t size = 0;      // T1: bytes, and the table of its words; the matrix begins with the uint32 offsets of its row
  uintptr_t words = 0;  // blocks and of its end
  bool given() const { return n > 0; }
  int blocks() const { return (n + kLanes - 1) / kLanes; }
  int groups() const { return (k + kGroup - 1) / kGroup; }
  size_t block_row() const {  // bytes of one row block
    return is_quantised(layout) ? groups() * block_bytes(layout) : (size_t)k * 16 * (layout == F32 ? 4 : 2);
  }
  size_t bytes() const { return layout == T1 ? size : blocks() * block_row(); }
  const uint8_t* data() const { return reinterpret_cast<const uint8_t*>(at); }
  // Row block b, 16 columns of y, for layouts of integers.
  void multiply(const Kernels& k, int b, const QRows& x, const int32_t* index, int rows, float* y, size_t ldy,
                uint8_t* panel) const {
    if (layout != T1) return k.block(layout, data() + b * block_row(), x, index, rows, y, ldy, panel);
    const uint32_t* starts = reinterpret_cast<const uint32_t*>(at);
    size_t from = starts[b], to = starts[b + 1];
    if (to > size || from > to || to - from < 96) from = to = 0;
    static const uint8_t damaged[98] = {0};
    if (to) k.coded(data() + from, data() + to, reinterpret_cast<const uint64_t*>(words), x, index, rows, y, ldy, panel);
    else k.coded(damaged, damaged, nullptr, x, index, rows, y, ldy, panel);
  }
};

struct Ffn {
  Matrix gate, up, down;  // gate may be absent: act(up x)
  int act = SILU;
  int inner() const { return up.n; }
};

enum RouterKind : int { SOFTMAX_TOPK = 0, TOPK_SOFTMAX = 1, SIGMOID_BIAS = 2 };

struct LayerSpec {
  uintptr_t attention_norm = 0, attention_norm_bias = 0, ffn_norm = 0, ffn_norm_bias = 0;  // float vectors
  Matrix q, k, v, o;
  uintptr_t q_bias = 0, k_bias = 0, v_bias = 0, o_bias = 0, q_norm = 0, k_norm = 0;
  int qk_norm = 0;  // 0 none, 1 each head, 2 all heads together
  int window = 0, rope = 0;
  float attention_scale = 0, attention_softcap = 0;
  Matrix router;
  uintptr_t router_bias = 0, select_bias = 0;  // added to the logits; added for the choice only
  int router_kind = SOFTMAX_TOPK, top_k = 0, groups = 1, top_groups = 1;
  int ahead = 0;  // the router reads what the router of the layer so many before would read
  bool renormalise = false;
  float route_scale = 1;
  int experts = 0;
  Ffn expert;  // addresses are offsets into a slab
  std::vector<Ffn> kinds;  // the same where slabs differ: expert e is as kinds[kind_of[e]] says
  std::vector<int> kind_of;
  const Ffn& of(int e) const { return kinds.empty() ? expert : kinds[kind_of[e]]; }
  Ffn shared;  // shared experts, or the whole dense block
  Matrix shared_gate;  // [1, hidden]: the shared branch weighs sigmoid(x . gate)
  std::vector<uintptr_t> slabs;  // address of each expert when all are resident
};

struct ModelSpec {
  int hidden = 0, heads = 0, kv_heads = 0, head_dim = 0, vocab = 0, pages = 0, rotary = 0;
  bool layer_norm = false, rope_interleaved = false;
  float eps = 1e-6f, norm_add = 0, embed_scale = 1, residual_scale = 1, logit_scale = 1, logit_softcap = 0, rope_factor = 1;
  Matrix embedding, head;
  uintptr_t final_norm = 0, final_norm_bias = 0;
  std::vector<std::vector<float>> inv_freq;
  std::vector<LayerSpec> layers;
};

// Aligned storage that only grows.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();
  template <class T> T* get(size_t count) { return static_cast<T*>(grow(count * sizeof(T))); }
  void* grow(size_t bytes);

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

struct Scratch {  // of one thread
  Buffer panel, codes, scales, gate, up, scores, query, pages_k, pages_v, line;
};

struct Step {  // what one step was asked for
  int rows = 0;
  std::vector<int32_t> tokens, positions, rows_of, tables;
  int table_width = 0, sequences = 0;
  bool lone = false;  // no sequence has two rows
};

class Model {
 public:
  Model(ModelSpec spec, int threads);
  ~Model();
  void begin(const int32_t* tokens, const int32_t* positions, const int32_t* rows_of, int rows, const int32_t* tables,
             int sequences, int width);
  // Attention block and routing; afterwards ids(), weights() [rows, top_k] and logits() [rows, experts] hold the choice.
  void attention(int layer);
  // Contributions of `count` experts (ascending ids) whose slabs are at `slabs`, for routes [rows, width].
  void routes(int layer, const int32_t* ids, const float* weights, int width);
  void experts(int layer, const int32_t* ids, const uintptr_t* slabs, int count);
  // For this step: rows that are not 0 leave out experts by ratios [layers, ranks] of their weights to the first one's.
  void thin(const float* ratios, int ranks, const int32_t* rows);
  void finish(int layer);
  void run(int from, int to);  // layers whose slabs are all resident
  void logits(const int32_t* want, int count, float* out);
  // Router logits [rows, experts] of layer `other` for the input of the experts of `layer`, whose attention ran last.
  void peek(int layer, int other, float* out);
  void copy_page(int from, int to);
  void read_hidden(float* out) const;

  const ModelSpec& spec() const { return spec_; }
  size_t page_bytes() const { return page_floats_ * sizeof(float); }
  int rows() const { return step_.rows; }
  const std::vector<int32_t>& chosen(int layer) const { return chosen_[layer]; }
  const std::vector<float>& weighed(int layer) const { return weighed_[layer]; }
  const float* scores(int layer) const { return scores_[layer]; }
  Pool& pool() { return pool_; }

 private:
  struct Item {  // one expert's share of a step
    Ffn ffn;     // absolute addresses
    int id;
    const int32_t* index;  // its rows
    const float* weights;
    int rows;
    QRows hidden;          // quantised for the down product,
    float* hidden_floats;  // or as they are
    float* sink;  // where outputs go while experts with lower ids are still to come; null: added at once
  };
  struct Unit { int item, from, to; };  // groups of hidden units
  void check() const;
  template <class Function> void parallel(const Function& f);
  // Parts of n things: the thread's own share when few rows make all parts alike, else whoever is free takes the next.
  template <class Function> void share(int n, int step, int counter, int thread, const Function& f);
  void attention_body(int layer, int thread);
  void place(int layer, int row, int kv_head);
  void place_whole(int layer, int row);
  void attend_unit(int layer, int thread, int first, int rows, int kv_head);
  void attend_all(int layer, int thread);
  void route_rows(int layer, int thread);
  void route_rows_of(int target, int from, int to, const float* own, int thread);
  void thin_row(const LayerSpec& l, const float* ratios, int32_t* ids, float* weights);
  void choose_row(const LayerSpec& l, float* logits, int32_t* ids, float* weights);
  void experts_body(bool last, int thread);
  void hidden_unit(const Item& item, int thread, int from, int to);
  void output_unit(int thread, int from, int to, bool last);
  void linear(const Matrix& m, const QRows& q, const float* x, size_t ldx, const int32_t* index, int rows, int from, int to,
              float* out, size_t ldo, Scratch& s);
  void norm(const float* x, uintptr_t weight, uintptr_t bias, float* out);
  void put(const QRows& q, int row, int group, const float* x, int k);
  QRows rows_in(Buffer* b, int rows, int groups, bool tiled);
  void plan_items(int layer, const int32_t* ids, const uintptr_t* slabs, int count, bool shared);
  void flush();
  void raise_if_bad(const char* where, int layer);
  bool many() const { return step_.rows > kFewRows; }

  ModelSpec spec_;
  const Kernels* k_;
  Pool pool_;
  Step step_;
  int ld_ = 0;  // hidden padded to 64
  std::vector<Scratch> scratch_;
  float* x_ = nullptr;       // residual stream [rows, ld]
  float* normed_ = nullptr;  // [rows, ld]
  float* mixed_ = nullptr;   // sum of the experts' outputs [rows, ld]
  std::vector<float*> scores_;  // by layer: router logits [rows, experts]
  std::vector<std::vector<int>> routed_at_;  // by layer: layers whose routers read its input
  float* qkv_ = nullptr;
  float* heads_ = nullptr;   // attention outputs [rows, heads * dim padded to 64]
  float* turn_ = nullptr;    // cos and sin [rope][rows][rotary]
  float* projected_ = nullptr;  // [rows, ld]
  QRows in_, mid_, flat_;
  Buffer b_x, b_normed, b_mixed, b_qkv, b_heads, b_turn, b_projected, b_logits, b_peek, b_hidden, b_hidden_floats;
  Buffer b_in[3], b_mid[3], b_flat[3];
  std::vector<Buffer> b_scores;  // one for all layers that route themselves, then one for each that is routed ahead
  std::vector<float> thin_;
  std::vector<int32_t> thin_rows_;
  int thin_ranks_ = 0;
  std::vector<std::vector<int32_t>> chosen_;
  std::vector<std::vector<float>> weighed_;
  // Routes of the layer in work, grouped by expert.
  int layer_ = -1, normed_of_ = -1;
  std::vector<int32_t> first_, row_of_, all_rows_;
  std::vector<float> weight_of_, shared_weight_;
  std::vector<int> needed_;  // ids with rows, ascending
  size_t next_ = 0;          // how many of them are in mixed_
  std::vector<std::vector<float>> waiting_;  // outputs of experts that came early, by id
  std::vector<char> state_;  // by id: 0 to come, 1 waits, 2 added
  std::vector<Item> items_;
  std::vector<Unit> units_;
  float* cache_ = nullptr;
  size_t page_floats_ = 0, cache_bytes_ = 0;
  std::atomic<bool> bad_{false};
};

}  // namespace moestro
