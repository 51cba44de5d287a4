// AVX2, FMA and BMI2. Rows are expanded eight elements at a time by byte shuffles looked up by the mask.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include <immintrin.h>

#include "attention.h"
#include "decode.h"
#include "sparse_linear.h"
#include "../common/region_avx2.h"

namespace tce::sparse_linear::avx2 {

constexpr int kVectorBytes = 32;
#include "../common/vectors.inl"
#include "../common/attention.inl"
#include "sparse_linear.inl"
#include "attention.inl"
#include "int4.inl"
#include "decode.inl"

// kSource[mask][i]: which of the packed elements belongs at place i; 0x80 (a zero for vpshufb) where the mask has no bit.
static constexpr auto kSource = [] {
  std::array<std::array<uint8_t, 8>, 256> table{};
  for (int mask = 0; mask < 256; ++mask)
    for (int i = 0, next = 0; i < 8; ++i) table[mask][i] = mask >> i & 1 ? next++ : 0x80;
  return table;
}();

// The same for elements of two bytes.
static constexpr auto kSource16 = [] {
  std::array<std::array<uint8_t, 16>, 256> table{};
  for (int mask = 0; mask < 256; ++mask)
    for (int i = 0; i < 16; ++i) table[mask][i] = kSource[mask][i / 2] == 0x80 ? 0x80 : 2 * kSource[mask][i / 2] + i % 2;
  return table;
}();

template <typename T>
static T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

static __m256 halves(const uint8_t* row, int i) { return _mm256_loadu_ps(reinterpret_cast<const float*>(row) + 8 * i); }

struct Fp32 {
  static constexpr DType dtype = DType::fp32;
  static constexpr int64_t kRowBlock = 4, kPanelBlock = 1, kStreamRows = 0;
  using X = float;

  static const uint8_t* expand(const uint8_t* words, const uint8_t* values, int64_t rows, uint8_t* out) {
    for (int64_t i = 0; i < 2 * rows; ++i) {
      const __m256i source = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSource[words[i]].data())));
      const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
      const __m256i spread = _mm256_permutevar8x32_epi32(packed, source);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * i), _mm256_andnot_si256(_mm256_srai_epi32(source, 31), spread));
      values += 4 * std::popcount(words[i]);
    }
    return values;
  }

  template <int M, int P>
  static void dot(const uint8_t* const* weight, int64_t rows, const Activations<Fp32>& a, float* sums) {
    __m256 sum[M][2];
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < 2; ++i) sum[m][i] = _mm256_loadu_ps(sums + m * kPanel + 8 * i);
    for (int64_t r = 0; r < rows; ++r) {
      const __m256 w[2] = {halves(weight[0] + r * kRow, 0), halves(weight[0] + r * kRow, 1)};
      for (int m = 0; m < M; ++m) {
        const __m256 x = _mm256_broadcast_ss(a.x + m * a.x_stride + r);
        for (int i = 0; i < 2; ++i) sum[m][i] = _mm256_fmadd_ps(w[i], x, sum[m][i]);
      }
    }
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < 2; ++i) _mm256_storeu_ps(sums + m * kPanel + 8 * i, sum[m][i]);
  }
};

struct Bf16 {
  static constexpr DType dtype = DType::bf16;
  static constexpr int64_t kRowBlock = 2, kPanelBlock = 1, kStreamRows = 0;
  using X = float;

  static const uint8_t* expand(const uint8_t* words, const uint8_t* values, int64_t rows, uint8_t* out) {
    for (int64_t i = 0; i < 4 * rows; ++i) {
      const __m128i source = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kSource16[words[i]].data()));
      const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * i), _mm_shuffle_epi8(packed, source));
      values += 2 * std::popcount(words[i]);
    }
    return values;
  }

  template <int M, int P>
  static void dot(const uint8_t* const* weight, int64_t rows, const Activations<Bf16>& a, float* sums) {
    const __m256 high = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xffff0000)));
    __m256 sum[M][2];
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < 2; ++i) sum[m][i] = _mm256_loadu_ps(sums + m * kPanel + 8 * i);
    for (int64_t r = 0; r < rows; ++r) {
      for (int i = 0; i < 2; ++i) {
        const __m256 pair = halves(weight[0] + r * kRow, i);
        const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pair), 16)), odd = _mm256_and_ps(pair, high);
        for (int m = 0; m < M; ++m) {
          const float* x = a.x + m * a.x_stride + 2 * r;
          sum[m][i] = _mm256_fmadd_ps(even, _mm256_broadcast_ss(x), sum[m][i]);
          sum[m][i] = _mm256_fmadd_ps(odd, _mm256_broadcast_ss(x + 1), sum[m][i]);
        }
      }
    }
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < 2; ++i) _mm256_storeu_ps(sums + m * kPanel + 8 * i, sum[m][i]);
  }
};

struct Int8 {
  static constexpr DType dtype = DType::int8;
  static constexpr int64_t kRowBlock = 2, kPanelBlock = 1, kStreamRows = 0;
  using X = int8_t;

  static const uint8_t* expand(const uint8_t* words, const uint8_t* values, int64_t rows, uint8_t* out) {
    for (int64_t i = 0; i < 8 * rows; ++i) {
      const __m128i source = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSource[words[i]].data()));
      const __m128i spread = _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values)), source);
      // Places without a bit have 0x80 as their source and 0 as their value: a zero weight, stored as 128.
      const __m128i zeros = _mm_and_si128(source, _mm_set1_epi8(static_cast<char>(0x80)));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(out + 8 * i), _mm_or_si128(spread, zeros));
      values += std::popcount(words[i]);
    }
    return values;
  }

  // No u8 x s8 product without saturation here: even and odd bytes are widened to 16 bits and multiplied by vpmaddwd.
  template <int M, int P>
  static void dot(const uint8_t* const* weight, int64_t rows, const Activations<Int8>& a, float* sums) {
    const __m256i low = _mm256_set1_epi16(0xff);
    for (int64_t r = 0; r < rows; r += a.row_group) {
      const int64_t end = std::min(rows, r + a.row_group), group = r / a.row_group;
      __m256i sum[M][2];
      for (int m = 0; m < M; ++m)
        for (int i = 0; i < 2; ++i) sum[m][i] = _mm256_set1_epi32(a.offset[m * a.scale_stride + group]);
      for (int64_t k = r; k < end; ++k) {
        for (int i = 0; i < 2; ++i) {
          const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight[0] + k * kRow) + i);
          const __m256i even = _mm256_and_si256(w, low), odd = _mm256_srli_epi16(w, 8);
          for (int m = 0; m < M; ++m) {
            const __m256i x = _mm256_set1_epi32(load<int32_t>(a.x + m * a.x_stride + 4 * k));
            const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x_odd = _mm256_srai_epi16(x, 8);
            sum[m][i] = _mm256_add_epi32(sum[m][i], _mm256_madd_epi16(even, x_even));
            sum[m][i] = _mm256_add_epi32(sum[m][i], _mm256_madd_epi16(odd, x_odd));
          }
        }
      }
      for (int m = 0; m < M; ++m) {
        const __m256 scale = _mm256_set1_ps(a.scale[m * a.scale_stride + group]);
        for (int i = 0; i < 2; ++i) {
          float* out = sums + m * kPanel + 8 * i;
          _mm256_storeu_ps(out, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[m][i]), scale, _mm256_loadu_ps(out)));
        }
      }
    }
  }
};

struct Int4 {
  static constexpr DType dtype = DType::int4;
  static constexpr int64_t kRowBlock = 4, kStreamRows = 0;
  using X = int8_t;

  static const uint8_t* expand_row(const uint8_t* words, const uint8_t* values, const uint8_t* zeros, uint8_t* out) {
    return expand_halves<Int4>(words, values, zeros, out);
  }

  static void spread(const uint8_t* words, const uint8_t* codes, const uint8_t* zeros, uint8_t* out) {
    for (int64_t i = 0; i < 8; ++i) {
      const __m128i source = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSource[words[i]].data()));
      const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
      const __m128i fill = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros + 8 * i));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(out + 8 * i), _mm_blendv_epi8(_mm_shuffle_epi8(packed, source), fill, source));
      codes += std::popcount(words[i]);
    }
  }

  // Sixteen bits hold the sums of a unit: sixteen products of at most 15 * 127 each.
  template <int M>
  static void dot(const Unit* units, int64_t count, const Activations<Int4>& a, float* sums) {
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    for (int64_t u = 0; u < count; ++u) {
      const Unit& unit = units[u];
      __m256i shorts[M][2] = {};
      for (int64_t r = 0; r < kUnitRows; ++r) {
        for (int i = 0; i < 2; ++i) {
          const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(unit.codes + r * kRow) + i);
          const __m256i even = _mm256_and_si256(codes, low), odd = _mm256_and_si256(_mm256_srli_epi16(codes, 4), low);
          for (int m = 0; m < M; ++m) {
            const int8_t* x = a.x + m * a.x_stride + (u * kUnitRows + r) * 8;
            shorts[m][i] = _mm256_add_epi16(shorts[m][i], _mm256_maddubs_epi16(even, _mm256_set1_epi32(load<int32_t>(x))));
            shorts[m][i] = _mm256_add_epi16(shorts[m][i], _mm256_maddubs_epi16(odd, _mm256_set1_epi32(load<int32_t>(x + 4))));
          }
        }
      }
      for (int m = 0; m < M; ++m) {
        const __m256 scale = _mm256_set1_ps(a.scale[m * a.scale_stride + u]), x = _mm256_set1_ps(x_sum(a, m * a.scale_stride + u));
        for (int i = 0; i < 2; ++i) {
          float* out = sums + m * kPanel + 8 * i;
          const __m256 sum = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(shorts[m][i], ones)), scale);
          const __m256 scaled = _mm256_fmadd_ps(sum, _mm256_loadu_ps(unit.scale + 8 * i), _mm256_loadu_ps(out));
          _mm256_storeu_ps(out, _mm256_fmadd_ps(x, _mm256_loadu_ps(unit.minimum + 8 * i), scaled));
        }
      }
    }
  }
};

Variant fp32() { return variant<Fp32>(); }
Variant bf16() { return variant<Bf16>(); }
Variant int8() { return variant<Int8>(); }
AttentionVariant attention() { return attention_variant<Paged<Rounded<1, 4>, Bf16>>(); }
Variant int4() { return int4_variant<Int4>(); }
Steps steps() { return decoder_steps<Exact<1, 4>>(); }

}  // namespace tce::sparse_linear::avx2

#include "../common/region_end.h"
