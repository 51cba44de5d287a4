// What the files with VBMI2 (vpexpandw) share; included after avx512.inl.

// A dense row of bf16 from its bitmap word and the next values, which it moves on.
static __m512i expand_bf16(const uint8_t* words, const uint8_t*& values) {
  const auto mask = load<uint32_t>(words);
  const __m512i row = _mm512_mask_expand_epi16(fresh(_mm512_setzero_si512()), mask, _mm512_loadu_si512(values));
  values += 2 * std::popcount(mask);
  return row;
}
