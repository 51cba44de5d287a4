// The body of prefill.h, for every instruction set; after common/attention.inl, whose tags say what multiplies. Their X is here what
// queries, keys, weights and values are.

// The tag T, and how many queries and blocks of 16 tokens (or of 16 elements of the values) have their sums in registers at a time.
template <typename T, int Rows, int Blocks>
struct Tiled : T {
  static constexpr int kRows = Rows, kBlocks = Blocks;
};

constexpr int64_t kStretchTokens = 256;  // tokens between two looks at the largest score
constexpr int64_t kNearRows = 16;        // queries whose scores of a stretch are in the cache at a time

// The vector of a token.
static const uint8_t* vector_at(const Prompt& p, const Vectors& v, int64_t batch, int64_t head, int64_t token) {
  const int64_t at = batch * v.batch_stride + head * v.head_stride + token * v.token_stride;
  return static_cast<const uint8_t*>(v.data) + at * (p.type == Float::fp32 ? 4 : 2);
}

template <typename X>
static void load_elements(const uint8_t* from, Float type, int64_t count, X* to) {
  if (type == (sizeof(X) == 4 ? Float::fp32 : Float::bf16)) {
    std::memcpy(to, from, count * sizeof(X));
  } else if (type == Float::bf16) {
    for (int64_t i = 0; i < count; ++i) to[i] = load_float(from, Float::bf16, i);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = load_float(from, Float::fp16, i);
  }
}

static void store_elements(void* to, Float type, int64_t at, const float* from, int64_t count) {
  if (type == Float::fp32) {
    std::memcpy(static_cast<float*>(to) + at, from, count * 4);
  } else if (type == Float::bf16) {
    for (int64_t i = 0; i < count; ++i) store_float(to, Float::bf16, at + i, from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) store_float(to, Float::fp16, at + i, from[i]);
  }
}

// ----------------------------------------------------------------------------------------------------------------------------------- pack

template <typename T>
static constexpr int64_t packed_bytes(int64_t d) {
  return kBlockTokens * d * static_cast<int64_t>(sizeof(typename T::X));
}

template <typename T>
static void pack_part(const Prompt& p, int64_t head, int64_t part) {
  using X = typename T::X;
  const Live live = p.live(head);
  const int64_t d = p.head_dim, words = d / T::kLane, b = head / p.kv_heads, h = head % p.kv_heads;
  const int64_t end = std::min((part + 1) * kPackBlocks, divide_up(live.tokens, kBlockTokens));
  const Scratch scratch(packed_bytes<T>(d));
  X* rows = reinterpret_cast<X*>(scratch.get());
  for (int64_t block = part * kPackBlocks; block < end; ++block) {
    const int64_t token = block * kBlockTokens, count = std::min(kBlockTokens, live.tokens - token);
    const int64_t at = (head * p.blocks() + block) * packed_bytes<T>(d);
    std::memset(rows + count * d, 0, (kBlockTokens - count) * d * sizeof(X));
    for (int64_t t = 0; t < count; ++t) load_elements(vector_at(p, p.k, b, h, live.first + token + t), p.type, d, rows + t * d);
    const uint8_t* from = reinterpret_cast<const uint8_t*>(rows);
    for (int64_t i = 0; i < words; ++i)
      for (int64_t t = 0; t < kBlockTokens; ++t) std::memcpy(p.keys + at + i * kBlockRow + t * 4, from + (t * words + i) * 4, 4);
    for (int64_t t = 0; t < count; ++t) load_elements(vector_at(p, p.v, b, h, live.first + token + t), p.type, d, rows + t * d);
    X* values = reinterpret_cast<X*>(p.values + at);
    for (int64_t t = 0; t < kBlockTokens; t += T::kLane)
      for (int64_t i = 0; i < d; ++i)
        for (int64_t j = 0; j < T::kLane; ++j) values[t * d + i * T::kLane + j] = rows[(t + j) * d + i];
    if (p.bias) {
      float* biases = p.biases + (head * p.blocks() + block) * kBlockTokens;
      std::memcpy(biases, p.bias + head * p.tokens + live.first + token, count * 4);
      std::fill_n(biases + count, kBlockTokens - count, 0.0f);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------------------------- products

// Calls f(m, u) for all m < M and u < U, without a loop: gcc 12 keeps sums in registers only then.
template <int M, int U, typename F>
static void for_all(const F& f) {
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) f(m, u);
}

// The products of U blocks of keys with M queries: those of query m from scores + m * stride on.
template <typename T, int M, int U>
static void multiply_keys(const uint8_t* keys, int64_t d, const typename T::X* q, float* scores, int64_t stride) {
  Sums sum[M][U];
  Row row[U];
  for_all<M, U>([&](int m, int u) {
    for (Vector& part : sum[m][u].part) part = Vector{};
  });
  for (int64_t i = 0; i < d; i += T::kLane, keys += kBlockRow, q += T::kLane) {
    for_all<1, U>([&](int, int u) { row[u] = load_row(keys + u * packed_bytes<T>(d)); });
    for_all<M, U>([&](int m, int u) { add_row<T>(sum[m][u], row[u], q + m * d); });
  }
  for_all<M, U>([&](int m, int u) { store_sums(scores + m * stride + u * kWide, sum[m][u]); });
}

// The same for any number of blocks and kRows queries.
template <typename T, int U = T::kBlocks>
static void multiply_all_keys(const uint8_t* keys, int64_t blocks, int64_t d, const typename T::X* q, float* scores, int64_t stride) {
  for (; blocks >= U; blocks -= U, keys += U * packed_bytes<T>(d), scores += U * kWide)
    multiply_keys<T, T::kRows, U>(keys, d, q, scores, stride);
  if constexpr (U > 1) multiply_all_keys<T, U / 2>(keys, blocks, d, q, scores, stride);
}

// Sixteen times U elements of M sums: what they are times `shrink`, plus the values of `tokens` tokens times their weights.
template <typename T, int M, int U>
static void add_values(const uint8_t* values, int64_t tokens, int64_t d, const typename T::X* weights, int64_t stride, const float* shrink,
                       float* sums) {
  Sums sum[M][U];
  Row row[U];
  for_all<M, U>([&](int m, int u) {
    sum[m][u] = load_sums(sums + m * d + u * kWide);
    for (Vector& part : sum[m][u].part) part *= shrink[m];
  });
  for (int64_t t = 0; t < tokens; t += T::kLane, values += d / kWide * kBlockRow, weights += T::kLane) {
    for_all<1, U>([&](int, int u) { row[u] = load_row(values + u * kBlockRow); });
    for_all<M, U>([&](int m, int u) { add_row<T>(sum[m][u], row[u], weights + m * stride); });
  }
  for_all<M, U>([&](int m, int u) { store_sums(sums + m * d + u * kWide, sum[m][u]); });
}

// The same for all d elements of kRows sums.
template <typename T, int U = T::kBlocks>
static void add_all_values(const uint8_t* values, int64_t tokens, int64_t d, const typename T::X* weights, int64_t stride,
                           const float* shrink, float* sums, int64_t group = 0) {
  const int64_t groups = d / kWide;
  for (; group + U <= groups; group += U)
    add_values<T, T::kRows, U>(values + group * kBlockRow, tokens, d, weights, stride, shrink, sums + group * kWide);
  if constexpr (U > 1) add_all_values<T, U / 2>(values, tokens, d, weights, stride, shrink, sums, group);
}

// -------------------------------------------------------------------------------------------------------------------------------- softmax

// Softmax is computed in powers of two: a score is what is exponentiated, times this.
constexpr float kLog2E = 1.44269504f;

// Products of one query with some tokens become scores once multiplied by what is returned. `biases`: those of the tokens, or null.
static float finish_scores(const Prompt& p, float* scores, int64_t width, const float* biases) {
  if (p.cap == 0 && !biases && p.scale > 0) return p.scale * kLog2E;
  const float narrow = p.cap != 0 ? 2 * kLog2E / p.cap : 0;
  for (int64_t i = 0; i < width; i += kLanes) {
    Vector score = load_vector(scores + i) * p.scale;
    if (p.cap != 0) {  // tanh(x) = 1 - 2 / (exp(2 x) + 1)
      const Vector power = score * narrow;
      score = p.cap - 2 * p.cap / (power_of_two(power > 126.0f ? Vector{} + 126.0f : power) + 1.0f);
    }
    if (biases) score += load_vector(biases + i);
    store_vector(scores + i, score);
  }
  return kLog2E;
}

static Integers lane_numbers() {
  Integers lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

// The largest of the first `seen` scores. Those behind them become -inf up to the next whole vector.
static float largest_score(float* scores, int64_t seen) {
  constexpr float none = -__builtin_inff();
  Vector most = Vector{} + none;
  int64_t i = 0;
  for (; i + kLanes <= seen; i += kLanes) {
    const Vector score = load_vector(scores + i);
    most = score > most ? score : most;
  }
  if (i < seen) {
    const Vector score = lane_numbers() < static_cast<int32_t>(seen - i) ? load_vector(scores + i) : Vector{} + none;
    most = score > most ? score : most;
    store_vector(scores + i, score);
  }
  return max_lanes(most);
}

// Weights in the place of scores: of the first `seen` tokens, up to the next whole vector, 0 for the others up to `width`. Returns their
// sum.
template <typename T>
static float weigh_scores(float* scores, typename T::X* weights, int64_t seen, int64_t width, float factor, float base) {
  Vector sum = {};
  int64_t i = 0;
  for (; i < seen; i += kLanes) {
    const Vector weight = power_of_two(load_vector(scores + i) * factor - base);
    sum += weight;
    T::put(weights + i, weight);
  }
  for (; i < width; i += kLanes) T::put(weights + i, Vector{});
  return sum_lanes(sum);
}

// ----------------------------------------------------------------------------------------------------------------------------------- tile

template <typename T>
static void attend_tile(const Prompt& p, int64_t head, int64_t tile) {
  using X = typename T::X;
  constexpr float none = -__builtin_inff();
  const Live live = p.live(head);
  const int64_t d = p.head_dim, g = p.group, b = head / p.kv_heads, h = head % p.kv_heads, heads = p.kv_heads * g;
  const int64_t size = p.type == Float::fp32 ? 4 : 2, begin = tile * p.tile_positions();
  if (tile == 0) {
    for (int64_t j = 0; j < g; ++j) {
      const int64_t at = (b * heads + h * g + j) * p.length;
      std::memset(static_cast<uint8_t*>(p.out) + at * d * size, 0, live.skipped * d * size);
      std::fill_n(p.lse + at, live.skipped, none);
    }
  }
  const int64_t end = std::min(begin + p.tile_positions(), live.queries);
  if (begin >= end) return;

  // Row r is the query of head r % g at position begin + r / g. The last few may be no queries at all.
  const int64_t rows = (end - begin) * g, all = round_up(rows, kNearRows);
  const int64_t q_bytes = all * d * sizeof(X);
  const Scratch scratch(q_bytes + (kNearRows * (kStretchTokens + 1) + all * (d + 2)) * 4);
  X* q = reinterpret_cast<X*>(scratch.get());
  float *scores = reinterpret_cast<float*>(scratch.get() + q_bytes), *sums = scores + kNearRows * kStretchTokens;
  float *largest = sums + all * d, *total = largest + all, *shrink = total + all;
  X* weights = reinterpret_cast<X*>(scores);
  constexpr int64_t stride = kStretchTokens * 4 / sizeof(X);
  for (int64_t r = 0; r < rows; ++r) load_elements(vector_at(p, p.q, b, h * g + r % g, live.skipped + begin + r / g), p.type, d, q + r * d);
  std::memset(q + rows * d, 0, (all - rows) * d * sizeof(X));
  std::memset(sums, 0, all * d * 4);
  std::fill_n(largest, all, none);
  std::fill_n(total, all, 0.0f);

  const uint8_t* keys = p.keys + head * p.blocks() * packed_bytes<T>(d);
  const uint8_t* values = p.values + head * p.blocks() * packed_bytes<T>(d);
  const float* biases = p.biases ? p.biases + head * p.blocks() * kBlockTokens : nullptr;
  // How many of the tokens from `at` on a row sees, at most a stretch.
  const auto seen = [&](int64_t row, int64_t at) {
    return std::clamp(live.position(begin + std::min(row, rows - 1) / g) + 1 - at, int64_t{0}, kStretchTokens);
  };
  for (int64_t at = 0; at <= live.position(end - 1); at += kStretchTokens) {
    const uint8_t *k = keys + at / kBlockTokens * packed_bytes<T>(d), *v = values + at / kBlockTokens * packed_bytes<T>(d);
    for (int64_t from = 0; from < rows; from += kNearRows) {
      const int64_t to = std::min(from + kNearRows, round_up(rows, T::kRows));
      float old[kNearRows], factor = 0;
      std::memcpy(old, largest + from, sizeof(old));
      for (int64_t r = from; r < to; r += T::kRows) {
        const int64_t blocks = divide_up(seen(r + T::kRows - 1, at), kBlockTokens);
        multiply_all_keys<T>(k, blocks, d, q + r * d, scores + (r - from) * kStretchTokens, kStretchTokens);
        for (int64_t i = r; i < r + T::kRows; ++i) {
          float* mine = scores + (i - from) * kStretchTokens;
          factor = finish_scores(p, mine, blocks * kBlockTokens, biases ? biases + at : nullptr);
          largest[i] = std::max(largest[i], largest_score(mine, seen(i, at)) * factor);
        }
      }
      for (int64_t i = 0; i < kNearRows; i += kLanes) {
        const Vector now = load_vector(largest + from + i), base = now > none ? now : Vector{};
        store_vector(shrink + i, power_of_two(load_vector(old + i) - base));
      }
      for (int64_t r = from; r < to; r += T::kRows) {
        const int64_t tokens = seen(r + T::kRows - 1, at), width = round_up(tokens, kBlockTokens);
        for (int64_t i = r; i < r + T::kRows; ++i) {
          const float base = largest[i] == none ? 0 : largest[i];
          const float sum =
              weigh_scores<T>(scores + (i - from) * kStretchTokens, weights + (i - from) * stride, seen(i, at), width, factor, base);
          total[i] = total[i] * shrink[i - from] + sum;
        }
        add_all_values<T>(v, round_up(tokens, T::kLane), d, weights + (r - from) * stride, stride, shrink + (r - from), sums + r * d);
      }
    }
  }

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = (b * heads + h * g + r % g) * p.length + live.skipped + begin + r / g;
    const float inverse = total[r] == 0 ? 0 : 1 / total[r];
    for (int64_t i = 0; i < d; i += kLanes) store_vector(sums + r * d + i, load_vector(sums + r * d + i) * inverse);
    store_elements(p.out, p.type, at * d, sums + r * d, d);
    p.lse[at] = total[r] == 0 ? none : static_cast<float>(largest[r] * 0.69314718055994531 + std::log(double{total[r]}));
  }
}

// --------------------------------------------------------------------------------------------------------------------------------- scores

template <typename T>
static void score_part(const Prompt& p, int64_t head, int64_t part) {
  using X = typename T::X;
  const Live live = p.live(head);
  const int64_t d = p.head_dim, b = head / p.kv_heads, h = head % p.kv_heads, at = part * kScoreTokens;
  if (part == 0)
    for (int64_t j = 0; j < p.group; ++j) std::fill_n(p.sums + (head * p.group + j) * p.tokens, live.first, 0.0f);
  const int64_t width = std::min(kScoreTokens, live.tokens - at);
  if (width <= 0) return;

  const int64_t q_bytes = round_up(T::kRows * d * sizeof(X), 64);
  const Scratch scratch(q_bytes + (T::kRows + 1) * kScoreTokens * 4);
  X* q = reinterpret_cast<X*>(scratch.get());
  float *scores = reinterpret_cast<float*>(scratch.get() + q_bytes), *column = scores + T::kRows * kScoreTokens;
  const uint8_t* keys = p.keys + (head * p.blocks() + at / kBlockTokens) * packed_bytes<T>(d);
  const float* biases = p.biases ? p.biases + head * p.blocks() * kBlockTokens + at : nullptr;
  const int64_t step = std::max<int64_t>(p.sample, 1), most = p.sample ? divide_up(live.queries, step) : std::min(p.window, live.queries);
  // Of `most` queries, those that see a token of this part.
  const int64_t count = std::min(most, divide_up(live.tokens - at, step));
  for (int64_t j = 0; j < p.group; ++j) {
    const int64_t query_head = h * p.group + j;
    std::fill_n(column, round_up(width, kBlockTokens), 0.0f);
    for (int64_t i = 0; i < count; i += T::kRows) {
      const int64_t rows = std::min<int64_t>(T::kRows, count - i);
      const auto query = [&](int64_t row) { return live.queries - 1 - (count - 1 - std::min(i + row, count - 1)) * step; };
      const auto seen = [&](int64_t row) { return std::min(live.position(query(row)) + 1 - at, width); };
      std::memset(q + rows * d, 0, (T::kRows - rows) * d * sizeof(X));
      for (int64_t r = 0; r < rows; ++r) load_elements(vector_at(p, p.q, b, query_head, live.skipped + query(r)), p.type, d, q + r * d);
      const int64_t blocks = divide_up(seen(T::kRows - 1), kBlockTokens);
      multiply_all_keys<T>(keys, blocks, d, q, scores, kScoreTokens);
      for (int64_t r = 0; r < rows; ++r) {
        float* mine = scores + r * kScoreTokens;
        const float factor = finish_scores(p, mine, blocks * kBlockTokens, biases);
        const float lse = p.lse[(head * p.group + j) * p.length + live.skipped + query(r)];
        if (lse == -__builtin_inff()) continue;  // it sees nothing
        const float base = lse * kLog2E;
        const Integers lanes = lane_numbers();
        for (int64_t t = 0; t < blocks * kBlockTokens; t += kLanes) {
          const Vector weight = power_of_two(load_vector(mine + t) * factor - base);
          const Vector kept = lanes < static_cast<int32_t>(seen(r) - t) ? weight : Vector{};
          store_vector(column + t, load_vector(column + t) + kept);
        }
      }
    }
    std::memcpy(p.sums + (head * p.group + j) * p.tokens + live.first + at, column, width * 4);
  }
}

// The larger one; NaN if there is one.
static Vector larger(Vector a, Vector b) { return (a > b) | (a != a) ? a : b; }

static void pool_head(const Prompt& p, int64_t query_head) {
  const Live live = p.live(query_head / p.group);
  const int64_t n = live.tokens, pool = std::min(p.pool, 2 * n + 1), half = pool / 2;
  float* out = p.score + query_head * p.tokens;
  std::fill_n(out, live.first, 0.0f);
  if (n == 0) return;
  const Scratch scratch((round_up(n, kLanes) + 2 * pool + kLanes) * 4);
  float* window = scratch.floats();
  std::fill_n(window, round_up(n, kLanes) + 2 * pool + kLanes, -__builtin_inff());
  std::memcpy(window + half, p.sums + query_head * p.tokens + live.first, n * 4);
  // window[i] becomes the largest of `width` from i on; the last step joins two that overlap.
  int64_t width = 1;
  for (; 2 * width <= pool; width *= 2)
    for (int64_t i = 0; i < n + pool - width; i += kLanes)
      store_vector(window + i, larger(load_vector(window + i), load_vector(window + i + width)));
  for (int64_t i = 0; i < n; i += kLanes) store_vector(window + i, larger(load_vector(window + i), load_vector(window + i + pool - width)));
  std::memcpy(out + live.first, window, n * 4);
}

template <typename T>
static constexpr PrefillVariant prefill_variant() {
  return {sizeof(typename T::X), pack_part<T>, attend_tile<T>, score_part<T>, pool_head};
}
