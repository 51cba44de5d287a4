// What the programs that run kernels under the sanitizers share.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

namespace {

std::mt19937_64 random_bits(1);

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "sanitize_main: %s\n", message.c_str());
  std::exit(1);
}

int64_t draw(int64_t end) { return std::uniform_int_distribution<int64_t>(0, end - 1)(random_bits); }
float normal() { return std::normal_distribution<float>()(random_bits); }

// Memory of exactly `bytes` bytes, `shift` bytes off any alignment, so that a byte past the end or a typed access is seen.
class Exact {
 public:
  explicit Exact(int64_t bytes, int64_t shift = 0) : data_(static_cast<uint8_t*>(std::malloc(bytes + shift))), shift_(shift) {}
  Exact(const Exact&) = delete;
  ~Exact() { std::free(data_); }
  template <typename T = uint8_t>
  T* get() const {
    return reinterpret_cast<T*>(data_ + shift_);
  }

 private:
  uint8_t* data_;
  int64_t shift_;
};

}  // namespace
