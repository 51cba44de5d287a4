// What the files with VBMI2 (vpexpandb, vpexpandw) share; included after avx512.inl.

// A dense row of bf16 from its bitmap word and the next values, which it moves on.
static __m512i expand_bf16(const uint8_t* words, const uint8_t*& values) {
  const auto mask = load<uint32_t>(words);
  const __m512i row = _mm512_mask_expand_epi16(fresh(_mm512_setzero_si512()), mask, _mm512_loadu_si512(values));
  values += 2 * std::popcount(mask);
  return row;
}

// The same of int8 codes, of which 128 is zero.
static __m512i expand_int8(const uint8_t* words, const uint8_t*& values) {
  const auto mask = load<uint64_t>(words);
  const __m512i row = _mm512_mask_expand_epi8(fresh(_mm512_set1_epi8(static_cast<char>(128))), mask, _mm512_loadu_si512(values));
  values += std::popcount(mask);
  return row;
}
