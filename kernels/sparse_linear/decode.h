// What a fused decoder does between the products with packed weights: the torch-free interface. All arrays are fp32 unless said.
#pragma once

#include <cstdint>

#include "../common/attention.h"
#include "../common/floats.h"
#include "../common/isa.h"

namespace tce::sparse_linear {

// Tokens that one item of attention takes; a constant, so that results do not depend on the number of threads.
constexpr int64_t kSplit = 128;

enum class Gate { silu, gelu_tanh };

// What an instruction set offers.
struct Steps {
  // out = x / sqrt(mean(x^2) + epsilon) * weight
  void (*rms_norm)(const float* x, const float* weight, float epsilon, int64_t n, float* out);
  // Rotates the pairs (i, i + dim / 2) of one head by the angles whose cosines and sines are given, [dim / 2].
  void (*rotate)(float* x, const float* cos, const float* sin, int64_t dim);
  // Queries [rows][dim], and the blocks of their head, finite throughout; a stretch of up to kSplit tokens.
  void (*attend)(const Stretch& stretch, const float* query, const uint16_t* keys, const uint16_t* values);
  // Joins the stretches of one query, see common/attention.inl.
  float (*join)(const float* sums, const float* largest, const float* total, int64_t count, int64_t stride, int64_t dim, float* out);
  // gate = f(gate) * up
  void (*multiply_gate)(float* gate, const float* up, Gate kind, int64_t n);
  void (*add)(float* to, const float* what, int64_t n);
  // Rounds n values to elements [at, at + n) of an array of bf16 or fp16.
  void (*round)(const float* values, Float type, int64_t at, int64_t n, void* out);
};

namespace scalar {
Steps steps();
}
namespace avx2 {
TCE_OPTIONAL Steps steps();
}
namespace avx512 {
TCE_OPTIONAL Steps steps();
}

}  // namespace tce::sparse_linear
