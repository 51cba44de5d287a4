// The body of attention that every instruction set includes, after sparse_linear.inl. The including file defines a tag T with the members
//
//   X, expand(words, values, rows, out)   as for bf16 weights: rows of a block have the form of rows of a packed bf16 weight
//   Sum, Row                              sixteen float sums; sixteen pairs of bf16
//   zero(), load(from), store(to, sum), plus(sum, sum), row(from)
//   ahead(at)                             asks for what lies a page after `at`
//   add(sum, row, x)                      sum plus the pairs of a row times the pair at x
//   kRows, kSums                          rows of queries one pass takes at most, 1 or 4; independent sums it should keep

// Sixteen floats at a time, in loops that compilers turn into vectors.
constexpr int64_t kLanes = 16;

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

// Dense rows of a block that begins at `block`, either straight from the cache, whose later lines must be asked for, or expanded.
enum class From { cache, expanded };

// The scores of 16 tokens for M rows of queries.
template <typename T, int M, From F>
static void score(const uint8_t* block, int64_t rows, const typename T::X* q, int64_t head_dim, float* scores) {
  constexpr int U = T::kSums > M ? T::kSums / M : 1;
  typename T::Sum sum[M][U];
  for (int m = 0; m < M; ++m)
    for (int u = 0; u < U; ++u) sum[m][u] = T::zero();
  const auto step = [&](int64_t i, int u) __attribute__((always_inline)) {
    if constexpr (F == From::cache) T::ahead(block + i * kBlockRow);
    const typename T::Row row = T::row(block + i * kBlockRow);
    for (int m = 0; m < M; ++m) sum[m][u] = T::add(sum[m][u], row, q + m * head_dim + 2 * i);
  };
  int64_t i = 0;
  for (; i + U <= rows; i += U)
    for (int u = 0; u < U; ++u) step(i + u, u);
  for (; i < rows; ++i) step(i, 0);
  for (int m = 0; m < M; ++m) {
    for (int u = 1; u < U; ++u) sum[m][0] = T::plus(sum[m][0], sum[m][u]);
    T::store(scores + m * kSplit, sum[m][0]);
  }
}

// Adds the values of 16 tokens times their probabilities to M rows of sums, G times 16 elements at a time.
template <typename T, int M, int G, From F>
static void mix(const uint8_t* block, int64_t groups, const typename T::X* p, float* sums, int64_t head_dim) {
  int64_t g = 0;
  for (; g + G <= groups; g += G) {
    typename T::Sum sum[M][G];
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < G; ++i) sum[m][i] = T::load(sums + m * head_dim + (g + i) * kLanes);
    for (int64_t pair = 0; pair < kBlockTokens / 2; ++pair) {
      for (int i = 0; i < G; ++i) {
        const uint8_t* at = block + (pair * groups + g + i) * kBlockRow;
        if constexpr (F == From::cache) T::ahead(at);
        const typename T::Row row = T::row(at);
        for (int m = 0; m < M; ++m) sum[m][i] = T::add(sum[m][i], row, p + m * kSplit + 2 * pair);
      }
    }
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < G; ++i) T::store(sums + m * head_dim + (g + i) * kLanes, sum[m][i]);
  }
  if constexpr (G > 1) {
    for (; g < groups; ++g) {
      for (int m = 0; m < M; ++m) {
        typename T::Sum sum = T::load(sums + m * head_dim + g * kLanes);
        for (int64_t pair = 0; pair < kBlockTokens / 2; ++pair)
          sum = T::add(sum, T::row(block + (pair * groups + g) * kBlockRow), p + m * kSplit + 2 * pair);
        T::store(sums + m * head_dim + g * kLanes, sum);
      }
    }
  }
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

template <typename T, From F>
static void score_rows(const uint8_t* block, const Attention& a, const typename T::X* q, float* scores) {
  for_rows<T>(a.rows, [&]<int M>(int64_t r) {
    score<T, M, F>(block, block_rows(a.head_dim), q + r * a.head_dim, a.head_dim, scores + r * kSplit);
  });
}

template <typename T, From F>
static void mix_rows(const uint8_t* block, const Attention& a, const typename T::X* p, float* sums) {
  for_rows<T>(a.rows, [&]<int M>(int64_t r) {
    constexpr int G = T::kSums > M ? T::kSums / M : 1;
    mix<T, M, G, F>(block, a.head_dim / kLanes, p + r * kSplit, sums + r * a.head_dim, a.head_dim);
  });
}

// The blocks of one head. Those that are expanded lie in `buffer` until the next one is opened.
template <typename T>
struct Reader {
  const uint8_t *pages, *tail;
  int64_t page_bytes, count, head_dim;
  uint8_t* buffer;  // an expanded block, and a copy of a page that is too near the end of the pages

  Reader(const Blocks& b, const Attention& a, const Span& span, int64_t head, uint8_t* buffer)
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

  // Null if the bitmap of a page does not fit its size.
  const uint8_t* open(int64_t i) const {
    if (i >= count) return tail + (i - count) * block_bytes(head_dim);
    const uint8_t* page = pages + i * page_bytes;
    if (!expanded(i)) return page;
    // Whatever the bitmap says, no more than a full one asks for is read; at the end of the pages that has to be from a copy.
    if ((count - i) * page_bytes < 2 * head_dim + block_bytes(head_dim) + kTail) {
      uint8_t* copy = buffer + block_bytes(head_dim);
      std::memcpy(copy, page, page_bytes);
      page = copy;
    }
    return T::expand(page, page + 2 * head_dim, block_rows(head_dim), buffer) == page + page_bytes ? buffer : nullptr;
  }
};

// The probabilities of one row from its scores: the largest score times `scale`, and the sum, over tokens [begin, end) of `width`.
template <typename X>
static void probabilities(float* scores, X* p, int64_t begin, int64_t end, int64_t width, float scale, float& largest, float& total) {
  constexpr float none = -__builtin_inff();
  std::fill(scores, scores + begin, none);
  std::fill(scores + end, scores + width, none);
  float most[kLanes], sum[kLanes];
  for (int j = 0; j < kLanes; ++j) most[j] = none, sum[j] = 0;
  for (int64_t i = 0; i < width; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const float s = scores[i + j] * scale;
      scores[i + j] = i + j < begin || i + j >= end ? none : s;
      most[j] = most[j] < scores[i + j] ? scores[i + j] : most[j];
    }
  }
  largest = *std::max_element(most, most + kLanes);
  const float from = largest == none ? 0 : largest;
  for (int64_t i = 0; i < width; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const float y = exp2_of(scores[i + j] - from);
      sum[j] += y;
      if constexpr (sizeof(X) == 2) {
        p[i + j] = float_to_bf16(y);
      } else {
        p[i + j] = bf16_to_float(float_to_bf16(y));
      }
    }
  }
  for (int64_t n = kLanes / 2; n > 0; n /= 2)
    for (int64_t j = 0; j < n; ++j) sum[j] += sum[j + n];
  total = sum[0];
}

template <typename T>
static bool attend_split(const Attention& a, int64_t head, int64_t split) {
  using X = typename T::X;
  const Span& span = a.spans[head];
  const int64_t d = a.head_dim, at = head * a.splits + split;
  const int64_t begin = std::max(split * kSplit, span.first / kBlockTokens * kBlockTokens),
                end = std::min((split + 1) * kSplit, span.tokens());
  float *sums = a.sums + at * a.rows * d, *largest = a.largest + at * a.rows, *total = a.total + at * a.rows;
  std::fill_n(sums, a.rows * d, 0.0f);
  if (begin >= end) {
    std::fill_n(largest, a.rows, -__builtin_inff());
    std::fill_n(total, a.rows, 0.0f);
    return true;
  }

  const int64_t q_bytes = round_up(a.rows * d * sizeof(X), 64), s_bytes = a.rows * kSplit * 4, p_bytes = a.rows * kSplit * sizeof(X);
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
    const uint8_t* block = k.open(i);
    if (!block) return false;
    if (k.expanded(i)) {
      score_rows<T, From::expanded>(block, a, q, scores + (i - first) * kBlockTokens);
    } else {
      score_rows<T, From::cache>(block, a, q, scores + (i - first) * kBlockTokens);
    }
  }

  for (int64_t r = 0; r < a.rows; ++r) {
    // A query does not see the tokens after its own.
    const int64_t seen = std::min(end, span.tokens() - a.length + 1 + r % a.length);
    const int64_t from = std::min(std::max(span.first - begin, int64_t{0}), width), to = std::max(seen - begin, from);
    probabilities(scores + r * kSplit, p + r * kSplit, from, to, width, a.scale * 1.44269504088896340736f, largest[r], total[r]);
  }

  for (int64_t i = first; i < last; ++i) {
    const uint8_t* block = v.open(i);
    if (!block) return false;
    const int64_t lead = std::max(span.first - i * kBlockTokens, int64_t{0}),
                  used = std::min(span.tokens() - i * kBlockTokens, kBlockTokens);
    if (v.expanded(i) || lead > 0 || used < kBlockTokens) {
      // Slots that hold no attended token may hold anything, NaN too.
      if (block != buffer) std::memcpy(buffer, block, block_bytes(d));
      for (int64_t t = 0; t < kBlockTokens; ++t) {
        if (t >= lead && t < used) continue;
        for (int64_t j = 0; j < d; ++j) std::memset(buffer + 2 * value_place(t, j, d), 0, 2);
      }
      mix_rows<T, From::expanded>(buffer, a, p + (i - first) * kBlockTokens, sums);
    } else {
      mix_rows<T, From::cache>(block, a, p + (i - first) * kBlockTokens, sums);
    }
  }
  return true;
}

template <typename T>
static void join_splits(const Attention& a, int64_t head) {
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
