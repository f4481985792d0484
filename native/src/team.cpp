// Threads for training. PyTorch's OpenMP workers spin for a while after each of its loops, so a second pool would fight
// them for the cores: where an OpenMP runtime with GNU's entry points is loaded, its team does our work as well.
#include <unistd.h>

#include <cstring>
#include <memory>
#include <mutex>
#include <string>

#include "pool.h"
#include "train.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

namespace moestro {

struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread)() = nullptr;
};

#if defined(__linux__)
struct Search {
  std::string best;
  int rank = 0;
};

static int look(dl_phdr_info* info, size_t, void* data) {
  Search& search = *static_cast<Search*>(data);
  const char* path = info->dlpi_name;
  if (!path) return 0;
  const char* slash = std::strrchr(path, '/');
  const char* file = slash ? slash + 1 : path;
  if (std::strncmp(file, "libgomp", 7) && std::strncmp(file, "libiomp", 7) && std::strncmp(file, "libomp", 6)) return 0;
  const int rank = std::strstr(path, "/torch") ? 2 : 1;  // other packages bring copies of their own
  if (rank > search.rank) search = {path, rank};
  return 0;
}

static OpenMp find() {
  Search search;
  dl_iterate_phdr(look, &search);
  OpenMp found;
  void* handle = search.rank ? dlopen(search.best.c_str(), RTLD_NOW | RTLD_NOLOAD) : nullptr;
  if (!handle) return found;
  found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(handle, "GOMP_parallel"));
  found.thread = reinterpret_cast<decltype(found.thread)>(dlsym(handle, "omp_get_thread_num"));
  if (!found.thread) found.parallel = nullptr;
  return found;
}
#else
static OpenMp find() { return {}; }
#endif

static const OpenMp& openmp() {
  static const OpenMp found = find();
  return found;
}

const char* team_name() { return openmp().parallel ? "openmp" : "own"; }

struct Job {
  void (*call)(const void*, int);
  const void* arg;
};

void team_run(int threads, void (*call)(const void*, int), const void* arg) {
  if (threads <= 1) return call(arg, 0);
  if (openmp().parallel) {
    Job job{call, arg};
    const auto enter = [](void* data) {
      const Job& job = *static_cast<const Job*>(data);
      job.call(job.arg, openmp().thread());
    };
    openmp().parallel(enter, &job, (unsigned)threads, 0);
    return;
  }
  static std::mutex mutex;
  static Pool* pool = nullptr;
  static pid_t owner = 0;
  std::lock_guard<std::mutex> lock(mutex);
  if (owner != getpid()) pool = nullptr;  // threads do not survive a fork
  if (!pool || pool->threads() != threads) {
    delete pool;
    pool = new Pool(threads);
    owner = getpid();
  }
  pool->run([&](int thread) { call(arg, thread); });
}

}  // namespace moestro
