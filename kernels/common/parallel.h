// Ways to share work among PyTorch's threads, for the bindings.
#pragma once

#include "binding.h"

#include <algorithm>
#include <atomic>

namespace tce {

// Calls f(index) for 0 <= index < count, in parallel.
template <typename F>
void for_each(int64_t count, int64_t grain, const F& f) {
  parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// The same, on at most `threads` threads, each of which takes the next index when it is done with its last, and calls finish() in the end.
template <typename F, typename Finish>
void for_each_dynamic(int64_t count, int64_t threads, const F& f, const Finish& finish) {
  if (threads == 1 || count == 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return finish();
  }
  std::atomic<int64_t> next{0};
  parallel_for(0, std::min(threads, count), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) f(i);
    finish();
  });
}

template <typename F>
void for_each_dynamic(int64_t count, int64_t threads, const F& f) {
  for_each_dynamic(count, threads, f, [] {});
}

}  // namespace tce
