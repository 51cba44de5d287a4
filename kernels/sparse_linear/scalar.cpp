// Plain C++ for every machine; the inner loops run over the 16 outputs of a panel and vectorise.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include "attention.h"
#include "decode.h"
#include "sparse_linear.h"

namespace tce::sparse_linear::scalar {

constexpr int kVectorBytes = 16;
#include "../common/vectors.inl"
#include "../common/attention.inl"
#include "sparse_linear.inl"
#include "attention.inl"
#include "int4.inl"
#include "decode.inl"

template <DType D>
struct Plain {
  static constexpr DType dtype = D;
  static constexpr int64_t kRowBlock = 1, kPanelBlock = 1, kStreamRows = 0;
  using X = std::conditional_t<D == DType::int8, int8_t, float>;
  using Value = std::conditional_t<D == DType::fp32, uint32_t, std::conditional_t<D == DType::bf16, uint16_t, uint8_t>>;

  static const uint8_t* expand(const uint8_t* words, const uint8_t* values, int64_t rows, uint8_t* out) {
    constexpr int64_t elements = kRow / sizeof(Value);
    for (int64_t r = 0; r < rows; ++r, words += elements / 8, out += kRow) {
      std::memset(out, D == DType::int8 ? 128 : 0, kRow);
      for (int64_t i = 0; i < elements; ++i) {
        if (!(words[i / 8] >> i % 8 & 1)) continue;
        std::memcpy(out + i * sizeof(Value), values, sizeof(Value));
        values += sizeof(Value);
      }
    }
    return values;
  }

  template <int M, int P>
  static void dot(const uint8_t* const* weight, int64_t rows, const Activations<Plain>& a, float* sums) {
    for (int64_t r = 0; r < rows; r += a.row_group) {
      const int64_t end = std::min(rows, r + a.row_group);
      if constexpr (D == DType::int8) {
        int32_t group_sums[kPanel];
        std::fill_n(group_sums, kPanel, a.offset[r / a.row_group]);
        for (int64_t i = r; i < end; ++i) add_row(weight[0] + i * kRow, a.x + i * 4, group_sums);
        for (int n = 0; n < kPanel; ++n) sums[n] = std::fma(static_cast<float>(group_sums[n]), a.scale[r / a.row_group], sums[n]);
      } else {
        for (int64_t i = r; i < end; ++i) add_row(weight[0] + i * kRow, a.x + i * group_of(D), sums);
      }
    }
  }

 private:
  static void add_row(const uint8_t* row, const float* x, float* sums) {
    uint32_t bits[kPanel];
    std::memcpy(bits, row, kRow);
    for (int n = 0; n < kPanel; ++n) {
      if constexpr (D == DType::fp32) {
        sums[n] += bits_float(bits[n]) * x[0];
      } else {
        sums[n] += bits_float(bits[n] << 16) * x[0] + bits_float(bits[n] & 0xffff0000) * x[1];
      }
    }
  }

  static void add_row(const uint8_t* row, const int8_t* x, int32_t* sums) {
    for (int n = 0; n < kPanel; ++n)
      for (int j = 0; j < 4; ++j) sums[n] += row[4 * n + j] * x[j];
  }
};

struct Int4 {
  static constexpr DType dtype = DType::int4;
  static constexpr int64_t kRowBlock = 1, kStreamRows = 0;
  using X = int8_t;

  static const uint8_t* expand_row(const uint8_t* words, const uint8_t* values, const uint8_t* zeros, uint8_t* out) {
    return expand_halves<Int4>(words, values, zeros, out);
  }

  static void spread(const uint8_t* words, const uint8_t* codes, const uint8_t* zeros, uint8_t* out) {
    for (int64_t i = 0; i < kRow; ++i) out[i] = words[i / 8] >> i % 8 & 1 ? *codes++ : zeros[i];
  }

  template <int M>
  static void dot(const Unit* units, int64_t count, const Activations<Int4>& a, float* sums) {
    for (int64_t u = 0; u < count; ++u) {
      const Unit& unit = units[u];
      int32_t integers[kPanel] = {};
      for (int64_t r = 0; r < kUnitRows; ++r) {
        const int8_t* x = a.x + (u * kUnitRows + r) * 8;
        for (int n = 0; n < kPanel; ++n) {
          for (int j = 0; j < 4; ++j) {
            const int byte = unit.codes[r * kRow + 4 * n + j];
            integers[n] += (byte & 15) * x[j] + (byte >> 4) * x[j + 4];
          }
        }
      }
      const float scale = a.scale[u], sum = x_sum(a, u);
      for (int n = 0; n < kPanel; ++n) sums[n] += unit.scale[n] * (static_cast<float>(integers[n]) * scale) + unit.minimum[n] * sum;
    }
  }
};

Variant fp32() { return variant<Plain<DType::fp32>>(); }
Variant bf16() { return variant<Plain<DType::bf16>>(); }
Variant int8() { return variant<Plain<DType::int8>>(); }
AttentionVariant attention() { return attention_variant<Paged<Rounded<1, 1>, Plain<DType::bf16>>>(); }
Variant int4() { return int4_variant<Int4>(); }
Steps steps() { return decoder_steps<Exact<1, 1>>(); }

}  // namespace tce::sparse_linear::scalar
