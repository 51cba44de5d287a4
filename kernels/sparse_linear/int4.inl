// int4, for every instruction set; included after sparse_linear.inl. After it the including file defines a tag T with the members
//
//   dtype, X                                     int4 and int8_t
//   expand_row(words, values, zeros, out)        a sparse row in dense form, returns the end of its values; may read kTail bytes past it
//   kRowBlock                                    rows of x that one call of dot takes at most, a power of two
//   dot<M>(units, count, x, sums)                adds `count` units times M rows of x to sums[m][16]
//   kStreamRows                                  rows of x that `stream` takes at most (0: there is no stream)
//   stream<M, layout>(weight, cursor, x, sums)   a whole panel times M rows of x in registers; false if a chunk is not readable

constexpr int64_t kUnit = chunk_of(DType::int4), kUnitRows = kUnit / group_of(DType::int4), kUnitWords = kUnitRows * 16;

// A chunk in dense form with the grids of its group: weight = scale * code + minimum.
struct Unit {
  uint8_t codes[kUnitRows * kRow];
  float scale[kPanel], minimum[kPanel];
};

// The sum of the x that share scale `at`: offsets are -128 times the sum of codes.
template <typename T>
static float x_sum(const Activations<T>& a, int64_t at) {
  return a.scale[at] * (static_cast<float>(a.offset[at]) / -128);
}

// Whether a sparse chunk can be read without leaving the packed array; see `readable`.
static bool readable_unit(const Cursor& c) {
  if (c.end - c.at < kUnitWords) return false;
  if (c.array_end - c.at >= kUnitWords + kUnitRows * kRow + kTail) return true;
  int64_t bytes = 0;
  for (int64_t row = 0; row < kUnitRows; ++row) {
    uint64_t words[2];
    std::memcpy(words, c.at + row * 16, 16);
    bytes += std::max(std::popcount(words[0]), std::popcount(words[1]));
  }
  return c.end - c.at >= kUnitWords + bytes;
}

// expand_row by T::spread(words, codes, zeros, out), which puts the next of `codes` where a bit is set and what is in `zeros` elsewhere; it
// may read eight codes more than there are bits.
template <typename T>
static const uint8_t* expand_halves(const uint8_t* words, const uint8_t* values, const uint8_t* zeros, uint8_t* out) {
  uint64_t counts[2];
  std::memcpy(counts, words, sizeof(counts));
  uint8_t low[kRow + 16], high[kRow + 16], spread[kRow];
  std::memset(low + kRow, 0, 16);
  std::memset(high + kRow, 0, 16);
  for (int64_t i = 0; i < kRow; ++i) {
    low[i] = values[i] & 15;
    high[i] = values[i] >> 4;
  }
  T::spread(words, low, zeros, out);
  T::spread(words + 8, high, zeros, spread);
  for (int64_t i = 0; i < kRow; ++i) out[i] = static_cast<uint8_t>(out[i] | spread[i] << 4);
  return values + std::max(std::popcount(counts[0]), std::popcount(counts[1]));
}

// Reads units [first, first + count) of a panel; `group` keeps the grids of the group the cursor is in, and its zeros, from call to call.
template <typename T>
static bool expand_units(const Packed& w, Cursor& c, int64_t first, int64_t count, Unit* units, Unit& group, uint8_t* zeros) {
  for (int64_t u = first; u < first + count; ++u, ++units) {
    if (u % (w.group_size / kUnit) == 0) {
      if (c.end - c.at < w.group_head()) return false;
      uint16_t halves[2][kPanel];
      std::memcpy(halves[0], c.at, sizeof(halves[0]));
      for (int64_t i = 0; i < kPanel; ++i) group.scale[i] = fp16_to_float(halves[0][i]);
      if (w.layout == Layout::dense && !w.symmetric) {
        std::memcpy(halves[1], c.at + sizeof(halves[0]), sizeof(halves[1]));
        for (int64_t i = 0; i < kPanel; ++i) group.minimum[i] = fp16_to_float(halves[1][i]);
      } else {
        for (int64_t i = 0; i < kPanel; ++i) {
          const uint8_t zero = w.symmetric ? 8 : c.at[sizeof(halves[0]) + i];
          group.minimum[i] = -group.scale[i] * zero;
          std::memset(zeros + 4 * i, zero, 4);
        }
      }
      c.at += w.group_head();
    }
    std::memcpy(units->scale, group.scale, sizeof(group.scale));
    std::memcpy(units->minimum, group.minimum, sizeof(group.minimum));
    if (w.layout == Layout::dense) {
      std::memcpy(units->codes, c.at, sizeof(units->codes));
      c.at += sizeof(units->codes);
      continue;
    }
    if (!readable_unit(c)) return false;
    const uint8_t *words = c.at, *values = c.at + kUnitWords;
    for (int64_t row = 0; row < kUnitRows; ++row) values = T::expand_row(words + 16 * row, values, zeros, units->codes + row * kRow);
    c.at = values;
  }
  return true;
}

template <typename T, int M>
static void dot_units(const Unit* units, int64_t count, Activations<T> a, float* sums, int64_t rows) {
  for (; rows >= M; rows -= M) {
    T::template dot<M>(units, count, a, sums);
    skip(a, M);
    sums += M * kPanel;
  }
  if constexpr (M > 1) {
    if (rows > 0) dot_units<T, M / 2>(units, count, a, sums, rows);
  }
}

// One panel times many rows of x; as in run_block the weights are expanded once and stay in the first-level cache for all rows.
template <typename T>
static bool run_units(const Product& p, int64_t panel, int64_t row_begin, int64_t row_end, float* sums) {
  const Packed& w = p.weight;
  const int64_t total = divide_up(w.inputs, kUnit), m = row_end - row_begin;
  Cursor c = cursor(w, panel);
  Unit units[kBlock / kUnit], group;
  uint8_t zeros[kRow] = {};
  std::fill_n(sums, m * kPanel, 0.0f);
  for (int64_t first = 0; first < total; first += kBlock / kUnit) {
    const int64_t count = std::min(kBlock / kUnit, total - first);
    if (!expand_units<T>(w, c, first, count, units, group, zeros)) return false;
    dot_units<T, T::kRowBlock>(units, count, activations<T>(p, row_begin, first * kUnitRows), sums, m);
  }
  if (c.at != c.end) return false;
  for (int64_t r = 0; r < m; ++r) store<T>(p, row_begin + r, panel, sums + r * kPanel);
  return true;
}

template <typename T, int M>
static bool stream_units(const Product& p, int64_t panel, int64_t row_begin) {
  if constexpr (T::kStreamRows >= M) {
    const Packed& w = p.weight;
    Cursor c = cursor(w, panel);
    float sums[M * kPanel];
    const Activations<T> a = activations<T>(p, row_begin, 0);
    const bool intact = w.layout == Layout::dense ? T::template stream<M, Layout::dense>(w, c, a, sums)
                                                  : T::template stream<M, Layout::sparse>(w, c, a, sums);
    if (!intact || c.at != c.end) return false;
    for (int m = 0; m < M; ++m) store<T>(p, row_begin + m, panel, sums + m * kPanel);
  }
  return true;
}

template <typename T>
static bool run_int4(const Product& p, int64_t panel_begin, int64_t panel_end, int64_t row_begin, int64_t row_end) {
  const int64_t m = row_end - row_begin;
  const bool stream = T::kStreamRows > 0 && streams(p.weight, p.m, p.stream_rows);
  const Scratch sums(stream ? 0 : m * kPanel * 4);
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    if (!stream) {
      if (!run_units<T>(p, panel, row_begin, row_end, sums.floats())) return false;
      continue;
    }
    for (int64_t row = row_begin; row < row_end; row += kStreamRows) {
      const int64_t count = row_end - row;
      const bool intact = count == 1   ? stream_units<T, 1>(p, panel, row)
                          : count == 2 ? stream_units<T, 2>(p, panel, row)
                          : count == 3 ? stream_units<T, 3>(p, panel, row)
                                       : stream_units<T, 4>(p, panel, row);
      if (!intact) return false;
    }
  }
  return true;
}

template <typename T>
static constexpr Variant int4_variant() {
  return {sizeof(typename T::X), prepare<T>, run_int4<T>};
}
