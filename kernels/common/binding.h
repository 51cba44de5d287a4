// What every binding.cpp shares. The only header that includes torch, and of torch only the stable ABI, which compiles in a second.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "floats.h"
#include "isa.h"
#include "scratch.h"

namespace tce {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

// Floating-point type of a tensor; the error names the argument.
inline Float float_type(const Tensor& tensor, const char* op, const char* argument) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Float::fp32;
    case ScalarType::BFloat16:
      return Float::bf16;
    case ScalarType::Half:
      return Float::fp16;
    default:
      STD_TORCH_CHECK(false, op, ": ", argument, " must be float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

// The torch type behind the short names fp32, bf16 and fp16.
inline ScalarType scalar_type(Float type) {
  return type == Float::fp32 ? ScalarType::Float : type == Float::bf16 ? ScalarType::BFloat16 : ScalarType::Half;
}

}  // namespace tce

// The loader's hooks: the cap on instruction sets, and which one a kernel would use now (-1: no such kernel). `emulated`: a test stands in
// for AMX.
extern "C" {
__attribute__((visibility("default"), used)) inline void tce_set_isa(int isa, int emulated) {
  constexpr int amx = static_cast<int>(tce::Isa::amx);
  tce::set_isa_cap(isa == amx && !emulated && !tce::amx_works() ? amx - 1 : isa);
}
__attribute__((visibility("default"), used)) inline int tce_kernel_isa(const char* name) {
  const tce::KernelName* kernel = tce::KernelName::find(name);
  return kernel ? static_cast<int>(kernel->isa()) : -1;
}
}
