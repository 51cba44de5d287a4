// Threads that go through many short stages in one parallel region.
#pragma once

#include "../common/binding.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <thread>

namespace tce::sparse_linear {

// Threads that help one of them, the leader: a region costs microseconds, a stage a tenth of one. Memory is read fastest front to back, so
// each thread begins with a stretch of the items that is its own, and then takes what others have left. The leader waits for items that
// others have begun, never for others to come: a thread that the machine runs elsewhere delays nobody. Threads that find nothing to do ask
// for the memory that they will read next.
class Team {
 public:
  // What a thread will read.
  struct Stretch {
    const uint8_t* begin;
    int64_t bytes;
  };

  // Calls body(team) once, on the calling thread.
  template <typename F>
  static void run(int64_t threads, const F& body) {
    Team team(threads);
    if (threads == 1) {
      body(team);
      return;
    }
    std::exception_ptr error;  // one that leaves a region through the stable ABI loses its message
    parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
      if (begin != 0) return team.help(begin);
      const Leave leave{team};
      try {
        body(team);
      } catch (...) {
        error = std::current_exception();
      }
    });
    if (error) std::rethrow_exception(error);
  }

  int64_t threads() const { return threads_; }

  // First of `count` items that are a thread's own.
  int64_t first(int64_t thread, int64_t count) const { return count * thread / threads_; }

  // Calls f(index) for 0 <= index < count; ahead(thread) says where the thread goes on in the stage after this one.
  template <typename F, typename Ahead>
  void each(int64_t count, const F& f, const Ahead& ahead) {
    if (threads_ == 1 || count <= 1) {
      for (int64_t i = 0; i < count; ++i) f(i);
      return;
    }
    context_ = &f;
    item_ = [](const void* context, int64_t index) { (*static_cast<const F*>(context))(index); };
    for (int64_t t = 0; t < threads_; ++t) {
      const Stretch next = ahead(t);
      members_[t].next.store(next.begin, std::memory_order_relaxed);
      members_[t].bytes.store(std::min(next.bytes, kAhead), std::memory_order_relaxed);
    }
    constexpr int64_t most = kMask;  // what a ticket has numbers for
    for (first_ = 0; first_ < count; first_ += most) stage(std::min(most, count - first_));
  }

 private:
  // A ticket is the number of the stage, the end of a thread's items and the next of them. With the number in it, no thread takes a ticket
  // of a stage that has ended.
  static constexpr int kBits = 20;
  static constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1, kStage = uint64_t{1} << 2 * kBits;
  // What a thread asks for ahead of time, at most: it has to stay in the second-level cache.
  static constexpr int64_t kAhead = 256 << 10, kLine = 64;

  struct alignas(64) Member {
    std::atomic<uint64_t> ticket{0};
    std::atomic<const uint8_t*> next{nullptr};
    std::atomic<int64_t> bytes{0};
  };

  struct Leave {
    Team& team;
    ~Leave() { team.ended_.store(true, std::memory_order_release); }
  };

  explicit Team(int64_t threads) : threads_(threads), members_(new Member[threads]) {}

  // One stage of `each`: items first_ to first_ + count - 1.
  void stage(int64_t count) {
    done_.store(0, std::memory_order_relaxed);
    stage_ += kStage;
    for (int64_t t = threads_; t-- > 0;) {
      const auto begin = static_cast<uint64_t>(first(t, count)), end = static_cast<uint64_t>(first(t + 1, count));
      members_[t].ticket.store(stage_ | end << kBits | begin, std::memory_order_release);
    }
    work(0);
    Rest rest(members_[0]);
    while (done_.load(std::memory_order_acquire) != count) rest();
  }

  // Does what is left of all threads' items, beginning with those of `thread`. True if there was any.
  bool work(int64_t thread) {
    bool any = false;
    for (int64_t i = 0; i < threads_; ++i) {
      int64_t count = 0;
      while (take(members_[(thread + i) % threads_].ticket)) ++count;
      if (count == 0) continue;
      done_.fetch_add(count, std::memory_order_release);
      any = true;
    }
    return any;
  }

  // Takes an item and does it. False if all are taken.
  bool take(std::atomic<uint64_t>& tickets) {
    uint64_t ticket = tickets.load(std::memory_order_acquire);
    do {
      if ((ticket & kMask) >= (ticket >> kBits & kMask)) return false;
    } while (!tickets.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel));
    item_(context_, first_ + static_cast<int64_t>(ticket & kMask));
    return true;
  }

  void help(int64_t thread) {
    Member& own = members_[thread];
    for (uint64_t seen = 0; !ended_.load(std::memory_order_acquire);) {
      Rest rest(own);
      uint64_t now = own.ticket.load(std::memory_order_acquire);
      for (; now / kStage == seen && !ended_.load(std::memory_order_acquire); now = own.ticket.load(std::memory_order_acquire)) rest();
      seen = now / kStage;
      work(thread);
    }
  }

  // What a thread does while it waits: asks for what it will read next, line by line, then watches for some ten microseconds, then lets
  // others run in between. Not by a pause instruction: virtual machines take a row of those for idleness and stop the processor.
  class Rest {
   public:
    explicit Rest(const Member& member)
        : at_(member.next.load(std::memory_order_relaxed)), left_(member.bytes.load(std::memory_order_relaxed)) {}
    void operator()() {
      if (left_ > 0) {
        __builtin_prefetch(at_, 0, 2);
        at_ += kLine;
        left_ -= kLine;
      } else if (++spins_ > 20000) {
        std::this_thread::yield();
      }
    }

   private:
    const uint8_t* at_;
    int64_t left_, spins_ = 0;
  };

  const int64_t threads_;
  uint64_t stage_ = 0;
  const void* context_ = nullptr;
  void (*item_)(const void*, int64_t) = nullptr;
  int64_t first_ = 0;
  const std::unique_ptr<Member[]> members_;
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<bool> ended_{false};
};

}  // namespace tce::sparse_linear
