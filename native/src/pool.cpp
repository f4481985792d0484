#include "pool.h"

#include <chrono>

namespace moestro {

static inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

Pool::Pool(int threads) : threads_(threads < 1 ? 1 : threads) {
  for (int t = 1; t < threads_; ++t) workers_.emplace_back([this, t] { work(t); });
}

Pool::~Pool() {
  stop_ = true;
  epoch_.fetch_add(1);
  wake();
  for (auto& worker : workers_) worker.join();
}

void Pool::wake() {
  if (sleepers_.load()) {
    std::lock_guard<std::mutex> lock(mutex_);
    changed_.notify_all();
  }
}

void Pool::await(const std::atomic<unsigned>& word, unsigned seen) {
  using clock = std::chrono::steady_clock;
  const auto until = clock::now() + std::chrono::microseconds(50);
  do {
    for (int i = 0; i < 64; ++i) {
      if (word.load(std::memory_order_acquire) != seen) return;
      pause();
    }
  } while (clock::now() < until);
  std::unique_lock<std::mutex> lock(mutex_);
  sleepers_.fetch_add(1);
  while (word.load() == seen) changed_.wait(lock);
  sleepers_.fetch_sub(1);
}

void Pool::barrier() {
  if (threads_ == 1) return;
  const unsigned seen = phase_.load();
  if (arrived_.fetch_add(1) + 1 == threads_) {
    arrived_.store(0);
    phase_.store(seen + 1);
    wake();
  } else {
    await(phase_, seen);
  }
}

void Pool::reset_shares() {
  for (auto& share : shares_) share.value.store(0, std::memory_order_relaxed);
}

void Pool::start(Call call, const void* arg) {
  call_ = call;
  arg_ = arg;
  reset_shares();
  if (threads_ > 1) {
    epoch_.fetch_add(1);
    wake();
  }
  call(arg, 0);
  barrier();
}

void Pool::work(int thread) {
  unsigned seen = 0;
  for (;;) {
    await(epoch_, seen);
    ++seen;
    if (stop_) return;
    call_(arg_, thread);
    barrier();
  }
}

}  // namespace moestro
