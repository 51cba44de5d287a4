// The body of attention.h, for every instruction set inside its own region and namespace; after vectors.inl. What multiplies is a tag T:
//
//   X                    what queries and weights are multiplied as, float or bf16 (uint16_t)
//   of(value)            a float as X
//   put(to, weights)     a vector of floats as X
//   kLane                neighbours along the sum in a lane of a row: 2 of bf16, 1 of float
//   add(sum, row, x)     sums plus those of a row times as many at x, a vector of each
//   kRows, kSums         queries that one pass takes at most, 1 or 4; independent sums it should keep, at most 8
//
// Where the blocks come from is a source S, which knows its keys and values:
//
//   score<T>(block, a, q, scores, stride)     the products of 16 tokens with all queries, those of query r from scores + r * stride on
//   mix<T>(block, a, weights, stride)         adds the values of 16 tokens, times their weights, to a.sums
//
// Both return false if the block is damaged.

// A row of a block, sixteen lanes; and as many sums.
constexpr int64_t kWide = 16;
constexpr int kParts = kWide / kLanes;
struct Row {
  Integers part[kParts];
};
struct Sums {
  Vector part[kParts];
};

static Row load_row(const uint8_t* from) {
  Row row;
  for (int i = 0; i < kParts; ++i) row.part[i] = reinterpret_cast<Integers>(load_vector(from + i * kVectorBytes));
  return row;
}

static Sums load_sums(const float* from) {
  Sums sums;
  for (int i = 0; i < kParts; ++i) sums.part[i] = load_vector(from + i * kLanes);
  return sums;
}

static void store_sums(float* to, const Sums& sums) {
  for (int i = 0; i < kParts; ++i) store_vector(to + i * kLanes, sums.part[i]);
}

// sums plus a row times what is at x.
template <typename T>
static void add_row(Sums& sums, const Row& row, const typename T::X* x) {
  for (int i = 0; i < kParts; ++i) sums.part[i] = T::add(sums.part[i], row.part[i], x);
}

template <int MostRows, int MostSums>
struct Exact {
  using X = float;
  static constexpr int kRows = MostRows, kSums = MostSums, kLane = 2;

  static X of(float value) { return value; }
  static void put(X* to, Vector weights) { store_vector(to, weights); }
  static Vector add(Vector sum, Integers row, const X* x) { return sum + lower(row) * x[0] + upper(row) * x[1]; }
};

// Blocks of floats, with one in a lane.
template <int MostRows, int MostSums>
struct Singles : Exact<MostRows, MostSums> {
  static constexpr int kLane = 1;

  static Vector add(Vector sum, Integers row, const float* x) { return sum + reinterpret_cast<Vector>(row) * x[0]; }
};

// Queries and weights rounded to bf16, as where the machine multiplies bf16.
template <int MostRows, int MostSums>
struct Rounded : Exact<MostRows, MostSums> {
  static float of(float value) { return bf16_to_float(float_to_bf16(value)); }
  static void put(float* to, Vector weights) { store_vector(to, reinterpret_cast<Vector>(round_bf16(weights))); }
};

static const bool kAhead = prefetch_pays();

// Asks for what lies a page later, where the hardware's own prefetching ends. Past the end of an array that is harmless.
static void ahead(const uint8_t* at) {
  if (kAhead) fetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(at) + 4096));
}

// Rows of a block, in order. Of one that is in the cache:
struct NearRows {
  const uint8_t* at;

  template <int U>
  void take(Row (&row)[U]) {
    for (int u = 0; u < U; ++u, at += kBlockRow) row[u] = load_row(at);
  }
};

// Of one in memory, where another block lies that is wanted next.
struct FarRows {
  const uint8_t *at, *other;

  template <int U>
  void take(Row (&row)[U]) {
    for (int u = 0; u < U; ++u, at += kBlockRow, other += kBlockRow) {
      ahead(at);
      fetch(other);
      row[u] = load_row(at);
    }
  }
};

// Calls f<M>(first query) for groups of queries.
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

// The products of the keys in `count` rows, a multiple of 8, with M queries. Returns where the rows end.
template <typename T, int M, typename Rows>
static Rows score_rows(Rows keys, int64_t count, const typename T::X* q, int64_t dim, float* scores, int64_t stride) {
  constexpr int U = T::kSums > M ? T::kSums / M : 1;
  Sums sum[M][U];
  for (int m = 0; m < M; ++m)
    for (int u = 0; u < U; ++u)
      for (Vector& part : sum[m][u].part) part = Vector{};  // gcc clears a whole array by a slow string instruction
  for (int64_t first = 0; first < count; first += U) {
    Row row[U];
    keys.take(row);
    for (int u = 0; u < U; ++u)
      for (int m = 0; m < M; ++m) add_row<T>(sum[m][u], row[u], q + m * dim + T::kLane * (first + u));
  }
  for (int m = 0; m < M; ++m) {
    for (int u = 1; u < U; ++u)
      for (int i = 0; i < kParts; ++i) sum[m][0].part[i] += sum[m][u].part[i];
    store_sums(scores + m * stride, sum[m][0]);
  }
  return keys;
}

// Adds the values of a block times their weights to M rows of sums, G times 16 elements at a time: the more, the longer are the stretches
// of memory that are read in order.
template <typename T, int M, int G>
static void mix_groups(const uint8_t* block, int64_t groups, const typename T::X* weights, int64_t stride, float* sums, int64_t dim) {
  for (int64_t g = 0; g < groups; g += G) {
    Sums sum[M][G];
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < G; ++i) sum[m][i] = load_sums(sums + m * dim + (g + i) * kWide);
    for (int64_t line = 0; line < kBlockTokens / T::kLane; ++line) {
      for (int i = 0; i < G; ++i) {
        const uint8_t* at = block + (line * groups + g + i) * kBlockRow;
        ahead(at);
        const Row row = load_row(at);
        for (int m = 0; m < M; ++m) add_row<T>(sum[m][i], row, weights + m * stride + T::kLane * line);
      }
    }
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < G; ++i) store_sums(sums + m * dim + (g + i) * kWide, sum[m][i]);
  }
}

// The same with the largest G that divides the groups and has registers.
template <typename T, int M, int G = std::min<int>(T::kSums, std::bit_floor<unsigned>(2 * T::kSums / M))>
static void mix_rows(const uint8_t* block, const typename T::X* weights, int64_t stride, float* sums, int64_t dim) {
  const int64_t groups = dim / kWide;
  if constexpr (G > 1) {
    if (groups % G != 0) return mix_rows<T, M, G / 2>(block, weights, stride, sums, dim);
  }
  mix_groups<T, M, G>(block, groups, weights, stride, sums, dim);
}

// A dense block for all queries. `other`: a block that is wanted next.
template <typename T>
static void score_block(const uint8_t* block, const uint8_t* other, const Stretch& a, const typename T::X* q, float* scores,
                        int64_t stride) {
  for_rows<T>(a.rows, [&]<int M>(int64_t r) {
    score_rows<T, M>(FarRows{block, other}, block_rows(a.dim), q + r * a.dim, a.dim, scores + r * stride, stride);
  });
}

template <typename T>
static void mix_block(const uint8_t* block, const Stretch& a, const typename T::X* weights, int64_t stride) {
  for_rows<T>(a.rows, [&]<int M>(int64_t r) { mix_rows<T, M>(block, weights + r * stride, stride, a.sums + r * a.dim, a.dim); });
}

// The weights of one query from its products with tokens [begin, begin + width). Both may be in the same place.
template <typename T>
static void weigh(const Stretch& a, int64_t row, int64_t begin, int64_t width, float* scores, typename T::X* weights) {
  constexpr float none = -__builtin_inff();
  const auto from = static_cast<int32_t>(std::clamp(a.first[row] - begin, int64_t{0}, width));
  const auto to = static_cast<int32_t>(std::clamp(a.last[row] - begin, int64_t{0}, width));
  Integers lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  const float narrow = a.cap != 0 ? 2 / a.cap : 0;
  Vector most = Vector{} + none, sum = {};
  const auto finish = [&]<bool Whole>(int32_t i) {
    Vector score = load_vector(scores + i) * a.scale;
    if (a.cap != 0) score = a.cap - 2 * a.cap / (exponential(score * narrow) + 1.0f);  // tanh(x) = 1 - 2 / (exp(2 x) + 1)
    if (a.bias != nullptr) score += load_vector(a.bias + i);
    if constexpr (!Whole) score = (lanes + i >= from) & (lanes + i < to) ? score : Vector{} + none;
    most = score > most ? score : most;
    store_vector(scores + i, score);
  };
  if (from == 0 && to == width) {
    for (int32_t i = 0; i < width; i += kLanes) finish.template operator()<true>(i);
  } else {
    for (int32_t i = 0; i < width; i += kLanes) finish.template operator()<false>(i);
  }
  const float largest = max_lanes(most), base = largest == none ? 0 : largest;
  for (int64_t i = 0; i < width; i += kLanes) {
    const Vector weight = exponential_up_to_88(load_vector(scores + i) - base);
    sum += weight;
    T::put(weights + i, weight);
  }
  a.largest[row] = largest;
  a.total[row] = sum_lanes(sum);
}

// Fills sums, largest and total. `scores` and `weights` have room for `stride` tokens of each query; with X float they may be one array.
// False if a block is damaged.
template <typename T, typename S>
static bool attend_stretch(const Stretch& a, const S& source, const typename T::X* q, float* scores, typename T::X* weights,
                           int64_t stride) {
  const int64_t first = a.begin / kBlockTokens, last = (a.end + kBlockTokens - 1) / kBlockTokens;
  for (int64_t i = first; i < last; ++i)
    if (!source.template score<T>(i, a, q, scores + (i - first) * kBlockTokens, stride)) return false;
  for (int64_t r = 0; r < a.rows; ++r)
    weigh<T>(a, r, first * kBlockTokens, (last - first) * kBlockTokens, scores + r * stride, weights + r * stride);
  std::fill_n(a.sums, a.rows * a.dim, 0.0f);
  for (int64_t i = first; i < last; ++i)
    if (!source.template mix<T>(i, a, weights + (i - first) * kBlockTokens, stride)) return false;
  return true;
}

// Joins the stretches of one query, those of stretch i lying i * stride rows further on: the values weighted by all the tokens seen, 0 if
// there are none. Returns the logarithm of the sum of all exp(score).
static float join_stretches(const float* sums, const float* largest, const float* total, int64_t count, int64_t stride, int64_t dim,
                            float* out) {
  constexpr float none = -__builtin_inff();
  float most = none, all = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, largest[i * stride]);
  std::fill_n(out, dim, 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    if (total[i * stride] == 0) continue;
    const float weight = std::exp(largest[i * stride] - most);
    all += weight * total[i * stride];
    const float* part = sums + i * stride * dim;
    for (int64_t d = 0; d < dim; d += kLanes) store_vector(out + d, load_vector(out + d) + load_vector(part + d) * weight);
  }
  if (all == 0) return none;
  for (int64_t d = 0; d < dim; d += kLanes) store_vector(out + d, load_vector(out + d) * (1 / all));
  return most + std::log(all);
}
