// Pages of int4, whose codes become bf16 by a table and are multiplied by vdpbf16ps; after attend_vnni.inl.

// The whole numbers from 0 to 15 as bf16, twice: the fifth bit of an index does not matter.
static __m512i code_table() {
  alignas(64) static constexpr uint16_t values[32] = {
      0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170,
      0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
  return _mm512_load_si512(values);
}

// Numbers 2 r and 2 r + 1 along the sum of a row of codes, as pairs of bf16.
static __m512i code_pair(__m512i table, __m512i row, int r) { return _mm512_permutexvar_epi16(_mm512_srli_epi32(row, 4 * r), table); }

static __m512 add_pair(__m512 sum, __m512i pair, const uint16_t* x) {
  int32_t bits;
  std::memcpy(&bits, x, 4);
  return _mm512_dpbf16_ps(sum, __m512bh(pair), __m512bh(_mm512_set1_epi32(bits)));
}

// `folded` has room for M queries, times the scales of the page.
template <int M>
static void score_page_int4(const uint8_t* page, const uint8_t* other, int64_t dim, const float* q, uint16_t* folded, float* scores) {
  const uint8_t* grid = page + rows_bytes(PageType::int4, dim);
  __m512 from_minimum[M];
  for (int m = 0; m < M; ++m) from_minimum[m] = _mm512_setzero_ps();
  for (int64_t j = 0; j < dim; j += 16) {
    const __m512 scale = grid_part(grid + 2 * j), minimum = grid_part(grid + 2 * (dim + j));
    for (int m = 0; m < M; ++m) {
      const __m512 x = _mm512_loadu_ps(q + m * dim + j);
      from_minimum[m] = _mm512_fmadd_ps(x, minimum, from_minimum[m]);
      const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_mul_ps(x, scale));
      std::memcpy(folded + m * dim + j, &rounded, 32);
    }
  }
  const __m512i table = code_table();
  __m512 sums[M][2];
  for (int m = 0; m < M; ++m) sums[m][0] = sums[m][1] = _mm512_setzero_ps();
  for (int64_t i = 0; i < dim / 8; ++i, page += kRowBytes, other += kRowBytes) {
    fetch(other);
    const __m512i row = _mm512_loadu_si512(page);
    for (int r = 0; r < 4; ++r) {
      const __m512i pair = code_pair(table, row, r);
      for (int m = 0; m < M; ++m) sums[m][r % 2] = add_pair(sums[m][r % 2], pair, folded + m * dim + 8 * i + 2 * r);
    }
  }
  for (int m = 0; m < M; ++m) {
    const float minimum = sum_lanes(Vector(from_minimum[m]));
    _mm512_storeu_ps(scores + m * kPartTokens, _mm512_add_ps(_mm512_add_ps(sums[m][0], sums[m][1]), _mm512_set1_ps(minimum)));
  }
}

template <typename K>
static void score_int4(const Work<K>& w, uint16_t* room, float* scores) {
  const int64_t d = w.a.dim;
  for (int64_t i = w.first; i < w.last; ++i) {
    const uint8_t *page = w.key(i), *other = w.value(i);
    w.ask_next(page, i, Kind::key);
    for_rows<typename K::Bf16>(w.a.rows, [&]<int M>(int64_t r) {
      score_page_int4<M>(page, other, d, w.q + r * d, room + r * d, scores + r * kPartTokens + (i - w.first) * kPageTokens);
    });
  }
}

// As mix_groups_int8.
template <int M, int G, typename K>
static void mix_groups_int4(const Work<K>& w, int64_t group, const uint16_t* weights, const float* minimum, float* sums) {
  const int64_t groups = w.a.dim / kLaneCount;
  const __m512i table = code_table();
  __m512 acc[M][G];
  for (int m = 0; m < M; ++m)
    for (int g = 0; g < G; ++g) acc[m][g] = _mm512_set1_ps(minimum[m]);
  for (int64_t i = w.first; i < w.last; ++i) {
    const uint8_t* page = w.value(i) + group * kRowBytes;
    const int64_t at = (i - w.first) * kPageTokens;
    for (int64_t eight = 0; eight < 2; ++eight, page += groups * kRowBytes) {
      for (int g = 0; g < G; ++g) {
        const __m512i row = _mm512_loadu_si512(page + g * kRowBytes);
        for (int r = 0; r < 4; ++r) {
          const __m512i pair = code_pair(table, row, r);
          for (int m = 0; m < M; ++m) acc[m][g] = add_pair(acc[m][g], pair, weights + m * kPartTokens + at + 8 * eight + 2 * r);
        }
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int g = 0; g < G; ++g) _mm512_storeu_ps(sums + m * w.a.dim + (group + g) * kLaneCount, acc[m][g]);
}

// Weights times the scales of their tokens, in place; returns the sum of weights times minimums.
template <typename K>
static float fold_grids(const Work<K>& w, float* weights) {
  const int64_t grid = rows_bytes(PageType::int4, w.a.dim);
  __m512 all = _mm512_setzero_ps();
  for (int64_t i = w.first; i < w.last; ++i, weights += kPageTokens) {
    const __m512 weight = _mm512_loadu_ps(weights);
    // A slot without a token has weight 0 and may have any grid.
    const __mmask16 some = _mm512_cmp_ps_mask(weight, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    _mm512_storeu_ps(weights, _mm512_maskz_mul_ps(some, weight, grid_part(w.value(i) + grid)));
    all = _mm512_mask3_fmadd_ps(weight, grid_part(w.value(i) + grid + 32), all, some);
  }
  return sum_lanes(Vector(all));
}

template <typename K>
static void mix_int4(const Work<K>& w, uint16_t* room, float* sums) {
  const int64_t rows = w.a.rows, d = w.a.dim;
  float* minimum = reinterpret_cast<float*>(room + rows * kPartTokens);
  for (int64_t r = 0; r < rows; ++r) {
    minimum[r] = fold_grids(w, w.weights + r * kPartTokens);
    convert<typename K::Bf16>(w.weights + r * kPartTokens, w.width, room + r * kPartTokens);
  }
  const int64_t groups = d / kLaneCount;
  for_rows<typename K::Bf16>(rows, [&]<int M>(int64_t r) {
    int64_t g = 0;
    for (; g + 4 <= groups; g += 4) mix_groups_int4<M, 4>(w, g, room + r * kPartTokens, minimum + r, sums + r * d);
    for (; g < groups; ++g) mix_groups_int4<M, 1>(w, g, room + r * kPartTokens, minimum + r, sums + r * d);
  });
}
