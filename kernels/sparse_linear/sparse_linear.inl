// The body that every instruction set includes, inside its region and its namespace. After it the including file defines a tag T for each
// dtype it serves (for int4 see int4.inl), with the members
//
//   dtype, X             the dtype, and the element type of the activations that `prepare` writes
//   expand(words, values, rows, out)          a chunk's rows in dense form; returns the end of the values, may read kTail bytes past it
//   kRowBlock, kPanelBlock                    rows of x and panels one call of dot takes at most: powers of two, 1 or 2 panels
//   dot<M, P>(weight, rows, x, sums)          adds `rows` packed rows of P panels times M rows of x to sums[m][panel][16]
//   kStreamRows                               rows of x that `stream` takes at most: 4 (0: there is no stream)
//   stream<M, layout>(cursor, rows, x, sums)  a whole panel times M rows of x in registers; false if a chunk is not readable
//   kFixedCounts                              present if there is a stream<1, structured>, for patterns n:4
//
// Whatever else reads a structured panel reads it as a sparse one, which it is.

template <typename T>
constexpr int64_t kGroup = group_of(T::dtype);
template <typename T>
constexpr int64_t kWord = 2 * kGroup<T>;  // bytes of a row's bitmap word
template <typename T>
constexpr int64_t kChunkRows = kChunk / kGroup<T>;

// x of the rows one call works on: row i begins at x + i * x_stride; with codes there is a scale and an offset for every row_group rows.
template <typename T>
struct Activations {
  const typename T::X* x;
  int64_t x_stride;
  const float* scale;
  const int32_t* offset;
  int64_t scale_stride;
  int64_t row_group;  // packed rows (of g inputs) that share a scale
};

template <typename T>
static Activations<T> activations(const Product& p, int64_t m, int64_t row) {
  const int64_t stride = p.padded_inputs();
  Activations<T> a{static_cast<typename T::X*>(p.x) + m * stride + row * kGroup<T>, stride, nullptr, nullptr, 0, 1};
  if constexpr (has_codes(T::dtype)) {
    const int64_t groups = p.x_groups(), first = m * groups + row * kGroup<T> / p.x_group;
    a = {a.x, stride, p.x_scale + first, p.x_offset + first, groups, p.x_group / kGroup<T>};
  }
  return a;
}

// ---------------------------------------------------------------------------------------------------------------------------- prepare

// Codes of one group of N inputs. A group that holds NaN or an infinity gets the scale NaN, which makes the whole output row NaN.
template <int N>
static void quantize(const float* x, int8_t* code, float& scale, int32_t& offset) {
  uint32_t largest = 0;  // compared as bits: NaN counts as larger than infinity
  for (int i = 0; i < N; ++i) largest = std::max(largest, float_bits(x[i]) & 0x7fffffff);
  scale = largest < 0x7f800000 ? bits_float(largest) / 127 : bits_float(0x7fc00000);
  const float inverse = 1 / scale;
  std::memset(code, 0, N);
  offset = 0;
  if (!(inverse <= 3.4028235e38f)) return;  // zeros and NaN, and denormals whose inverse overflows
  int32_t rounded[N];
  for (int i = 0; i < N; ++i) {
    const float value = x[i] * inverse, clamped = value > 127 ? 127 : value < -127 ? -127 : value;
    rounded[i] = static_cast<int32_t>((clamped + 0x1.8p23f) - 0x1.8p23f);  // the adder rounds, ties to even
  }
  for (int i = 0; i < N; ++i) code[i] = static_cast<int8_t>(rounded[i]);
  for (int i = 0; i < N; ++i) offset -= 128 * rounded[i];
}

// 64 inputs, from any address, as floats; zeros beyond n.
static void load_chunk(const void* source, Float type, int64_t at, int64_t n, float* values) {
  if (type == Float::fp32) {
    std::fill_n(values, kChunk, 0.0f);
    std::memcpy(values, static_cast<const char*>(source) + at * 4, n * 4);
    return;
  }
  uint16_t bits[kChunk] = {};
  std::memcpy(bits, static_cast<const char*>(source) + at * 2, n * 2);
  if (type == Float::bf16) {
    for (int64_t i = 0; i < kChunk; ++i) values[i] = bf16_to_float(bits[i]);
  } else {
    for (int64_t i = 0; i < kChunk; ++i) values[i] = fp16_to_float(bits[i]);
  }
}

template <typename T>
static void prepare(const Product& p, const void* source, Float type, int64_t begin, int64_t end) {
  const int64_t k = p.weight.inputs;
  for (int64_t m = begin; m < end; ++m) {
    typename T::X* x = static_cast<typename T::X*>(p.x) + m * p.padded_inputs();
    for (int64_t first = 0; first < k; first += kChunk, x += kChunk) {
      const int64_t n = std::min(kChunk, k - first);
      float values[kChunk];
      load_chunk(source, type, m * k + first, n, values);
      if constexpr (has_codes(T::dtype)) {
        const int64_t group = m * p.x_groups() + first / p.x_group;
        if (p.x_group == kChunk) {
          quantize<kChunk>(values, x, p.x_scale[group], p.x_offset[group]);
        } else {
          quantize<kChunk / 2>(values, x, p.x_scale[group], p.x_offset[group]);
          std::memset(x + kChunk / 2, 0, kChunk / 2);
          if (n > kChunk / 2) quantize<kChunk / 2>(values + kChunk / 2, x + kChunk / 2, p.x_scale[group + 1], p.x_offset[group + 1]);
        }
      } else if constexpr (T::dtype == DType::bf16 && sizeof(typename T::X) == 2) {
        for (int64_t i = 0; i < kChunk; ++i) x[i] = float_to_bf16(values[i]);
      } else if constexpr (T::dtype == DType::bf16) {  // no bf16 products here: the same rounding, kept in fp32
        for (int64_t i = 0; i < kChunk; ++i) x[i] = bf16_to_float(float_to_bf16(values[i]));
      } else {
        std::memcpy(x, values, sizeof(values));
      }
    }
  }
}

// -------------------------------------------------------------------------------------------------------------------------------- run

// Where a panel's stream stands.
struct Cursor {
  const uint8_t* at;
  const uint8_t* end;        // of the panel's chunks
  const uint8_t* array_end;  // of the packed array
  Pattern pattern;
};

static Cursor cursor(const Packed& w, int64_t panel) {
  return {w.data + w.offset(panel), w.data + w.offset(panel + 1) - panel_tail(w.dtype), w.data + w.bytes, w.pattern};
}

// Whether a sparse chunk can be read without leaving the packed array. Bounding it by the most a chunk can hold is enough nearly
// everywhere; a panel that is wrong inside the array is found by where its stream ends. Only the last chunks of an array count their bits.
template <typename T>
static bool readable(const Cursor& c, int64_t rows) {
  const int64_t words = rows * kWord<T>;
  if (c.end - c.at < words) return false;
  if (c.array_end - c.at >= words + rows * kRow + kTail) return true;
  int64_t count = 0;
  for (int64_t i = 0; i < words; ++i) count += std::popcount(c.at[i]);
  return c.end - c.at >= words + count * (4 / kGroup<T>);
}

// Bias, scales and the cast to the output type for one row of one panel.
template <typename T>
static void store(const Product& p, int64_t m, int64_t panel, const float* sums) {
  const int64_t first = panel * kPanel, count = std::min(kPanel, p.weight.outputs - first);
  float y[kPanel];
  std::memcpy(y, sums, sizeof(y));
  if constexpr (T::dtype == DType::int8) {
    float scale[kPanel];
    std::memcpy(scale, p.weight.data + p.weight.offset(panel + 1) - panel_tail(T::dtype), sizeof(scale));
    for (int64_t i = 0; i < kPanel; ++i) y[i] *= scale[i];
  }
  if (p.bias) {
    float bias[kPanel] = {};
    std::memcpy(bias, p.bias + first, count * 4);
    for (int64_t i = 0; i < kPanel; ++i) y[i] += bias[i];
  }
  const int64_t at = m * p.weight.outputs + first;
  if (p.out_type == Float::fp32) {
    std::memcpy(static_cast<float*>(p.out) + at, y, count * 4);
    return;
  }
  uint16_t halves[kPanel];
  if (p.out_type == Float::bf16) {
    for (int64_t i = 0; i < kPanel; ++i) halves[i] = float_to_bf16(y[i]);
  } else {
    for (int64_t i = 0; i < kPanel; ++i) halves[i] = float_to_fp16(y[i]);
  }
  std::memcpy(static_cast<uint16_t*>(p.out) + at, halves, count * 2);
}

// Moves on by `count` rows of x.
template <typename T>
static void skip(Activations<T>& a, int64_t count) {
  a.x += count * a.x_stride;
  if constexpr (has_codes(T::dtype)) {
    a.scale += count * a.scale_stride;
    a.offset += count * a.scale_stride;
  }
}

// Dense rows times rows of x, in blocks of M rows, then of M / 2, ...
template <typename T, int M, int P>
static void dot_rows(const uint8_t* const* weight, int64_t rows, Activations<T> a, float* sums, int64_t count) {
  for (; count >= M; count -= M) {
    T::template dot<M, P>(weight, rows, a, sums);
    skip(a, M);
    sums += M * P * kPanel;
  }
  if constexpr (M > 1) {
    if (count > 0) dot_rows<T, M / 2, P>(weight, rows, a, sums, count);
  }
}

// P panels times many rows of x. The weights are expanded once, kBlock inputs at a time, and stay in the first-level cache for all rows.
constexpr int64_t kBlock = 256;

template <typename T, int P>
static bool run_block(const Product& p, int64_t panel, int64_t row_begin, int64_t row_end, float* sums, uint8_t* expanded) {
  const Packed& w = p.weight;
  const int64_t rows = w.rows(), block_rows = kBlock / kGroup<T>, m = row_end - row_begin;
  std::fill_n(sums, m * P * kPanel, 0.0f);
  Cursor c[P];
  for (int i = 0; i < P; ++i) c[i] = cursor(w, panel + i);
  for (int64_t row = 0; row < rows; row += block_rows) {
    const int64_t count = std::min(block_rows, rows - row);
    const uint8_t* dense[P];
    for (int i = 0; i < P; ++i) {
      if (w.layout == Layout::dense) {
        dense[i] = c[i].at;
        c[i].at += count * kRow;
        continue;
      }
      uint8_t* out = expanded + i * block_rows * kRow;
      dense[i] = out;
      for (int64_t r = 0; r < count; r += kChunkRows<T>) {
        const int64_t chunk = std::min(kChunkRows<T>, count - r);
        if (!readable<T>(c[i], chunk)) return false;
        c[i].at = T::expand(c[i].at, c[i].at + chunk * kWord<T>, chunk, out + r * kRow);
      }
    }
    dot_rows<T, T::kRowBlock, P>(dense, count, activations<T>(p, row_begin, row), sums, m);
  }
  for (int i = 0; i < P; ++i) {
    if (c[i].at != c[i].end) return false;
    for (int64_t r = 0; r < m; ++r) store<T>(p, row_begin + r, panel + i, sums + (r * P + i) * kPanel);
  }
  return true;
}

// Whether T has a stream of M rows of x that makes use of fixed counts. Measured: with other m, or more rows, it gains nothing.
template <typename T, int M>
constexpr bool kFixed = M == 1 && requires { T::kFixedCounts; };
constexpr int64_t kFixedOf = 4;  // the m of those patterns

// One panel times a few rows of x, in registers from end to end.
template <typename T, int M>
static bool run_stream(const Product& p, int64_t panel, int64_t row_begin) {
  if constexpr (T::kStreamRows >= M) {
    const Packed& w = p.weight;
    Cursor c = cursor(w, panel);
    float sums[M * kPanel];
    const Activations<T> a = activations<T>(p, row_begin, 0);
    const bool intact = w.layout == Layout::dense ? T::template stream<M, Layout::dense>(c, w.rows(), a, sums)
                        : kFixed<T, M> && w.pattern.m == kFixedOf
                            ? T::template stream<M, kFixed<T, M> ? Layout::structured : Layout::sparse>(c, w.rows(), a, sums)
                            : T::template stream<M, Layout::sparse>(c, w.rows(), a, sums);
    if (!intact || c.at != c.end) return false;
    for (int m = 0; m < M; ++m) store<T>(p, row_begin + m, panel, sums + m * kPanel);
  }
  return true;
}

template <typename T>
static bool run(const Product& p, int64_t panel_begin, int64_t panel_end, int64_t row_begin, int64_t row_end) {
  const int64_t m = row_end - row_begin;
  if (T::kStreamRows > 0 && streams(p.weight, p.m, p.stream_rows)) {
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      for (int64_t row = row_begin; row < row_end; row += kStreamRows) {  // from the second pass on, the panel comes from a cache
        const int64_t count = row_end - row;
        const bool intact = count == 1   ? run_stream<T, 1>(p, panel, row)
                            : count == 2 ? run_stream<T, 2>(p, panel, row)
                            : count == 3 ? run_stream<T, 3>(p, panel, row)
                                         : run_stream<T, 4>(p, panel, row);
        if (!intact) return false;
      }
    }
    return true;
  }
  constexpr int64_t P = T::kPanelBlock, expanded_bytes = P * kBlock / kGroup<T> * kRow;
  const int64_t sums_bytes = round_up(m * P * kPanel * 4, 64);
  const Scratch scratch(expanded_bytes + sums_bytes);
  uint8_t* expanded = scratch.get();
  float* sums = reinterpret_cast<float*>(expanded + expanded_bytes);
  for (int64_t panel = panel_begin; panel < panel_end; panel += P) {
    const bool intact = P == 2 && panel + 1 < panel_end ? run_block<T, P>(p, panel, row_begin, row_end, sums, expanded)
                                                        : run_block<T, 1>(p, panel, row_begin, row_end, sums, expanded);
    if (!intact) return false;
  }
  return true;
}

template <typename T>
static constexpr Variant variant() {
  return {sizeof(typename T::X), prepare<T>, run<T>};
}
