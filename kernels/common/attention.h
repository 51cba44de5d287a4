// Attention of a few queries over some tokens of one key-value head: the one loop for every way to keep keys and values.
#pragma once

#include <cstdint>

#include "kv_block.h"

namespace tce {

// The queries of one key-value head, and some of its tokens. Several stretches of the same queries are joined afterwards.
struct Stretch {
  int64_t rows, dim;            // rows: queries; dim: a multiple of 16
  int64_t begin, end;           // tokens, in the first and the last block with others before and after them
  const int64_t *first, *last;  // [rows]: the tokens each query sees, [first, last), inside of the stretch or not
  float scale, cap;             // a score is scale times the product of query and key; where cap is not 0, cap * tanh(that / cap)
  float* sums;                  // [rows][dim]: values times exp(score - largest), added up
  float *largest, *total;       // [rows]: the largest score, -inf if none of the tokens is seen; the sum of exp(score - largest)
  const float* bias = nullptr;  // added to the scores in the end: of the tokens from the first block on, whole blocks; or null

  // A part of the queries.
  Stretch part(int64_t row, int64_t count) const {
    return {count, dim, begin, end, first + row, last + row, scale, cap, sums + row * dim, largest + row, total + row, bias};
  }
};

}  // namespace tce
