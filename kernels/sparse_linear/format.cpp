#include "format.h"

#include <algorithm>
#include <cmath>

namespace tce::sparse_linear {
namespace {

// One value as it is stored, right-aligned.
uint32_t encode(float value, DType dtype, float inverse_scale) {
  if (dtype == DType::fp32) return float_bits(value);
  if (dtype == DType::bf16) return float_to_bf16(value);
  return static_cast<uint32_t>(std::clamp(std::nearbyint(value * inverse_scale), -127.0f, 127.0f) + 128.0f);
}

float decode(uint32_t code, DType dtype, float scale) {
  if (dtype == DType::fp32) return bits_float(code);
  if (dtype == DType::bf16) return bf16_to_float(static_cast<uint16_t>(code));
  return (static_cast<float>(code) - 128.0f) * scale;
}

bool is_zero(uint32_t code, DType dtype) {  // the sign of a zero is not kept: pruning by multiplication makes negative ones
  return dtype == DType::fp32 ? (code << 1) == 0 : dtype == DType::bf16 ? (code & 0x7fff) == 0 : code == 128;
}

uint32_t zero_code(DType dtype) { return dtype == DType::int8 ? 128 : 0; }
int64_t size_of(DType dtype) { return 4 / group_of(dtype); }
int64_t word_bytes(DType dtype) { return 2 * group_of(dtype); }

// int8: the value of one step of output n, as given or so that the largest weight has code 127.
float scale_of(const Dense& weight, int64_t n) {
  if (weight.scale) return load_float(weight.scale, Float::fp32, n);
  float largest = 0;
  for (int64_t k = 0; k < weight.inputs; ++k)
    largest = std::max(largest, std::fabs(load_float(weight.data, weight.type, n * weight.inputs + k)));
  return largest / 127;
}

// Of a panel with this many stored values (structured: as many as it has to have); for int4 with these many bytes of them.
int64_t panel_bytes(const Scheme& scheme, int64_t inputs, int64_t values) {
  const int64_t rows = round_up(divide_up(inputs, group_of(scheme.dtype)), scheme.dtype == DType::int4 ? 4 : 1);
  if (scheme.layout == Layout::structured)
    values = rows / scheme.pattern.block_rows(scheme.dtype) * scheme.pattern.block_values(scheme.dtype);
  if (scheme.dtype == DType::int4) {
    const int64_t heads = divide_up(inputs, scheme.group_size) * scheme.group_head();
    return heads + (scheme.layout == Layout::dense ? rows * kRow : rows * 16 + values);
  }
  return (scheme.layout == Layout::dense ? rows * kRow : rows * word_bytes(scheme.dtype) + values * size_of(scheme.dtype)) +
         panel_tail(scheme.dtype);
}

// The zeros of one output in `rows` rows that the pattern stores beside the nonzeros: bit k of the result.
template <typename IsNonzero>
uint64_t zeros_to_store(const Pattern& pattern, int64_t rows, int64_t group, const IsNonzero& is_nonzero) {
  uint64_t zeros = 0;
  for (int64_t begin = 0; begin < rows * group; begin += pattern.m) {
    int64_t missing = pattern.n;
    for (int64_t k = begin; k < begin + pattern.m; ++k) missing -= is_nonzero(k);
    for (int64_t k = begin; k < begin + pattern.m && missing > 0; ++k) {
      if (is_nonzero(k)) continue;
      zeros |= uint64_t{1} << k;
      --missing;
    }
  }
  return zeros;
}

// Calls visit(row, bit, n, k) for the elements of a panel in stream order; padding has n or k past the end.
template <typename Visit>
void for_each(int64_t row_begin, int64_t row_end, int64_t panel, int64_t group, const Visit& visit) {
  for (int64_t row = row_begin; row < row_end; ++row)
    for (int64_t bit = 0; bit < kPanel * group; ++bit) visit(row, bit, panel * kPanel + bit / group, row * group + bit % group);
}

// Whether a pattern is one of the structured layout and fits the number of inputs.
bool fits(const Pattern& pattern, int64_t inputs) {
  return pattern.m >= 2 && pattern.m <= kChunk && std::has_single_bit(static_cast<uint64_t>(pattern.m)) && pattern.n >= 1 &&
         pattern.n < pattern.m && inputs % pattern.m == 0;
}

}  // namespace

Header header_of(const Scheme& scheme, int64_t outputs, int64_t inputs, int64_t bytes, int64_t nonzeros) {
  const bool structured = scheme.layout == Layout::structured;
  return {kMagic,  kVersion, scheme.dtype, scheme.layout, static_cast<uint32_t>(structured ? scheme.pattern.n : scheme.group_size),
          outputs, inputs,   bytes,        nonzeros,      structured ? scheme.pattern.m : scheme.symmetric};
}

const char* open(const uint8_t* data, int64_t bytes, Packed& out) {
  Header header;
  if (bytes < static_cast<int64_t>(sizeof(Header))) return "an array too short for a header";
  std::memcpy(&header, data, sizeof(Header));
  if (header.magic != kMagic) return "an array that does not begin with the format's magic number";
  if (header.version > kVersion) return "a format version from the future: update torch_cpu_ext";
  if (header.version < 1) return "format version 0";
  if (header.dtype > DType::int4) return "an unknown dtype code";
  const bool int4 = header.dtype == DType::int4, structured = header.layout == Layout::structured;
  if (header.layout > (int4 ? Layout::sparse : Layout::structured)) return "an unknown layout code";
  const bool known = header.group_size == 32 || header.group_size == 64 || header.group_size == 128;
  if (!structured && (int4 ? !known : header.group_size != 0)) return "an unknown group size";
  if (!structured && header.symmetric != 0 && !(int4 && header.symmetric == 1)) return "an unknown kind of zero";
  constexpr int64_t limit = int64_t{1} << 40;  // far above any layer, and no product of two sizes below overflows
  if (header.outputs < 0 || header.inputs < 0 || header.outputs > limit || header.inputs > limit) return "sizes out of range";
  const Pattern pattern = structured ? Pattern{header.group_size, header.symmetric} : Pattern{};
  if (structured && !fits(pattern, header.inputs)) return "an unknown pattern";
  if (header.bytes != bytes) return "an array of another length than its header says (truncated?)";
  const int64_t group_size = structured ? 0 : header.group_size;
  out = Packed{
      {header.dtype, header.layout, group_size, !structured && header.symmetric == 1, pattern}, data, header.outputs, header.inputs, bytes};
  const int64_t panels = out.panels();
  if (panels > bytes / 8) return "an array too short for its offsets";
  const int64_t first = round_up(sizeof(Header) + (panels + 1) * 8, 64);
  if (first + kTail > bytes) return "an array too short for its offsets";
  if (out.offset(0) != first || out.offset(panels) != bytes - kTail) return "offsets that do not span the array";
  const int64_t least = panel_bytes(out, header.inputs, 0);
  const bool fixed = header.layout != Layout::sparse;
  int64_t begin = first;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t end = out.offset(panel + 1);
    if (end < begin || end > bytes - kTail) return "offsets out of order";
    if (fixed ? end - begin != least : end - begin < least) return "a panel of the wrong length";
    begin = end;
  }
  return nullptr;
}

PanelPlan plan_panel(const Dense& weight, const Scheme& scheme, int64_t panel) {
  if (scheme.dtype == DType::int4) return plan_panel_int4(weight, scheme, panel);
  PanelPlan plan{0, 0, true};
  const int64_t first = panel * kPanel, last = std::min(first + kPanel, weight.outputs);
  for (int64_t n = first; n < last; ++n) {
    const float inverse_scale = scheme.dtype == DType::int8 ? inverse_of(scale_of(weight, n)) : 0;
    int64_t before = plan.nonzeros;  // structured: before the group of m inputs that k is in
    for (int64_t k = 0; k < weight.inputs; ++k) {
      const float value = load_float(weight.data, weight.type, n * weight.inputs + k);
      if (scheme.dtype == DType::int8 && !std::isfinite(value)) return {0, 0, false};
      if (scheme.layout == Layout::structured && k % scheme.pattern.m == 0) before = plan.nonzeros;
      plan.nonzeros += !is_zero(encode(value, scheme.dtype, inverse_scale), scheme.dtype);
      if (scheme.layout == Layout::structured && plan.nonzeros - before > scheme.pattern.n && plan.misfit < 0) plan.misfit = n;
    }
  }
  plan.bytes = panel_bytes(scheme, weight.inputs, plan.nonzeros);
  return plan;
}

void write_panel(const Dense& weight, const Scheme& scheme, int64_t panel, uint8_t* out) {
  if (scheme.dtype == DType::int4) return write_panel_int4(weight, scheme, panel, out);
  const DType dtype = scheme.dtype;
  const int64_t group = group_of(dtype), rows = divide_up(weight.inputs, group), chunk_rows = kChunk / group, size = size_of(dtype);
  float scale[kPanel] = {}, inverse_scale[kPanel] = {};
  for (int64_t i = 0; dtype == DType::int8 && i < kPanel && panel * kPanel + i < weight.outputs; ++i) {
    scale[i] = scale_of(weight, panel * kPanel + i);
    inverse_scale[i] = inverse_of(scale[i]);
  }
  const auto code_at = [&](int64_t n, int64_t k) {
    if (n >= weight.outputs || k >= weight.inputs) return zero_code(dtype);
    return encode(load_float(weight.data, weight.type, n * weight.inputs + k), dtype, inverse_scale[n % kPanel]);
  };
  for (int64_t row = 0; row < rows; row += chunk_rows) {
    const int64_t end = std::min(row + chunk_rows, rows);
    if (scheme.layout == Layout::dense) {
      for_each(row, end, panel, group, [&](int64_t, int64_t, int64_t n, int64_t k) {
        const uint32_t code = code_at(n, k);
        std::memcpy(out, &code, size);
        out += size;
      });
      continue;
    }
    uint64_t zeros[kPanel] = {};  // structured: bit k % 64 of the zeros that are stored
    for (int64_t i = 0; scheme.layout == Layout::structured && i < kPanel; ++i)
      zeros[i] = zeros_to_store(scheme.pattern, end - row, group,
                                [&](int64_t k) { return !is_zero(code_at(panel * kPanel + i, row * group + k), dtype); });
    uint8_t* words = out;
    out += (end - row) * word_bytes(dtype);
    std::memset(words, 0, out - words);
    for_each(row, end, panel, group, [&](int64_t r, int64_t bit, int64_t n, int64_t k) {
      uint32_t code = code_at(n, k);
      if (is_zero(code, dtype)) {
        if (!(zeros[n % kPanel] >> k % kChunk & 1)) return;
        code = zero_code(dtype);
      }
      words[(r - row) * word_bytes(dtype) + bit / 8] |= 1 << bit % 8;
      std::memcpy(out, &code, size);
      out += size;
    });
  }
  if (dtype == DType::int8) std::memcpy(out, scale, sizeof(scale));
}

int64_t unpack_panel(const Packed& weight, int64_t panel, void* out, Float out_type) {
  if (weight.dtype == DType::int4) return unpack_panel_int4(weight, panel, out, out_type);
  const DType dtype = weight.dtype;
  const int64_t group = group_of(dtype), rows = weight.rows(), chunk_rows = kChunk / group, size = size_of(dtype);
  const uint8_t* at = weight.data + weight.offset(panel);
  const uint8_t* end = weight.data + weight.offset(panel + 1) - panel_tail(dtype);
  float scale[kPanel] = {};
  if (dtype == DType::int8) std::memcpy(scale, end, sizeof(scale));
  int64_t nonzeros = 0;
  for (int64_t row = 0; row < rows; row += chunk_rows) {
    const int64_t last = std::min(row + chunk_rows, rows);
    const uint8_t* words = at;
    if (weight.layout != Layout::dense) at += (last - row) * word_bytes(dtype);
    if (at > end) return -1;
    bool intact = true;
    int64_t stored[kPanel] = {};  // structured: of the group of m inputs that k is in
    for_each(row, last, panel, group, [&](int64_t r, int64_t bit, int64_t n, int64_t k) {
      uint32_t code = zero_code(dtype);
      const bool is_stored = weight.layout == Layout::dense || (words[(r - row) * word_bytes(dtype) + bit / 8] >> bit % 8 & 1);
      if (weight.layout == Layout::structured) {
        int64_t& count = stored[n % kPanel];
        count = is_stored + (k % weight.pattern.m == 0 ? 0 : count);
        intact &= k % weight.pattern.m != weight.pattern.m - 1 || count == weight.pattern.n;
      }
      if (is_stored) {
        intact &= at + size <= end;
        if (!intact) return;
        code = 0;
        std::memcpy(&code, at, size);
        at += size;
      }
      if (n >= weight.outputs || k >= weight.inputs) {
        intact &= code == zero_code(dtype);
        return;
      }
      nonzeros += !is_zero(code, dtype);
      if (out) store_float(out, out_type, n * weight.inputs + k, decode(code, dtype, scale[n % kPanel]));
    });
    if (!intact) return -1;
  }
  return at == end ? nonzeros : -1;
}

}  // namespace tce::sparse_linear
