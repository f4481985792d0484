// The experts of a layer. Outputs of a row are added in ascending order of expert id, whichever slab came first.
#include <cstring>
#include <stdexcept>

#include "shares.h"

namespace moestro {

void Model::routes(int layer, const int32_t* ids, const float* weights, int width) {
  const LayerSpec& l = spec_.layers.at(layer);
  const int rows = step_.rows, count = l.experts;
  first_.assign(count + 1, 0);
  for (int i = 0; i < rows * width; ++i) {
    if (ids[i] >= count) throw std::invalid_argument("route to an expert that does not exist");
    if (ids[i] >= 0) ++first_[ids[i] + 1];  // negative: no expert
  }
  needed_.clear();
  for (int e = 0; e < count; ++e) {
    if (first_[e + 1]) needed_.push_back(e);
    first_[e + 1] += first_[e];
  }
  row_of_.resize(first_[count]);
  weight_of_.resize(first_[count]);
  std::vector<int32_t> at(first_.begin(), first_.end() - 1);
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < width; ++j) {
      const int e = ids[r * width + j];
      if (e < 0) continue;
      row_of_[at[e]] = r;
      weight_of_[at[e]++] = weights[r * width + j];
    }
  layer_ = layer;
  next_ = 0;
  waiting_.resize(count);
  state_.assign(count, 0);
}

static Matrix placed(Matrix m, uintptr_t base) {
  if (m.given()) m.at += base;
  return m;
}

void Model::plan_items(int layer, const int32_t* ids, const uintptr_t* slabs, int count, bool shared) {
  const LayerSpec& l = spec_.layers[layer];
  items_.clear();
  units_.clear();
  size_t next = next_;
  for (int i = 0; i < count; ++i) {
    const int e = ids[i], rows = first_[e + 1] - first_[e];
    Ffn f = l.of(e);
    f.gate = placed(f.gate, slabs[i]);
    f.up = placed(f.up, slabs[i]);
    f.down = placed(f.down, slabs[i]);
    Item item{f, e, row_of_.data() + first_[e], weight_of_.data() + first_[e], rows, {}, nullptr, nullptr};
    if (next < needed_.size() && needed_[next] == e) {
      ++next;
      state_[e] = 2;
    } else {
      waiting_[e].resize((size_t)rows * ld_);
      item.sink = waiting_[e].data();
      state_[e] = 1;
    }
    items_.push_back(item);
  }
  next_ = next;
  if (shared && l.shared.up.given())
    items_.push_back({l.shared, -1, all_rows_.data(), shared_weight_.data(), step_.rows, {}, nullptr, nullptr});
  // Hidden states of all items lie behind one another; a tiled item is padded to whole tiles.
  const auto room = [](const Item& i) { return (size_t)(i.rows + 15) / 16 * 16 * i.ffn.down.groups(); };
  size_t cells = 0;
  for (const Item& i : items_) cells += room(i);
  char* base = b_hidden.get<char>(cells * (kGroup + sizeof(float) + sizeof(int32_t)));
  float* plain = nullptr;
  for (const Item& i : items_)
    if (!is_quantised(i.ffn.down.layout)) plain = b_hidden_floats.get<float>(cells * kGroup);
  size_t done = 0;
  const int step = many() ? 4 : 1;
  for (size_t n = 0; n < items_.size(); ++n) {
    Item& i = items_[n];
    i.hidden.codes = (int8_t*)base + done * kGroup;
    i.hidden.scales = (float*)(base + cells * kGroup) + done;
    i.hidden.sums = (int32_t*)(base + cells * (kGroup + sizeof(float))) + done;
    i.hidden.groups = i.ffn.down.groups();
    i.hidden.tiled = k_->tiles && i.rows > kFewRows;
    i.hidden_floats = plain ? plain + done * kGroup : nullptr;
    done += room(i);
    for (int g = 0; g < i.hidden.groups; g += step)
      units_.push_back({(int)n, g, std::min(g + step, i.hidden.groups)});
  }
}

void Model::experts(int layer, const int32_t* ids, const uintptr_t* slabs, int count) {
  if (layer != layer_) throw std::logic_error("routes first");
  const LayerSpec& l = spec_.layers[layer];
  for (int i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= l.experts || (i && ids[i] <= ids[i - 1]))
      throw std::invalid_argument("expert ids must be in range and ascending");
    if (first_[ids[i] + 1] == first_[ids[i]]) throw std::invalid_argument("an expert without rows");
    if (state_[ids[i]]) throw std::invalid_argument("an expert came twice");
  }
  if (count < 1) return;
  plan_items(layer, ids, slabs, count, false);
  parallel([&](int thread) { experts_body(false, thread); });
  raise_if_bad("experts", layer);
  flush();
}

// Adds what waited for experts with lower ids.
void Model::flush() {
  for (; next_ < needed_.size() && state_[needed_[next_]] == 1; ++next_) {
    const int e = needed_[next_];
    for (int i = first_[e]; i < first_[e + 1]; ++i)
      k_->add(mixed_ + (size_t)row_of_[i] * ld_, waiting_[e].data() + (size_t)(i - first_[e]) * ld_, ld_, 1.0f);
    state_[e] = 2;
    std::vector<float>().swap(waiting_[e]);
  }
}

void Model::finish(int layer) {
  const LayerSpec& l = spec_.layers.at(layer);
  if (l.experts && (layer != layer_ || next_ != needed_.size())) throw std::logic_error("experts of the layer are missing");
  plan_items(layer, nullptr, nullptr, 0, true);
  parallel([&](int thread) { experts_body(true, thread); });
  raise_if_bad("experts", layer);
  layer_ = -1;
}

void Model::experts_body(bool last, int thread) {
  share((int)units_.size(), 1, 0, thread, [&](int from, int to) {
    for (int u = from; u < to; ++u) hidden_unit(items_[units_[u].item], thread, units_[u].from, units_[u].to);
  });
  pool_.barrier();
  const int blocks = (spec_.hidden + kLanes - 1) / kLanes;
  share(blocks, 8, 1, thread, [&](int from, int to) { output_unit(thread, from, to, last); });
}

// act(gate x) * (up x) * weight for some groups of 64 hidden units of one expert.
void Model::hidden_unit(const Item& item, int thread, int from, int to) {
  const Ffn& f = item.ffn;
  Scratch& s = scratch_[thread];
  const int rows = item.rows, groups = flat_.groups;
  QRows in = flat_;
  const int32_t* index = item.index;
  const bool tiled = item.hidden.tiled && is_quantised(f.up.layout);
  if (tiled) {
    const int tiles = (rows + 15) / 16;
    in.codes = s.codes.get<int8_t>((size_t)tiles * groups * 1024);
    in.scales = s.scales.get<float>((size_t)tiles * groups * 16);
    in.tiled = true;
    for (int r = 0; r < rows; ++r)
      for (int g = 0; g < groups; ++g) {
        const size_t cell = (size_t)(r / 16) * groups + g, source = (size_t)index[r] * groups + g;
        std::memcpy(in.codes + cell * 1024 + r % 16 * 64, flat_.codes + source * 64, 64);
        in.scales[cell * 16 + r % 16] = flat_.scales[source];
      }
    index = nullptr;
  }
  float* gate = s.gate.get<float>((size_t)rows * kGroup);
  float* up = s.up.get<float>((size_t)rows * kGroup);
  float* line = s.line.get<float>(kGroup);
  for (int g = from; g < to; ++g) {
    const int first = g * 4, end = std::min(first + 4, f.up.blocks());
    const auto product = [&](const Matrix& m, float* out) {
      if (end - first < 4) std::memset(out, 0, (size_t)rows * kGroup * sizeof(float));
      linear(m, in, normed_, ld_, index, rows, first, end, out - (size_t)first * 16, kGroup, s);
    };
    product(f.up, up);
    if (f.gate.given()) product(f.gate, gate);
    for (int r = 0; r < rows; ++r) {
      const float* y = up + (size_t)r * kGroup;
      if (f.gate.given()) k_->activate(f.act, gate + (size_t)r * kGroup, y, kGroup, item.weights[r], line);
      else k_->activate(f.act, y, nullptr, kGroup, item.weights[r], line);
      if (is_quantised(f.down.layout)) put(item.hidden, r, g, line, kGroup);
      else std::memcpy(item.hidden_floats + ((size_t)r * item.hidden.groups + g) * kGroup, line, kGroup * sizeof(float));
    }
  }
}

void Model::output_unit(int thread, int from, int to, bool last) {
  Scratch& s = scratch_[thread];
  const int width = (to - from) * kLanes;
  for (const Item& i : items_) {
    float* y = s.gate.get<float>((size_t)i.rows * width);
    const size_t ldh = (size_t)i.hidden.groups * kGroup;
    linear(i.ffn.down, i.hidden, i.hidden_floats, ldh, nullptr, i.rows, from, to, y - (size_t)from * 16, width, s);
    for (int r = 0; r < i.rows; ++r) {
      float* out = i.sink ? i.sink + (size_t)r * ld_ : mixed_ + (size_t)i.index[r] * ld_;
      if (i.sink) std::memcpy(out + from * 16, y + (size_t)r * width, width * sizeof(float));
      else k_->add(out + from * 16, y + (size_t)r * width, width, 1.0f);
    }
  }
  if (!last) return;
  for (int r = 0; r < step_.rows; ++r)
    k_->add(x_ + (size_t)r * ld_ + from * 16, mixed_ + (size_t)r * ld_ + from * 16, width, spec_.residual_scale);
}

}  // namespace moestro
