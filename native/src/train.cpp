// How the work of a training pass is shared: experts, or pieces of busy ones, largest first, to whichever thread is free.
#include "train.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace moestro {

constexpr int64_t kWorthSharing = 1 << 19;  // multiply-adds below which waking a thread costs more than it saves
constexpr size_t kCached = 4 << 20;         // bytes of rows up to which caches may still hold them when they are read
constexpr int kExpertCost = 16;             // what an expert costs beside its rows, in rows

const TrainKernels* table_train_scalar();
#if defined(__x86_64__)
const TrainKernels* table_train_avx2();
const TrainKernels* table_train_avx512();
#endif

const TrainKernels* train_kernels() {
#if defined(__x86_64__)
  const char* name = current()->name;
  if (!std::strcmp(name, "amx") || !std::strcmp(name, "avx512vnni")) return table_train_avx512();
  if (!std::strcmp(name, "avxvnni") || !std::strcmp(name, "avx2")) return table_train_avx2();
#endif
  return table_train_scalar();
}

static size_t forward_floats(const Bank& b) { return (size_t)(b.dim + b.wide() + b.out + 16) * 32 + 16; }
static size_t block_floats(const Bank& b) { return (size_t)kBlock * (b.out + b.inner + b.wide()); }

size_t train_scratch(const Bank& bank, int threads, bool backward) {
  const size_t own = backward ? block_floats(bank) + kPanel : forward_floats(bank);
  return (size_t)threads * (own + 16) + 16;
}

Route train_route(const int64_t* token, const int64_t* expert, size_t count, int experts, int tokens) {
  if (count > (size_t)INT32_MAX) throw std::invalid_argument("more than 2^31 assignments");
  Route route;
  std::vector<int32_t> next(experts + 1, 0), bags(tokens + 1, 0);
  for (size_t n = 0; n < count; ++n) {
    if (expert[n] < 0) throw std::invalid_argument("expert ids must be >= 0; got " + std::to_string(expert[n]));
    if (expert[n] >= experts) continue;
    if (token[n] < 0 || token[n] >= tokens)
      throw std::invalid_argument("token " + std::to_string(token[n]) + " of " + std::to_string(tokens));
    ++next[expert[n] + 1];
    ++bags[token[n] + 1];
  }
  for (int e = 0; e < experts; ++e) next[e + 1] += next[e];
  for (int t = 0; t < tokens; ++t) bags[t + 1] += bags[t];
  route.offsets = next;
  route.bag_offsets = bags;
  const size_t rows = next[experts];
  route.order.resize(rows);
  route.token.resize(rows);
  route.bag.resize(rows);
  for (size_t n = 0; n < count; ++n)
    if (expert[n] < experts) {
      const int row = next[expert[n]]++;
      route.order[row] = (int32_t)n;
      route.token[row] = (int32_t)token[n];
    }
  for (size_t row = 0; row < rows; ++row) route.bag[bags[route.token[row]]++] = (int32_t)row;
  return route;
}

struct Piece {
  int expert, row, count;
};

static bool larger(const Piece& a, const Piece& b) { return a.count != b.count ? a.count > b.count : a.row < b.row; }

// One after another to whichever thread is free.
template <class Function> static void each(int threads, int count, const Function& f) {
  std::atomic<int> next{0};
  team(std::max(1, std::min(threads, count)), [&](int thread) {
    for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i, thread);
  });
}

static float* aligned(float* p) { return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p) + 63) & ~(uintptr_t)63); }

static void combine(const TrainKernels& k, const Route& route, const float* rows, int wide, const float* weight, float* y,
                    int threads) {
  const int tokens = route.tokens(), step = std::max(8, tokens / (8 * threads));
  each(threads, (tokens + step - 1) / step, [&](int i, int) {
    k.combine(route, rows, wide, weight, i * step, std::min(tokens, (i + 1) * step), y);
  });
}

static int threads_for(const Bank& bank, const Route& route, int threads) {
  const int64_t row = (int64_t)bank.wide() * bank.dim + (int64_t)bank.out * bank.inner;
  return route.rows() * row < kWorthSharing ? 1 : threads;
}

void train_forward(const Bank& bank, const Route& route, const float* x, const float* weight, float* pre, float* rows,
                   float* y, float* scratch, int threads) {
  const TrainKernels& k = *train_kernels();
  threads = threads_for(bank, route, threads);
  // Busy experts in pieces, so that threads finish together.
  const int fair = threads > 1 ? route.rows() / (4 * threads) : route.rows();
  const int most = std::max(64, (fair + 31) / 32 * 32);
  std::vector<Piece> pieces;
  for (int e = 0; e < route.experts(); ++e) {
    const int start = route.offsets[e], count = route.offsets[e + 1] - start, parts = (count + most - 1) / most;
    const int step = parts ? ((count + parts - 1) / parts + 31) / 32 * 32 : 0;
    for (int at = 0; at < count; at += step) pieces.push_back({e, start + at, std::min(step, count - at)});
  }
  std::sort(pieces.begin(), pieces.end(), larger);
  const bool past = (size_t)route.rows() * std::max(bank.out, pre ? bank.wide() : 0) * sizeof(float) > kCached;
  const size_t own = forward_floats(bank) + 16;
  each(threads, (int)pieces.size(), [&](int i, int thread) {
    const Piece& p = pieces[i];
    k.forward(bank, p.expert, x, route.token.data(), p.row, p.count, pre, rows, past, aligned(scratch + thread * own));
  });
  combine(k, route, rows, bank.out, weight, y, threads);
}

namespace {
struct Backward {
  const TrainKernels& k;
  const Bank& bank;
  const Gradients& grads;
  const Route& route;
  const float *x, *weight;
  float* scratch;
  int threads;

  size_t own() const { return block_floats(bank) + kPanel + 16; }
  BlockBuffers buffers(int thread) const {
    float* p = aligned(scratch + thread * own());
    return {p, p + (size_t)kBlock * bank.out, p + (size_t)kBlock * (bank.out + bank.inner)};
  }
  float* panel(int thread) const { return aligned(scratch + thread * own()) + block_floats(bank); }
  int parts() const { return 1 + bank.halves(); }
  int height(int part) const { return part ? bank.inner : bank.out; }

  void weights(const Piece& p, const BlockBuffers& b, int part, int from, int to, bool add, int thread) const {
    k.backward_weights(bank, grads, route, p.expert, x, weight, p.row, p.count, b, part, from, to, add, panel(thread));
  }
  // A whole expert by one thread.
  void alone(const Piece& p, int thread) const {
    const BlockBuffers b = buffers(thread);
    for (int at = 0; at < p.count; at += kBlock) {
      const Piece block{p.expert, p.row + at, std::min(kBlock, p.count - at)};
      k.backward_rows(bank, grads, route, p.expert, weight, block.row, block.count, block.row, b, panel(thread));
      for (int part = 0; part < parts(); ++part) weights(block, b, part, 0, height(part), at > 0, thread);
    }
  }
  // A busy expert by all: its rows, then the rows of its gradients.
  void together(const Piece& p) const {
    const BlockBuffers b = buffers(0);
    constexpr int step = 48;
    for (int at = 0; at < p.count; at += kBlock) {
      const Piece block{p.expert, p.row + at, std::min(kBlock, p.count - at)};
      each(threads, (block.count + step - 1) / step, [&](int i, int thread) {
        const int row = block.row + i * step, count = std::min(step, block.count - i * step);
        k.backward_rows(bank, grads, route, p.expert, weight, row, count, block.row, b, panel(thread));
      });
      std::vector<Piece> pieces;  // (part, from, rows)
      for (int part = 0; part < parts(); ++part)
        for (int from = 0; from < height(part); from += step)
          pieces.push_back({part, from, std::min(step, height(part) - from)});
      each(threads, (int)pieces.size(), [&](int i, int thread) {
        const Piece& q = pieces[i];
        weights(block, b, q.expert, q.row, q.row + q.count, at > 0, thread);
      });
    }
  }
};

void clear(const Bank& bank, const Stack& stack, int expert, int rows, int columns) {
  if (!stack.p) return;
  for (int r = 0; r < rows; ++r) {
    float* p = stack.p + expert * stack.e + r * stack.r;
    if (stack.c == 1)
      std::memset(p, 0, columns * sizeof(float));
    else
      for (int c = 0; c < columns; ++c) p[c * stack.c] = 0.0f;
  }
  (void)bank;
}
}  // namespace

// How many of the experts, largest first, all threads must share so that the others leave them equal loads.
static size_t shared_experts(const std::vector<Piece>& experts, int threads) {
  if (threads == 1) return 0;
  for (size_t skip = 0; skip < experts.size(); ++skip) {
    std::vector<int64_t> loads(threads, 0);
    int64_t total = 0;
    for (size_t i = skip; i < experts.size(); ++i) {
      const int64_t cost = experts[i].count + kExpertCost;
      *std::min_element(loads.begin(), loads.end()) += cost;
      total += cost;
    }
    if (*std::max_element(loads.begin(), loads.end()) * threads * 10 <= total * 12) return skip;
  }
  return experts.size();
}

void train_backward(const Bank& bank, Gradients grads, const Route& route, const float* x, const float* weight,
                    size_t assignments, float* scratch, int threads) {
  grads.past = (size_t)route.rows() * bank.dim * sizeof(float) > kCached;
  threads = threads_for(bank, route, threads);
  const Backward work{*train_kernels(), bank, grads, route, x, weight, scratch, threads};
  if (grads.weight) std::memset(grads.weight, 0, assignments * sizeof(float));
  std::vector<Piece> experts, idle;
  for (int e = 0; e < route.experts(); ++e) {
    const Piece piece{e, route.offsets[e], route.offsets[e + 1] - route.offsets[e]};
    (piece.count ? experts : idle).push_back(piece);
  }
  std::sort(experts.begin(), experts.end(), larger);
  const size_t shared = shared_experts(experts, threads);
  for (size_t i = 0; i < shared; ++i) work.together(experts[i]);
  const int whole = (int)(experts.size() - shared);
  each(threads, whole + (int)idle.size(), [&](int i, int thread) {
    if (i < whole) return work.alone(experts[shared + i], thread);
    const int e = idle[i - whole].expert;
    clear(bank, grads.up, e, bank.wide(), bank.dim);
    clear(bank, grads.down, e, bank.out, bank.inner);
    if (grads.up_bias) std::memset(grads.up_bias + (size_t)e * bank.wide(), 0, bank.wide() * sizeof(float));
    if (grads.down_bias) std::memset(grads.down_bias + (size_t)e * bank.out, 0, bank.out * sizeof(float));
  });
  if (grads.x) combine(work.k, route, grads.rows, bank.dim, nullptr, grads.x, threads);
}

}  // namespace moestro
