// AVX-512 VNNI (vpdpbusd) with VBMI2 (vpexpandb, vpexpandw): int8 weights, and bf16 weights where vdpbf16ps is slow or missing.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>

#include <immintrin.h>

#include "attention.h"
#include "sparse_linear.h"
#include "../common/region_avx512_vnni.h"

namespace tce::sparse_linear::avx512_vnni {

constexpr int kVectorBytes = 64;
#include "../common/vectors.inl"
#include "../common/attention.inl"
#include "sparse_linear.inl"
#include "avx512.inl"
#include "vbmi2.inl"
#include "attention.inl"
#include "attention_vbmi2.inl"
#include "int4.inl"

struct Bf16 : Floats<Bf16> {
  static constexpr DType dtype = DType::bf16;
  using X = float;

  static constexpr bool kFixedCounts = true;

  static __m512i expand_row(const uint8_t* words, const uint8_t*& values) { return expand_bf16(words, values); }
  static __m512 add(__m512 sum, __m512i row, const float* x) { return add_bf16(sum, row, x); }
};

struct Int8 {
  static constexpr DType dtype = DType::int8;
  static constexpr int64_t kRowBlock = 4, kPanelBlock = 2, kStreamRows = 4;
  using X = int8_t;

  static constexpr bool kFixedCounts = true;

  static __m512i expand_row(const uint8_t* words, const uint8_t*& values) { return expand_int8(words, values); }
  static __m512i quad(const int8_t* x) { return _mm512_set1_epi32(load<int32_t>(x)); }

  static const uint8_t* expand(const uint8_t* words, const uint8_t* values, int64_t rows, uint8_t* out) {
    return expand_rows<Int8>(words, values, rows, out);
  }

  template <int M, int P>
  static void dot(const uint8_t* const* weight, int64_t rows, const Activations<Int8>& a, float* sums) {
    __m512 sum[M][P];
    load_sums<M, P>(sums, sum);
    for (int64_t r = 0, group = 0; r < rows; r += a.row_group, ++group) {
      const int64_t end = std::min(rows, r + a.row_group);
      __m512i integers[M][P];
      for (int m = 0; m < M; ++m)
        for (int i = 0; i < P; ++i) integers[m][i] = _mm512_set1_epi32(a.offset[m * a.scale_stride + group]);
      for (int64_t k = r; k < end; ++k) {
        __m512i w[P];
        for (int i = 0; i < P; ++i) w[i] = _mm512_loadu_si512(weight[i] + k * kRow);
        for (int m = 0; m < M; ++m) {
          const __m512i x = quad(a.x + m * a.x_stride + 4 * k);
          for (int i = 0; i < P; ++i) integers[m][i] = _mm512_dpbusd_epi32(integers[m][i], w[i], x);
        }
      }
      for (int m = 0; m < M; ++m) {
        const __m512 scale = _mm512_set1_ps(a.scale[m * a.scale_stride + group]);
        for (int i = 0; i < P; ++i) sum[m][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(integers[m][i]), scale, sum[m][i]);
      }
    }
    store_sums<M, P>(sum, sums);
  }

  // Integer sums over each group of inputs that share a scale, then one conversion and one multiply-add.
  template <int M, Layout L>
  static bool stream(Cursor& c, int64_t rows, const Activations<Int8>& a, float* sums) {
    constexpr int kStep = 8;  // rows of the smallest group, 32 inputs
    static_assert(kFixedOf == kGroup<Int8>);
    const int64_t block_bytes = kPanel * c.pattern.n;  // structured
    __m512 sum[M];
    __m512i integers[M];
    for (int m = 0; m < M; ++m) {
      sum[m] = _mm512_setzero_ps();
      integers[m] = _mm512_set1_epi32(rows > 0 ? a.offset[m * a.scale_stride] : 0);
    }
    int64_t group = 0, left = a.row_group;
    for (int64_t first = 0; first < rows; first += kChunkRows<Int8>) {
      const int64_t count = std::min(kChunkRows<Int8>, rows - first);
      const uint8_t *words = c.at, *values = c.at;
      if constexpr (L != Layout::dense) {
        if (!chunk_readable<Int8, L>(c, count)) return false;
        values += count * kWord<Int8>;
      }
      const auto step = [&](int64_t r) __attribute__((always_inline)) {
        __m512i w;
        prefetch(values);
        if constexpr (L == Layout::structured) {  // a row is a block
          const uint8_t* block = values;
          w = expand_row(words + r * kWord<Int8>, block);
          values += block_bytes;
        } else if constexpr (L == Layout::sparse) {
          w = expand_row(words + r * kWord<Int8>, values);
        } else {
          w = _mm512_loadu_si512(values);
          values += kRow;
        }
        for (int m = 0; m < M; ++m) integers[m] = _mm512_dpbusd_epi32(integers[m], w, quad(a.x + m * a.x_stride + (first + r) * 4));
      };
      for (int64_t r = 0; r < count; r += kStep) {
        if (count - r >= kStep) {
          for (int u = 0; u < kStep; ++u) step(r + u);
        } else {
          for (int64_t u = r; u < count; ++u) step(u);
        }
        left -= kStep;
        if (left > 0 && first + r + kStep < rows) continue;
        const bool more = first + r + kStep < rows;
        for (int m = 0; m < M; ++m) {
          const __m512 scale = _mm512_set1_ps(a.scale[m * a.scale_stride + group]);
          sum[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(integers[m]), scale, sum[m]);
          if (more) integers[m] = _mm512_set1_epi32(a.offset[m * a.scale_stride + group + 1]);
        }
        ++group;
        left = a.row_group;
      }
      c.at = values;
    }
    for (int m = 0; m < M; ++m) _mm512_storeu_ps(sums + m * kPanel, sum[m]);
    return true;
  }
};

struct Int4 {
  static constexpr DType dtype = DType::int4;
  static constexpr int64_t kRowBlock = 8, kStreamRows = 4;
  using X = int8_t;

  static const uint8_t* expand_row(const uint8_t* words, const uint8_t* values, const uint8_t* zeros, uint8_t* out) {
    const __m512i zero = _mm512_loadu_si512(zeros);
    const Halves row = expand_int4(words, values, {zero, _mm512_slli_epi16(zero, 4)});
    _mm512_storeu_si512(out, _mm512_or_si512(row.low, row.high));
    return values;
  }

  static __m512i quad(const int8_t* x) { return _mm512_set1_epi32(load<int32_t>(x)); }
  static __m512 halves_to_floats(const uint8_t* at) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))); }

  // The sums of the upper halves are sixteen times too large, exactly.
  static __m512 total(const Halves& sums) { return _mm512_cvtepi32_ps(_mm512_add_epi32(sums.low, _mm512_srai_epi32(sums.high, 4))); }

  static void add(Halves& sums, const Halves& row, const int8_t* x) {
    sums.low = _mm512_dpbusd_epi32(sums.low, row.low, quad(x));
    sums.high = _mm512_dpbusd_epi32(sums.high, row.high, quad(x + 4));
  }

  template <int M>
  static void dot(const Unit* units, int64_t count, const Activations<Int4>& a, float* sums) {
    __m512 sum[M][1];
    load_sums<M, 1>(sums, sum);
    for (int64_t u = 0; u < count; ++u) {
      const Unit& unit = units[u];
      Halves integers[M] = {};
      for (int64_t r = 0; r < kUnitRows; ++r) {
        const Halves row = split(_mm512_loadu_si512(unit.codes + r * kRow));
        for (int m = 0; m < M; ++m) add(integers[m], row, a.x + m * a.x_stride + (u * kUnitRows + r) * 8);
      }
      const __m512 scale = _mm512_loadu_ps(unit.scale), minimum = _mm512_loadu_ps(unit.minimum);
      for (int m = 0; m < M; ++m) {
        const int64_t at = m * a.scale_stride + u;
        sum[m][0] = _mm512_fmadd_ps(_mm512_mul_ps(total(integers[m]), _mm512_set1_ps(a.scale[at])), scale, sum[m][0]);
        sum[m][0] = _mm512_fmadd_ps(_mm512_set1_ps(x_sum(a, at)), minimum, sum[m][0]);
      }
    }
    store_sums<M, 1>(sum, sums);
  }

  // What a group's head says: the scales, the values of code 0, and the codes of zero.
  template <Layout L>
  static void read_head(const Packed& w, const uint8_t* head, __m512& scale, __m512& minimum, Halves& zero) {
    scale = halves_to_floats(head);
    if (L == Layout::dense && !w.symmetric) {
      minimum = halves_to_floats(head + 2 * kPanel);
      return;
    }
    __m128i zeros = _mm_set1_epi8(8);
    if (!w.symmetric) zeros = _mm_loadu_si128(reinterpret_cast<const __m128i*>(head + 2 * kPanel));
    const __m512i wide = _mm512_cvtepu8_epi32(zeros);
    minimum = _mm512_mul_ps(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_cvtepi32_ps(wide)), scale);
    zero.low = _mm512_mullo_epi32(wide, _mm512_set1_epi32(0x01010101));  // four bytes for each output
    zero.high = _mm512_slli_epi16(zero.low, 4);
  }

  template <int M, Layout L>
  static bool stream(const Packed& w, Cursor& c, const Activations<Int4>& a, float* sums) {
    const int64_t units = divide_up(w.inputs, kUnit), per_group = w.group_size / kUnit;
    __m512 sum[M];
    for (int m = 0; m < M; ++m) sum[m] = _mm512_setzero_ps();
    for (int64_t u = 0; u < units;) {
      if (L == Layout::sparse && c.end - c.at < w.group_head()) return false;
      __m512 scale, minimum;
      Halves zero;
      read_head<L>(w, c.at, scale, minimum, zero);
      c.at += w.group_head();
      __m512 group_sum[M];
      float x_sums[M] = {};
      for (int m = 0; m < M; ++m) group_sum[m] = _mm512_setzero_ps();
      for (const int64_t end = std::min(u + per_group, units); u < end; ++u) {
        const uint8_t *words = c.at, *values = c.at;
        if constexpr (L == Layout::sparse) {
          if (!readable_unit(c)) return false;
          values += kUnitWords;
        }
        Halves integers[M] = {};
        for (int64_t r = 0; r < kUnitRows; ++r) {
          prefetch(values);
          Halves row;
          if constexpr (L == Layout::sparse) {
            row = expand_int4(words + 16 * r, values, zero);
          } else {
            row = split(_mm512_loadu_si512(values));
            values += kRow;
          }
          for (int m = 0; m < M; ++m) add(integers[m], row, a.x + m * a.x_stride + (u * kUnitRows + r) * 8);
        }
        c.at = values;
        for (int m = 0; m < M; ++m) {
          const int64_t at = m * a.scale_stride + u;
          group_sum[m] = _mm512_fmadd_ps(total(integers[m]), _mm512_set1_ps(a.scale[at]), group_sum[m]);
          x_sums[m] += x_sum(a, at);
        }
      }
      for (int m = 0; m < M; ++m) {
        sum[m] = _mm512_fmadd_ps(group_sum[m], scale, sum[m]);
        sum[m] = _mm512_fmadd_ps(_mm512_set1_ps(x_sums[m]), minimum, sum[m]);
      }
    }
    for (int m = 0; m < M; ++m) _mm512_storeu_ps(sums + m * kPanel, sum[m]);
    return true;
  }
};

Variant bf16() { return variant<Bf16>(); }
Variant int8() { return variant<Int8>(); }
AttentionVariant attention() { return attention_variant<PagedPairs<Rounded<4, 8>>>(); }
Variant int4() { return int4_variant<Int4>(); }

}  // namespace tce::sparse_linear::avx512_vnni

#include "../common/region_end.h"
