// One pool of threads. A job runs the same function on every thread; inside it, `barrier` joins them. Who waits spins
// for at most 50 microseconds and then blocks, so that idle workers cost nothing.
#pragma once
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace moestro {

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  int threads() const { return threads_; }
  // f(thread) on every thread, the caller being thread 0; returns when all are done.
  template <class Function> void run(const Function& f) {
    start([](const void* arg, int thread) { (*static_cast<const Function*>(arg))(thread); }, &f);
  }
  void barrier();
  // Shares of a loop that any thread may take next; call `reset_shares` outside of it, between two barriers.
  int next_share(int counter) { return shares_[counter].value.fetch_add(1, std::memory_order_relaxed); }
  void reset_shares();
  static constexpr int kCounters = 8;

 private:
  using Call = void (*)(const void*, int);
  struct alignas(64) Counter { std::atomic<int> value{0}; };
  void start(Call call, const void* arg);
  void work(int thread);
  // Returns when `word` differs from `seen`.
  void await(const std::atomic<unsigned>& word, unsigned seen);
  void wake();

  int threads_;
  std::vector<std::thread> workers_;
  Call call_ = nullptr;
  const void* arg_ = nullptr;
  bool stop_ = false;
  alignas(64) std::atomic<unsigned> epoch_{0};
  alignas(64) std::atomic<unsigned> phase_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  Counter shares_[kCounters];
  std::mutex mutex_;
  std::condition_variable changed_;
};

inline void split(int n, int thread, int threads, int* begin, int* end) {
  *begin = (int)((int64_t)n * thread / threads);
  *end = (int)((int64_t)n * (thread + 1) / threads);
}

}  // namespace moestro
