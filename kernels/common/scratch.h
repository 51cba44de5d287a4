// Memory for the time of a call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace tce {

struct OutOfMemory final : std::bad_alloc {
  const char* what() const noexcept override { return "out of memory: no room for a kernel's scratch"; }
};

// Aligned to cache lines, not initialised; null for no bytes. Neither std::unique_ptr, whose header takes longer to compile than all others
// of the standard library that a kernel includes, nor std::aligned_alloc, which takes longer than malloc.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : block_(bytes > 0 ? std::malloc(bytes + 63) : nullptr) {
    if (bytes > 0 && block_ == nullptr) throw OutOfMemory();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(block_); }

  uint8_t* get() const { return static_cast<uint8_t*>(block_) + (-reinterpret_cast<uintptr_t>(block_) & 63); }
  float* floats() const { return reinterpret_cast<float*>(get()); }

 private:
  void* block_;
};

}  // namespace tce
