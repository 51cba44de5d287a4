// The ops of sparse_linear: checks, allocation, split of the work.
#include "../common/binding.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "format.h"

namespace tce::sparse_linear {
namespace {

// With fewer rows of x, memory is the limit, and the AVX-512 kernels that keep all sums in registers do with less work.
constexpr int64_t kTileLeastRows = 5;

const Kernel<Variant> kFp32{"fp32", {{Isa::scalar, scalar::fp32}, {Isa::avx2, avx2::fp32}, {Isa::avx512, avx512::fp32}}};
const Kernel<Variant> kBf16{"bf16",
                            {{Isa::scalar, scalar::bf16},
                             {Isa::avx2, avx2::bf16},
                             {Isa::avx512, avx512::bf16},
                             {Isa::avx512_vnni, avx512_vnni::bf16},
                             {Isa::avx512_bf16, bf16_dot_pays() ? avx512_bf16::bf16 : nullptr},
                             {Isa::amx, amx::bf16, kTileLeastRows}}};
const Kernel<Variant> kInt8{"int8",
                            {{Isa::scalar, scalar::int8},
                             {Isa::avx2, avx2::int8},
                             {Isa::avx512, avx512::int8},
                             {Isa::avx512_vnni, avx512_vnni::int8},
                             {Isa::amx, amx::int8, kTileLeastRows}}};

const Variant& variant(DType dtype, int64_t rows) {
  return (dtype == DType::fp32 ? kFp32 : dtype == DType::bf16 ? kBf16 : kInt8).get(rows);
}

// Rows of x that one pass over the weights serves: their sums and 256 inputs of each stay in the second-level cache.
constexpr int64_t kRowTile = 512;
// Work is counted in bytes of weights times passes of eight rows. Below this much, waking a second thread costs more than it brings (0.7 us
// against 25 GB/s).
constexpr int64_t kSerialWork = 32 << 10;
// Threads take parts of a weight as they get done with the last one, since the machine rarely serves all of them equally. Parts are long
// enough for the hardware prefetcher and short enough for all threads to end together.
constexpr int64_t kPartWork = 64 << 10, kPartsPerThread = 32;

// Calls f(index) for 0 <= index < count, in parallel.
template <typename F>
void for_each(int64_t count, int64_t grain, const F& f) {
  parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// The same, on at most `threads` threads, each of which takes the next index when it is done with its last, and calls finish() in the end.
template <typename F, typename Finish>
void for_each_dynamic(int64_t count, int64_t threads, const F& f, const Finish& finish) {
  if (threads == 1 || count == 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return finish();
  }
  std::atomic<int64_t> next{0};
  parallel_for(0, std::min(threads, count), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) f(i);
    finish();
  });
}

Packed checked(const Tensor& packed, const char* op) {
  STD_TORCH_CHECK(packed.dim() == 1 && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() && packed.is_cpu(), op,
                  ": packed must be a contiguous 1-D uint8 CPU tensor, as sparse_linear_pack makes it, got ", packed.dim(), "-D ",
                  torch::headeronly::toString(packed.scalar_type()));
  Packed weight;
  const char* problem = open(static_cast<const uint8_t*>(packed.const_data_ptr()), packed.numel(), weight);
  STD_TORCH_CHECK(!problem, op, ": packed must be intact, got ", problem);
  return weight;
}

void check_shape(const Packed& weight, int64_t outputs, int64_t inputs, const char* op) {
  STD_TORCH_CHECK(weight.outputs == outputs && weight.inputs == inputs, op, ": packed must hold ", outputs, " x ", inputs,
                  " (out_features x in_features), got ", weight.outputs, " x ", weight.inputs);
}

DType dtype_of(const std::string& name, const char* op) {
  STD_TORCH_CHECK(name == "fp32" || name == "bf16" || name == "int8", op, ": dtype must be fp32, bf16 or int8, got ", name);
  return name == "fp32" ? DType::fp32 : name == "bf16" ? DType::bf16 : DType::int8;
}

// First panel of part i of n: parts hold equally many bytes, not equally many panels. An even number, since kernels like pairs.
int64_t cut(const Packed& weight, int64_t i, int64_t n) {
  if (i == 0 || i == n) return i == 0 ? 0 : weight.panels();
  const int64_t first = weight.offset(0), wanted = first + (weight.offset(weight.panels()) - first) / n * i;
  int64_t low = 0, high = weight.panels();
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (weight.offset(middle) < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low / 2 * 2;
}

Tensor forward(Tensor input, Tensor packed, std::optional<Tensor> bias, int64_t out_features, int64_t activation_group) {
  static const char* op = "sparse_linear";
  const Float type = float_type(input, op, "input");
  STD_TORCH_CHECK(input.dim() >= 1, op, ": input must have at least one dimension, got a scalar");
  STD_TORCH_CHECK(activation_group == 32 || activation_group == 64, op, ": activation_group must be 32 or 64, got ", activation_group);
  const Packed weight = checked(packed, op);
  const int64_t k = input.size(input.dim() - 1);
  check_shape(weight, out_features, k, op);
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out_features, op, ": bias must be 1-D with ", out_features, " elements, got ",
                    bias->dim(), "-D with ", bias->numel());
  }
  const Float bias_type = bias ? float_type(*bias, op, "bias") : Float::fp32;

  std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  shape.back() = out_features;
  Tensor out = torch::stable::new_empty(input, shape);
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < input.dim(); ++i) m *= input.size(i);
  if (m == 0 || out_features == 0) return out;
  input = torch::stable::contiguous(input);
  if (bias) bias = torch::stable::contiguous(*bias);

  const Variant& kernel = variant(weight.dtype, m);
  Product p{weight, m, nullptr, nullptr, nullptr, activation_group, nullptr, out.mutable_data_ptr(), type};
  const bool scaled = weight.dtype == DType::int8;
  const bool cast_bias = bias && (bias_type != Float::fp32 || reinterpret_cast<uintptr_t>(bias->const_data_ptr()) % 4 != 0);
  // Rows that need neither conversion nor padding are read where they are.
  const void* source = input.const_data_ptr();
  const bool as_is = weight.dtype == (type == Float::fp32 ? DType::fp32 : DType::bf16) && kernel.x_bytes == (type == Float::fp32 ? 4 : 2) &&
                     type != Float::fp16 && k == p.padded_inputs() && reinterpret_cast<uintptr_t>(source) % 4 == 0;
  const int64_t x_bytes = as_is ? 0 : round_up(m * p.padded_inputs() * kernel.x_bytes, 64), groups = scaled ? m * p.x_groups() : 0;
  const Scratch scratch(x_bytes + groups * 8 + (cast_bias ? out_features * 4 : 0));
  p.x = as_is ? const_cast<void*>(source) : scratch.get();  // only `prepare` writes to it
  p.x_scale = reinterpret_cast<float*>(scratch.get() + x_bytes);
  p.x_offset = reinterpret_cast<int32_t*>(p.x_scale + groups);
  if (bias && !cast_bias) p.bias = static_cast<const float*>(bias->const_data_ptr());
  if (cast_bias) {
    float* values = p.x_scale + 2 * groups;
    for (int64_t n = 0; n < out_features; ++n) values[n] = load_float(bias->const_data_ptr(), bias_type, n);
    p.bias = values;
  }

  const int64_t grain = std::max<int64_t>(1, (16 << 10) / std::max<int64_t>(1, k));
  if (as_is) {
    // nothing to prepare
  } else if (m <= grain) {
    kernel.prepare(p, source, type, 0, m);
  } else {
    parallel_for(0, m, grain, [&](int64_t begin, int64_t end) { kernel.prepare(p, source, type, begin, end); });
  }

  std::atomic<bool> intact{true};
  const int64_t tiles = divide_up(m, kRowTile);
  const int64_t work = weight.bytes * divide_up(m, 8), threads = work < kSerialWork ? 1 : torch::stable::get_num_threads();
  const int64_t parts = threads == 1 ? 1 : std::min({divide_up(weight.panels(), 2), threads * kPartsPerThread, divide_up(work, kPartWork)});
  const auto run = [&](int64_t item) {
    const int64_t part = item / tiles, row = item % tiles * kRowTile;
    if (!kernel.run(p, cut(weight, part, parts), cut(weight, part + 1, parts), row, std::min(row + kRowTile, m))) intact = false;
  };
  for_each_dynamic(parts * tiles, threads, run, [&] {
    if (kernel.finish) kernel.finish();
  });
  STD_TORCH_CHECK(intact, op, ": packed must be intact, got a panel whose bitmap and bytes disagree");
  return out;
}

Tensor pack(Tensor weight, std::string dtype_name, std::string layout_name) {
  static const char* op = "sparse_linear_pack";
  const Float type = float_type(weight, op, "weight");
  STD_TORCH_CHECK(weight.dim() == 2, op, ": weight must be 2-D (out_features, in_features), got ", weight.dim(), "-D");
  const DType dtype = dtype_of(dtype_name, op);
  STD_TORCH_CHECK(layout_name == "auto" || layout_name == "sparse" || layout_name == "dense", op,
                  ": layout must be auto, sparse or dense, got ", layout_name);
  weight = torch::stable::contiguous(weight);
  const Dense dense{weight.const_data_ptr(), type, weight.size(0), weight.size(1)};
  const int64_t panels = divide_up(dense.outputs, kPanel);

  std::vector<PanelPlan> plans(panels);
  for_each(panels, 1, [&](int64_t i) { plans[i] = plan_panel(dense, dtype, i); });
  int64_t nonzeros = 0, bytes[2] = {0, 0};
  for (const PanelPlan& plan : plans) {
    STD_TORCH_CHECK(plan.finite, op, ": weight must be finite to be packed as int8, got NaN or an infinity");
    nonzeros += plan.nonzeros;
    for (Layout layout : {Layout::dense, Layout::sparse})
      bytes[static_cast<int>(layout)] += panel_bytes(dtype, layout, dense.inputs, plan.nonzeros);
  }
  const Layout layout = layout_name == "dense"    ? Layout::dense
                        : layout_name == "sparse" ? Layout::sparse
                        : bytes[1] < bytes[0]     ? Layout::sparse
                                                  : Layout::dense;

  const int64_t first = round_up(sizeof(Header) + (panels + 1) * 8, 64), total = first + bytes[static_cast<int>(layout)] + kTail;
  Tensor packed = torch::stable::empty({total}, ScalarType::Byte);
  uint8_t* data = static_cast<uint8_t*>(packed.mutable_data_ptr());
  std::memset(data, 0, first);
  std::memset(data + total - kTail, 0, kTail);
  const Header header{kMagic, kVersion, dtype, layout, 0, dense.outputs, dense.inputs, total, nonzeros, 0};
  std::memcpy(data, &header, sizeof(header));
  std::vector<int64_t> offsets{first};
  for (const PanelPlan& plan : plans) offsets.push_back(offsets.back() + panel_bytes(dtype, layout, dense.inputs, plan.nonzeros));
  std::memcpy(data + sizeof(header), offsets.data(), offsets.size() * 8);
  for_each(panels, 1, [&](int64_t i) { write_panel(dense, dtype, layout, i, plans[i], data + offsets[i]); });
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
  Tensor out = torch::stable::empty({6}, ScalarType::Long);
  const int64_t facts[6] = {
      header.version, static_cast<int64_t>(header.dtype), static_cast<int64_t>(header.layout), header.outputs, header.inputs, nonzeros};
  std::memcpy(out.mutable_data_ptr(), facts, sizeof(facts));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_cpu_ext, CPU, m) {
  m.impl("sparse_linear", TORCH_BOX(&forward));
  m.impl("sparse_linear_pack", TORCH_BOX(&pack));
  m.impl("sparse_linear_unpack", TORCH_BOX(&unpack));
  m.impl("sparse_linear_check", TORCH_BOX(&check));
}

}  // namespace tce::sparse_linear
