// What the bindings of attention share.
#pragma once

#include "binding.h"
#include "kv_block.h"

namespace tce {

// Below this many bytes of keys and values, waking a second thread costs more than it brings.
constexpr int64_t kSerialBytes = 64 << 10;

inline Kind kind_of(const std::string& name, const char* op) {
  STD_TORCH_CHECK(name == "key" || name == "value", op, ": kind must be key or value, got ", name);
  return name == "key" ? Kind::key : Kind::value;
}

inline void check_head_dim(int64_t head_dim, const char* op) {
  STD_TORCH_CHECK(head_dim > 0 && head_dim % kBlockTokens == 0, op, ": head_dim must be a positive multiple of 16, got ", head_dim);
}

}  // namespace tce
