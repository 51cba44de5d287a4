// AVX-512 F, BW, VL and DQ.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include <immintrin.h>

#include "attend.h"
#include "prefill.h"
#include "select.h"
#include "../common/region_avx512.h"

namespace tce::kv_cache::avx512 {

constexpr int kVectorBytes = 64;
#include "../common/vectors.inl"
#include "../common/attention.inl"
#include "attend.inl"
#include "prefill.inl"
static unsigned greater(Integers a, Integers b) {
  return _mm512_cmpgt_epi32_mask(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b));
}
static int64_t nth_bit(uint64_t bits, int64_t n) { return std::countr_zero(_pdep_u64(uint64_t{1} << n, bits)); }
#include "select.inl"

struct Attend {
  using Bf16 = Exact<4, 8>;
  using Fp32 = Singles<4, 8>;
  static constexpr bool kInt8 = false, kInt4 = false;
};

AttendVariant attend() { return attend_variant<Attend>(); }
PrefillVariant prefill() { return prefill_variant<Tiled<Attend::Fp32, 4, 4>>(); }

}  // namespace tce::kv_cache::avx512

#include "../common/region_end.h"
