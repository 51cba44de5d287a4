// Packing, unpacking and checking; plain C++ for every machine.
#pragma once

#include <cmath>

#include "sparse_linear.h"

namespace tce::sparse_linear {

// The header of a packed array of `bytes` bytes.
Header header_of(const Scheme& scheme, int64_t outputs, int64_t inputs, int64_t bytes, int64_t nonzeros);

// Checks the header and the offsets of a packed array and fills `out`. Returns null, or what is wrong.
const char* open(const uint8_t* data, int64_t bytes, Packed& out);

// A dense weight to pack: contiguous [outputs][inputs]; and, if they are given, the grids its codes lie on, as floats. At any address.
struct Dense {
  const void* data;
  Float type;
  int64_t outputs, inputs;
  const void* scale = nullptr;    // int8: [outputs]; int4: [outputs][groups]
  const void* minimum = nullptr;  // int4, not symmetric: [outputs][groups], the value of code 0
};

// What a value is multiplied by to get its code. Zero for a zero of either sign, and for a scale so small that its inverse overflows: all
// codes of that grid are zero.
inline float inverse_of(float scale) {
  const float inverse = 1 / scale;
  return std::isfinite(inverse) ? inverse : 0.0f;
}

// What packing finds out about a panel before it writes it.
struct PanelPlan {
  int64_t nonzeros;  // elements that are not zero once rounded
  int64_t bytes;
  bool representable;   // false: int8 and int4 cannot hold infinities and NaN, int4 no scale beyond fp16
  int64_t misfit = -1;  // structured: the first output with more nonzeros than the pattern has places
};
PanelPlan plan_panel(const Dense& weight, const Scheme& scheme, int64_t panel);
void write_panel(const Dense& weight, const Scheme& scheme, int64_t panel, uint8_t* out);

// Writes the outputs of a panel to a dense [outputs][inputs] array. Returns the panel's weights that are not zero, or -1 if its bitmap and
// bytes disagree. With `out` null it only checks.
int64_t unpack_panel(const Packed& weight, int64_t panel, void* out, Float out_type);

// The same for int4, in format_int4.cpp.
PanelPlan plan_panel_int4(const Dense& weight, const Scheme& scheme, int64_t panel);
void write_panel_int4(const Dense& weight, const Scheme& scheme, int64_t panel, uint8_t* out);
int64_t unpack_panel_int4(const Packed& weight, int64_t panel, void* out, Float out_type);

}  // namespace tce::sparse_linear
