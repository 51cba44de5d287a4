// AVX-512 BF16 (vdpbf16ps).
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include <immintrin.h>

#include "attend.h"
#include "prefill.h"
#include "../common/region_avx512_bf16.h"

namespace tce::kv_cache::avx512_bf16 {

constexpr int kVectorBytes = 64;
#include "../common/vectors.inl"
#include "../common/attention.inl"
#include "attend.inl"
#include "prefill.inl"
#include "attend_vnni.inl"
#include "attend_bf16.inl"

// Queries and weights as bf16.
struct Products {
  using X = uint16_t;
  static constexpr int kRows = 4, kSums = 8, kLane = 2;

  static X of(float value) { return float_to_bf16(value); }
  static void put(X* to, Vector weights) {
    const __m256bh rounded = _mm512_cvtneps_pbh(__m512(weights));
    std::memcpy(to, &rounded, 32);
  }
  static Vector add(Vector sum, Integers row, const X* x) { return Vector(add_pair(__m512(sum), __m512i(row), x)); }
};

struct Attend {
  using Bf16 = Products;
  using Fp32 = Singles<4, 8>;
  static constexpr bool kInt8 = true, kInt4 = true;
};

AttendVariant attend() { return attend_variant<Attend>(); }
PrefillVariant prefill() { return prefill_variant<Tiled<Products, 4, 4>>(); }

}  // namespace tce::kv_cache::avx512_bf16

#include "../common/region_end.h"
