// Plain C++ for every machine.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include "attend.h"
#include "prefill.h"
#include "select.h"

namespace tce::kv_cache::scalar {

constexpr int kVectorBytes = 16;
#include "../common/vectors.inl"
#include "../common/attention.inl"
#include "attend.inl"
#include "prefill.inl"
static unsigned greater(Integers a, Integers b) {
  unsigned bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<unsigned>(a[i] > b[i]) << i;
  return bits;
}
static int64_t nth_bit(uint64_t bits, int64_t n) {
  for (; n > 0; --n) bits &= bits - 1;
  return std::countr_zero(bits);
}
#include "select.inl"

struct Attend {
  using Bf16 = Exact<1, 1>;
  using Fp32 = Singles<1, 1>;
  static constexpr bool kInt8 = false, kInt4 = false;
};

AttendVariant attend() { return attend_variant<Attend>(); }
PrefillVariant prefill() { return prefill_variant<Tiled<Attend::Fp32, 2, 1>>(); }

}  // namespace tce::kv_cache::scalar
