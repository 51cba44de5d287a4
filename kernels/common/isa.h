// Choice of a kernel's variant at run time.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

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

// Whether AMX works beyond the CPUID bits that Python has seen: the operating system keeps the state of tiles, and the processor has the
// one kind of tiles there is so far. On virtual machines that is not a matter of course. Permission is asked for in core/isa.py.
inline bool amx_works() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (~d & (1u << 22 | 1u << 24 | 1u << 25)) != 0) return false;  // BF16, TILE, INT8
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c >> 27 & 1) == 0) return false;                                     // xgetbv
  unsigned low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return false;                                  // configuration and data of tiles
  if (!__get_cpuid_count(0x1d, 0, &a, &b, &c, &d) || a < 1) return false;  // the highest palette
  if (!__get_cpuid_count(0x1d, 1, &a, &b, &c, &d)) return false;
  return (b & 0xffff) == 64 && b >> 16 == 8 && (c & 0xffff) == 16;  // 8 tiles of 16 rows of 64 bytes
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
// Only these two touch it. Not a std::atomic, whose header takes a quarter of a second to compile, in every file.
inline int isa_cap = 0;
inline void set_isa_cap(int isa) { __atomic_store_n(&isa_cap, isa, __ATOMIC_RELAXED); }
inline int get_isa_cap() { return __atomic_load_n(&isa_cap, __ATOMIC_RELAXED); }

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
    int64_t least = 0;  // size (rows of a product, say) from which on it pays; below, the next worse choice is taken
  };

  // Choices from worst to best; the first must be Isa::scalar.
  Kernel(const char* name, std::initializer_list<Choice> choices) : KernelName(name) {
    for (const Choice& choice : choices)
      if (choice.make) choices_[count_++] = {choice.isa, choice.make(), choice.least};
  }

  const Variant& get(int64_t size = INT64_MAX) const { return best(size).variant; }
  Isa isa() const override { return best(INT64_MAX).isa; }

 private:
  struct Made {
    Isa isa;
    Variant variant;
    int64_t least;
  };

  const Made& best(int64_t size) const {
    const int cap = get_isa_cap();
    int i = count_ - 1;
    while (i > 0 && (static_cast<int>(choices_[i].isa) > cap || choices_[i].least > size)) --i;
    return choices_[i];
  }

  Made choices_[6];
  int count_ = 0;
};

}  // namespace tce
