// AVX-512 BF16 (vdpbf16ps) with VBMI2 (vpexpandw): bf16 weights.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>

#include <immintrin.h>

#include "attention.h"
#include "sparse_linear.h"
#include "../common/region_avx512_bf16.h"

namespace tce::sparse_linear::avx512_bf16 {

constexpr int kVectorBytes = 64;
#include "../common/vectors.inl"
#include "../common/attention.inl"
#include "sparse_linear.inl"
#include "avx512.inl"
#include "vbmi2.inl"
#include "attention.inl"
#include "attention_vbmi2.inl"

struct Bf16 : Floats<Bf16> {
  static constexpr DType dtype = DType::bf16;
  using X = uint16_t;
  static constexpr bool kFixedCounts = true;

  static __m512i expand_row(const uint8_t* words, const uint8_t*& values) { return expand_bf16(words, values); }

  static __m512 add(__m512 sum, __m512i row, const uint16_t* x) {
    return _mm512_dpbf16_ps(sum, __m512bh(row), __m512bh(_mm512_set1_epi32(load<int32_t>(x))));
  }
};

// Attention with queries and weights as bf16.
struct Attended {
  using X = uint16_t;
  static constexpr int kRows = 4, kSums = 8, kLane = 2;

  static X of(float value) { return float_to_bf16(value); }
  static void put(X* to, Vector weights) {
    const __m256i halves = _mm512_cvtepi32_epi16(__m512i(round_bf16(weights) >> 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
  }
  static Vector add(Vector sum, Integers row, const X* x) {
    return Vector(_mm512_dpbf16_ps(__m512(sum), __m512bh(row), __m512bh(_mm512_set1_epi32(load<int32_t>(x)))));
  }
};

Variant bf16() { return variant<Bf16>(); }
AttentionVariant attention() { return attention_variant<PagedPairs<Attended>>(); }

}  // namespace tce::sparse_linear::avx512_bf16

#include "../common/region_end.h"
