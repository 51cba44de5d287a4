// Keys and values of attention in blocks of 16 tokens: the one layout that all code reading a KV cache shares.
#pragma once

#include <cstdint>

namespace tce {

// A block holds 16 tokens of one KV head as bf16, in rows of 64 bytes, one AVX-512 register each; d is the head's dimension, a multiple
// of 16. Both kinds of block take 32 * d bytes.
//
//   keys    [d / 2][16 tokens][2]   row i:          (token 0: k[2i] k[2i+1])  (token 1: k[2i] k[2i+1])  ...  (token 15: ...)
//   values  [8 pairs][d][2]         row (p, d/16):  (v[0] of tokens 2p, 2p+1)  (v[1] of tokens 2p, 2p+1)  ...  sixteen of them
//
// A product of queries and keys has one token a lane, one of probabilities and values one element of the output a lane. Each 32-bit lane
// holds two neighbours along the sum, as vdpbf16ps wants them, and no sum has to be added up across a register.
constexpr int64_t kBlockTokens = 16, kBlockRow = 64;

// Which of the two a block is: where its elements lie.
enum class Kind { key, value };

constexpr int64_t block_bytes(int64_t head_dim) { return kBlockTokens * head_dim * 2; }
constexpr int64_t block_rows(int64_t head_dim) { return head_dim / 2; }

// Number of an element within its block.
constexpr int64_t key_place(int64_t token, int64_t k) { return k / 2 * (2 * kBlockTokens) + token * 2 + k % 2; }
constexpr int64_t value_place(int64_t token, int64_t k, int64_t head_dim) { return token / 2 * (2 * head_dim) + k * 2 + token % 2; }

}  // namespace tce
