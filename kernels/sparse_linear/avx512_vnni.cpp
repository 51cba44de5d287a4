// AVX-512 VNNI (vpdpbusd) with VBMI2 (vpexpandb, vpexpandw): int8 weights, and bf16 weights where vdpbf16ps is slow or missing.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <memory>

#include <immintrin.h>

#include "sparse_linear.h"
#include "../common/region_avx512_vnni.h"

namespace tce::sparse_linear::avx512_vnni {

#include "sparse_linear.inl"
#include "avx512.inl"
#include "vbmi2.inl"

struct Bf16 : Floats<Bf16> {
  static constexpr DType dtype = DType::bf16;
  using X = float;

  static __m512i expand_row(const uint8_t* words, const uint8_t*& values) { return expand_bf16(words, values); }
  static __m512 add(__m512 sum, __m512i row, const float* x) { return add_bf16(sum, row, x); }
};

struct Int8 {
  static constexpr DType dtype = DType::int8;
  static constexpr int64_t kRowBlock = 4, kPanelBlock = 2, kStreamRows = 4;
  using X = int8_t;

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
      if constexpr (L == Layout::sparse) {
        if (!readable<Int8>(c, count)) return false;
        values += count * kWord<Int8>;
      }
      const auto step = [&](int64_t r) __attribute__((always_inline)) {
        __m512i w;
        prefetch(values);
        if constexpr (L == Layout::sparse) {
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

Variant bf16() { return variant<Bf16>(); }
Variant int8() { return variant<Int8>(); }

}  // namespace tce::sparse_linear::avx512_vnni

#include "../common/region_end.h"
