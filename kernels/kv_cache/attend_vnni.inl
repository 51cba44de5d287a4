// Pages of int8, multiplied as they are by vpdpbusd; for files whose region has VNNI.

constexpr float kMostWhole = 127 * 256;

// Sixteen numbers times `inverse`, rounded, as signed high and low halves.
static void split_halves(__m512 x, __m512 inverse, int8_t* high, int8_t* low) {
  const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));
  const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
  const __m512i lower = _mm512_sub_epi32(whole, _mm512_slli_epi32(upper, 8));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm512_cvtepi32_epi8(upper));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm512_cvtepi32_epi8(lower));
}

static __m512 join_halves(__m512i high, __m512i low) {
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256), _mm512_cvtepi32_ps(low));
}

static __m512i four(const int8_t* x) {
  int32_t bytes;
  std::memcpy(&bytes, x, 4);
  return _mm512_set1_epi32(bytes);
}

static __m512 grid_part(const uint8_t* half_floats) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half_floats)));
}

static float inverse_of(float step) {
  const float inverse = 1 / step;
  return inverse <= 3e38f ? inverse : 0;
}

// Queries become whole numbers of 8 bits.
template <int M>
static void score_page_int8(const uint8_t* page, const uint8_t* other, int64_t dim, const int8_t* q, const float* step, const float* sum,
                            float* scores) {
  __m512i sums[M];
  for (int m = 0; m < M; ++m) sums[m] = _mm512_setzero_si512();
  for (int64_t i = 0; i < dim / 4; ++i, page += kRowBytes, other += kRowBytes) {
    fetch(other);
    const __m512i row = _mm512_loadu_si512(page);
    for (int m = 0; m < M; ++m) sums[m] = _mm512_dpbusd_epi32(sums[m], row, four(q + m * dim + 4 * i));
  }
  fetch(other);
  const __m512 scale = grid_part(page), minimum = grid_part(page + 32);
  for (int m = 0; m < M; ++m) {
    const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[m]), _mm512_set1_ps(step[m]));
    _mm512_storeu_ps(scores + m * kPartTokens, _mm512_fmadd_ps(product, scale, _mm512_mul_ps(minimum, _mm512_set1_ps(sum[m]))));
  }
}

// `room` has as many bytes as the queries.
template <typename K>
static void score_int8(const Work<K>& w, uint8_t* room, float* scores) {
  const int64_t rows = w.a.rows, d = w.a.dim;
  int8_t* q = reinterpret_cast<int8_t*>(room);
  float *step = reinterpret_cast<float*>(q + rows * d), *sum = step + rows;  // d is 16 at least: there is room for them
  for (int64_t r = 0; r < rows; ++r) {
    __m512 most = _mm512_setzero_ps(), all = _mm512_setzero_ps();
    for (int64_t j = 0; j < d; j += 16) {
      const __m512 x = _mm512_loadu_ps(w.q + r * d + j);
      most = _mm512_max_ps(most, _mm512_abs_ps(x));
      all = _mm512_add_ps(all, x);
    }
    step[r] = max_lanes(Vector(most)) / 127;
    sum[r] = sum_lanes(Vector(all));
    const __m512 inverse = _mm512_set1_ps(inverse_of(step[r]));
    for (int64_t j = 0; j < d; j += 16) {
      const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(w.q + r * d + j), inverse));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + r * d + j), _mm512_cvtsepi32_epi8(whole));
    }
  }
  for (int64_t i = w.first; i < w.last; ++i) {
    const uint8_t *page = w.key(i), *other = w.value(i);
    w.ask_next(page, i, Kind::key);
    for_rows<typename K::Bf16>(rows, [&]<int M>(int64_t r) {
      score_page_int8<M>(page, other, d, q + r * d, step + r, sum + r, scores + r * kPartTokens + (i - w.first) * kPageTokens);
    });
  }
}

// G times 16 elements of M rows over all pages, so that sums stay in registers.
template <int M, int G, typename K>
static void mix_groups_int8(const Work<K>& w, int64_t group, const int8_t* high, const int8_t* low, const float* step, const float* minimum,
                            float* sums) {
  const int64_t groups = w.a.dim / kLaneCount;
  __m512i acc[M][G][2];
  for (int m = 0; m < M; ++m)
    for (int g = 0; g < G; ++g) acc[m][g][0] = acc[m][g][1] = _mm512_setzero_si512();
  for (int64_t i = w.first; i < w.last; ++i) {
    const uint8_t* page = w.value(i) + group * kRowBytes;
    const int64_t at = (i - w.first) * kPageTokens;
    for (int64_t quad = 0; quad < 4; ++quad, page += groups * kRowBytes) {
      for (int g = 0; g < G; ++g) {
        const __m512i row = _mm512_loadu_si512(page + g * kRowBytes);
        for (int m = 0; m < M; ++m) {
          acc[m][g][0] = _mm512_dpbusd_epi32(acc[m][g][0], row, four(high + m * kPartTokens + at + 4 * quad));
          acc[m][g][1] = _mm512_dpbusd_epi32(acc[m][g][1], row, four(low + m * kPartTokens + at + 4 * quad));
        }
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int g = 0; g < G; ++g)
      _mm512_storeu_ps(sums + m * w.a.dim + (group + g) * kLaneCount,
                       _mm512_fmadd_ps(join_halves(acc[m][g][0], acc[m][g][1]), _mm512_set1_ps(step[m]), _mm512_set1_ps(minimum[m])));
}

// Weights, times the scales of their tokens, become whole numbers of 16 bits, 256 * high + low, of which both halves are multiplied by the
// codes.
template <typename K>
static void mix_int8(const Work<K>& w, uint8_t* room, float* sums) {
  const int64_t rows = w.a.rows, d = w.a.dim, grid = rows_bytes(PageType::int8, d);
  int8_t *high = reinterpret_cast<int8_t*>(room), *low = high + rows * kPartTokens;
  float *step = reinterpret_cast<float*>(low + rows * kPartTokens), *minimum = step + rows;
  // A weight is 1 at most.
  __m512 most = _mm512_setzero_ps();
  for (int64_t i = w.first; i < w.last; ++i) {
    const auto some = static_cast<__mmask16>((1 << w.filled(i)) - 1);
    most = _mm512_mask_max_ps(most, some, grid_part(w.value(i) + grid), most);
  }
  std::fill_n(step, rows, max_lanes(Vector(most)) / kMostWhole);
  const __m512 inverse = _mm512_set1_ps(inverse_of(step[0]));
  for (int64_t r = 0; r < rows; ++r) {
    __m512 all = _mm512_setzero_ps();
    for (int64_t i = w.first; i < w.last; ++i) {
      const int64_t at = r * kPartTokens + (i - w.first) * kPageTokens;
      const __m512 weight = _mm512_loadu_ps(w.weights + at);
      // A slot without a token has weight 0 and may have any grid.
      const __mmask16 some = _mm512_cmp_ps_mask(weight, _mm512_setzero_ps(), _CMP_NEQ_UQ);
      split_halves(_mm512_maskz_mul_ps(some, weight, grid_part(w.value(i) + grid)), inverse, high + at, low + at);
      all = _mm512_mask3_fmadd_ps(weight, grid_part(w.value(i) + grid + 32), all, some);
    }
    minimum[r] = sum_lanes(Vector(all));
  }
  const int64_t groups = d / kLaneCount;
  const auto mix = [&]<int M>(int64_t r) {
    int64_t g = 0;
    for (; g + 4 <= groups; g += 4)
      mix_groups_int8<M, 4>(w, g, high + r * kPartTokens, low + r * kPartTokens, step + r, minimum + r, sums + r * d);
    for (; g < groups; ++g) mix_groups_int8<M, 1>(w, g, high + r * kPartTokens, low + r * kPartTokens, step + r, minimum + r, sums + r * d);
  };
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2) mix.template operator()<2>(r);
  if (r < rows) mix.template operator()<1>(r);
}
