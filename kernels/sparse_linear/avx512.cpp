// AVX-512 F, BW, VL and DQ: fp32 at full speed, bf16 and int8 for machines without BF16, VNNI or VBMI2.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include <immintrin.h>

#include "attention.h"
#include "decode.h"
#include "sparse_linear.h"
#include "../common/region_avx512.h"

namespace tce::sparse_linear::avx512 {

constexpr int kVectorBytes = 64;
#include "../common/vectors.inl"
#include "../common/attention.inl"
#include "sparse_linear.inl"
#include "avx512.inl"
#include "attention.inl"
#include "int4.inl"
#include "decode.inl"

// Sixteen 32-bit elements; the rest of the row of a shorter element type is made of them by narrowing.
static __m512i expand_dwords(__mmask16 mask, __m512i packed, __m512i zero) { return _mm512_mask_expand_epi32(fresh(zero), mask, packed); }

struct Fp32 : Floats<Fp32> {
  static constexpr DType dtype = DType::fp32;
  using X = float;

  static __m512i expand_row(const uint8_t* words, const uint8_t*& values) {
    const auto mask = load<uint16_t>(words);
    const __m512i row = expand_dwords(mask, _mm512_loadu_si512(values), _mm512_setzero_si512());
    values += 4 * std::popcount(mask);
    return row;
  }

  static __m512 add(__m512 sum, __m512i row, const float* x) { return _mm512_fmadd_ps(_mm512_castsi512_ps(row), _mm512_set1_ps(*x), sum); }
};

struct Bf16 : Floats<Bf16> {
  static constexpr DType dtype = DType::bf16;
  using X = float;

  static __m256i expand_half(const uint8_t* words, const uint8_t*& values) {
    const auto mask = load<uint16_t>(words);
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
    values += 2 * std::popcount(mask);
    return _mm512_cvtepi32_epi16(expand_dwords(mask, wide, _mm512_setzero_si512()));
  }

  static __m512i expand_row(const uint8_t* words, const uint8_t*& values) {
    const __m256i low = expand_half(words, values), high = expand_half(words + 2, values);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }

  static __m512 add(__m512 sum, __m512i row, const float* x) { return add_bf16(sum, row, x); }
};

struct Int8 {
  static constexpr DType dtype = DType::int8;
  static constexpr int64_t kRowBlock = 4, kPanelBlock = 1, kStreamRows = 0;
  using X = int8_t;

  static const uint8_t* expand(const uint8_t* words, const uint8_t* values, int64_t rows, uint8_t* out) {
    for (int64_t i = 0; i < 4 * rows; ++i) {
      const auto mask = load<uint16_t>(words + 2 * i);
      const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
      const __m128i row = _mm512_cvtepi32_epi8(expand_dwords(mask, wide, _mm512_set1_epi32(128)));
      _mm_store_si128(reinterpret_cast<__m128i*>(out + 16 * i), row);
      values += std::popcount(mask);
    }
    return values;
  }

  // No u8 x s8 product without saturation here: even and odd bytes are widened to 16 bits and multiplied by vpmaddwd.
  template <int M, int P>
  static void dot(const uint8_t* const* weight, int64_t rows, const Activations<Int8>& a, float* sums) {
    const __m512i low = _mm512_set1_epi16(0xff);
    for (int64_t r = 0; r < rows; r += a.row_group) {
      const int64_t end = std::min(rows, r + a.row_group), group = r / a.row_group;
      __m512i sum[M];
      for (int m = 0; m < M; ++m) sum[m] = _mm512_set1_epi32(a.offset[m * a.scale_stride + group]);
      for (int64_t k = r; k < end; ++k) {
        const __m512i w = _mm512_loadu_si512(weight[0] + k * kRow);
        const __m512i even = _mm512_and_si512(w, low), odd = _mm512_srli_epi16(w, 8);
        for (int m = 0; m < M; ++m) {
          const __m512i x = _mm512_set1_epi32(load<int32_t>(a.x + m * a.x_stride + 4 * k));
          sum[m] = _mm512_add_epi32(sum[m], _mm512_madd_epi16(even, _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8)));
          sum[m] = _mm512_add_epi32(sum[m], _mm512_madd_epi16(odd, _mm512_srai_epi16(x, 8)));
        }
      }
      for (int m = 0; m < M; ++m) {
        const __m512 scale = _mm512_set1_ps(a.scale[m * a.scale_stride + group]), before = _mm512_loadu_ps(sums + m * kPanel);
        _mm512_storeu_ps(sums + m * kPanel, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m]), scale, before));
      }
    }
  }
};

struct Int4 {
  static constexpr DType dtype = DType::int4;
  static constexpr int64_t kRowBlock = 8, kStreamRows = 0;
  using X = int8_t;

  static const uint8_t* expand_row(const uint8_t* words, const uint8_t* values, const uint8_t* zeros, uint8_t* out) {
    return expand_halves<Int4>(words, values, zeros, out);
  }

  static __m512i widen(const uint8_t* bytes) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))); }

  static void spread(const uint8_t* words, const uint8_t* codes, const uint8_t* zeros, uint8_t* out) {
    for (int64_t i = 0; i < 4; ++i) {
      const auto mask = load<uint16_t>(words + 2 * i);
      const __m128i part = _mm512_cvtepi32_epi8(expand_dwords(mask, widen(codes), widen(zeros + 16 * i)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * i), part);
      codes += std::popcount(mask);
    }
  }

  // Sixteen bits hold the sums of a unit: sixteen products of at most 15 * 127 each.
  template <int M>
  static void dot(const Unit* units, int64_t count, const Activations<Int4>& a, float* sums) {
    const __m512i low = _mm512_set1_epi8(15), ones = _mm512_set1_epi16(1);
    __m512 sum[M][1];
    load_sums<M, 1>(sums, sum);
    for (int64_t u = 0; u < count; ++u) {
      const Unit& unit = units[u];
      __m512i shorts[M] = {};
      for (int64_t r = 0; r < kUnitRows; ++r) {
        const __m512i codes = _mm512_loadu_si512(unit.codes + r * kRow);
        const __m512i even = _mm512_and_si512(codes, low), odd = _mm512_and_si512(_mm512_srli_epi16(codes, 4), low);
        for (int m = 0; m < M; ++m) {
          const int8_t* x = a.x + m * a.x_stride + (u * kUnitRows + r) * 8;
          shorts[m] = _mm512_add_epi16(shorts[m], _mm512_maddubs_epi16(even, _mm512_set1_epi32(load<int32_t>(x))));
          shorts[m] = _mm512_add_epi16(shorts[m], _mm512_maddubs_epi16(odd, _mm512_set1_epi32(load<int32_t>(x + 4))));
        }
      }
      const __m512 scale = _mm512_loadu_ps(unit.scale), minimum = _mm512_loadu_ps(unit.minimum);
      for (int m = 0; m < M; ++m) {
        const __m512 x = _mm512_set1_ps(a.scale[m * a.scale_stride + u]);
        sum[m][0] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_madd_epi16(shorts[m], ones)), x), scale, sum[m][0]);
        sum[m][0] = _mm512_fmadd_ps(_mm512_set1_ps(x_sum(a, m * a.scale_stride + u)), minimum, sum[m][0]);
      }
    }
    store_sums<M, 1>(sum, sums);
  }
};

Variant fp32() { return variant<Fp32>(); }
Variant bf16() { return variant<Bf16>(); }
Variant int8() { return variant<Int8>(); }
AttentionVariant attention() { return attention_variant<Paged<Rounded<4, 8>, Bf16>>(); }
Variant int4() { return int4_variant<Int4>(); }
Steps steps() { return decoder_steps<Exact<4, 8>>(); }

}  // namespace tce::sparse_linear::avx512

#include "../common/region_end.h"
