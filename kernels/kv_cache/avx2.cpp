// AVX2 and FMA.
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
#include "../common/region_avx2.h"

namespace tce::kv_cache::avx2 {

constexpr int kVectorBytes = 32;
#include "../common/vectors.inl"
#include "../common/attention.inl"
#include "attend.inl"
#include "prefill.inl"
static unsigned greater(Integers a, Integers b) { return static_cast<unsigned>(_mm256_movemask_ps(reinterpret_cast<__m256>(a > b))); }
static int64_t nth_bit(uint64_t bits, int64_t n) { return std::countr_zero(_pdep_u64(uint64_t{1} << n, bits)); }
#include "select.inl"

struct Attend {
  using Bf16 = Exact<1, 4>;
  using Fp32 = Singles<1, 4>;
  static constexpr bool kInt8 = false, kInt4 = false;
};

AttendVariant attend() { return attend_variant<Attend>(); }
PrefillVariant prefill() { return prefill_variant<Tiled<Attend::Fp32, 4, 1>>(); }

}  // namespace tce::kv_cache::avx2

#include "../common/region_end.h"
