// Which kernels run, and how their work is split among threads; shared by the bindings.
#pragma once

#include "../common/binding.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>

#include "sparse_linear.h"

namespace tce::sparse_linear {

// With fewer rows of x, memory is the limit, and the AVX-512 kernels that keep all sums in registers do with less work.
constexpr int64_t kTileLeastRows = 5;

inline const Kernel<Variant> kFp32{"fp32", {{Isa::scalar, scalar::fp32}, {Isa::avx2, avx2::fp32}, {Isa::avx512, avx512::fp32}}};
inline const Kernel<Variant> kBf16{"bf16",
                                   {{Isa::scalar, scalar::bf16},
                                    {Isa::avx2, avx2::bf16},
                                    {Isa::avx512, avx512::bf16},
                                    {Isa::avx512_vnni, avx512_vnni::bf16},
                                    {Isa::avx512_bf16, bf16_dot_pays() ? avx512_bf16::bf16 : nullptr},
                                    {Isa::amx, amx::bf16, kTileLeastRows}}};
inline const Kernel<Variant> kInt8{"int8",
                                   {{Isa::scalar, scalar::int8},
                                    {Isa::avx2, avx2::int8},
                                    {Isa::avx512, avx512::int8},
                                    {Isa::avx512_vnni, avx512_vnni::int8},
                                    {Isa::amx, amx::int8, kTileLeastRows}}};

inline const Kernel<Variant> kInt4{"int4",
                                   {{Isa::scalar, scalar::int4},
                                    {Isa::avx2, avx2::int4},
                                    {Isa::avx512, avx512::int4},
                                    {Isa::avx512_vnni, avx512_vnni::int4},
                                    {Isa::amx, amx::int4, kTileLeastRows}}};

inline const Variant& variant(DType dtype, int64_t rows) {
  const Kernel<Variant>* kernels[] = {&kFp32, &kBf16, &kInt8, &kInt4};
  return kernels[static_cast<int>(dtype)]->get(rows);
}

// Rows of x that one pass over the weights serves: their sums and 256 inputs of each stay in the second-level cache.
constexpr int64_t kRowTile = 512;
// Work is counted in bytes of weights times passes of eight rows. Below this much, waking a second thread costs more than it brings (0.7 us
// against 25 GB/s).
constexpr int64_t kSerialWork = 32 << 10;
// Threads take parts of a weight as they get done with the last one, since the machine rarely serves all of them equally. Parts are long
// enough for the hardware prefetcher and short enough for all threads to end together.
constexpr int64_t kPartWork = 128 << 10, kPartsPerThread = 32;

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

// Threads that help one of them, the leader, through many short stages in one parallel region: a region costs microseconds, a stage a tenth
// of one. The leader waits for items that others have begun, never for others to come: a thread that the machine runs elsewhere delays
// nobody.
class Team {
 public:
  // Calls body(team) once, on the calling thread.
  template <typename F>
  static void run(int64_t threads, const F& body) {
    Team team;
    if (threads == 1) {
      body(team);
      return;
    }
    std::exception_ptr error;  // one that leaves a region through the stable ABI loses its message
    parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
      if (begin != 0) return team.help();
      const Leave leave{team};
      try {
        body(team);
      } catch (...) {
        error = std::current_exception();
      }
    });
    if (error) std::rethrow_exception(error);
  }

  // Calls f(index) for 0 <= index < count, the leader and its helpers each taking the next index when done with the last.
  template <typename F>
  void each(int64_t count, const F& f) {
    if (count <= 1) {
      if (count == 1) f(0);
      return;
    }
    context_ = &f;
    item_ = [](const void* context, int64_t index) { (*static_cast<const F*>(context))(index); };
    constexpr int64_t most = kMask;  // what a ticket has numbers for
    for (first_ = 0; first_ < count; first_ += most) stage(std::min(most, count - first_));
  }

 private:
  // One stage of `each`: items first_ to first_ + count - 1.
  void stage(int64_t count) {
    done_.store(0, std::memory_order_relaxed);
    stage_ += kStage;
    ticket_.store(stage_ | static_cast<uint64_t>(count) << kBits, std::memory_order_release);
    while (take()) {
    }
    for (int64_t spins = 0; done_.load(std::memory_order_acquire) != count;) rest(spins);
  }

  // A ticket is the number of the stage, the count of its items and the next item. With the number in it, no thread takes a ticket of a
  // stage that has ended.
  static constexpr int kBits = 20;
  static constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1, kStage = uint64_t{1} << 2 * kBits;

  struct Leave {
    Team& team;
    ~Leave() { team.ended_.store(true, std::memory_order_release); }
  };

  // Takes an item and does it. False if all are taken.
  bool take() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    do {
      if ((ticket & kMask) >= (ticket >> kBits & kMask)) return false;
    } while (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel));
    item_(context_, first_ + static_cast<int64_t>(ticket & kMask));
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  void help() {
    for (int64_t spins = 0; !ended_.load(std::memory_order_acquire);) {
      if (take()) {
        spins = 0;
      } else {
        rest(spins);
      }
    }
  }

  // Watches for some ten microseconds, then lets others run in between. Not by a pause instruction: virtual machines take a row of those
  // for idleness and stop the processor.
  static void rest(int64_t& spins) {
    if (++spins > 20000) std::this_thread::yield();
  }

  uint64_t stage_ = 0;
  const void* context_ = nullptr;
  void (*item_)(const void*, int64_t) = nullptr;
  int64_t first_ = 0;
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<bool> ended_{false};
};

// Work of a product with m rows of x.
inline int64_t work_of(const Packed& weight, int64_t m) { return weight.bytes * divide_up(m, 8); }
inline int64_t threads_for(int64_t work) { return work < kSerialWork ? 1 : torch::stable::get_num_threads(); }

// Parts that a product is split into.
inline int64_t parts_of(const Packed& weight, int64_t m, int64_t threads) {
  if (threads == 1) return 1;
  return std::min({divide_up(weight.panels(), 2), threads * kPartsPerThread, divide_up(work_of(weight, m), kPartWork)});
}

// First panel of part i of n: parts hold equally many bytes, not equally many panels. An even number, since kernels like pairs.
inline int64_t cut(const Packed& weight, int64_t i, int64_t n) {
  if (i == 0 || i == n) return i == 0 ? 0 : weight.panels();
  const int64_t first = weight.offset(0), wanted = first + (weight.offset(weight.panels()) - first) / n * i;
  int64_t low = 0, high = weight.panels();
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (weight.offset(middle) < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low / 2 * 2;
}

}  // namespace tce::sparse_linear
