// The ops that multiply with packed weights: checks, allocation, split of the work.
#include "../common/binding.h"

#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "products.h"

namespace tce::sparse_linear {
namespace {

// Multiplies the same rows with several weights in one parallel region.
void multiply(Rows& rows, std::vector<Product>& products) {
  std::vector<const Variant*> kernels;
  int64_t work = 0;
  for (Product& p : products) {
    kernels.push_back(&rows.prepare(p));
    work += work_of(p.weight, p.m);
  }
  const int64_t threads = threads_for(work), tiles = divide_up(rows.rows(), kRowTile);
  std::vector<int64_t> first{0};  // item of each product; an item is a part of the panels and a tile of the rows
  for (const Product& p : products) first.push_back(first.back() + parts_of(p.weight, p.m, threads) * tiles);
  std::atomic<bool> intact{true};
  const auto run = [&](int64_t item) {
    size_t i = 0;
    while (item >= first[i + 1]) ++i;
    const Product& p = products[i];
    const int64_t parts = (first[i + 1] - first[i]) / tiles, part = (item - first[i]) / tiles, row = (item - first[i]) % tiles * kRowTile;
    if (!kernels[i]->run(p, cut(p.weight, part, parts), cut(p.weight, part + 1, parts), row, std::min(row + kRowTile, p.m))) intact = false;
  };
  for_each_dynamic(first.back(), threads, run, [&] {
    for (const Variant* kernel : kernels)
      if (kernel->finish) kernel->finish();
  });
  rows.check_intact(intact);
}

Tensor linear(Tensor input, Tensor packed, std::optional<Tensor> bias, int64_t out_features, int64_t activation_group,
              int64_t stream_rows) {
  Rows rows("sparse_linear", input, activation_group, stream_rows);
  std::vector<Product> products{rows.product(packed, bias, out_features)};
  Tensor out = rows.output(out_features);
  if (out.numel() == 0) return out;
  products[0].out = out.mutable_data_ptr();
  multiply(rows, products);
  return out;
}

std::vector<Tensor> group(Tensor input, std::vector<Tensor> packed, std::vector<Tensor> bias, std::vector<int64_t> out_features,
                          int64_t activation_group, int64_t stream_rows) {
  static const char* op = "sparse_linear_group";
  STD_TORCH_CHECK(!packed.empty() && out_features.size() == packed.size() && (bias.empty() || bias.size() == packed.size()), op,
                  ": packed, out_features and bias must be lists of one length, at least 1 (bias: or 0), got ", packed.size(), ", ",
                  out_features.size(), " and ", bias.size());
  Rows rows(op, input, activation_group, stream_rows);
  std::vector<Product> products;
  for (size_t i = 0; i < packed.size(); ++i) {
    products.push_back(rows.product(packed[i], bias.empty() ? std::nullopt : std::optional(bias[i]), out_features[i]));
  }
  std::vector<Tensor> result;
  std::vector<Product> filled;  // those that have an output
  for (size_t i = 0; i < products.size(); ++i) {
    Tensor& out = result.emplace_back(rows.output(out_features[i]));
    if (out.numel() == 0) continue;
    filled.push_back(products[i]);
    filled.back().out = out.mutable_data_ptr();
  }
  if (!filled.empty()) multiply(rows, filled);
  return result;
}

Tensor gated(Tensor input, Tensor gate, Tensor up, std::optional<Tensor> gate_bias, std::optional<Tensor> up_bias, int64_t out_features,
             std::string activation, int64_t activation_group, int64_t stream_rows) {
  static const char* op = "sparse_linear_gated";
  STD_TORCH_CHECK(activation == "silu" || activation == "gelu_tanh", op, ": activation must be silu or gelu_tanh, got ", activation);
  Rows rows(op, input, activation_group, stream_rows);
  Product g = rows.product(gate, gate_bias, out_features, "gate", "gate_bias");
  Product u = rows.product(up, up_bias, out_features, "up", "up_bias");
  Tensor out = rows.output(out_features);
  if (out.numel() == 0) return out;
  const Gate kind = activation == "silu" ? Gate::silu : Gate::gelu_tanh;
  const int64_t m = rows.rows();
  const bool direct = rows.type() == Float::fp32 && reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 4 == 0;
  const Scratch scratch(m * out_features * 4 * (direct ? 1 : 2));
  float* const ups = reinterpret_cast<float*>(scratch.get());
  float* const gates = direct ? static_cast<float*>(out.mutable_data_ptr()) : ups + m * out_features;
  g.out = gates;
  u.out = ups;
  g.out_type = u.out_type = Float::fp32;
  const Variant &gate_kernel = rows.prepare(g), &up_kernel = rows.prepare(u);
  const Steps& steps = kSteps.get();
  void* const target = out.mutable_data_ptr();
  const int64_t threads = threads_for(work_of(g.weight, m) + work_of(u.weight, m)), tiles = divide_up(m, kRowTile);
  const int64_t parts = parts_of(g.weight, m, threads == 1 ? 1 : 2 * threads);  // each is twice the work
  std::atomic<bool> gate_intact{true}, up_intact{true};
  // Each item computes the same outputs of both, so that they are multiplied while they are in the cache.
  const auto run = [&](int64_t item) {
    const int64_t part = item / tiles, begin = item % tiles * kRowTile, end = std::min(begin + kRowTile, m);
    const int64_t first = cut(g.weight, part, parts), last = cut(g.weight, part + 1, parts);
    if (!gate_kernel.run(g, first, last, begin, end)) gate_intact = false;
    if (!up_kernel.run(u, first, last, begin, end)) up_intact = false;
    if (!gate_intact || !up_intact) return;
    const int64_t column = first * kPanel, count = std::min(last * kPanel, out_features) - column;
    for (int64_t row = begin; row < end && count > 0; ++row) {
      const int64_t at = row * out_features + column;
      steps.multiply_gate(gates + at, ups + at, kind, count);
      if (!direct) steps.round(gates + at, rows.type(), at, count, target);
    }
  };
  for_each_dynamic(parts * tiles, threads, run, [&] {
    for (const Variant* kernel : {&gate_kernel, &up_kernel})
      if (kernel->finish) kernel->finish();
  });
  rows.check_intact(gate_intact, "gate");
  rows.check_intact(up_intact, "up");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_cpu_ext, CPU, m) {
  m.impl("sparse_linear", TORCH_BOX(&linear));
  m.impl("sparse_linear_group", TORCH_BOX(&group));
  m.impl("sparse_linear_gated", TORCH_BOX(&gated));
}

}  // namespace tce::sparse_linear
