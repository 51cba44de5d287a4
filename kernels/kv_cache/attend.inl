// The body of attend.h, for every instruction set; after vectors.inl and attention.inl. The including file says how, by a struct K:
//
//   Bf16, Fp32           tags of attention.inl, for pages of bf16 and of floats
//   kInt8, kInt4         whether it multiplies codes themselves (attend_vnni.inl, attend_bf16.inl); else they become floats first

// What a part works on, in scratch.
template <typename K>
struct Work {
  const Attention& a;
  const Part& part;
  const Pool& pool;
  int64_t first, last, width;  // pages [first, last), and their tokens
  const int64_t *seen_first, *seen_last;
  uint8_t* page;   // one page as floats
  float* q;        // [rows][dim]
  float* weights;  // [rows][kPartTokens]

  const int32_t* line() const { return pool.line(part.head, a.kv_heads); }
  const uint8_t* key(int64_t i) const { return pool.k + pool.place(line()[i], part.head, a.kv_heads) * pool.k_bytes; }
  const uint8_t* value(int64_t i) const { return pool.v + pool.place(line()[i], part.head, a.kv_heads) * pool.v_bytes; }
  // Asks for the page after `page`, the i-th, where it does not lie behind it: the hardware does not guess that.
  void ask_next(const uint8_t* page, int64_t i, Kind kind) const {
    if (i + 1 == last) return;
    const uint8_t* next = kind == Kind::key ? key(i + 1) : value(i + 1);
    const int64_t bytes = kind == Kind::key ? pool.k_bytes : pool.v_bytes;
    if (next == page + bytes) return;
    for (int64_t at = 0; at < bytes; at += kRowBytes) fetch(next + at);
  }
  // Tokens of page i that there are; slots after them may hold anything.
  int64_t filled(int64_t i) const { return std::min(kPageTokens, part.end - i * kPageTokens); }
};

static Row load_grid(const uint8_t* half_floats) {
  float values[kWide];
  for (int64_t i = 0; i < kWide; ++i) {
    uint16_t bits;
    std::memcpy(&bits, half_floats + 2 * i, 2);
    values[i] = fp16_to_float(bits);
  }
  return load_row(reinterpret_cast<const uint8_t*>(values));
}

// A page with a grid as rows of floats: what its codes stand for.
static const uint8_t* expand_page(const uint8_t* page, PageType type, Kind kind, int64_t dim, uint8_t* out) {
  const int64_t per_lane = type == PageType::int8 ? 4 : 8, lanes = kind == Kind::key ? kPageTokens : dim;
  const int64_t lines = (kind == Kind::key ? dim : kPageTokens) / per_lane, groups = grid_groups(type, kind, dim);
  const uint8_t *scales = page + rows_bytes(type, dim), *minimums = scales + 2 * groups;
  const bool same = type == PageType::int8 && kind == Kind::key;  // the lanes of a row are the groups; else a row has one group
  const Row scale = load_grid(scales), minimum = load_grid(minimums);
  for (int64_t line = 0; line < lines; ++line) {
    for (int64_t lane = 0; lane < lanes; lane += kWide) {
      const Row codes = load_row(page + (line * lanes + lane) * 4);
      for (int64_t i = 0; i < per_lane; ++i) {
        const int64_t along = line * per_lane + i;
        const int shift = static_cast<int>(type == PageType::int8 ? 8 * i : 4 * (i % 2 * 4 + i / 2));
        const int mask = type == PageType::int8 ? 255 : 15;
        float one_scale = 0, one_minimum = 0;
        if (!same) {
          uint16_t bits[2];
          std::memcpy(bits, scales + 2 * along, 2);
          std::memcpy(bits + 1, minimums + 2 * along, 2);
          one_scale = fp16_to_float(bits[0]);
          one_minimum = fp16_to_float(bits[1]);
        }
        for (int p = 0; p < kParts; ++p) {
          const Vector code = __builtin_convertvector(codes.part[p] >> shift & mask, Vector);
          const Vector value = same ? code * reinterpret_cast<Vector>(scale.part[p]) + reinterpret_cast<Vector>(minimum.part[p])
                                    : code * one_scale + one_minimum;
          store_vector(out + ((along * lanes + lane) * 4 + p * kVectorBytes), value);
        }
      }
    }
  }
  return out;
}

// A copy of a page of values with zeros in the slots without a token, which may hold anything, NaN too.
static const uint8_t* without_others(const uint8_t* page, int64_t lane, int64_t filled, int64_t dim, uint8_t* out) {
  const int64_t bytes = 4 / lane;
  if (page != out) std::memcpy(out, page, kPageTokens * dim * bytes);
  for (int64_t t = filled; t < kPageTokens; ++t)
    for (int64_t i = 0; i < dim; ++i) std::memset(out + ((t / lane * dim + i) * lane + t % lane) * bytes, 0, bytes);
  return out;
}

template <typename T>
static void convert(const float* from, int64_t count, typename T::X* to) {
  for (int64_t i = 0; i < count; i += kLanes) T::put(to + i, load_vector(from + i));
}

// Rows of a page in memory. To ask for pages that are wanted later made reading slower: on Zen 4 the hardware's own prefetching alone is as
// fast as it gets.
struct StreamRows {
  const uint8_t* at;

  template <int U>
  void take(Row (&row)[U]) {
    for (int u = 0; u < U; ++u, at += kRowBytes) {
      ahead(at);
      row[u] = load_row(at);
    }
  }
};

// Pages that are multiplied as they are.
template <typename T, typename K>
static void score_plain(const Work<K>& w, const typename T::X* q, float* scores) {
  for (int64_t i = w.first; i < w.last; ++i) {
    const uint8_t* page = w.key(i);
    w.ask_next(page, i, Kind::key);
    for_rows<T>(w.a.rows, [&]<int M>(int64_t r) {
      score_rows<T, M>(StreamRows{page}, w.a.dim / T::kLane, q + r * w.a.dim, w.a.dim,
                       scores + r * kPartTokens + (i - w.first) * kPageTokens, kPartTokens);
    });
  }
}

template <typename K>
static void score_expanded(const Work<K>& w, float* scores) {
  using T = typename K::Fp32;
  for (int64_t i = w.first; i < w.last; ++i) {
    const uint8_t* page = expand_page(w.key(i), w.pool.k_type, Kind::key, w.a.dim, w.page);
    for_rows<T>(w.a.rows, [&]<int M>(int64_t r) {
      score_rows<T, M>(NearRows{page}, w.a.dim, w.q + r * w.a.dim, w.a.dim, scores + r * kPartTokens + (i - w.first) * kPageTokens,
                       kPartTokens);
    });
  }
}

template <typename T, typename K, typename Open>
static void mix_pages(const Work<K>& w, const typename T::X* weights, float* sums, const Open& open) {
  for (int64_t i = w.first; i < w.last; ++i) {
    const uint8_t* page = open(i);
    w.ask_next(w.value(i), i, Kind::value);
    if (w.filled(i) < kPageTokens) page = without_others(page, T::kLane, w.filled(i), w.a.dim, w.page);
    const auto* at = weights + (i - w.first) * kPageTokens;
    for_rows<T>(w.a.rows, [&]<int M>(int64_t r) { mix_rows<T, M>(page, at + r * kPartTokens, kPartTokens, sums + r * w.a.dim, w.a.dim); });
  }
}

template <typename K>
static void attend_part(const Attention& a, int64_t index) {
  using X = typename K::Bf16::X;
  const Part& part = a.parts[index];
  const Pool& pool = a.pools[part.pool];
  const int64_t d = a.dim, first = part.begin / kPageTokens, last = divide_up(part.end, kPageTokens);
  const int64_t seen_bytes = round_up(a.rows * 16, 64), q_bytes = round_up(a.rows * d * 4, 64), w_bytes = a.rows * kPartTokens * 4;
  const int64_t page_bytes = kPageTokens * d * 4;
  const Scratch scratch(seen_bytes + page_bytes + 2 * q_bytes + 2 * w_bytes + (a.scores == nullptr ? w_bytes : 0));
  uint8_t* at = scratch.get();
  const auto take = [&at](int64_t bytes) {
    uint8_t* taken = at;
    at += bytes;
    return taken;
  };
  auto* seen = reinterpret_cast<int64_t*>(take(seen_bytes));
  const Work<K> w{a,
                  part,
                  pool,
                  first,
                  last,
                  (last - first) * kPageTokens,
                  seen,
                  seen + a.rows,
                  take(page_bytes),
                  reinterpret_cast<float*>(take(q_bytes)),
                  reinterpret_cast<float*>(take(w_bytes))};
  uint8_t *q_other = take(q_bytes), *w_other = take(w_bytes);
  float* scores = a.scores != nullptr ? a.scores + index * a.rows * kPartTokens : reinterpret_cast<float*>(take(w_bytes));

  for (int64_t i = 0; i < a.rows * d; ++i) w.q[i] = load_float(a.q, a.q_type, part.head * a.rows * d + i);
  for (int64_t r = 0; r < a.rows; ++r) {
    seen[r] = part.begin;
    // A query does not see the tokens after its own.
    seen[a.rows + r] = std::min(part.end, a.tokens[part.head] - a.length + 1 + r % a.length - part.before);
  }

  switch (pool.k_type) {
    case PageType::fp32:
      score_plain<typename K::Fp32>(w, w.q, scores);
      break;
    case PageType::bf16:
      convert<typename K::Bf16>(w.q, a.rows * d, reinterpret_cast<X*>(q_other));
      score_plain<typename K::Bf16>(w, reinterpret_cast<const X*>(q_other), scores);
      break;
    case PageType::int8:
      if constexpr (K::kInt8) {
        score_int8(w, q_other, scores);
        break;
      }
      score_expanded(w, scores);
      break;
    case PageType::int4:
      if constexpr (K::kInt4) {
        score_int4(w, reinterpret_cast<uint16_t*>(q_other), scores);
        break;
      }
      score_expanded(w, scores);
  }

  const float* bias = pool.bias == nullptr ? nullptr : pool.bias + part.head * pool.width * kPageTokens + first * kPageTokens;
  float* sums = a.sums + index * a.rows * d;
  const Stretch stretch{a.rows,
                        d,
                        part.begin,
                        part.end,
                        w.seen_first,
                        w.seen_last,
                        a.scale,
                        a.cap,
                        sums,
                        a.largest + index * a.rows,
                        a.total + index * a.rows,
                        bias};
  for (int64_t r = 0; r < a.rows; ++r)
    weigh<typename K::Fp32>(stretch, r, first * kPageTokens, w.width, scores + r * kPartTokens, w.weights + r * kPartTokens);

  std::fill_n(sums, a.rows * d, 0.0f);
  const auto value = [&](int64_t i) { return w.value(i); };
  const auto expanded = [&](int64_t i) { return expand_page(w.value(i), pool.v_type, Kind::value, d, w.page); };
  switch (pool.v_type) {
    case PageType::fp32:
      mix_pages<typename K::Fp32>(w, w.weights, sums, value);
      break;
    case PageType::bf16:
      for (int64_t r = 0; r < a.rows; ++r)
        convert<typename K::Bf16>(w.weights + r * kPartTokens, w.width, reinterpret_cast<X*>(w_other) + r * kPartTokens);
      mix_pages<typename K::Bf16>(w, reinterpret_cast<const X*>(w_other), sums, value);
      break;
    case PageType::int8:
      if constexpr (K::kInt8) {
        mix_int8(w, w_other, sums);
        break;
      }
      mix_pages<typename K::Fp32>(w, w.weights, sums, expanded);
      break;
    case PageType::int4:
      if constexpr (K::kInt4) {
        mix_int4(w, reinterpret_cast<uint16_t*>(w_other), sums);
        break;
      }
      mix_pages<typename K::Fp32>(w, w.weights, sums, expanded);
  }
}

template <typename K>
static void attend_join(const Attention& a, int64_t head) {
  const int64_t d = a.dim, first = a.first_part[head], count = a.first_part[head + 1] - first;
  const Scratch scratch(d * 4);
  float* joined = scratch.floats();
  for (int64_t r = 0; r < a.rows; ++r) {
    const int64_t at = first * a.rows + r;
    const float lse = join_stretches(a.sums + at * d, a.largest + at, a.total + at, count, a.rows, d, joined);
    a.lse[head * a.rows + r] = lse;
    for (int64_t j = 0; j < d; ++j) store_float(a.out, a.q_type, (head * a.rows + r) * d + j, joined[j]);
    if (a.mass == nullptr || lse == -__builtin_inff()) continue;
    for (int64_t p = first; p < first + count; ++p) {
      const Part& part = a.parts[p];
      const float* scores = a.scores + (p * a.rows + r) * kPartTokens;
      float* mass = a.mass + head * a.slots + part.slot + part.begin;
      const int64_t tokens = part.end - part.begin, whole = tokens / kLanes * kLanes;
      for (int64_t i = 0; i < whole; i += kLanes)
        store_vector(mass + i, load_vector(mass + i) + exponential_up_to_88(load_vector(scores + i) - lse));
      if (whole == tokens) continue;
      float rest[kLanes];
      store_vector(rest, exponential_up_to_88(load_vector(scores + whole) - lse));
      for (int64_t i = whole; i < tokens; ++i) mass[i] += rest[i - whole];
    }
  }
}

template <typename K>
static constexpr AttendVariant attend_variant() {
  return {attend_part<K>, attend_join<K>};
}
