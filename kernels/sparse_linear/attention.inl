// The body of attention that every instruction set includes, after sparse_linear.inl. The including file defines a tag T with the members
//
//   X, expand(words, values, rows, out)   as for bf16 weights: rows of a block have the form of rows of a packed bf16 weight
//   Sum, Row                              sixteen float sums; sixteen pairs of bf16
//   zero(), load(from), store(to, sum), plus(sum, sum), row(from)
//   ahead(at)                             asks for what lies a page after `at`
//   add(sum, row, x)                      sum plus the pairs of a row times the pair at x
//   kRows, kSums                          rows of queries one pass takes at most, 1 or 4; independent sums it should keep, at most 8
//   expand_pair(words, values, rows)      two rows from their bitmap words and the next values, which it moves on; where kPairs is true

// Sixteen floats at a time, in loops that compilers turn into vectors.
constexpr int64_t kWide = 16, kPairsInBlock = kBlockTokens / 2;

// 2^x for x <= 0; 0 below -126; NaN stays NaN.
static inline float exp2_of(float x) {
  const float shifted = x + 0x1.8p23f, f = x - (shifted - 0x1.8p23f);
  float y = 1.5403530393381609954e-4f;
  y = y * f + 1.3333558146428443423e-3f;
  y = y * f + 9.6181291076284771619e-3f;
  y = y * f + 5.5504108664821579953e-2f;
  y = y * f + 2.4022650695910071233e-1f;
  y = y * f + 6.9314718055994530942e-1f;
  y = y * f + 1.0f;
  const float result = bits_float(float_bits(y) + (float_bits(shifted) << 23));
  return x < -126.0f ? 0.0f : result;
}

// Where the rows of a block are: in memory, whose later lines must be asked for, expanded before, or still in a sparse page.
enum class From { memory, buffer, page };

// The scores of 16 tokens for M rows of queries. The end of the values where the block is a page.
template <typename T, int M, From F>
static const uint8_t* score(const uint8_t* block, int64_t rows, const typename T::X* q, int64_t head_dim, float* scores) {
  constexpr int U = T::kSums > M ? T::kSums / M : 1;  // divides the number of rows, a multiple of 8
  typename T::Sum sum[M][U];
  for (int m = 0; m < M; ++m)
    for (int u = 0; u < U; ++u) sum[m][u] = T::zero();
  const uint8_t* values = block + rows * 4;
  for (int64_t first = 0; first < rows; first += U) {
    typename T::Row row[U];
    if constexpr (F == From::page) {
      for (int u = 0; u < U; u += 2) T::expand_pair(block + (first + u) * 4, values, row + u);
    } else {
      for (int u = 0; u < U; ++u) {
        if constexpr (F == From::memory) T::ahead(block + (first + u) * kBlockRow);
        row[u] = T::row(block + (first + u) * kBlockRow);
      }
    }
    for (int u = 0; u < U; ++u)
      for (int m = 0; m < M; ++m) sum[m][u] = T::add(sum[m][u], row[u], q + m * head_dim + 2 * (first + u));
  }
  for (int m = 0; m < M; ++m) {
    for (int u = 1; u < U; ++u) sum[m][0] = T::plus(sum[m][0], sum[m][u]);
    T::store(scores + m * kSplitTokens, sum[m][0]);
  }
  return values;
}

// Adds the values of 16 tokens times their probabilities to M rows of sums. A dense block, G times 16 elements at a time: the more, the
// longer are the stretches of memory that are read in order.
template <typename T, int M, int G>
static void mix(const uint8_t* block, int64_t groups, const typename T::X* p, float* sums, int64_t head_dim) {
  for (int64_t g = 0; g < groups; g += G) {
    typename T::Sum sum[M][G];
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < G; ++i) sum[m][i] = T::load(sums + m * head_dim + (g + i) * kWide);
    for (int64_t pair = 0; pair < kPairsInBlock; ++pair) {
      for (int i = 0; i < G; ++i) {
        const uint8_t* at = block + (pair * groups + g + i) * kBlockRow;
        T::ahead(at);
        const typename T::Row row = T::row(at);
        for (int m = 0; m < M; ++m) sum[m][i] = T::add(sum[m][i], row, p + m * kSplitTokens + 2 * pair);
      }
    }
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < G; ++i) T::store(sums + m * head_dim + (g + i) * kWide, sum[m][i]);
  }
}

// The same for all rows of queries, with the largest G there are registers for.
template <typename T, int G>
static void mix_rows(const uint8_t* block, const PageAttention& a, const typename T::X* p, float* sums) {
  const int64_t groups = a.head_dim / kWide;
  if (groups % G != 0) {
    if constexpr (G > 1) mix_rows<T, G / 2>(block, a, p, sums);
    return;
  }
  constexpr int M = T::kRows > 1 ? 2 : 1;
  int64_t r = 0;
  for (; r + M <= a.rows; r += M) mix<T, M, G>(block, groups, p + r * kSplitTokens, sums + r * a.head_dim, a.head_dim);
  if (r < a.rows) mix<T, 1, G>(block, groups, p + r * kSplitTokens, sums + r * a.head_dim, a.head_dim);
}

// The same from the rows of a sparse page, expanded or not. The end of the values where it is not.
template <typename T, int M, From F>
static const uint8_t* mix_page(const uint8_t* page, int64_t groups, const typename T::X* p, float* sums, int64_t head_dim) {
  const uint8_t* values = page + groups * kPairsInBlock * 4;
  for (int64_t g = 0; g < groups; ++g) {
    typename T::Sum sum[M];
    for (int m = 0; m < M; ++m) sum[m] = T::load(sums + m * head_dim + g * kWide);
    typename T::Row row[kPairsInBlock];
    for (int pair = 0; pair < kPairsInBlock; pair += 2) {
      const int64_t at = g * kPairsInBlock + pair;
      if constexpr (F == From::page) {
        T::expand_pair(page + at * 4, values, row + pair);
      } else {
        for (int i = 0; i < 2; ++i) row[pair + i] = T::row(page + (at + i) * kBlockRow);
      }
      for (int i = 0; i < 2; ++i)
        for (int m = 0; m < M; ++m) sum[m] = T::add(sum[m], row[pair + i], p + m * kSplitTokens + 2 * (pair + i));
    }
    for (int m = 0; m < M; ++m) T::store(sums + m * head_dim + g * kWide, sum[m]);
  }
  return values;
}

// Calls f<M>(first row) for blocks of rows.
template <typename T, typename F>
static void for_rows(int64_t rows, const F& f) {
  int64_t r = 0;
  for (; r + T::kRows <= rows; r += T::kRows) f.template operator()<T::kRows>(r);
  if constexpr (T::kRows == 4) {
    if (rows - r == 3) f.template operator()<3>(r);
    if (rows - r == 2) f.template operator()<2>(r);
    if (rows - r == 1) f.template operator()<1>(r);
  }
}

// The blocks of one head. Those that are expanded lie in `buffer` until the next one is opened.
template <typename T>
struct Reader {
  const uint8_t *pages, *tail;
  int64_t page_bytes, count, head_dim;
  uint8_t* buffer;  // an expanded block, and a copy of a page that is too near the end of the pages

  Reader(const Blocks& b, const PageAttention& a, const Span& span, int64_t head, uint8_t* buffer)
      : pages(b.pages + head / a.kv_heads * b.batch_stride + head % a.kv_heads * b.head_stride),
        tail(b.tail + head / a.kv_heads * b.tail_batch_stride + head % a.kv_heads * b.tail_head_stride),
        page_bytes(b.page_bytes),
        count(span.pages),
        head_dim(a.head_dim),
        buffer(buffer) {}

  static int64_t buffer_bytes(int64_t head_dim) {
    return block_bytes(head_dim) + round_up(2 * head_dim + block_bytes(head_dim) + kTail, 64);
  }

  bool expanded(int64_t i) const { return i < count && page_bytes != block_bytes(head_dim); }

  // A block, or a sparse page from which it is safe to expand.
  const uint8_t* at(int64_t i) const {
    if (i >= count) return tail + (i - count) * block_bytes(head_dim);
    const uint8_t* page = pages + i * page_bytes;
    if (!expanded(i)) return page;
    // Whatever the bitmap says, no more than a full one asks for is read; at the end of the pages that has to be from a copy.
    if ((count - i) * page_bytes < 2 * head_dim + block_bytes(head_dim) + kTail) {
      uint8_t* copy = buffer + block_bytes(head_dim);
      std::memcpy(copy, page, page_bytes);
      page = copy;
    }
    return page;
  }

  // A block with all its rows. Null if the bitmap of a page does not fit its size.
  const uint8_t* open(int64_t i) const {
    const uint8_t* block = at(i);
    if (!expanded(i)) return block;
    return T::expand(block, block + 2 * head_dim, block_rows(head_dim), buffer) == block + page_bytes ? buffer : nullptr;
  }
};

// The scores of block number i for all rows. False if the bitmap of a page does not fit its size.
template <typename T>
static bool score_tokens(const Reader<T>& k, int64_t i, const PageAttention& a, const typename T::X* q, float* scores) {
  const int64_t rows = block_rows(a.head_dim);
  if (!k.expanded(i)) {
    const uint8_t* block = k.at(i);
    for_rows<T>(a.rows, [&]<int M>(int64_t r) {
      score<T, M, From::memory>(block, rows, q + r * a.head_dim, a.head_dim, scores + r * kSplitTokens);
    });
    return true;
  }
  if constexpr (T::kPairs) {
    if (a.rows <= T::kRows) {
      const uint8_t* page = k.at(i);
      bool intact = true;
      for_rows<T>(a.rows,
                  [&]<int M>(int64_t) { intact = score<T, M, From::page>(page, rows, q, a.head_dim, scores) == page + k.page_bytes; });
      return intact;
    }
  }
  const uint8_t* block = k.open(i);
  if (!block) return false;
  for_rows<T>(a.rows,
              [&]<int M>(int64_t r) { score<T, M, From::buffer>(block, rows, q + r * a.head_dim, a.head_dim, scores + r * kSplitTokens); });
  return true;
}

// Adds block number i of the values to all rows of sums, without tokens outside [begin, end). False as in score_tokens.
template <typename T>
static bool mix_block(const Reader<T>& v, int64_t i, const PageAttention& a, int64_t begin, int64_t end, const typename T::X* p,
                      float* sums) {
  const int64_t d = a.head_dim, groups = d / kWide;
  const bool whole = i * kBlockTokens >= begin && (i + 1) * kBlockTokens <= end;
  if constexpr (T::kPairs) {
    if (v.expanded(i) && whole && a.rows <= T::kRows) {
      const uint8_t* page = v.at(i);
      bool intact = true;
      for_rows<T>(a.rows, [&]<int M>(int64_t) { intact = mix_page<T, M, From::page>(page, groups, p, sums, d) == page + v.page_bytes; });
      return intact;
    }
  }
  const uint8_t* block = v.open(i);
  if (!block) return false;
  if (!whole) {
    // Slots that hold no attended token may hold anything, NaN too.
    if (block != v.buffer) std::memcpy(v.buffer, block, block_bytes(d));
    block = v.buffer;
    for (int64_t row = 0; row < block_rows(d); ++row) {
      const int64_t pair = v.expanded(i) ? row % kPairsInBlock : row / groups;
      for (int64_t token = 0; token < 2; ++token) {
        const int64_t at = i * kBlockTokens + 2 * pair + token;
        if (at >= begin && at < end) continue;
        for (int64_t j = 0; j < kWide; ++j) std::memset(v.buffer + row * kBlockRow + j * 4 + token * 2, 0, 2);
      }
    }
  }
  if (!v.expanded(i)) {
    mix_rows<T, T::kSums>(block, a, p, sums);
    return true;
  }
  for_rows<T>(a.rows, [&]<int M>(int64_t r) { mix_page<T, M, From::buffer>(block, groups, p + r * kSplitTokens, sums + r * d, d); });
  return true;
}

// The probabilities of one row from its scores: the largest score times `scale`, and the sum, over tokens [begin, end) of `width`.
template <typename X>
static void probabilities(float* scores, X* p, int64_t begin, int64_t end, int64_t width, float scale, float& largest, float& total) {
  constexpr float none = -__builtin_inff();
  for (int64_t i = 0; i < width; ++i) scores[i] *= scale;
  std::fill(scores, scores + begin, none);
  std::fill(scores + end, scores + width, none);
  float most[kWide], sum[kWide];
  for (int j = 0; j < kWide; ++j) most[j] = none, sum[j] = 0;
  for (int64_t i = 0; i < width; i += kWide)
    for (int j = 0; j < kWide; ++j) most[j] = most[j] < scores[i + j] ? scores[i + j] : most[j];
  largest = *std::max_element(most, most + kWide);
  const float from = largest == none ? 0 : largest;
  for (int64_t i = 0; i < width; ++i) scores[i] = exp2_of(scores[i] - from);
  for (int64_t i = 0; i < width; i += kWide)
    for (int j = 0; j < kWide; ++j) sum[j] += scores[i + j];
  for (int64_t i = 0; i < width; ++i) {
    // To bf16, ties to even. NaN needs no care here: its lower half is zero.
    const uint32_t bits = float_bits(scores[i]), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    if constexpr (sizeof(X) == 2) {
      p[i] = static_cast<uint16_t>(rounded);
    } else {
      p[i] = bits_float(rounded << 16);
    }
  }
  for (int64_t n = kWide / 2; n > 0; n /= 2)
    for (int64_t j = 0; j < n; ++j) sum[j] += sum[j + n];
  total = sum[0];
}

template <typename T>
static bool attend_split(const PageAttention& a, int64_t head, int64_t split) {
  using X = typename T::X;
  const Span& span = a.spans[head];
  const int64_t d = a.head_dim, at = head * a.splits + split;
  const int64_t begin = std::max(split * kSplitTokens, span.first / kBlockTokens * kBlockTokens),
                end = std::min((split + 1) * kSplitTokens, span.tokens());
  float *sums = a.sums + at * a.rows * d, *largest = a.largest + at * a.rows, *total = a.total + at * a.rows;
  std::fill_n(sums, a.rows * d, 0.0f);
  if (begin >= end) {
    std::fill_n(largest, a.rows, -__builtin_inff());
    std::fill_n(total, a.rows, 0.0f);
    return true;
  }

  const int64_t q_bytes = round_up(a.rows * d * sizeof(X), 64), s_bytes = a.rows * kSplitTokens * 4,
                p_bytes = a.rows * kSplitTokens * sizeof(X);
  const std::unique_ptr<uint8_t[]> scratch(new uint8_t[q_bytes + s_bytes + p_bytes + Reader<T>::buffer_bytes(d) + 64]);
  uint8_t* buffer = scratch.get() + (-reinterpret_cast<uintptr_t>(scratch.get()) & 63);
  X* q = reinterpret_cast<X*>(buffer + Reader<T>::buffer_bytes(d));
  float* scores = reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(q) + q_bytes);
  X* p = reinterpret_cast<X*>(reinterpret_cast<uint8_t*>(scores) + s_bytes);
  for (int64_t i = 0; i < a.rows * d; ++i) {
    const uint16_t bits = float_to_bf16(load_float(a.q, a.q_type, head * a.rows * d + i));
    if constexpr (sizeof(X) == 2) {
      q[i] = bits;
    } else {
      q[i] = bf16_to_float(bits);
    }
  }

  const Reader<T> k(a.k, a, span, head, buffer), v(a.v, a, span, head, buffer);
  const int64_t first = begin / kBlockTokens, last = divide_up(end, kBlockTokens), width = (last - first) * kBlockTokens;
  for (int64_t i = first; i < last; ++i) {
    if (!score_tokens<T>(k, i, a, q, scores + (i - first) * kBlockTokens)) return false;
  }

  for (int64_t r = 0; r < a.rows; ++r) {
    // A query does not see the tokens after its own.
    const int64_t seen = std::min(end, span.tokens() - a.length + 1 + r % a.length);
    const int64_t from = std::min(std::max(span.first - begin, int64_t{0}), width), to = std::max(seen - begin, from);
    probabilities(scores + r * kSplitTokens, p + r * kSplitTokens, from, to, width, a.scale * 1.44269504088896340736f, largest[r],
                  total[r]);
  }

  for (int64_t i = first; i < last; ++i) {
    if (!mix_block<T>(v, i, a, span.first, span.tokens(), p + (i - first) * kBlockTokens, sums)) return false;
  }
  return true;
}

template <typename T>
static void join_splits(const PageAttention& a, int64_t head) {
  const int64_t d = a.head_dim;
  const std::unique_ptr<float[]> joined(new float[d]);
  for (int64_t r = 0; r < a.rows; ++r) {
    float largest = -__builtin_inff(), total = 0;
    for (int64_t s = 0; s < a.splits; ++s) largest = std::max(largest, a.largest[(head * a.splits + s) * a.rows + r]);
    std::fill_n(joined.get(), d, 0.0f);
    for (int64_t s = 0; s < a.splits; ++s) {
      const int64_t at = (head * a.splits + s) * a.rows + r;
      if (a.total[at] == 0) continue;
      const float weight = exp2_of(a.largest[at] - largest);
      total += weight * a.total[at];
      for (int64_t j = 0; j < d; ++j) joined[j] += weight * a.sums[at * d + j];
    }
    const float inverse = total == 0 ? 0 : 1 / total;
    for (int64_t j = 0; j < d; ++j) store_float(a.out, a.q_type, (head * a.rows + r) * d + j, joined[j] * inverse);
    a.lse[head * a.rows + r] = total == 0 ? -__builtin_inff() : largest * 0.69314718055994530942f + std::log(total);
  }
}

template <typename T>
static constexpr AttentionVariant attention_variant() {
  return {attend_split<T>, join_splits<T>};
}
