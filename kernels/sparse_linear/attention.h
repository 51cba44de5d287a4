// Decode attention over pages of pruned keys and values: the page format and the torch-free interface of the kernels.
#pragma once

#include <algorithm>

#include "../common/attention.h"
#include "sparse_linear.h"

namespace tce::sparse_linear {

// A page is a block of common/kv_block.h, whole or pruned. All pages of one tensor have the same size, so they need no offsets:
//
//   dense   the block, 32 * d bytes
//   sparse  a bitmap word of 32 bits for each row of 64 bytes (least significant bit first) | the kept elements, in the order of the bits
//
// The rows of a sparse page are those of the block. Rows of keys stand in the block's order; rows of values are ordered by their sixteen
// elements first, then by token pairs, [d / 16][8 pairs][16][2], so that the sums of sixteen elements stay in registers for all tokens.
//
// Of each token's vector the `keep` elements of largest magnitude are kept (among equals, those of lower index), so a sparse page has
// 2 * d + 32 * keep bytes. Where that is no less than the block, the page is dense, with zeros in place of what was pruned.
constexpr int64_t sparse_page_bytes(int64_t head_dim, int64_t keep) { return 2 * head_dim + 32 * keep; }
constexpr int64_t page_bytes(int64_t head_dim, int64_t keep) { return std::min(sparse_page_bytes(head_dim, keep), block_bytes(head_dim)); }
// Whether pages of this size can hold vectors of d elements.
constexpr bool valid_page_bytes(int64_t bytes, int64_t head_dim) {
  return bytes == block_bytes(head_dim) || (bytes >= sparse_page_bytes(head_dim, 1) && bytes < block_bytes(head_dim) && bytes % 32 == 0);
}

// Prunes 16 vectors of d elements to a page.
void write_page(const void* x, Float type, int64_t head_dim, Kind kind, int64_t keep, uint8_t* page);
// The vectors of a page as bf16; false if its bitmap does not fit its size.
bool read_page(const uint8_t* page, int64_t bytes, int64_t head_dim, Kind kind, uint16_t* x);

// The keys or the values of all heads: pages, and dense blocks after them. Strides in bytes; those of pages and blocks are their sizes.
struct Blocks {
  const uint8_t* pages;
  int64_t page_bytes, batch_stride, head_stride, count;
  const uint8_t* tail;
  int64_t tail_batch_stride, tail_head_stride;
};

// What is attended of one KV head.
struct Span {
  int64_t first, pages, tail;  // first token attended; pages in use; tokens in the tail
  int64_t tokens() const { return pages * kBlockTokens + tail; }
};

// Tokens one work item takes. Fixed, so that results do not depend on the number of threads.
constexpr int64_t kSplitTokens = 512;

// Attention of `rows` rows of queries for each KV head. Row r is the query of token number tokens - length + r % length.
struct PageAttention {
  int64_t heads, kv_heads, head_dim;  // heads: batch times KV heads
  int64_t rows, length;               // rows: query heads that share a KV head, times length
  float scale;
  Blocks k, v;
  const Span* spans;       // [heads]
  const void* q;           // [heads][rows][d]
  Float q_type;            // of q and out
  int64_t splits;          // of the longest head
  float* sums;             // [heads][splits][rows][d]: sums of probabilities times values, not normalised
  float *largest, *total;  // [heads][splits][rows]: the largest score and the sum of the probabilities
  void* out;               // [heads][rows][d]
  float* lse;              // [heads][rows]
};

struct AttentionVariant {
  // One split of one head. False if the bitmap of a page does not fit its size; nothing outside the pages is read even then.
  bool (*split)(const PageAttention& attention, int64_t head, int64_t split);
  // Joins the splits of a head.
  void (*join)(const PageAttention& attention, int64_t head);
};

namespace scalar {
AttentionVariant attention();
}
namespace avx2 {
TCE_OPTIONAL AttentionVariant attention();
}
namespace avx512 {
TCE_OPTIONAL AttentionVariant attention();
}
namespace avx512_vnni {
TCE_OPTIONAL AttentionVariant attention();
}
namespace avx512_bf16 {
TCE_OPTIONAL AttentionVariant attention();
}

}  // namespace tce::sparse_linear
