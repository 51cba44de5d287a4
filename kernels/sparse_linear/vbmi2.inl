// What the files with VBMI2 (vpexpandb, vpexpandw) share; included after avx512.inl.

// Whether every block of a structured chunk has as many bits as the pattern n:4 says, so that its rows end where the next block begins.
template <typename T>
static bool regular(const Cursor& c, int64_t rows) {
  static_assert(kPanel * kFixedOf == 64);
  const int64_t words = rows * kWord<T> / 8;  // each of all bits of a block
  const __m512i wanted = _mm512_set1_epi64(kPanel * c.pattern.n);
  unsigned wrong = 0;
  for (int64_t i = 0; i < words; i += 8) {
    const __mmask8 mask = words - i >= 8 ? 0xff : (1 << (words - i)) - 1;
    const __m512i counts = _mm512_popcnt_epi64(_mm512_maskz_loadu_epi64(mask, c.at + i * 8));
    wrong |= _mm512_mask_cmpneq_epi64_mask(mask, counts, wanted);
  }
  return wrong == 0;
}

// A dense row of bf16 from its bitmap word and the next values, which it moves on.
static __m512i expand_bf16(const uint8_t* words, const uint8_t*& values) {
  const auto mask = load<uint32_t>(words);
  const __m512i row = _mm512_mask_expand_epi16(fresh(_mm512_setzero_si512()), mask, _mm512_loadu_si512(values));
  values += 2 * std::popcount(mask);
  return row;
}

// The codes in the lower halves of bytes, and those in the upper halves times 16.
struct Halves {
  __m512i low, high;
};

static Halves split(__m512i bytes) {
  return {_mm512_and_si512(bytes, _mm512_set1_epi8(0x0f)), _mm512_and_si512(bytes, _mm512_set1_epi8(static_cast<char>(0xf0)))};
}

// The same of int4 codes; `zero` is what stands where there is no bit.
static Halves expand_int4(const uint8_t* words, const uint8_t*& values, const Halves& zero) {
  const auto low = load<uint64_t>(words), high = load<uint64_t>(words + 8);
  const Halves packed = split(_mm512_loadu_si512(values));
  values += std::max(std::popcount(low), std::popcount(high));
  return {_mm512_mask_expand_epi8(fresh(zero.low), low, packed.low), _mm512_mask_expand_epi8(fresh(zero.high), high, packed.high)};
}

// The same of int8 codes, of which 128 is zero.
static __m512i expand_int8(const uint8_t* words, const uint8_t*& values) {
  const auto mask = load<uint64_t>(words);
  const __m512i row = _mm512_mask_expand_epi8(fresh(_mm512_set1_epi8(static_cast<char>(128))), mask, _mm512_loadu_si512(values));
  values += std::popcount(mask);
  return row;
}
