// sparse_linear: products with packed weights. The packed format and the torch-free interface of the kernels.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "../common/floats.h"
#include "../common/isa.h"
#include "../common/scratch.h"
#include "../common/sizes.h"

namespace tce::sparse_linear {

// The packed format, version 1. One byte array, little endian, the same for every instruction set and thread count.
//
//   Header (64 bytes) | offsets: int64[panels + 1], from the start of the array | zeros to a multiple of 64 | panels | 64 zero bytes
//
// A panel holds 16 outputs (the last may have fewer; the missing ones are zeros) as one sequential stream, read once, front to back:
//
//   panel   chunk 0 | chunk 1 | ... | scales: float[16] (int8 only)
//   chunk   64 inputs k (the last chunk may have fewer), as rows of 16 outputs x g inputs, g = 1 (fp32), 2 (bf16), 4 (int8)
//   row     64 bytes: element (n, k) is number (n % 16) * g + k % g
//
//   dense   chunk = row | row | ...
//   sparse  chunk = a bitmap word of 16 * g bits for each row (least significant bit first) | the nonzero elements, in the same order
//   structured  as sparse; of every m inputs of an output, in order, exactly n are stored, the first zeros among them if need be; m is a
//               power of two up to 64 and divides the inputs. Every m inputs of a panel have 16 * n values, so all places are known
//
// So a whole chunk has 128 bytes of bitmap for 1024 weights in every dtype. int8 codes are stored as code + 128; a zero weight is 128.
// Bitmap and values share one stream because two short streams cost twice the time from DRAM (docs/techniques/sparse_linear.md).
//
// int4 has groups of 32, 64 or 128 inputs that share a scale, and codes from 0 to 15. Inputs are padded to whole chunks of 32:
//
//   panel   group 0 | group 1 | ... (the last may have fewer chunks)
//   group   scales: fp16[16] | what zero is (unless symmetric) | chunk | chunk | ...
//   chunk   32 inputs, as four rows of 16 outputs x 8 inputs: element (n, k) with j = k % 8 is in byte (n % 16) * 4 + j % 4, in the
//           low half where j < 4, else in the high half
//
//   dense   weight = scale * code + minimum;  minimums: fp16[16]; symmetric: weight = scale * (code - 8); a row is 64 bytes
//   sparse  weight = scale * (code - zero);   zeros: uint8[16];   symmetric: zero = 8;
//           chunk = two bitmap words of 64 bits for each row, of its low and of its high halves | for each row the codes that are not
//           zero's, the low ones and the high ones each in order, as many bytes as the more numerous need; missing halves are 0
//
// Padding has the code of zero (dense, not symmetric: code 0); the outputs that only fill a panel have scale, minimum and zero 0.

enum class DType : uint32_t { fp32, bf16, int8, int4 };
enum class Layout : uint32_t { dense, sparse, structured };

constexpr uint64_t kMagic = 0x4c5053'45435401;  // 01 "TCESPL"
constexpr uint32_t kVersion = 1;
constexpr int64_t kPanel = 16, kChunk = 64, kRow = 64, kTail = 64;

struct Header {
  uint64_t magic;
  uint32_t version;
  DType dtype;
  Layout layout;
  uint32_t group_size;  // int4: inputs that share a scale; structured: n; else 0
  int64_t outputs, inputs;
  int64_t bytes;      // of the whole array
  int64_t nonzeros;   // weights that are not zero
  int64_t symmetric;  // int4: 1 if zero is always code 8; structured: m; else 0
};
static_assert(sizeof(Header) == 64);

// Inputs in a row of 64 bytes.
constexpr int64_t group_of(DType dtype) { return int64_t{1} << static_cast<int>(dtype); }
constexpr int64_t chunk_of(DType dtype) { return dtype == DType::int4 ? 32 : kChunk; }
constexpr bool has_codes(DType dtype) { return dtype == DType::int8 || dtype == DType::int4; }
constexpr int64_t panel_tail(DType dtype) { return dtype == DType::int8 ? kPanel * 4 : 0; }

// Of the structured layout: n of every m consecutive inputs of an output are stored.
struct Pattern {
  int64_t n = 0, m = 0;

  // A block is the fewest rows that hold whole groups of m inputs, hence equally many values.
  constexpr int64_t block_rows(DType dtype) const { return divide_up(m, group_of(dtype)); }
  constexpr int64_t block_values(DType dtype) const { return kPanel * n * divide_up(group_of(dtype), m); }
};

// How the panels of a packed weight are written.
struct Scheme {
  DType dtype;
  Layout layout;
  int64_t group_size;  // of int4, else 0
  bool symmetric;
  Pattern pattern = {};  // of the structured layout

  // int4: bytes before the chunks of a group.
  int64_t group_head() const { return kPanel * 2 + (symmetric ? 0 : layout == Layout::dense ? kPanel * 2 : kPanel); }
};

// A packed weight whose header and offsets have been checked (see open in format.h).
struct Packed : Scheme {
  const uint8_t* data;
  int64_t outputs, inputs, bytes;

  int64_t panels() const { return divide_up(outputs, kPanel); }
  int64_t rows() const { return divide_up(inputs, group_of(dtype)); }
  int64_t offset(int64_t panel) const {  // the array may be unaligned (a memory-mapped file)
    int64_t value;
    std::memcpy(&value, data + sizeof(Header) + panel * 8, 8);
    return value;
  }
};

// One product: out[m, n] = sum over k of x[m, k] * weight[n, k], plus bias[n].
struct Product {
  Packed weight;
  int64_t m;          // rows of x
  void* x;            // as `prepare` wrote it: [m][padded inputs]
  float* x_scale;     // int8, int4: [m][groups], the value of one step of x
  int32_t* x_offset;  // int8, int4: [m][groups], -128 times the sum of the group's codes: takes the 128 in int8 weights back out
  int64_t x_group;    // int8, int4: inputs that share a scale, 32 or 64; 32 for int4
  const float* bias;  // [outputs], or null
  void* out;          // [m][outputs]
  Float out_type;
  int64_t stream_rows = 0;  // rows of x up to which panels are streamed, see `streams`; 0: the built-in number

  int64_t padded_inputs() const { return round_up(weight.inputs, kChunk); }
  int64_t x_groups() const { return divide_up(weight.inputs, x_group); }
};

// Rows that one pass over a panel's stream serves.
constexpr int64_t kStreamRows = 4;

// Whether so many rows of x go through panels in passes of kStreamRows, with all sums in registers, in place of the kernels for many rows,
// which expand pieces of a panel first. The built-in numbers were measured on Zen 4 (docs/techniques/sparse_linear.md); `tune` measures.
inline bool streams(const Packed& weight, int64_t rows, int64_t stream_rows) {
  if (stream_rows == 0) {
    const bool sparse = weight.layout != Layout::dense;
    stream_rows = weight.dtype == DType::int4 ? 16 : weight.dtype == DType::int8 && sparse ? 8 : kStreamRows;
  }
  return rows <= stream_rows;
}

// What an instruction set offers for one dtype.
struct Variant {
  int64_t x_bytes;  // of one element of x after `prepare`
  // Converts rows [begin, end) of the activations `source`, contiguous [m][inputs], to what `run` reads; fills x, x_scale and x_offset.
  void (*prepare)(const Product& product, const void* source, Float source_type, int64_t begin, int64_t end);
  // Computes rows [row_begin, row_end) of x times panels [panel_begin, panel_end). False if a panel's bitmap and bytes disagree; nothing
  // outside the packed array is read even then.
  bool (*run)(const Product& product, int64_t panel_begin, int64_t panel_end, int64_t row_begin, int64_t row_end);
  // Every thread calls it after its last `run` of a product; null where there is nothing to clean up.
  void (*finish)() = nullptr;
};

// The variants there are, by instruction set and dtype. Files that this machine or compiler cannot use are left out of a build.
namespace scalar {
Variant fp32(), bf16(), int8(), int4();
}
namespace avx2 {
TCE_OPTIONAL Variant fp32(), bf16(), int8(), int4();
}
namespace avx512 {
TCE_OPTIONAL Variant fp32(), bf16(), int8(), int4();
}
namespace avx512_vnni {
TCE_OPTIONAL Variant bf16(), int8(), int4();
}
namespace avx512_bf16 {
TCE_OPTIONAL Variant bf16();
}
namespace amx {
TCE_OPTIONAL Variant bf16(), int8(), int4();
}

}  // namespace tce::sparse_linear
