// Attention of a prompt, with the scores of its tokens: the torch-free interface of the kernels.
//
// Keys and values are first packed into blocks of 16 tokens, counted from the first live token of their head, so that padding changes
// nothing: blocks of common/kv_block.h where pairs of bf16 are multiplied, else floats, keys [d][16 tokens] and values [16 tokens][d].
// Then a tile of queries, all those of one KV head at a few neighbouring positions, goes through the tokens it sees, a stretch of them at
// a time: products, softmax with the largest score so far, weighted values. Scores of tokens are made in a third step, again from products
// and from what the softmax of each query added up to. Every step consists of independent parts, each done in a fixed order.
#pragma once

#include "kv_cache.h"

namespace tce::kv_cache {

// The vectors of a tensor (batch, heads, tokens, d); strides in elements, those of a vector lie side by side.
struct Vectors {
  const void* data;
  int64_t batch_stride, head_stride, token_stride;
};

constexpr int64_t kTileRows = 64;      // queries of a tile, all heads of the group together, unless a single position has more
constexpr int64_t kPackBlocks = 16;    // blocks that are packed at a time
constexpr int64_t kScoreTokens = 512;  // tokens whose scores are made at a time

// The live part of a KV head: `tokens` from `first` on, the last `queries` of which have a query; `skipped` queries are of padding.
struct Live {
  int64_t first, tokens, queries, skipped;

  int64_t position(int64_t query) const { return tokens - queries + query; }
};

struct Prompt {
  int64_t batch, kv_heads, group, length, tokens, head_dim;
  float scale, cap;  // as in common/attention.h
  Float type;        // of q, k, v and out
  Vectors q, k, v;
  const int64_t* first;    // [batch * kv_heads], or null
  const float* bias;       // [batch * kv_heads][tokens], or null
  int64_t window, sample;  // which queries make scores; at most one of the two is not 0
  int64_t pool;

  // Packed, for each KV head `blocks` of them.
  uint8_t *keys, *values;
  float* biases;  // null where there is no bias

  void* out;     // [batch][kv_heads * group][length][head_dim]
  float* lse;    // [batch][kv_heads * group][length]
  float* sums;   // [batch][kv_heads * group][tokens]: scores before pooling; where pool is 1, the same as
  float* score;  // [batch][kv_heads * group][tokens], or null

  int64_t heads() const { return batch * kv_heads; }
  int64_t blocks() const { return divide_up(tokens, kBlockTokens); }
  int64_t tile_positions() const { return std::max<int64_t>(1, kTileRows / group); }
  int64_t tiles() const { return std::max<int64_t>(1, divide_up(length, tile_positions())); }
  Live live(int64_t head) const {
    const int64_t begin = first ? first[head] : 0, n = tokens - begin, queries = std::min(length, n);
    return {begin, n, queries, length - queries};
  }
};

struct PrefillVariant {
  int64_t element;                                          // bytes of an element of the blocks
  void (*pack)(const Prompt&, int64_t head, int64_t part);  // kPackBlocks blocks
  void (*attend)(const Prompt&, int64_t head, int64_t tile);
  void (*score)(const Prompt&, int64_t head, int64_t part);  // sums of kScoreTokens tokens
  void (*pool)(const Prompt&, int64_t query_head);           // from sums to score
};

namespace scalar {
PrefillVariant prefill();
}
namespace avx2 {
TCE_OPTIONAL PrefillVariant prefill();
}
namespace avx512 {
TCE_OPTIONAL PrefillVariant prefill();
}
namespace avx512_bf16 {
TCE_OPTIONAL PrefillVariant prefill();
}

}  // namespace tce::kv_cache
