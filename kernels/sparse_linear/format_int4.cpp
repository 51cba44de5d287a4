// Packing, unpacking and checking of int4 weights.
#include "format.h"

#include <algorithm>
#include <cmath>

namespace tce::sparse_linear {
namespace {

constexpr int64_t kInputs = chunk_of(DType::int4), kRows = 4, kHalf = 4;  // a chunk; its rows; inputs in one half of a row

// The grid of one output in one group: weight = scale * (code - zero), or scale * code + minimum where the layout is dense and not
// symmetric.
struct Grid {
  uint16_t scale16, minimum16;
  uint8_t zero;
  bool affine;

  static Grid of(const Scheme& scheme, uint16_t scale, uint16_t minimum, uint8_t zero) {
    const bool affine = scheme.layout == Layout::dense && !scheme.symmetric;
    return {scale, affine ? minimum : uint16_t{0}, static_cast<uint8_t>(affine ? 0 : scheme.symmetric ? 8 : zero), affine};
  }
  float scale() const { return fp16_to_float(scale16); }
  float minimum() const { return fp16_to_float(minimum16); }

  uint8_t encode(float value) const {
    const float steps = affine ? (value - minimum()) * inverse_of(scale()) : value * inverse_of(scale()) + zero;
    return static_cast<uint8_t>(std::clamp(std::nearbyint(steps), 0.0f, 15.0f));
  }
  float decode(int code) const { return affine ? scale() * code + minimum() : scale() * (code - zero); }
};

// The grid as given, or the one whose ends are the smallest and the largest weight.
Grid grid_of(const Dense& weight, const Scheme& scheme, int64_t n, int64_t group) {
  const int64_t begin = group * scheme.group_size, end = std::min(begin + scheme.group_size, weight.inputs);
  const int64_t at = n * divide_up(weight.inputs, scheme.group_size) + group;
  float scale, minimum;
  if (weight.scale) {
    scale = load_float(weight.scale, Float::fp32, at);
    minimum = weight.minimum ? load_float(weight.minimum, Float::fp32, at) : 0.0f;
  } else {
    const auto value_at = [&](int64_t k) { return load_float(weight.data, weight.type, n * weight.inputs + k); };
    float low = value_at(begin), high = low;
    for (int64_t k = begin + 1; k < end; ++k) {
      low = std::min(low, value_at(k));
      high = std::max(high, value_at(k));
    }
    if (scheme.symmetric) {                             // the weight of largest magnitude has code 0, eight steps from zero
      scale = (-low >= high ? low : high) / -8 + 0.0f;  // the zero that is added makes -0 a 0
      minimum = 0;
    } else {
      if (scheme.layout == Layout::sparse) {  // zero must be on the grid
        low = std::min(low, 0.0f);
        high = std::max(high, 0.0f);
      }
      scale = (high - low) / 15 + 0.0f;
      minimum = low + 0.0f;
    }
  }
  const uint16_t scale16 = float_to_fp16(scale);
  const float zero = std::clamp(std::nearbyint(-minimum * inverse_of(fp16_to_float(scale16))), 0.0f, 15.0f);
  return Grid::of(scheme, scale16, float_to_fp16(minimum), std::isfinite(zero) ? static_cast<uint8_t>(zero) : 0);
}

// Number of codes of a row's half that are stored.
int64_t stored(uint64_t word) { return std::popcount(word); }

// The chunk of one group and the codes in it: codes[row][half][byte], words likewise.
struct Chunk {
  uint8_t codes[kRows][2][kRow];
  uint64_t words[kRows][2];
};

Chunk encode_chunk(const Dense& weight, int64_t panel, int64_t chunk, const Grid* grids) {
  Chunk result{};
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t half = 0; half < 2; ++half) {
      for (int64_t byte = 0; byte < kRow; ++byte) {
        const int64_t i = byte / kHalf, n = panel * kPanel + i, k = chunk * kInputs + (row * 2 + half) * kHalf + byte % kHalf;
        const bool inside = n < weight.outputs && k < weight.inputs;
        uint8_t code = grids[i].zero;  // of padding
        if (inside) code = grids[i].encode(load_float(weight.data, weight.type, n * weight.inputs + k));
        result.codes[row][half][byte] = code;
        if (code != grids[i].zero) result.words[row][half] |= uint64_t{1} << byte;
      }
    }
  }
  return result;
}

// Calls visit(chunk number, grids, whether a group begins) for the chunks of a panel. False if a grid is not finite.
template <typename Visit>
bool for_each_chunk(const Dense& weight, const Scheme& scheme, int64_t panel, const Visit& visit) {
  Grid grids[kPanel];
  const int64_t per_group = scheme.group_size / kInputs;
  for (int64_t chunk = 0; chunk < divide_up(weight.inputs, kInputs); ++chunk) {
    const bool begins = chunk % per_group == 0;
    for (int64_t i = 0; begins && i < kPanel; ++i) {
      const int64_t n = panel * kPanel + i;
      grids[i] = n < weight.outputs ? grid_of(weight, scheme, n, chunk / per_group) : Grid::of(scheme, 0, 0, 0);
      if (!std::isfinite(grids[i].scale()) || !std::isfinite(grids[i].minimum())) return false;
    }
    visit(chunk, grids, begins);
  }
  return true;
}

}  // namespace

PanelPlan plan_panel_int4(const Dense& weight, const Scheme& scheme, int64_t panel) {
  PanelPlan plan{0, 0, true};
  const int64_t first = panel * kPanel * weight.inputs, last = std::min((panel + 1) * kPanel, weight.outputs) * weight.inputs;
  for (int64_t i = first; i < last; ++i)
    if (!std::isfinite(load_float(weight.data, weight.type, i))) return {0, 0, false};
  plan.representable = for_each_chunk(weight, scheme, panel, [&](int64_t number, const Grid* grids, bool begins) {
    const Chunk chunk = encode_chunk(weight, panel, number, grids);
    if (begins) plan.bytes += scheme.group_head();
    for (int64_t row = 0; row < kRows; ++row) {
      const uint64_t* words = chunk.words[row];
      plan.bytes += scheme.layout == Layout::dense ? kRow : 16 + std::max(stored(words[0]), stored(words[1]));
      for (int64_t half = 0; half < 2; ++half) {
        for (int64_t byte = 0; byte < kRow; ++byte) {
          const int64_t n = panel * kPanel + byte / kHalf, k = number * kInputs + (row * 2 + half) * kHalf + byte % kHalf;
          const bool inside = n < weight.outputs && k < weight.inputs;
          plan.nonzeros += inside && grids[byte / kHalf].decode(chunk.codes[row][half][byte]) != 0;
        }
      }
    }
  });
  return plan;
}

void write_panel_int4(const Dense& weight, const Scheme& scheme, int64_t panel, uint8_t* out) {
  for_each_chunk(weight, scheme, panel, [&](int64_t number, const Grid* grids, bool begins) {
    for (int64_t i = 0; begins && i < kPanel; ++i, out += 2) std::memcpy(out, &grids[i].scale16, 2);
    if (begins && !scheme.symmetric) {
      for (int64_t i = 0; i < kPanel; ++i) {
        const int64_t size = scheme.layout == Layout::dense ? 2 : 1;
        std::memcpy(out, size == 2 ? static_cast<const void*>(&grids[i].minimum16) : &grids[i].zero, size);
        out += size;
      }
    }
    const Chunk chunk = encode_chunk(weight, panel, number, grids);
    if (scheme.layout == Layout::sparse) {
      std::memcpy(out, chunk.words, sizeof(chunk.words));
      out += sizeof(chunk.words);
    }
    for (int64_t row = 0; row < kRows; ++row) {
      int64_t length = 0;
      for (int64_t half = 0; half < 2; ++half) {
        int64_t at = 0;
        for (int64_t byte = 0; byte < kRow; ++byte) {
          if (scheme.layout == Layout::sparse && !(chunk.words[row][half] >> byte & 1)) continue;
          if (at == length) out[length++] = 0;
          out[at++] |= chunk.codes[row][half][byte] << 4 * half;
        }
      }
      out += length;
    }
  });
}

int64_t unpack_panel_int4(const Packed& weight, int64_t panel, void* out, Float out_type) {
  const uint8_t* at = weight.data + weight.offset(panel);
  const uint8_t* end = weight.data + weight.offset(panel + 1);
  const int64_t per_group = weight.group_size / kInputs;
  Grid grids[kPanel];
  int64_t nonzeros = 0;
  for (int64_t chunk = 0; chunk < divide_up(weight.inputs, kInputs); ++chunk) {
    if (chunk % per_group == 0) {
      if (end - at < weight.group_head()) return -1;
      for (int64_t i = 0; i < kPanel; ++i) {
        uint16_t scale, minimum = 0;
        std::memcpy(&scale, at + 2 * i, 2);
        const uint8_t* zeros = at + 2 * kPanel;
        if (weight.layout == Layout::dense && !weight.symmetric) std::memcpy(&minimum, zeros + 2 * i, 2);
        const uint8_t zero = weight.layout == Layout::sparse && !weight.symmetric ? zeros[i] : 0;
        if (zero > 15) return -1;
        grids[i] = Grid::of(weight, scale, minimum, zero);
      }
      at += weight.group_head();
    }
    uint64_t words[kRows][2];
    std::memset(words, 255, sizeof(words));
    if (weight.layout == Layout::sparse) {
      if (end - at < static_cast<int64_t>(sizeof(words))) return -1;
      std::memcpy(words, at, sizeof(words));
      at += sizeof(words);
    }
    for (int64_t row = 0; row < kRows; ++row) {
      const int64_t length = std::max(stored(words[row][0]), stored(words[row][1]));
      if (end - at < length) return -1;
      for (int64_t half = 0; half < 2; ++half) {
        int64_t next = 0;
        for (int64_t byte = 0; byte < kRow; ++byte) {
          const Grid& grid = grids[byte / kHalf];
          const int64_t n = panel * kPanel + byte / kHalf, k = chunk * kInputs + (row * 2 + half) * kHalf + byte % kHalf;
          int code = grid.zero;
          if (words[row][half] >> byte & 1) code = at[next++] >> 4 * half & 15;
          if (n >= weight.outputs || k >= weight.inputs) {
            if (code != grid.zero) return -1;
            continue;
          }
          const float value = grid.decode(code);
          nonzeros += value != 0;
          if (out) store_float(out, out_type, n * weight.inputs + k, value);
        }
        for (; next < length; ++next)
          if (at[next] >> 4 * half & 15) return -1;
      }
      at += length;
    }
  }
  return at == end ? nonzeros : -1;
}

}  // namespace tce::sparse_linear
