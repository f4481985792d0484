#pragma once
#include "model.h"

namespace moestro {

template <class Function> void Model::parallel(const Function& f) {
  pool_.run([&](int thread) {
    k_->enter();
    f(thread);
    k_->leave();
  });
}

template <class Function> void Model::share(int n, int step, int counter, int thread, const Function& f) {
  int from, to;
  if (!many()) {
    split(n, thread, pool_.threads(), &from, &to);
    if (from < to) f(from, to);
    return;
  }
  while ((from = pool_.next_share(counter) * step) < n) f(from, from + step < n ? from + step : n);
}

}  // namespace moestro
