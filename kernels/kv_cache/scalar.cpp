// Plain C++ for every machine.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include "attend.h"
#include "prefill.h"
#include "select.h"

namespace tce::kv_cache::scalar {

constexpr int kVectorBytes = 16;
#include "../common/vectors.inl"
#include "../common/attention.inl"
#include "attend.inl"
#include "prefill.inl"
#include "select.inl"

struct Attend {
  using Bf16 = Exact<1, 1>;
  using Fp32 = Singles<1, 1>;
  static constexpr bool kInt8 = false, kInt4 = false;
};

AttendVariant attend() { return attend_variant<Attend>(); }

}  // namespace tce::kv_cache::scalar
