// The ops that make packed weights and look into them: checks, allocation, split of the work.
#include "../common/binding.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "products.h"

namespace tce::sparse_linear {
namespace {

DType dtype_of(const std::string& name, const char* op) {
  const char* names[] = {"fp32", "bf16", "int8", "int4"};
  for (uint32_t i = 0; i < 4; ++i)
    if (name == names[i]) return static_cast<DType>(i);
  STD_TORCH_CHECK(false, op, ": dtype must be fp32, bf16, int8 or int4, got ", name);
}

// The n and m of "n:m"; zeros of "unstructured".
Pattern pattern_of(const std::string& name, const char* op) {
  for (int64_t m = 2; m <= kChunk; m *= 2)
    for (int64_t n = 1; n < m; ++n)
      if (name == std::to_string(n) + ':' + std::to_string(m)) return {n, m};
  STD_TORCH_CHECK(name == "unstructured", op,
                  ": pattern must be unstructured or n:m with n below m and m a power of two from 2 to 64, got ", name);
  return {};
}

// One grid argument of `pack` as contiguous floats at any address, or null where it is not given.
const void* grid_values(std::optional<Tensor>& grid, const char* argument, int64_t outputs, int64_t groups, const char* op) {
  if (!grid) return nullptr;
  STD_TORCH_CHECK(grid->dim() == 2 && grid->size(0) == outputs && grid->size(1) == groups && grid->scalar_type() == ScalarType::Float, op,
                  ": ", argument, " must be float32 (", outputs, ", ", groups, "), got ", grid->dim(), "-D ",
                  torch::headeronly::toString(grid->scalar_type()), " with ", grid->numel(), " elements");
  grid = torch::stable::contiguous(*grid);
  const void* values = grid->const_data_ptr();
  bool finite = true;
  for (int64_t i = 0; i < grid->numel(); ++i) finite &= std::isfinite(load_float(values, Float::fp32, i));
  STD_TORCH_CHECK(finite, op, ": ", argument, " must be finite, got NaN or an infinity");
  return values;
}

Tensor pack(Tensor weight, std::string dtype_name, std::string layout_name, int64_t group_size, bool symmetric, std::optional<Tensor> scale,
            std::optional<Tensor> minimum, std::string pattern_name) {
  static const char* op = "sparse_linear_pack";
  const Float type = float_type(weight, op, "weight");
  STD_TORCH_CHECK(weight.dim() == 2, op, ": weight must be 2-D (out_features, in_features), got ", weight.dim(), "-D");
  const DType dtype = dtype_of(dtype_name, op);
  STD_TORCH_CHECK(layout_name == "auto" || layout_name == "sparse" || layout_name == "dense", op,
                  ": layout must be auto, sparse or dense, got ", layout_name);
  const bool int4 = dtype == DType::int4;
  STD_TORCH_CHECK(group_size == 32 || group_size == 64 || group_size == 128, op, ": group_size must be 32, 64 or 128, got ", group_size);
  STD_TORCH_CHECK(!scale || has_codes(dtype), op, ": scale must be None unless dtype is int8 or int4, got a tensor with dtype ",
                  dtype_name);
  STD_TORCH_CHECK(scale.has_value() && int4 && !symmetric ? minimum.has_value() : !minimum, op,
                  ": minimum must be given with scale for an int4 weight that is not symmetric, and only then");
  const Pattern pattern = pattern_of(pattern_name, op);
  const bool structured = pattern.m > 0;
  STD_TORCH_CHECK(!structured || !int4, op, ": pattern must be unstructured for int4 weights, got ", pattern_name);
  STD_TORCH_CHECK(!structured || layout_name == "auto", op, ": layout must be auto with a pattern, got ", layout_name);
  STD_TORCH_CHECK(!structured || weight.size(1) % pattern.m == 0, op, ": weight must have a multiple of ", pattern.m,
                  " inputs for the pattern ", pattern_name, ", got ", weight.size(1));
  weight = torch::stable::contiguous(weight);
  Dense dense{weight.const_data_ptr(), type, weight.size(0), weight.size(1)};
  const int64_t panels = divide_up(dense.outputs, kPanel), groups = int4 ? divide_up(dense.inputs, group_size) : 1;
  dense.scale = grid_values(scale, "scale", dense.outputs, groups, op);
  dense.minimum = grid_values(minimum, "minimum", dense.outputs, groups, op);

  // What each layout would need; only the wanted one, if it is named or a pattern says so.
  Scheme scheme{dtype, Layout::dense, int4 ? group_size : 0, int4 && symmetric, pattern};
  const char* names[] = {"dense", "sparse", "structured"};
  std::vector<PanelPlan> plans[3];
  int64_t best = -1, bytes[3] = {0, 0, 0};
  for (int i = 0; i < 3; ++i) {
    if (structured ? i != 2 : i == 2 || (layout_name != "auto" && layout_name != names[i])) continue;
    scheme.layout = static_cast<Layout>(i);
    plans[i].resize(panels);
    for_each(panels, 1, [&](int64_t panel) { plans[i][panel] = plan_panel(dense, scheme, panel); });
    for (const PanelPlan& plan : plans[i]) {
      STD_TORCH_CHECK(plan.representable, op, ": weight must be finite", int4 ? " and within the range of fp16 scales" : "",
                      " to be packed as ", dtype_name, ", got ", int4 ? "other values" : "NaN or an infinity");
      STD_TORCH_CHECK(plan.misfit < 0, op, ": weight must have at most ", pattern.n, " nonzeros among every ", pattern.m,
                      " inputs for the pattern ", pattern_name, ", got more in output ", plan.misfit);
      bytes[i] += plan.bytes;
    }
    if (best < 0 || bytes[i] < bytes[best]) best = i;
  }
  scheme.layout = static_cast<Layout>(best);

  const int64_t first = round_up(sizeof(Header) + (panels + 1) * 8, 64), total = first + bytes[best] + kTail;
  Tensor packed = torch::stable::empty({total}, ScalarType::Byte);
  uint8_t* data = static_cast<uint8_t*>(packed.mutable_data_ptr());
  std::memset(data, 0, first);
  std::memset(data + total - kTail, 0, kTail);
  int64_t nonzeros = 0;
  std::vector<int64_t> offsets{first};
  for (const PanelPlan& plan : plans[best]) {
    nonzeros += plan.nonzeros;
    offsets.push_back(offsets.back() + plan.bytes);
  }
  const Header header = header_of(scheme, dense.outputs, dense.inputs, total, nonzeros);
  std::memcpy(data, &header, sizeof(header));
  std::memcpy(data + sizeof(header), offsets.data(), offsets.size() * 8);
  for_each(panels, 1, [&](int64_t i) { write_panel(dense, scheme, i, data + offsets[i]); });
  return packed;
}

Tensor unpack(Tensor packed, int64_t out_features, int64_t in_features, std::string dtype_name) {
  static const char* op = "sparse_linear_unpack";
  STD_TORCH_CHECK(dtype_name == "fp32" || dtype_name == "bf16" || dtype_name == "fp16", op, ": dtype must be fp32, bf16 or fp16, got ",
                  dtype_name);
  const Float type = dtype_name == "fp32" ? Float::fp32 : dtype_name == "bf16" ? Float::bf16 : Float::fp16;
  const Packed weight = checked(packed, op);
  check_shape(weight, out_features, in_features, op);
  Tensor out = torch::stable::empty({out_features, in_features}, scalar_type(type));
  std::atomic<bool> intact{true};
  for_each(weight.panels(), 1, [&](int64_t i) {
    if (unpack_panel(weight, i, out.mutable_data_ptr(), type) < 0) intact = false;
  });
  STD_TORCH_CHECK(intact, op, ": packed must be intact, got a panel whose bitmap and bytes disagree");
  return out;
}

Tensor check(Tensor packed) {
  static const char* op = "sparse_linear_check";
  const Packed weight = checked(packed, op);
  Header header;
  std::memcpy(&header, weight.data, sizeof(header));
  std::atomic<bool> intact{true};
  std::atomic<int64_t> nonzeros{0};
  for_each(weight.panels(), 1, [&](int64_t i) {
    const int64_t count = unpack_panel(weight, i, nullptr, Float::fp32);
    if (count < 0) intact = false;
    nonzeros += count;
  });
  STD_TORCH_CHECK(intact && nonzeros == header.nonzeros, op, ": packed must be intact, got a panel whose bitmap and bytes disagree");
  Tensor out = torch::stable::empty({8}, ScalarType::Long);
  const int64_t facts[8] = {header.version,
                            static_cast<int64_t>(header.dtype),
                            static_cast<int64_t>(header.layout),
                            header.outputs,
                            header.inputs,
                            nonzeros,
                            header.group_size,
                            header.symmetric};
  std::memcpy(out.mutable_data_ptr(), facts, sizeof(facts));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_cpu_ext, CPU, m) {
  m.impl("sparse_linear_pack", TORCH_BOX(&pack));
  m.impl("sparse_linear_unpack", TORCH_BOX(&unpack));
  m.impl("sparse_linear_check", TORCH_BOX(&check));
}

}  // namespace tce::sparse_linear
