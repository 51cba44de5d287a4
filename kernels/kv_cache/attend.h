// Pages of keys and values, and attention of a few queries over them: the formats and the torch-free interface of the kernels.
#pragma once

#include "kv_cache.h"

namespace tce::kv_cache {

// A page holds 16 tokens of one KV head, in rows of 64 bytes; d is the head's dimension, a multiple of 16. A row has 16 lanes: of keys, a
// lane is a token, of values, an element of the output. A lane holds neighbours along the sum, so that none is needed across a register.
//
//   fp32   keys    [d][16 tokens]                      values  [16 tokens][d]
//   bf16   keys    [d / 2][16 tokens][2]               values  [8 pairs][d][2]           (common/kv_block.h)
//   int8   keys    [d / 4][16 tokens][4] | grid        values  [4 quads][d][4] | grid
//   int4   keys    [d / 8][16 tokens][8 halves] | grid values  [2 eights][d][8 halves] | grid
//
//   sparse keys and values as sparse_linear/attention.h draws them: a bitmap word for each row of bf16, then the elements that are not zero
//
// x = scale * code + minimum, codes from 0 to 255 or 15. The grid is the scales, then the minimums, as float16: of the 16 tokens, or, for
// int4 keys, of the d elements. The halves of a lane of int4, from the lowest bits on, are numbers 0 2 4 6 1 3 5 7 of the eight along the
// sum, so that a shift by 4 r brings numbers 2 r and 2 r + 1 to the lowest bits of the lane's two 16-bit words.
enum class PageType { fp32, bf16, int8, int4, sparse };

constexpr int64_t kPageTokens = kBlockTokens, kLaneCount = 16, kRowBytes = kBlockRow;

constexpr bool has_grid(PageType type) { return type == PageType::int8 || type == PageType::int4; }
// Bytes of the rows of a page, not of a sparse one: its grid starts there.
constexpr int64_t rows_bytes(PageType type, int64_t dim) { return kPageTokens * dim * 4 >> static_cast<int>(type); }
// Groups of numbers with a scale and a minimum of their own.
constexpr int64_t grid_groups(PageType type, Kind kind, int64_t dim) {
  return !has_grid(type) ? 0 : type == PageType::int4 && kind == Kind::key ? dim : kPageTokens;
}
constexpr int64_t page_bytes(PageType type, Kind kind, int64_t dim) { return rows_bytes(type, dim) + 4 * grid_groups(type, kind, dim); }

// Whether sparse pages of vectors of d elements can have this size.
constexpr bool valid_sparse_bytes(int64_t bytes, int64_t dim) {
  return bytes >= 2 * dim + 32 && bytes < block_bytes(dim) && (bytes - 2 * dim) % 32 == 0;
}

// 16 tokens of `dim` elements to a page and back; x is contiguous, at any address. read_page writes floats for fp32, else bf16;
// it is false if the bitmap of a sparse page does not fit its size. Sparse pages are not written here.
void write_page(const void* x, Float float_type, int64_t dim, Kind kind, PageType type, uint8_t* page);
bool read_page(const uint8_t* page, int64_t bytes, int64_t dim, Kind kind, PageType type, void* x);
// One token into a slot of a page of fp32 or bf16.
void write_token(const void* x, Float float_type, int64_t dim, Kind kind, PageType type, int64_t slot, uint8_t* page);

// Some of the tokens of all heads: pages of one kind each for keys and values, found by a table.
struct Pool {
  const uint8_t *k, *v;
  PageType k_type, v_type;
  int64_t k_bytes, v_bytes;  // of a page
  int64_t heads;             // 1, or all KV heads: a page of the pool has `heads` of those above
  const int32_t* table;      // [batch][heads == 1 ? KV heads : 1][width]
  int64_t width;
  const int64_t* length;  // [batch][KV heads]
  const float* bias;      // [batch][KV heads][16 * width], or null

  const int32_t* line(int64_t head, int64_t kv_heads) const { return table + (heads == 1 ? head : head / kv_heads) * width; }
  int64_t place(int64_t page, int64_t head, int64_t kv_heads) const { return heads == 1 ? page : page * heads + head % kv_heads; }
};

// Tokens one work item takes at most; long parts read memory faster, and short ones share the work of short heads. Chosen by the tokens of
// the head alone, so that results do not depend on the number of threads.
constexpr int64_t kPartTokens = 1024;
constexpr int64_t part_tokens(int64_t tokens) { return tokens < 8 * kPartTokens ? kPartTokens / 2 : kPartTokens; }

// Tokens [begin, end) of one head in one pool.
struct Part {
  int64_t head, pool, begin, end;
  int64_t before;  // tokens of the head in earlier pools
  int64_t slot;    // of token 0 of the pool among the slots of all pools
};

struct Attention {
  int64_t kv_heads, dim;
  int64_t rows, length;  // rows: query heads that share a KV head, times length; row r is the query of the r % length-th new token
  float scale, cap;
  const Pool* pools;
  const Part* parts;
  const int64_t *first_part, *tokens;  // [heads + 1], [heads]: parts of a head, and its tokens in all pools
  const void* q;                       // [heads][rows][dim]
  Float q_type;                        // of q and out
  float* sums;                         // [parts][rows][dim]
  float *largest, *total;              // [parts][rows]
  float* scores;                       // [parts][rows][kPartTokens]; null unless mass is wanted
  void* out;                           // [heads][rows][dim]
  float* lse;                          // [heads][rows]
  float* mass;                         // [heads][slots], zeros before; null if not wanted
  int64_t slots;
};

struct AttendVariant {
  // False if the bitmap of a sparse page does not fit its size; nothing outside the page is read even then.
  bool (*part)(const Attention& attention, int64_t part);
  // Joins the parts of a head.
  void (*join)(const Attention& attention, int64_t head);
};

namespace scalar {
AttendVariant attend();
}
namespace avx2 {
TCE_OPTIONAL AttendVariant attend();
}
namespace avx512 {
TCE_OPTIONAL AttendVariant attend();
}
namespace avx512_vnni {
TCE_OPTIONAL AttendVariant attend();
}
namespace avx512_bf16 {
TCE_OPTIONAL AttendVariant attend();
}

}  // namespace tce::kv_cache
