// What a fused decoder does between the products with packed weights: the torch-free interface. All arrays are fp32 unless said.
#pragma once

#include <cstdint>

#include "../common/floats.h"
#include "../common/isa.h"
#include "../common/kv_block.h"

namespace tce::sparse_linear {

// Tokens that one item of attention takes; a constant, so that results do not depend on the number of threads.
constexpr int64_t kSplit = 128;

enum class Gate { silu, gelu_tanh };

// Attention of a few queries of one key-value head over one split of the tokens.
struct Attention {
  const float* query;             // [rows][dim], scaled
  const uint16_t *keys, *values;  // the head's blocks, see common/kv_block.h
  int64_t rows, dim;              // dim: a multiple of 16
  int64_t begin, end;             // tokens of the split; begin is a multiple of kBlockTokens
  const int64_t *first, *last;    // of each row: the tokens it sees, [first, last)
  float* out;                     // [rows][dim]: sums of values with weights exp(score - maximum)
  float *maximum, *sum;           // [rows]: the largest score, -inf if the row sees none of these tokens, and the sum of weights
};

// What an instruction set offers.
struct Steps {
  // out = x / sqrt(mean(x^2) + epsilon) * weight
  void (*rms_norm)(const float* x, const float* weight, float epsilon, int64_t n, float* out);
  // Rotates the pairs (i, i + dim / 2) of one head by the angles whose cosines and sines are given, [dim / 2].
  void (*rotate)(float* x, const float* cos, const float* sin, int64_t dim);
  void (*attend)(const Attention& item);
  // Joins the splits of one row: out, maximum and sum of split i lie i * stride rows further on.
  void (*merge)(const float* out, const float* maximum, const float* sum, int64_t splits, int64_t stride, int64_t dim, float* result);
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
