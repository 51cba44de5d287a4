// What attention gains from VBMI2; included after attention.inl and avx512.inl.
template <typename A>
struct PagedPairs : A {
  static constexpr bool kPairs = true;

  // One load for the bitmap words of both rows, which with single rows are loaded twice each.
  static void expand_pair(const uint8_t* words, const uint8_t*& values, Row* rows) {
    const auto masks = load<uint64_t>(words);
    const auto low = static_cast<uint32_t>(masks), high = static_cast<uint32_t>(masks >> 32);
    const uint8_t* next = values + 2 * std::popcount(low);
    rows[0].part[0] = reinterpret_cast<Integers>(_mm512_mask_expand_epi16(fresh(_mm512_setzero_si512()), low, _mm512_loadu_si512(values)));
    rows[1].part[0] = reinterpret_cast<Integers>(_mm512_mask_expand_epi16(fresh(_mm512_setzero_si512()), high, _mm512_loadu_si512(next)));
    values += 2 * std::popcount(masks);
  }

  static const uint8_t* expand(const uint8_t* words, const uint8_t* values, int64_t rows, uint8_t* out) {
    for (int64_t r = 0; r < rows; r += 2) {
      Row pair[2];
      expand_pair(words + 4 * r, values, pair);
      for (int i = 0; i < 2; ++i) store_vector(out + (r + i) * kBlockRow, reinterpret_cast<Vector>(pair[i].part[0]));
    }
    return values;
  }
};
