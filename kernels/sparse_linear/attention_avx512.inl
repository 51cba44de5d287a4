// What attention needs of the AVX-512 files, on top of their tag B for bf16 weights.
template <typename B>
struct Attended : B {
  using Sum = __m512;
  using Row = __m512i;
  static constexpr int kRows = 4, kSums = 8;
  static constexpr bool kPairs = false;

  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Sum sum) { _mm512_storeu_ps(to, sum); }
  static Sum plus(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  static Row row(const uint8_t* from) { return _mm512_loadu_si512(from); }
  static void ahead(const uint8_t* at) { prefetch(at); }
};
