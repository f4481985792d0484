#include "shares.h"

#include <sys/mman.h>

#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>

namespace moestro {

static void* map(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (bytes >= (4u << 20)) madvise(p, bytes, MADV_HUGEPAGE);
#endif
  return p;
}

Buffer::~Buffer() {
  if (data_) munmap(data_, bytes_);
}

void* Buffer::grow(size_t bytes) {
  if (bytes > bytes_) {
    const size_t size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    void* fresh = map(size);
    if (data_) munmap(data_, bytes_);
    data_ = fresh;
    bytes_ = size;
  }
  return data_;
}

static int padded(int n) { return (n + kGroup - 1) / kGroup * kGroup; }

Model::Model(ModelSpec spec, int threads) : spec_(std::move(spec)), k_(current()), pool_(threads) {
  check();
  ld_ = padded(spec_.hidden);
  scratch_ = std::vector<Scratch>(pool_.threads());
  chosen_.resize(spec_.layers.size());
  weighed_.resize(spec_.layers.size());
  scores_.assign(spec_.layers.size(), nullptr);
  routed_at_.resize(spec_.layers.size());
  for (int i = 0; i < (int)spec_.layers.size(); ++i)
    if (spec_.layers[i].experts) routed_at_[i - spec_.layers[i].ahead].push_back(i);
  b_scores = std::vector<Buffer>(spec_.layers.size() + 1);
  page_floats_ = spec_.layers.size() * spec_.kv_heads * 2 * kLanes * (size_t)spec_.head_dim;
  cache_bytes_ = page_floats_ * sizeof(float) * spec_.pages;
  // Pages cost memory when they are written first, not here.
  cache_ = static_cast<float*>(map(cache_bytes_));
}

Model::~Model() {
  if (cache_) munmap(cache_, cache_bytes_);
}

void Model::check() const {
  const auto need = [](bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
  };
  const auto fits = [&](const Matrix& m, int n, int k, const char* what) {
    need(m.n == n && m.k == k && m.layout >= F32 && m.layout <= T1, what);
  };
  need(spec_.hidden > 0 && spec_.heads > 0 && spec_.kv_heads > 0 && spec_.vocab > 0 && spec_.pages > 0, "sizes must be positive");
  need(spec_.heads % spec_.kv_heads == 0, "heads must be a multiple of kv_heads");
  need(spec_.head_dim > 0 && spec_.head_dim % 16 == 0, "head_dim must be a multiple of 16");
  need(spec_.rotary % 2 == 0 && spec_.rotary >= 0 && spec_.rotary <= spec_.head_dim, "rotary must be even, at most head_dim");
  fits(spec_.embedding, spec_.vocab, spec_.hidden, "embedding: not [vocab, hidden]");
  fits(spec_.head, spec_.vocab, spec_.hidden, "head: not [vocab, hidden]");
  need(spec_.final_norm != 0, "final norm missing");
  for (const auto& f : spec_.inv_freq) need((int)f.size() == spec_.rotary / 2, "inv_freq: not rotary / 2 values");
  const auto ffn = [&](const Ffn& f, const char* what) {
    fits(f.up, f.up.n, spec_.hidden, what);
    fits(f.down, spec_.hidden, f.up.n, what);
    if (f.gate.given()) fits(f.gate, f.up.n, spec_.hidden, what);
  };
  for (size_t index = 0; index < spec_.layers.size(); ++index) {
    const LayerSpec& l = spec_.layers[index];
    need(l.ahead >= 0 && l.ahead <= (int)index, "ahead: no such layer before");
    fits(l.q, spec_.heads * spec_.head_dim, spec_.hidden, "q: not [heads * head_dim, hidden]");
    fits(l.k, spec_.kv_heads * spec_.head_dim, spec_.hidden, "k: not [kv_heads * head_dim, hidden]");
    fits(l.v, spec_.kv_heads * spec_.head_dim, spec_.hidden, "v: not [kv_heads * head_dim, hidden]");
    fits(l.o, spec_.hidden, spec_.heads * spec_.head_dim, "o: not [hidden, heads * head_dim]");
    need(l.attention_norm && l.ffn_norm, "norms missing");
    need(spec_.rotary == 0 || (l.rope >= 0 && l.rope < (int)spec_.inv_freq.size()), "rope: no such table");
    need(l.qk_norm == 0 || (l.q_norm && l.k_norm), "q_norm and k_norm missing");
    if (l.experts) {
      fits(l.router, l.experts, spec_.hidden, "router: not [experts, hidden]");
      need(!is_quantised(l.router.layout), "router: float layouts only");
      need(l.top_k >= 1 && l.top_k <= l.experts, "top_k: not in 1..experts");
      need(l.groups >= 1 && l.experts % l.groups == 0 && l.top_groups >= 1 && l.top_groups <= l.groups, "router groups");
      need(l.top_groups * (l.experts / l.groups) >= l.top_k, "router groups: fewer experts open than top_k");
      need(l.slabs.empty() || (int)l.slabs.size() == l.experts, "slabs: not one address per expert");
      ffn(l.expert, "expert matrices do not fit");
      for (const Ffn& f : l.kinds) {
        ffn(f, "expert matrices do not fit");
        need(f.up.n == l.expert.up.n && f.act == l.expert.act, "experts of different forms");
      }
      need(l.kinds.empty() || (int)l.kind_of.size() == l.experts, "kinds: not one for each expert");
      for (int kind : l.kind_of) need(kind >= 0 && kind < (int)l.kinds.size(), "kinds: no such kind");
    }
    need(l.experts || l.shared.up.given(), "a layer needs experts or a dense block");
    if (l.shared.up.given()) ffn(l.shared, "shared matrices do not fit");
    if (l.shared_gate.given()) fits(l.shared_gate, 1, spec_.hidden, "shared gate: not [1, hidden]");
  }
}

void Model::begin(const int32_t* tokens, const int32_t* positions, const int32_t* rows_of, int rows, const int32_t* tables,
                  int sequences, int width) {
  if (rows < 1) throw std::invalid_argument("a step needs at least one row");
  std::vector<int> count(sequences, 0);
  for (int r = 0; r < rows; ++r) {
    if (tokens[r] < 0 || tokens[r] >= spec_.vocab) throw std::invalid_argument("token id outside the vocabulary");
    if (rows_of[r] < 0 || rows_of[r] >= sequences) throw std::invalid_argument("rows_of: no such sequence");
    const int pages = positions[r] / kLanes + 1;
    if (positions[r] < 0 || pages > width) throw std::invalid_argument("position outside the page table");
    for (int p = 0; p < pages; ++p) {
      const int page = tables[rows_of[r] * width + p];
      if (page < 0 || page >= spec_.pages) throw std::invalid_argument("page id outside the cache");
    }
    ++count[rows_of[r]];
  }
  step_.rows = rows;
  thin_rows_.clear();
  normed_of_ = -1;
  for (auto& ids : chosen_) ids.clear();
  step_.tokens.assign(tokens, tokens + rows);
  step_.positions.assign(positions, positions + rows);
  step_.rows_of.assign(rows_of, rows_of + rows);
  step_.tables.assign(tables, tables + (size_t)sequences * width);
  step_.table_width = width;
  step_.lone = true;
  for (int c : count) step_.lone = step_.lone && c <= 1;
  x_ = b_x.get<float>((size_t)rows * ld_);
  normed_ = b_normed.get<float>((size_t)rows * ld_);
  mixed_ = b_mixed.get<float>((size_t)rows * ld_);
  projected_ = b_projected.get<float>((size_t)rows * ld_);
  all_rows_.resize(rows);
  for (int r = 0; r < rows; ++r) all_rows_[r] = r;
  const int half = spec_.rotary / 2;
  turn_ = b_turn.get<float>(spec_.inv_freq.size() * rows * spec_.rotary + 1);
  for (size_t t = 0; t < spec_.inv_freq.size(); ++t)
    for (int r = 0; r < rows; ++r) {
      float* turn = turn_ + (t * rows + r) * spec_.rotary;
      for (int i = 0; i < half; ++i) {
        const float angle = (float)positions[r] * spec_.inv_freq[t][i];
        turn[i] = std::cos(angle) * spec_.rope_factor;
        turn[half + i] = std::sin(angle) * spec_.rope_factor;
      }
    }
  parallel([&](int thread) {
    int from, to;
    split(rows, thread, pool_.threads(), &from, &to);
    for (int r = from; r < to; ++r) {
      float* x = x_ + (size_t)r * ld_;
      k_->embed(spec_.embedding.layout, spec_.embedding.data(), step_.tokens[r], spec_.hidden, spec_.embed_scale, x);
      std::memset(x + spec_.hidden, 0, (ld_ - spec_.hidden) * sizeof(float));
    }
  });
}

void Model::norm(const float* x, uintptr_t weight, uintptr_t bias, float* out) {
  const float* w = reinterpret_cast<const float*>(weight);
  const float* b = reinterpret_cast<const float*>(bias);
  if (spec_.layer_norm) k_->layer_norm(x, w, b, spec_.hidden, spec_.eps, out);
  else k_->rms_norm(x, w, spec_.hidden, spec_.eps, spec_.norm_add, out);
  std::memset(out + spec_.hidden, 0, (ld_ - spec_.hidden) * sizeof(float));
}

QRows Model::rows_in(Buffer* b, int rows, int groups, bool tiled) {
  QRows q;
  const size_t full = (size_t)(rows + 15) / 16 * 16 * groups;
  q.codes = b[0].get<int8_t>(full * kGroup);
  q.scales = b[1].get<float>(full);
  q.sums = b[2].get<int32_t>(full);
  q.groups = groups;
  q.tiled = tiled;
  return q;
}

// Quantises k floats of a row from a group on.
void Model::put(const QRows& q, int row, int group, const float* x, int k) {
  bool sound;
  if (q.tiled) {
    const size_t cell = (size_t)(row / 16) * q.groups + group;
    sound = k_->quantise(x, k, q.codes + cell * 1024 + row % 16 * 64, 1024, q.scales + cell * 16 + row % 16, 16, nullptr);
  } else {
    const size_t cell = (size_t)row * q.groups + group;
    sound = k_->quantise(x, k, q.codes + cell * 64, 64, q.scales + cell, 1, q.sums + cell);
  }
  if (!sound) bad_.store(true, std::memory_order_relaxed);
}

// Row blocks from..to-1 of a matrix; block b goes to columns b * 16 of `out`.
void Model::linear(const Matrix& m, const QRows& q, const float* x, size_t ldx, const int32_t* index, int rows, int from,
                   int to, float* out, size_t ldo, Scratch& s) {
  if (from >= to) return;
  if (!is_quantised(m.layout)) {
    k_->block_float(m.layout, m.data() + from * m.block_row(), m.k, x, ldx, index, rows, to - from, out + from * 16, ldo);
    return;
  }
  uint8_t* panel = s.panel.get<uint8_t>((size_t)q.groups * (1024 + 64));
  for (int b = from; b < to; ++b) m.multiply(*k_, b, q, index, rows, out + b * 16, ldo, panel);
}

void Model::raise_if_bad(const char* where, int layer) {
  if (bad_.exchange(false)) {
    const std::string at = layer < 0 ? "" : " of layer " + std::to_string(layer);
    throw std::runtime_error(std::string("a NaN or an infinity appeared in the ") + where + at);
  }
}

void Model::run(int from, int to) {
  for (int layer = from; layer < to; ++layer) {
    const LayerSpec& l = spec_.layers[layer];
    attention(layer);
    if (l.experts) {
      if (l.slabs.empty()) throw std::invalid_argument("run: the experts of a layer are not all resident");
      routes(layer, chosen_[layer].data(), weighed_[layer].data(), l.top_k);
      std::vector<int32_t> ids(needed_.begin(), needed_.end());
      std::vector<uintptr_t> slabs(ids.size());
      for (size_t i = 0; i < ids.size(); ++i) slabs[i] = l.slabs[ids[i]];
      plan_items(layer, ids.data(), slabs.data(), (int)ids.size(), true);
    } else {
      plan_items(layer, nullptr, nullptr, 0, true);
    }
    parallel([&](int thread) { experts_body(true, thread); });
    raise_if_bad("experts", layer);
    layer_ = -1;
  }
}

void Model::logits(const int32_t* want, int count, float* out) {
  if (count < 1) return;
  for (int i = 0; i < count; ++i)
    if (want[i] < 0 || want[i] >= step_.rows) throw std::invalid_argument("want: no such row");
  normed_of_ = -1;
  const Matrix& head = spec_.head;
  const size_t ld = (size_t)head.blocks() * 16;
  float* all = b_logits.get<float>((size_t)count * ld);
  in_ = rows_in(b_in, count, head.groups(), k_->tiles && count > kFewRows);
  parallel([&](int thread) {
    Scratch& s = scratch_[thread];
    int from, to;
    split(count, thread, pool_.threads(), &from, &to);
    for (int i = from; i < to; ++i) {
      float* v = normed_ + (size_t)i * ld_;
      norm(x_ + (size_t)want[i] * ld_, spec_.final_norm, spec_.final_norm_bias, v);
      if (is_quantised(head.layout)) put(in_, i, 0, v, spec_.hidden);
    }
    pool_.barrier();
    split(head.blocks(), thread, pool_.threads(), &from, &to);
    linear(head, in_, normed_, ld_, nullptr, count, from, to, all, ld, s);
    pool_.barrier();
    split(count, thread, pool_.threads(), &from, &to);
    for (int i = from; i < to; ++i) {
      float* v = out + (size_t)i * spec_.vocab;
      std::memcpy(v, all + i * ld, spec_.vocab * sizeof(float));
      if (spec_.logit_scale != 1)
        for (int j = 0; j < spec_.vocab; ++j) v[j] *= spec_.logit_scale;
      if (spec_.logit_softcap > 0) k_->softcap(v, spec_.vocab, spec_.logit_softcap);
    }
  });
  raise_if_bad("input of the head", -1);
}

void Model::copy_page(int from, int to) {
  if (from < 0 || to < 0 || from >= spec_.pages || to >= spec_.pages) throw std::invalid_argument("page id outside the cache");
  if (from != to) std::memcpy(cache_ + page_floats_ * to, cache_ + page_floats_ * from, page_bytes());
}

void Model::read_hidden(float* out) const {
  for (int r = 0; r < step_.rows; ++r)
    std::memcpy(out + (size_t)r * spec_.hidden, x_ + (size_t)r * ld_, spec_.hidden * sizeof(float));
}

}  // namespace moestro
