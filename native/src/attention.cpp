// The attention block of a layer, and the router behind it.
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "shares.h"

namespace moestro {

static const float* floats(uintptr_t at) { return reinterpret_cast<const float*>(at); }

void Model::attention(int layer) {
  if (layer < 0 || layer >= (int)spec_.layers.size()) throw std::invalid_argument("no such layer");
  const LayerSpec& l = spec_.layers[layer];
  const int rows = step_.rows;
  if (rows < 1) throw std::logic_error("begin first");
  const bool tiled = k_->tiles && many();
  in_ = rows_in(b_in, rows, l.q.groups(), tiled);
  mid_ = rows_in(b_mid, rows, l.o.groups(), tiled);
  flat_ = rows_in(b_flat, rows, ld_ / kGroup, false);
  qkv_ = b_qkv.get<float>((size_t)rows * (l.q.blocks() + l.k.blocks() + l.v.blocks()) * 16);
  heads_ = b_heads.get<float>((size_t)rows * l.o.groups() * kGroup);
  if (!l.experts) chosen_[layer].clear(), weighed_[layer].clear();
  for (int target : routed_at_[layer]) {
    const LayerSpec& t = spec_.layers[target];
    scores_[target] = b_scores[target == layer ? 0 : target + 1].get<float>((size_t)rows * (t.router.blocks() + 1) * 16);
    chosen_[target].assign((size_t)rows * t.top_k, 0);
    weighed_[target].assign(chosen_[target].size(), 0.0f);
  }
  shared_weight_.assign(rows, 1.0f);
  normed_of_ = -1;
  parallel([&](int thread) { attention_body(layer, thread); });
  raise_if_bad("attention", layer);
  normed_of_ = layer;
}

void Model::peek(int layer, int other, float* out) {
  if (layer != normed_of_) throw std::invalid_argument("peek: the attention of another layer ran last");
  if (other < 0 || other >= (int)spec_.layers.size() || !spec_.layers[other].experts)
    throw std::invalid_argument("peek: no layer with experts");
  const LayerSpec& l = spec_.layers[other];
  const Matrix& m = l.router;
  const size_t ld = (size_t)m.blocks() * 16;
  float* all = b_peek.get<float>(step_.rows * ld);
  parallel([&](int thread) {
    int from, to;
    if (many()) {
      split(step_.rows, thread, pool_.threads(), &from, &to);
      if (from < to)
        k_->block_float(m.layout, m.data(), m.k, normed_ + (size_t)from * ld_, ld_, nullptr, to - from, m.blocks(),
                        all + from * ld, ld);
    } else {
      split(m.blocks(), thread, pool_.threads(), &from, &to);
      if (from < to)
        k_->block_float(m.layout, m.data() + from * m.block_row(), m.k, normed_, ld_, nullptr, step_.rows, to - from,
                        all + from * 16, ld);
    }
  });
  for (int r = 0; r < step_.rows; ++r) {
    if (l.router_bias) k_->add(all + r * ld, floats(l.router_bias), l.experts, 1.0f);
    std::memcpy(out + (size_t)r * l.experts, all + r * ld, l.experts * sizeof(float));
  }
}

void Model::attention_body(int layer, int thread) {
  const LayerSpec& l = spec_.layers[layer];
  const int rows = step_.rows, threads = pool_.threads();
  Scratch& s = scratch_[thread];
  int from, to;
  split(rows, thread, threads, &from, &to);
  const bool quantised = is_quantised(l.q.layout) || is_quantised(l.k.layout) || is_quantised(l.v.layout);
  for (int r = from; r < to; ++r) {
    float* v = normed_ + (size_t)r * ld_;
    norm(x_ + (size_t)r * ld_, l.attention_norm, l.attention_norm_bias, v);
    if (quantised) put(in_, r, 0, v, spec_.hidden);
  }
  pool_.barrier();

  const Matrix* parts[3] = {&l.q, &l.k, &l.v};
  const int nq = l.q.blocks(), nk = l.k.blocks(), all = nq + nk + l.v.blocks();
  const size_t ld = (size_t)all * 16;
  share(all, 4, 0, thread, [&](int begin, int end) {
    int base = 0;
    for (const Matrix* m : parts) {
      const int a = begin > base ? begin - base : 0, b = end - base < m->blocks() ? end - base : m->blocks();
      if (a < b) linear(*m, in_, normed_, ld_, nullptr, rows, a, b, qkv_ + base * 16, ld, s);
      base += m->blocks();
    }
  });
  pool_.barrier();

  const bool fused = step_.lone && l.qk_norm != 2;
  if (!fused) {
    for (int r = from; r < to; ++r) {
      place_whole(layer, r);
      for (int h = 0; h < spec_.kv_heads; ++h) place(layer, r, h);
    }
    pool_.barrier();
  }
  attend_all(layer, thread);
  pool_.barrier();

  const int width = spec_.heads * spec_.head_dim;
  if (is_quantised(l.o.layout) && (spec_.heads / spec_.kv_heads * spec_.head_dim) % kGroup) {
    for (int r = from; r < to; ++r) put(mid_, r, 0, heads_ + (size_t)r * l.o.groups() * kGroup, width);
    pool_.barrier();
  }
  share(l.o.blocks(), 4, 2, thread, [&](int begin, int end) {
    linear(l.o, mid_, heads_, l.o.groups() * kGroup, nullptr, rows, begin, end, projected_, ld_, s);
    const int first = begin * 16, n = (end * 16 < spec_.hidden ? end * 16 : spec_.hidden) - first;
    for (int r = 0; r < rows; ++r) {
      float* y = projected_ + (size_t)r * ld_ + first;
      if (l.o_bias) k_->add(y, floats(l.o_bias) + first, n, 1.0f);
      k_->add(x_ + (size_t)r * ld_ + first, y, n, spec_.residual_scale);
    }
  });
  pool_.barrier();
  route_rows(layer, thread);
}

// Biases and the norm over all heads of a row.
void Model::place_whole(int layer, int row) {
  const LayerSpec& l = spec_.layers[layer];
  if (l.qk_norm != 2) return;
  float* q = qkv_ + (size_t)row * (l.q.blocks() + l.k.blocks() + l.v.blocks()) * 16;
  float* k = q + l.q.blocks() * 16;
  if (l.q_bias) k_->add(q, floats(l.q_bias), l.q.n, 1.0f);
  if (l.k_bias) k_->add(k, floats(l.k_bias), l.k.n, 1.0f);
  k_->rms_norm(q, floats(l.q_norm), l.q.n, spec_.eps, spec_.norm_add, q);
  k_->rms_norm(k, floats(l.k_norm), l.k.n, spec_.eps, spec_.norm_add, k);
}

// Turns the queries and the key of one KV head to their position and writes key and value into the cache.
void Model::place(int layer, int row, int kv_head) {
  const LayerSpec& l = spec_.layers[layer];
  const int dim = spec_.head_dim, group = spec_.heads / spec_.kv_heads;
  float* base = qkv_ + (size_t)row * (l.q.blocks() + l.k.blocks() + l.v.blocks()) * 16;
  float* q = base + (size_t)kv_head * group * dim;
  float* k = base + l.q.blocks() * 16 + (size_t)kv_head * dim;
  float* v = base + (l.q.blocks() + l.k.blocks()) * 16 + (size_t)kv_head * dim;
  const float* turn = turn_ + ((size_t)l.rope * step_.rows + row) * spec_.rotary;
  const Rope rope{turn, turn + spec_.rotary / 2, spec_.rotary, spec_.rope_interleaved};
  if (l.qk_norm != 2) {
    if (l.q_bias) k_->add(q, floats(l.q_bias) + kv_head * group * dim, group * dim, 1.0f);
    if (l.k_bias) k_->add(k, floats(l.k_bias) + kv_head * dim, dim, 1.0f);
  }
  if (l.v_bias) k_->add(v, floats(l.v_bias) + kv_head * dim, dim, 1.0f);
  if (l.qk_norm == 1) {
    for (int h = 0; h < group; ++h) k_->rms_norm(q + h * dim, floats(l.q_norm), dim, spec_.eps, spec_.norm_add, q + h * dim);
    k_->rms_norm(k, floats(l.k_norm), dim, spec_.eps, spec_.norm_add, k);
  }
  if (spec_.rotary) {
    for (int h = 0; h < group; ++h) k_->rope(q + h * dim, rope);
    k_->rope(k, rope);
  }
  const int position = step_.positions[row], slot = position % kLanes;
  const int page = step_.tables[(size_t)step_.rows_of[row] * step_.table_width + position / kLanes];
  float* cell = cache_ + page_floats_ * page + ((size_t)layer * spec_.kv_heads + kv_head) * 2 * kLanes * dim;
  for (int d = 0; d < dim; ++d) cell[d * kLanes + slot] = k[d];
  std::memcpy(cell + (size_t)(kLanes + slot) * dim, v, dim * sizeof(float));
}

void Model::attend_all(int layer, int thread) {
  const LayerSpec& l = spec_.layers[layer];
  const int group = spec_.heads / spec_.kv_heads, rows = step_.rows;
  const bool fused = step_.lone && l.qk_norm != 2;
  if (!many()) {
    int from, to;
    split(rows * spec_.kv_heads, thread, pool_.threads(), &from, &to);
    for (int u = from; u < to; ++u) {
      if (fused) place(layer, u / spec_.kv_heads, u % spec_.kv_heads);
      attend_unit(layer, thread, u / spec_.kv_heads, 1, u % spec_.kv_heads);
    }
    return;
  }
  const int step = group >= kFewRows ? 1 : kFewRows / group, tiles = (rows + step - 1) / step;
  for (;;) {
    const int u = pool_.next_share(1);
    if (u >= tiles * spec_.kv_heads) return;
    const int head = u / tiles, begin = (tiles - 1 - u % tiles) * step, end = begin + step < rows ? begin + step : rows;
    for (int r = begin; r < end;) {  // rows of one sequence go together
      int n = 1;
      while (r + n < end && step_.rows_of[r + n] == step_.rows_of[r]) ++n;
      if (fused)
        for (int i = 0; i < n; ++i) place(layer, r + i, head);
      attend_unit(layer, thread, r, n, head);
      r += n;
    }
  }
}

void Model::attend_unit(int layer, int thread, int first, int rows, int kv_head) {
  const LayerSpec& l = spec_.layers[layer];
  Scratch& s = scratch_[thread];
  const int dim = spec_.head_dim, group = spec_.heads / spec_.kv_heads;
  const int32_t* table = step_.tables.data() + (size_t)step_.rows_of[first] * step_.table_width;
  int most = 0;
  for (int r = 0; r < rows; ++r) most = std::max(most, step_.positions[first + r]);
  const int pages = most / kLanes + 1;
  const float** k = s.pages_k.get<const float*>(pages);
  const float** v = s.pages_v.get<const float*>(pages);
  for (int p = 0; p < pages; ++p) {
    k[p] = cache_ + page_floats_ * table[p] + ((size_t)layer * spec_.kv_heads + kv_head) * 2 * kLanes * dim;
    v[p] = k[p] + (size_t)kLanes * dim;
  }
  const size_t ldq = (size_t)(l.q.blocks() + l.k.blocks() + l.v.blocks()) * 16, ldo = l.o.groups() * kGroup;
  const int total = rows * group;
  float* q = s.query.get<float>((size_t)total * dim * 2);
  float* out = q + (size_t)total * dim;
  for (int r = 0; r < rows; ++r)
    std::memcpy(q + (size_t)r * group * dim, qkv_ + (first + r) * ldq + (size_t)kv_head * group * dim, group * dim * sizeof(float));
  AttendArgs a;
  a.scores = s.scores.get<float>((size_t)kFewRows * pages * kLanes);
  a.k = k;
  a.v = v;
  a.dim = dim;
  a.window = l.window;
  a.scale = l.attention_scale;
  a.softcap = l.attention_softcap;
  for (int begin = 0; begin < total; begin += kFewRows) {
    int last[kFewRows];
    a.count = std::min(kFewRows, total - begin);
    for (int i = 0; i < a.count; ++i) last[i] = step_.positions[first + (begin + i) / group];
    a.last = last;
    a.q = q + (size_t)begin * dim;
    a.out = out + (size_t)begin * dim;
    k_->attend(a);
  }
  const int width = group * dim;
  for (int r = 0; r < rows; ++r) {
    float* y = heads_ + (first + r) * ldo + (size_t)kv_head * width;
    std::memcpy(y, out + (size_t)r * width, width * sizeof(float));
    if (is_quantised(l.o.layout) && width % kGroup == 0) put(mid_, first + r, kv_head * width / kGroup, y, width);
  }
}

// Norm, quantised input of the experts, router scores, choice. Few rows: all threads normalise all of them and share the
// router's row blocks; many: they share the rows.
void Model::route_rows(int layer, int thread) {
  const LayerSpec& l = spec_.layers[layer];
  const int rows = step_.rows, threads = pool_.threads();
  Scratch& s = scratch_[thread];
  int from, to;
  split((rows + 3) / 4, thread, threads, &from, &to);
  from *= 4;
  to = std::min(to * 4, rows);
  if (!many()) split(rows, thread, threads, &from, &to);
  for (int r = from; r < to; ++r) {
    float* v = normed_ + (size_t)r * ld_;
    norm(x_ + (size_t)r * ld_, l.ffn_norm, l.ffn_norm_bias, v);
    put(flat_, r, 0, v, spec_.hidden);
    std::memset(mixed_ + (size_t)r * ld_, 0, ld_ * sizeof(float));
  }
  if (from < to && l.shared_gate.given()) {
    float* gate = s.line.get<float>((size_t)(to - from) * 16);
    k_->block_float(l.shared_gate.layout, l.shared_gate.data(), spec_.hidden, normed_ + (size_t)from * ld_, ld_, nullptr,
                    to - from, 1, gate, 16);
    for (int r = from; r < to; ++r) {
      k_->sigmoid(gate + (r - from) * 16, 1);
      shared_weight_[r] = gate[(r - from) * 16];
    }
  }
  if (routed_at_[layer].empty()) return;
  float* own = nullptr;
  if (!many()) {
    own = s.query.get<float>((size_t)rows * ld_);
    for (int r = 0; r < rows; ++r) norm(x_ + (size_t)r * ld_, l.ffn_norm, l.ffn_norm_bias, own + (size_t)r * ld_);
  }
  for (int target : routed_at_[layer]) route_rows_of(target, from, to, own, thread);
}

// Scores and choice of a layer for rows from..to-1, which this thread has normalised; `own`: all rows, where few.
void Model::route_rows_of(int target, int from, int to, const float* own, int thread) {
  const LayerSpec& l = spec_.layers[target];
  const Matrix& m = l.router;
  const size_t ld = (size_t)m.blocks() * 16;
  float* scores = scores_[target];
  if (!own) {
    if (from < to)
      k_->block_float(m.layout, m.data(), m.k, normed_ + (size_t)from * ld_, ld_, nullptr, to - from, m.blocks(),
                      scores + from * ld, ld);
  } else {
    int begin, end;
    split(m.blocks(), thread, pool_.threads(), &begin, &end);
    if (begin < end)
      k_->block_float(m.layout, m.data() + begin * m.block_row(), m.k, own, ld_, nullptr, step_.rows, end - begin,
                      scores + begin * 16, ld);
    pool_.barrier();
  }
  for (int r = from; r < to; ++r) {
    if (l.router_bias) k_->add(scores + r * ld, floats(l.router_bias), l.experts, 1.0f);
    int32_t* ids = chosen_[target].data() + (size_t)r * l.top_k;
    float* weights = weighed_[target].data() + (size_t)r * l.top_k;
    choose_row(l, scores + r * ld, ids, weights);
    if (!thin_rows_.empty() && thin_rows_[r]) thin_row(l, thin_.data() + (size_t)target * thin_ranks_, ids, weights);
  }
}

void Model::thin(const float* ratios, int ranks, const int32_t* rows) {
  thin_.assign(ratios, ratios + spec_.layers.size() * ranks);
  thin_ranks_ = ranks;
  thin_rows_.assign(rows, rows + step_.rows);
}

// Leaves out the experts of rank j that weigh less than ratios[j] times the first; the others weigh anew.
void Model::thin_row(const LayerSpec& l, const float* ratios, int32_t* ids, float* weights) {
  bool lost = false;
  float sum = 0;
  for (int j = 0; j < l.top_k; ++j) {
    const float least = ratios[j] * weights[0];
    if (j && weights[j] < least) {
      lost = true;
      ids[j] = -1;
    } else {
      sum += weights[j];
    }
  }
  if (!lost) return;
  const bool anew = l.renormalise || l.router_kind == TOPK_SOFTMAX;
  for (int j = 0; j < l.top_k; ++j)
    weights[j] = ids[j] < 0 ? 0.0f : anew ? weights[j] / sum * l.route_scale : weights[j];
}

// The n highest, best first; equal values go to the lower index.
static void top(const float* value, const char* open, int count, int n, int32_t* ids) {
  int have = 0;
  for (int e = 0; e < count; ++e) {
    if (open && !open[e]) continue;
    if (have == n && !(value[e] > value[ids[n - 1]])) continue;
    int at = have < n ? have++ : n - 1;
    for (; at > 0 && value[e] > value[ids[at - 1]]; --at) ids[at] = ids[at - 1];
    ids[at] = e;
  }
}

void Model::choose_row(const LayerSpec& l, float* logits, int32_t* ids, float* weights) {
  const int count = l.experts, n = l.top_k;
  thread_local std::vector<float> gate, rank;
  thread_local std::vector<char> open;
  gate.assign(logits, logits + count);
  for (float v : gate)
    if (!std::isfinite(v)) bad_.store(true, std::memory_order_relaxed);
  if (l.router_kind == SOFTMAX_TOPK) k_->softmax(gate.data(), count);
  else if (l.router_kind == SIGMOID_BIAS) k_->sigmoid(gate.data(), count);
  // A softmax keeps the order of its logits; ranking the logits keeps apart what it would round to equal.
  const float* by = l.router_kind == SIGMOID_BIAS ? gate.data() : logits;
  if (l.select_bias) {
    rank.assign(by, by + count);
    k_->add(rank.data(), floats(l.select_bias), count, 1.0f);
    by = rank.data();
  }
  const char* allowed = nullptr;
  if (l.groups > 1 && l.top_groups < l.groups) {
    const int size = count / l.groups;
    std::vector<float> best(l.groups);
    std::vector<int32_t> two(2), kept(l.top_groups);
    open.assign(count, 0);
    for (int g = 0; g < l.groups; ++g) {
      const int m = std::min(2, size);
      top(by + g * size, nullptr, size, m, two.data());
      best[g] = by[g * size + two[0]] + (m == 2 ? by[g * size + two[1]] : 0.0f);
    }
    top(best.data(), nullptr, l.groups, l.top_groups, kept.data());
    for (int g : kept) std::memset(open.data() + g * size, 1, size);
    allowed = open.data();
  }
  top(by, allowed, count, n, ids);
  for (int i = 0; i < n; ++i) weights[i] = gate[ids[i]];
  if (l.router_kind == TOPK_SOFTMAX) k_->softmax(weights, n);
  if (l.renormalise) {
    float sum = 0;
    for (int i = 0; i < n; ++i) sum += weights[i];
    for (int i = 0; i < n; ++i) weights[i] = sum > 0 ? weights[i] / sum : weights[i];
  }
  for (int i = 0; i < n; ++i) weights[i] *= l.route_scale;
}

}  // namespace moestro
