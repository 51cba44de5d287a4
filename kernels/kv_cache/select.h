// Signatures, and the choice of the tokens to keep: the torch-free interface of the kernels.
//
// Scores are compared as integers of the same order ("keys"), in which -0 is 0 and NaN lies below all numbers. What is among the largest
// is said by a Threshold, found digit by digit of the keys with histograms; nothing is sorted by score.
#pragma once

#include "kv_cache.h"

namespace tce::kv_cache {

// Units that are handled at once, and whose bits make one word of a bitmap.
constexpr int64_t kBlock = 64;

// The largest of some scores: those with a key above `key`, and those with this key at positions before `cut`.
struct Threshold {
  int32_t key;
  int64_t cut;
};

// Signatures of one row. Bit s * page + t % page of unit t / page, counted from the lowest bit of the unit's first word, is that of head s
// and token t:
//
//   page 1, 40 heads:   token 0 [ heads 0 .. 39, 24 zeros ]   token 1 [ heads 0 .. 39, 24 zeros ]   ...
//   page 16, 3 heads:   tokens 0 .. 15 [ head 0: 16 bits | head 1: 16 bits | head 2: 16 bits | 16 zeros ]   ...
struct Signatures {
  const float* score;  // (heads, tokens)
  int64_t heads, tokens;
  int64_t begin, end;  // tokens outside have no bits; 0 <= begin, end <= tokens
  int64_t page;
  const Threshold* thresholds;  // of the heads
  uint64_t* words;              // (units(), words_each())

  int64_t units() const { return divide_up(tokens, page); }
  int64_t words_each() const { return divide_up(heads * page, 64); }
};

using Word = uint64_t __attribute__((aligned(1)));  // of a tensor, which may begin at any address

enum class Anchor { random, zeros, ones, mean, inv_mean, alternate };

// The order of the evictable units [begin, end) by the distances to the anchors, then by position.
struct Order {
  const Word* signature;  // (units, words), from unit 0
  int64_t words;
  int64_t begin, end;
  Anchor anchor;
  int64_t anchors;
  uint64_t seed;
  uint8_t* scratch;  // order_bytes()
  uint32_t* order;   // which unit (less begin) is at each place of the order
  uint32_t* rank;    // at which place of the order each unit is

  int64_t size() const { return end - begin; }
};

inline int64_t order_bytes(int64_t size, int64_t words) { return round_up(words * 8 + 4 * (64 * words + 1) * 4 + size * 6, 64); }

// One KV head's choice. Bitmaps are over the evictable units.
struct Choice {
  const float* score;  // from unit 0
  int64_t first, length;
  int64_t begin, end;  // evictable units
  bool all;            // nothing is dropped; what follows is not used then, but for the results
  int64_t important, representatives;
  Threshold threshold;  // of the important ones
  const uint32_t *order, *rank;
  uint8_t* scratch;  // choice_bytes()
  int64_t most;
  int32_t* index;
  int64_t* count;
  uint8_t* kind;
  float* members;
};

inline int64_t choice_bytes(int64_t size, int64_t important, int64_t representatives) {
  return round_up(divide_up(size, kBlock) * 20 + (important + 2 * representatives + 8) * 4, 64);
}

struct SelectVariant {
  // Of the `count` largest of score[begin .. end).
  Threshold (*threshold)(const float* score, int64_t begin, int64_t end, int64_t count);
  // Words of the units from `from` to `to`.
  void (*sign)(const Signatures& signatures, int64_t from, int64_t to);
  void (*order)(const Order& order);
  void (*choose)(const Choice& choice);
};

// Signatures of all rows, in parallel, as the op kv_cache_sign has them (in binding_select.cpp, for other bindings). begin and end are
// those of each row, score is (batch, heads, tokens), words (batch, units, words of a unit); the caller has checked them.
void sign(const float* score, int64_t batch, int64_t heads, int64_t tokens, const int64_t* begin, const int64_t* end, int64_t page,
          uint64_t* words);

namespace scalar {
SelectVariant select();
}
namespace avx2 {
TCE_OPTIONAL SelectVariant select();
}
namespace avx512 {
TCE_OPTIONAL SelectVariant select();
}
namespace avx512_vnni {
TCE_OPTIONAL SelectVariant select();
}

}  // namespace tce::kv_cache
