// What the AVX-512 files share; included after sparse_linear.inl.

template <typename T>
static T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

// A copy the compiler must make anew each time. gcc gives all zero-masked expands one destination register, and on Zen 4 and 5 an expand
// waits for its destination: five cycles each instead of one and a half (llvm-project issues 206849 and 207079).
static __m512i fresh(__m512i value) {
  asm("" : "+v"(value));
  return value;
}

template <int M, int P>
static void load_sums(const float* sums, __m512 (&sum)[M][P]) {
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < P; ++i) sum[m][i] = _mm512_loadu_ps(sums + (m * P + i) * kPanel);
}

template <int M, int P>
static void store_sums(const __m512 (&sum)[M][P], float* sums) {
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < P; ++i) _mm512_storeu_ps(sums + (m * P + i) * kPanel, sum[m][i]);
}

static const bool kPrefetch = prefetch_pays();

// Asks for what a stream needs a page later, where the hardware's own prefetching ends; 1 or 2 KiB ahead bring less, 8 KiB no more. An
// address past the array is harmless: prefetches do not fault. In assembly, because gcc 12 drops _mm_prefetch where a pragma sets the
// target.
static void prefetch(const uint8_t* at) {
  if (kPrefetch) asm volatile("prefetcht0 %0" : : "m"(*reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(at) + 4096)));
}

// In vbmi2.inl.
template <typename T>
static bool regular(const Cursor& c, int64_t rows);

// Whether the next chunk of a sparse or a structured panel can be read without leaving the array.
template <typename T, Layout L>
static bool chunk_readable(const Cursor& c, int64_t rows) {
  if constexpr (L == Layout::structured) {
    return regular<T>(c, rows);
  } else {
    return readable<T>(c, rows);
  }
}

// Expands rows of 64 bytes one by one.
template <typename T>
static const uint8_t* expand_rows(const uint8_t* words, const uint8_t* values, int64_t rows, uint8_t* out) {
  for (int64_t r = 0; r < rows; ++r) {
    prefetch(values);
    _mm512_store_si512(out + r * kRow, T::expand_row(words + r * kWord<T>, values));
  }
  return values;
}

// sum plus a row of bf16 pairs times the pair of floats at x, by widening: a bf16 is the upper half of a float.
static __m512 add_bf16(__m512 sum, __m512i row, const float* x) {
  const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(row, 16));
  const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(row, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  return _mm512_fmadd_ps(odd, _mm512_set1_ps(x[1]), _mm512_fmadd_ps(even, _mm512_set1_ps(x[0]), sum));
}

// A tag whose sums are floating-point throughout. T adds dtype, X and
//
//   expand_row(words, values)  a dense row from its bitmap word and the next values, which it moves on
//   add(sum, row, x)           sum plus a row times the g inputs at x
template <typename T>
struct Floats {
  static constexpr int64_t kRowBlock = 8, kPanelBlock = 2, kStreamRows = 4;

  static const uint8_t* expand(const uint8_t* words, const uint8_t* values, int64_t rows, uint8_t* out) {
    return expand_rows<T>(words, values, rows, out);
  }

  template <int M, int P>
  static void dot(const uint8_t* const* weight, int64_t rows, const Activations<T>& a, float* sums) {
    __m512 sum[M][P];
    load_sums<M, P>(sums, sum);
    for (int64_t r = 0; r < rows; ++r) {
      __m512i w[P];
      for (int i = 0; i < P; ++i) w[i] = _mm512_loadu_si512(weight[i] + r * kRow);
      for (int m = 0; m < M; ++m)
        for (int i = 0; i < P; ++i) sum[m][i] = T::add(sum[m][i], w[i], a.x + m * a.x_stride + r * kGroup<T>);
    }
    store_sums<M, P>(sum, sums);
  }

  // Each row of x has several sums, taken in turn, so that additions do not wait for each other.
  template <int M, Layout L>
  static bool stream(Cursor& c, int64_t rows, const Activations<T>& a, float* sums) {
    constexpr int kSums = M == 1 ? 8 : M == 2 ? 4 : 2;
    constexpr int kBlock = L == Layout::structured ? kFixedOf / kGroup<T> : 1;  // rows of a block
    const int64_t block_bytes = kPanel * c.pattern.n * (4 / kGroup<T>);
    __m512 sum[M][kSums];
    for (int m = 0; m < M; ++m)
      for (int u = 0; u < kSums; ++u) sum[m][u] = _mm512_setzero_ps();
    for (int64_t first = 0; first < rows; first += kChunkRows<T>) {
      const int64_t count = std::min(kChunkRows<T>, rows - first);
      const uint8_t *words = c.at, *values = c.at;
      if constexpr (L != Layout::dense) {
        if (!chunk_readable<T, L>(c, count)) return false;
        values += count * kWord<T>;
      }
      const uint8_t* block = values;  // structured: the next one
      const auto step = [&](int64_t r, int u, int place) __attribute__((always_inline)) {
        __m512i w;
        if (L == Layout::structured && place == 0) {
          values = block;
          block += block_bytes;
        }
        prefetch(values);
        if constexpr (L != Layout::dense) {
          w = T::expand_row(words + r * kWord<T>, values);
        } else {
          w = _mm512_loadu_si512(values);
          values += kRow;
        }
        for (int m = 0; m < M; ++m) sum[m][u] = T::add(sum[m][u], w, a.x + m * a.x_stride + (first + r) * kGroup<T>);
      };
      int64_t r = 0;
      for (; r + kSums <= count; r += kSums)
        for (int u = 0; u < kSums; ++u) step(r + u, u, u % kBlock);
      for (; r < count; r += kBlock)
        for (int i = 0; i < kBlock; ++i) step(r + i, 0, i);
      c.at = L == Layout::structured ? block : values;
    }
    for (int m = 0; m < M; ++m) {
      for (int width = kSums / 2; width > 0; width /= 2)
        for (int u = 0; u < width; ++u) sum[m][u] = _mm512_add_ps(sum[m][u], sum[m][u + width]);
      _mm512_storeu_ps(sums + m * kPanel, sum[m][0]);
    }
    return true;
  }
};
