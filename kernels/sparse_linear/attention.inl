// Attention over pages that every instruction set includes, after common/attention.inl and sparse_linear.inl. To what common/attention.inl
// asks of a tag, the including file adds (see Paged)
//
//   expand(words, values, rows, out)  as for bf16 weights: rows of a block have the form of rows of a packed bf16 weight
//   expand_pair(words, values, rows)  two rows from their bitmap words and the next values, which it moves on; where kPairs is true

constexpr int64_t kPairsInBlock = kBlockTokens / 2;

// The tag A of common/attention.inl with pages that B expands.
template <typename A, typename B>
struct Paged : A {
  static constexpr bool kPairs = false;

  static const uint8_t* expand(const uint8_t* words, const uint8_t* values, int64_t rows, uint8_t* out) {
    return B::expand(words, values, rows, out);
  }
};

// Rows straight from a sparse page.
template <typename T>
struct PageRows {
  const uint8_t *words, *values;

  PageRows(const uint8_t* page, int64_t rows) : words(page), values(page + rows * 4) {}

  template <int U>
  void take(Row (&row)[U]) {
    for (int u = 0; u < U; u += 2, words += 8) T::expand_pair(words, values, row + u);
  }
};

// Adds the values of a sparse page, times their weights, to M rows of sums: sixteen elements of all tokens before the next sixteen.
// Returns where the page ends.
template <typename T, int M, typename Rows>
static Rows mix_page(Rows page, int64_t groups, const typename T::X* weights, int64_t stride, float* sums, int64_t dim) {
  for (int64_t g = 0; g < groups; ++g) {
    Sums sum[M];
    for (int m = 0; m < M; ++m) sum[m] = load_sums(sums + m * dim + g * kWide);
    for (int pair = 0; pair < kPairsInBlock; pair += 2) {
      Row row[2];
      page.take(row);
      for (int i = 0; i < 2; ++i)
        for (int m = 0; m < M; ++m) add_row<T>(sum[m], row[i], weights + m * stride + 2 * (pair + i));
    }
    for (int m = 0; m < M; ++m) store_sums(sums + m * dim + g * kWide, sum[m]);
  }
  return page;
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

  const uint8_t* place(int64_t i) const { return i < count ? pages + i * page_bytes : tail + (i - count) * block_bytes(head_dim); }

  // A block, or a sparse page from which it is safe to expand.
  const uint8_t* at(int64_t i) const {
    const uint8_t* page = place(i);
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

// The keys and values of one head.
template <typename P>
struct PageSource {
  Reader<P> k, v;
  int64_t begin, end;  // tokens attended

  template <typename T>
  bool score(int64_t i, const Stretch& a, const typename T::X* q, float* scores, int64_t stride) const {
    if (!k.expanded(i)) {
      score_block<T>(k.place(i), v.place(i), a, q, scores, stride);
      return true;
    }
    const int64_t count = block_rows(a.dim);
    if constexpr (T::kPairs) {
      if (a.rows <= T::kRows) {
        const uint8_t* page = k.at(i);
        PageRows<T> rows(page, count);
        for_rows<T>(a.rows, [&]<int M>(int64_t) { rows = score_rows<T, M>(rows, count, q, a.dim, scores, stride); });
        return rows.values == page + k.page_bytes;
      }
    }
    const uint8_t* block = k.open(i);
    if (!block) return false;
    for_rows<T>(a.rows,
                [&]<int M>(int64_t r) { score_rows<T, M>(NearRows{block}, count, q + r * a.dim, a.dim, scores + r * stride, stride); });
    return true;
  }

  template <typename T>
  bool mix(int64_t i, const Stretch& a, const typename T::X* weights, int64_t stride) const {
    const int64_t groups = a.dim / kWide;
    const bool whole = i * kBlockTokens >= begin && (i + 1) * kBlockTokens <= end;
    if constexpr (T::kPairs) {
      if (v.expanded(i) && whole && a.rows <= T::kRows) {
        const uint8_t* page = v.at(i);
        PageRows<T> rows(page, block_rows(a.dim));
        for_rows<T>(a.rows, [&]<int M>(int64_t) { rows = mix_page<T, M>(rows, groups, weights, stride, a.sums, a.dim); });
        return rows.values == page + v.page_bytes;
      }
    }
    const uint8_t* block = v.open(i);
    if (!block) return false;
    if (!whole) block = without_others(block, i, groups);
    if (!v.expanded(i)) {
      mix_block<T>(block, a, weights, stride);
      return true;
    }
    for_rows<T>(a.rows, [&]<int M>(int64_t r) {
      mix_page<T, M>(NearRows{block}, groups, weights + r * stride, stride, a.sums + r * a.dim, a.dim);
    });
    return true;
  }

 private:
  // A copy of block i of the values with zeros in the slots that hold no attended token, which may hold anything, NaN too.
  const uint8_t* without_others(const uint8_t* block, int64_t i, int64_t groups) const {
    if (block != v.buffer) std::memcpy(v.buffer, block, block_bytes(v.head_dim));
    for (int64_t row = 0; row < block_rows(v.head_dim); ++row) {
      const int64_t pair = v.expanded(i) ? row % kPairsInBlock : row / groups;
      for (int64_t token = 0; token < 2; ++token) {
        const int64_t at = i * kBlockTokens + 2 * pair + token;
        if (at >= begin && at < end) continue;
        for (int64_t j = 0; j < kWide; ++j) std::memset(v.buffer + row * kBlockRow + j * 4 + token * 2, 0, 2);
      }
    }
    return v.buffer;
  }
};

template <typename T>
static bool attend_split(const PageAttention& a, int64_t head, int64_t split) {
  using X = typename T::X;
  const Span& span = a.spans[head];
  const int64_t d = a.head_dim, at = head * a.splits + split, tokens = span.tokens();
  const int64_t begin = std::max(split * kSplitTokens, span.first), end = std::min((split + 1) * kSplitTokens, tokens);
  float *sums = a.sums + at * a.rows * d, *largest = a.largest + at * a.rows, *total = a.total + at * a.rows;
  if (begin >= end) {
    std::fill_n(sums, a.rows * d, 0.0f);
    std::fill_n(largest, a.rows, -__builtin_inff());
    std::fill_n(total, a.rows, 0.0f);
    return true;
  }

  const int64_t seen_bytes = round_up(a.rows * 2 * sizeof(int64_t), 64), q_bytes = round_up(a.rows * d * sizeof(X), 64);
  const int64_t s_bytes = a.rows * kSplitTokens * 4, w_bytes = sizeof(X) == 4 ? 0 : a.rows * kSplitTokens * sizeof(X);
  const Scratch scratch(Reader<T>::buffer_bytes(d) + seen_bytes + q_bytes + s_bytes + w_bytes);
  uint8_t* buffer = scratch.get();
  int64_t* first = reinterpret_cast<int64_t*>(buffer + Reader<T>::buffer_bytes(d));
  int64_t* last = first + a.rows;
  X* q = reinterpret_cast<X*>(reinterpret_cast<uint8_t*>(first) + seen_bytes);
  float* scores = reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(q) + q_bytes);
  X* weights = reinterpret_cast<X*>(sizeof(X) == 4 ? scores : scores + a.rows * kSplitTokens);
  for (int64_t i = 0; i < a.rows * d; ++i) q[i] = T::of(load_float(a.q, a.q_type, head * a.rows * d + i));
  for (int64_t r = 0; r < a.rows; ++r) {
    first[r] = span.first;
    last[r] = tokens - a.length + 1 + r % a.length;  // a query does not see the tokens after its own
  }

  const PageSource<T> source{{a.k, a, span, head, buffer}, {a.v, a, span, head, buffer}, span.first, tokens};
  return attend_stretch<T>({a.rows, d, begin, end, first, last, a.scale, 0, sums, largest, total}, source, q, scores, weights,
                           kSplitTokens);
}

template <typename T>
static void join_splits(const PageAttention& a, int64_t head) {
  const int64_t d = a.head_dim;
  const Scratch scratch(d * 4);
  float* joined = scratch.floats();
  for (int64_t r = 0; r < a.rows; ++r) {
    const int64_t at = head * a.splits * a.rows + r;
    a.lse[head * a.rows + r] = join_stretches(a.sums + at * d, a.largest + at, a.total + at, a.splits, a.rows, d, joined);
    for (int64_t j = 0; j < d; ++j) store_float(a.out, a.q_type, (head * a.rows + r) * d + j, joined[j]);
  }
}

template <typename T>
static constexpr AttentionVariant attention_variant() {
  return {attend_split<T>, join_splits<T>};
}
