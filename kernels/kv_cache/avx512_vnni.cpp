// AVX-512 VNNI: int8 pages, multiplied as integers; VPOPCNTDQ.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include <immintrin.h>

#include "attend.h"
#include "select.h"
#include "../common/region_avx512_vnni.h"

namespace tce::kv_cache::avx512_vnni {

constexpr int kVectorBytes = 64;
#include "../common/vectors.inl"
#include "../common/attention.inl"
#include "attend.inl"
static unsigned greater(Integers a, Integers b) {
  return _mm512_cmpgt_epi32_mask(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b));
}
static int64_t nth_bit(uint64_t bits, int64_t n) { return std::countr_zero(_pdep_u64(uint64_t{1} << n, bits)); }
#include "select.inl"
#include "attend_vnni.inl"

struct Attend {
  using Bf16 = Exact<4, 8>;
  using Fp32 = Singles<4, 8>;
  static constexpr bool kInt8 = true, kInt4 = false;
};

AttendVariant attend() { return attend_variant<Attend>(); }

}  // namespace tce::kv_cache::avx512_vnni

#include "../common/region_end.h"
