// What the ops that multiply rows of a tensor with packed weights share: checks of their arguments, and x as the kernels read it.
#pragma once

#include <algorithm>
#include <deque>
#include <vector>

#include "format.h"
#include "work.h"

namespace tce::sparse_linear {

inline Packed checked(const Tensor& packed, const char* op, const char* name = "packed") {
  STD_TORCH_CHECK(packed.dim() == 1 && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() && packed.is_cpu(), op, ": ",
                  name, " must be a contiguous 1-D uint8 CPU tensor, as sparse_linear_pack makes it, got ", packed.dim(), "-D ",
                  torch::headeronly::toString(packed.scalar_type()));
  Packed weight;
  const char* problem = open(static_cast<const uint8_t*>(packed.const_data_ptr()), packed.numel(), weight);
  STD_TORCH_CHECK(!problem, op, ": ", name, " must be intact, got ", problem);
  return weight;
}

inline void check_shape(const Packed& weight, int64_t outputs, int64_t inputs, const char* op, const char* name = "packed") {
  STD_TORCH_CHECK(weight.outputs == outputs && weight.inputs == inputs, op, ": ", name, " must hold ", outputs, " x ", inputs,
                  " (out_features x in_features), got ", weight.outputs, " x ", weight.inputs);
}

// The rows of one tensor, checked, and prepared once for all weights of a dtype.
class Rows {
 public:
  Rows(const char* op, const Tensor& input, int64_t activation_group, int64_t stream_rows)
      : op_(op), type_(float_type(input, op, "input")), x_group_(activation_group), stream_rows_(stream_rows) {
    STD_TORCH_CHECK(input.dim() >= 1, op, ": input must have at least one dimension, got a scalar");
    STD_TORCH_CHECK(activation_group == 32 || activation_group == 64, op, ": activation_group must be 32 or 64, got ", activation_group);
    STD_TORCH_CHECK(stream_rows >= 0, op, ": stream_rows must be 0 or more, got ", stream_rows);
    shape_.assign(input.sizes().begin(), input.sizes().end());
    for (size_t i = 0; i + 1 < shape_.size(); ++i) rows_ *= shape_[i];
    input_ = torch::stable::contiguous(input);
  }

  Float type() const { return type_; }
  int64_t rows() const { return rows_; }

  // An output of so many features, not initialised.
  Tensor output(int64_t features) const {
    std::vector<int64_t> shape = shape_;
    shape.back() = features;
    return torch::stable::new_empty(input_, shape);
  }

  // The product with a packed weight, all of it but x and out, after a look at the arguments. It holds pointers into this object.
  Product product(const Tensor& packed, const std::optional<Tensor>& bias, int64_t outputs, const char* name = "packed",
                  const char* bias_name = "bias") {
    const Packed weight = checked(packed, op_, name);
    check_shape(weight, outputs, shape_.back(), op_, name);
    STD_TORCH_CHECK(weight.dtype != DType::int4 || x_group_ == 32, op_, ": activation_group must be 32 for int4 weights, got ", x_group_);
    return {weight,  rows_, nullptr,     nullptr, nullptr, x_group_, bias ? floats(*bias, outputs, bias_name) : nullptr,
            nullptr, type_, stream_rows_};
  }

  // Points a product to x as the kernel reads it that is returned.
  const Variant& prepare(Product& p) {
    for (const Prepared& one : prepared_) {
      if (one.dtype == p.weight.dtype) {
        p.x = one.x;
        p.x_scale = one.scale;
        p.x_offset = one.offset;
        return *one.kernel;
      }
    }
    // Who gives a number of rows to stream means tiles, too, for the others.
    const int64_t size = stream_rows_ == 0 ? rows_ : streams(p.weight, rows_, stream_rows_) ? kTileLeastRows - 1 : kTileLeastRows;
    const Variant& kernel = variant(p.weight.dtype, size);
    // Rows that need neither conversion nor padding are read where they are.
    const void* source = input_.const_data_ptr();
    const int64_t k = p.weight.inputs, m = rows_;
    const bool as_is = p.weight.dtype == (type_ == Float::fp32 ? DType::fp32 : DType::bf16) &&
                       kernel.x_bytes == (type_ == Float::fp32 ? 4 : 2) && type_ != Float::fp16 && k == p.padded_inputs() &&
                       reinterpret_cast<uintptr_t>(source) % 4 == 0;
    if (as_is) {
      p.x = const_cast<void*>(source);  // only `prepare` writes to it
    } else {
      const int64_t x_bytes = round_up(m * p.padded_inputs() * kernel.x_bytes, 64);
      const int64_t groups = has_codes(p.weight.dtype) ? m * p.x_groups() : 0;
      uint8_t* memory = scratch_.emplace_back(x_bytes + groups * 8).get();
      p.x = memory;
      p.x_scale = reinterpret_cast<float*>(memory + x_bytes);
      p.x_offset = reinterpret_cast<int32_t*>(p.x_scale + groups);
      const int64_t grain = std::max<int64_t>(1, (16 << 10) / std::max<int64_t>(1, k));
      if (m <= grain) {
        kernel.prepare(p, source, type_, 0, m);
      } else {
        parallel_for(0, m, grain, [&](int64_t begin, int64_t end) { kernel.prepare(p, source, type_, begin, end); });
      }
    }
    prepared_.push_back({p.weight.dtype, &kernel, p.x, p.x_scale, p.x_offset});
    return kernel;
  }

  void check_intact(bool intact, const char* name = "packed") const {
    STD_TORCH_CHECK(intact, op_, ": ", name, " must be intact, got a panel whose bitmap and bytes disagree");
  }

 private:
  struct Prepared {
    DType dtype;
    const Variant* kernel;
    void* x;
    float* scale;
    int32_t* offset;
  };

  // A bias as aligned floats.
  const float* floats(const Tensor& bias, int64_t outputs, const char* name) {
    STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == outputs, op_, ": ", name, " must be 1-D with ", outputs, " elements, got ",
                    bias.dim(), "-D with ", bias.numel());
    const Float type = float_type(bias, op_, name);
    const Tensor& values = kept_.emplace_back(torch::stable::contiguous(bias));
    const void* source = values.const_data_ptr();
    if (type == Float::fp32 && reinterpret_cast<uintptr_t>(source) % 4 == 0) return static_cast<const float*>(source);
    float* copy = reinterpret_cast<float*>(scratch_.emplace_back(outputs * 4).get());
    for (int64_t n = 0; n < outputs; ++n) copy[n] = load_float(source, type, n);
    return copy;
  }

  const char* op_;
  Float type_;
  int64_t x_group_, stream_rows_;
  std::vector<int64_t> shape_;
  int64_t rows_ = 1;
  Tensor input_;
  std::deque<Tensor> kept_;
  std::deque<Scratch> scratch_;
  std::vector<Prepared> prepared_;
};

}  // namespace tce::sparse_linear
