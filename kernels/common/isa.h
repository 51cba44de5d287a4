// Choice of a kernel's variant at run time.
#pragma once

#include <atomic>
#include <cstring>
#include <initializer_list>

// Marks the declaration of something an optional file defines; its address is null where that file is left out of the build.
#define TCE_OPTIONAL __attribute__((weak))

namespace tce {

// The ladder of torch_cpu_ext/core/isa.py: same names, same order.
enum class Isa { scalar, avx2, avx512, avx512_vnni, avx512_bf16, amx };

// Whether vdpbf16ps does more in a cycle than the two fused multiply-adds on floats that replace it. Measured: on Zen 4 twice as much, on
// Emerald Rapids half as much (Intel's fast bf16 is AMX).
inline bool bf16_dot_pays() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

// Whether asking for a stream's next page pays. Measured: on two Emerald Rapids cores sparse streams go from 14 to 23 GB/s; on Zen 4, whose
// own prefetchers are as good, asking costs 3 to 13 %.
inline bool prefetch_pays() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

// The highest instruction set in use. The loader sets it from what the machine has and from the user's cap, before the first call.
inline std::atomic<int> isa_cap{0};

// A named kernel of a technique: knows its variants, hands out the best one under the cap, and says which that is.
class KernelName {
 public:
  KernelName(const char* name) : name_(name), next_(first_) { first_ = this; }
  virtual Isa isa() const = 0;

  static const KernelName* find(const char* name) {
    const KernelName* kernel = first_;
    while (kernel && std::strcmp(kernel->name_, name) != 0) kernel = kernel->next_;
    return kernel;
  }

 private:
  const char* name_;
  const KernelName* next_;
  inline static const KernelName* first_ = nullptr;
};

template <typename Variant>
class Kernel final : public KernelName {
 public:
  struct Choice {
    Isa isa;
    Variant (*make)();  // null: its file is not in this build, or it does not pay on this machine
  };

  // Choices from worst to best; the first must be Isa::scalar.
  Kernel(const char* name, std::initializer_list<Choice> choices) : KernelName(name) {
    for (const Choice& choice : choices)
      if (choice.make) choices_[count_++] = {choice.isa, choice.make()};
  }

  const Variant& get() const { return best().variant; }
  Isa isa() const override { return best().isa; }

 private:
  struct Made {
    Isa isa;
    Variant variant;
  };

  const Made& best() const {
    const int cap = isa_cap.load(std::memory_order_relaxed);
    int i = count_ - 1;
    while (i > 0 && static_cast<int>(choices_[i].isa) > cap) --i;
    return choices_[i];
  }

  Made choices_[6];
  int count_ = 0;
};

}  // namespace tce
