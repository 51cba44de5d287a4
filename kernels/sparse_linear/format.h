// Packing, unpacking and checking; plain C++ for every machine.
#pragma once

#include "sparse_linear.h"

namespace tce::sparse_linear {

// Checks the header and the offsets of a packed array and fills `out`. Returns null, or what is wrong.
const char* open(const uint8_t* data, int64_t bytes, Packed& out);

// A dense weight to pack: contiguous [outputs][inputs].
struct Dense {
  const void* data;
  Float type;
  int64_t outputs, inputs;
};

// What packing finds out about a panel before it writes it.
struct PanelPlan {
  float scale[kPanel];  // int8: value of one step, for each output
  int64_t nonzeros;     // elements that are not zero once rounded to the dtype
  bool finite;          // int8 cannot hold infinities and NaN
};
PanelPlan plan_panel(const Dense& weight, DType dtype, int64_t panel);

int64_t panel_bytes(DType dtype, Layout layout, int64_t inputs, int64_t nonzeros);
void write_panel(const Dense& weight, DType dtype, Layout layout, int64_t panel, const PanelPlan& plan, uint8_t* out);

// Writes the outputs of a panel to a dense [outputs][inputs] array. Returns the panel's weights that are not zero, or -1 if its bitmap and
// bytes disagree. With `out` null it only checks.
int64_t unpack_panel(const Packed& weight, int64_t panel, void* out, Float out_type);

}  // namespace tce::sparse_linear
