// Pages of pruned keys and values: writing and reading them. Plain C++; each token is written once.
#include <bit>
#include <memory>

#include "attention.h"

namespace tce::sparse_linear {
namespace {

// Number of an element within a page.
int64_t place(Kind kind, bool dense, int64_t token, int64_t k, int64_t head_dim) {
  if (kind == Kind::key) return key_place(token, k);
  if (dense) return value_place(token, k, head_dim);
  return (k / 16 * (kBlockTokens / 2) + token / 2) * 32 + k % 16 * 2 + token % 2;
}

// The smallest magnitude, as bits, of which no more than `keep` elements are larger.
uint16_t threshold(const uint16_t* magnitude, int64_t n, int64_t keep) {
  uint32_t low = 0, high = 0x7fff;
  while (low < high) {
    const uint16_t middle = static_cast<uint16_t>((low + high) / 2);
    int32_t larger = 0;
    for (int64_t i = 0; i < n; ++i) larger += magnitude[i] > middle;
    if (larger > keep) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return static_cast<uint16_t>(low);
}

}  // namespace

void write_page(const void* x, Float type, int64_t head_dim, Kind kind, int64_t keep, uint8_t* page) {
  const int64_t d = head_dim, elements = kBlockTokens * d, bytes = page_bytes(d, keep);
  const std::unique_ptr<uint16_t[]> block(new uint16_t[elements]()), magnitude(new uint16_t[d]), bits(new uint16_t[d]);
  const std::unique_ptr<uint8_t[]> kept(new uint8_t[elements]());
  for (int64_t t = 0; t < kBlockTokens; ++t) {
    for (int64_t i = 0; i < d; ++i) {
      bits[i] = float_to_bf16(load_float(x, type, t * d + i));
      magnitude[i] = bits[i] & 0x7fff;
    }
    const uint16_t least = threshold(magnitude.get(), d, keep);
    int64_t equal = keep;  // how many elements of the magnitude `least` there is room for
    for (int64_t i = 0; i < d; ++i) equal -= magnitude[i] > least;
    for (int64_t i = 0; i < d; ++i) {
      if (magnitude[i] < least || (magnitude[i] == least && equal-- <= 0)) continue;
      const int64_t at = place(kind, bytes == block_bytes(d), t, i, d);
      block[at] = bits[i];
      kept[at] = 1;
    }
  }
  if (bytes == block_bytes(d)) {
    std::memcpy(page, block.get(), bytes);
    return;
  }
  std::memset(page, 0, 2 * d);
  uint8_t* values = page + 2 * d;
  for (int64_t i = 0; i < elements; ++i) {
    if (!kept[i]) continue;
    page[i / 8] |= 1 << i % 8;
    std::memcpy(values, &block[i], 2);
    values += 2;
  }
}

bool read_page(const uint8_t* page, int64_t bytes, int64_t head_dim, Kind kind, uint16_t* x) {
  const int64_t d = head_dim, elements = kBlockTokens * d;
  const bool dense = bytes == block_bytes(d);
  const uint8_t *values = dense ? page : page + 2 * d, *end = page + bytes;
  if (!dense) {
    int64_t count = 0;
    for (int64_t i = 0; i < 2 * d; ++i) count += std::popcount(page[i]);
    if (values + 2 * count != end) return false;
  }
  const std::unique_ptr<uint16_t[]> block(new uint16_t[elements]());
  for (int64_t i = 0; i < elements; ++i) {
    if (!dense && !(page[i / 8] >> i % 8 & 1)) continue;
    std::memcpy(&block[i], values, 2);
    values += 2;
  }
  for (int64_t t = 0; t < kBlockTokens; ++t)
    for (int64_t i = 0; i < d; ++i) x[t * d + i] = block[place(kind, bytes == block_bytes(d), t, i, d)];
  return true;
}

}  // namespace tce::sparse_linear
