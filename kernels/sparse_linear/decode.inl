// The body of a fused decoder's steps that every instruction set includes, inside its region and its namespace. Written with vectors of
// sixteen floats, which the compiler splits where the machine's are shorter.

#pragma GCC diagnostic ignored "-Wpsabi"  // of vectors longer than the machine's, which stay inside this file

using Vector = float __attribute__((vector_size(64)));
using Integers = int32_t __attribute__((vector_size(64)));
constexpr int kLanes = 16;

static Vector load_vector(const void* from) {
  Vector value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

static void store_vector(void* to, Vector value) { std::memcpy(to, &value, sizeof(value)); }

// The first n < 16 elements, then zeros.
static Vector load_some(const float* from, int64_t n) {
  float values[kLanes] = {};
  std::memcpy(values, from, n * 4);
  return load_vector(values);
}

static void store_some(float* to, Vector value, int64_t n) {
  float values[kLanes];
  store_vector(values, value);
  std::memcpy(to, values, n * 4);
}

// The floats in the lower and in the upper halves of 32 bits: a bf16 is the upper half of a float.
static Vector lower(Integers pair) { return reinterpret_cast<Vector>(pair << 16); }
static Vector upper(Integers pair) { return reinterpret_cast<Vector>(pair & static_cast<int32_t>(0xffff0000)); }

static float sum_lanes(Vector v) {
  float values[kLanes];
  store_vector(values, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) values[i] += values[i + width];
  return values[0];
}

static float max_lanes(Vector v) {
  float values[kLanes];
  store_vector(values, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) values[i] = std::max(values[i], values[i + width]);
  return values[0];
}

// exp(x), off by 2 in the last place at most; 0 below -87.3 and large but finite above 88. As 2^n * 2^f with |f| <= 1/2: the polynomial is
// the Taylor series of exp in f * ln 2.
static Vector exponential(Vector x) {
  const Vector low = Vector{} - 87.3f, high = Vector{} + 88.0f;
  const Integers tiny = x < low;
  x = x < low ? low : x > high ? high : x;
  const Vector shifted = x * 1.44269504f + 12582912.0f;  // the adder rounds to whole numbers
  const Vector n = shifted - 12582912.0f;
  const Vector f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector p = f * (1.0f / 5040) + 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
  return tiny ? Vector{} : p * reinterpret_cast<Vector>(power);
}

static void rms_norm(const float* x, const float* weight, float epsilon, int64_t n, float* out) {
  Vector sums[4] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vector v = load_vector(x + i);
    sums[i / kLanes % 4] += v * v;
  }
  const Vector rest = load_some(x + i, n - i);
  const float mean = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]) + rest * rest) / static_cast<float>(n);
  const float scale = 1 / std::sqrt(mean + epsilon);
  for (i = 0; i + kLanes <= n; i += kLanes) store_vector(out + i, load_vector(x + i) * scale * load_vector(weight + i));
  if (i < n) store_some(out + i, rest * scale * load_some(weight + i, n - i), n - i);
}

static void rotate(float* x, const float* cos, const float* sin, int64_t dim) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

// Asks for a cache line. In assembly, because gcc 12 drops __builtin_prefetch where a pragma sets the target.
static void fetch(const void* at) {
#if defined(__x86_64__)
  asm volatile("prefetcht0 %0" : : "m"(*static_cast<const char*>(at)));
#else
  __builtin_prefetch(at);
#endif
}

// Scores of R rows against the tokens of one block; asks for the values of the block meanwhile, which are needed next and lie elsewhere.
template <int R>
static void score_block(const float* query, const uint16_t* keys, const uint16_t* values, int64_t dim, Vector* scores) {
  Vector even[R] = {}, odd[R] = {};
  for (int64_t i = 0; i < dim; i += 2) {
    fetch(values + i * kBlockTokens);
    const Integers pair = reinterpret_cast<Integers>(load_vector(keys + i * kBlockTokens));
    const Vector a = lower(pair), b = upper(pair);
    for (int r = 0; r < R; ++r) {
      even[r] += a * query[r * dim + i];
      odd[r] += b * query[r * dim + i + 1];
    }
  }
  for (int r = 0; r < R; ++r) scores[r] = even[r] + odd[r];
}

// Adds the values of one block, with R rows of sixteen weights, to D vectors of each row of out.
template <int R, int D>
static void add_values(const float* weights, const uint16_t* values, int64_t dim, float* out) {
  Vector sums[R][D];
  for (int r = 0; r < R; ++r)
    for (int d = 0; d < D; ++d) sums[r][d] = load_vector(out + r * dim + d * kLanes);
  for (int64_t t = 0; t < kBlockTokens; t += 2) {
    for (int d = 0; d < D; ++d) {
      const Integers pair = reinterpret_cast<Integers>(load_vector(values + t * dim + d * 2 * kLanes));
      const Vector a = lower(pair), b = upper(pair);
      for (int r = 0; r < R; ++r) sums[r][d] += a * weights[r * kSplit + t] + b * weights[r * kSplit + t + 1];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int d = 0; d < D; ++d) store_vector(out + r * dim + d * kLanes, sums[r][d]);
}

template <int R>
static void attend_rows(const Attention& item, int64_t row) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const int64_t dim = item.dim;
  const float* query = item.query + row * dim;
  float* out = item.out + row * dim;
  float weights[R * kSplit];
  Vector largest[R];
  for (int r = 0; r < R; ++r) largest[r] = Vector{} - infinity;
  const Integers lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int64_t token = item.begin; token < item.end; token += kBlockTokens) {
    Vector scores[R];
    score_block<R>(query, item.keys + token * dim, item.values + token * dim, dim, scores);
    for (int r = 0; r < R; ++r) {
      const auto first = static_cast<int32_t>(item.first[row + r] - token), last = static_cast<int32_t>(item.last[row + r] - token);
      const Vector seen = (lanes >= first) & (lanes < last) ? scores[r] : Vector{} - infinity;
      largest[r] = seen > largest[r] ? seen : largest[r];
      store_vector(weights + r * kSplit + (token - item.begin), seen);
    }
  }
  for (int r = 0; r < R; ++r) {
    const float maximum = max_lanes(largest[r]);
    Vector sum = {};
    for (int64_t token = item.begin; token < item.end; token += kBlockTokens) {
      float* at = weights + r * kSplit + (token - item.begin);
      const Vector score = load_vector(at);
      const Vector weight = maximum == -infinity || score == -infinity ? Vector{} : exponential(score - maximum);
      sum += weight;
      store_vector(at, weight);
    }
    item.maximum[row + r] = maximum;
    item.sum[row + r] = sum_lanes(sum);
  }
  std::fill_n(out, R * dim, 0.0f);
  for (int64_t token = item.begin; token < item.end; token += kBlockTokens) {
    const float* block = weights + (token - item.begin);
    int64_t d = 0;
    for (; d + 2 * kLanes <= dim; d += 2 * kLanes) add_values<R, 2>(block, item.values + token * dim + 2 * d, dim, out + d);
    if (d < dim) add_values<R, 1>(block, item.values + token * dim + 2 * d, dim, out + d);
  }
}

static void attend(const Attention& item) {
  int64_t row = 0;
  for (; row + 4 <= item.rows; row += 4) attend_rows<4>(item, row);
  switch (item.rows - row) {
    case 3:
      return attend_rows<3>(item, row);
    case 2:
      return attend_rows<2>(item, row);
    case 1:
      return attend_rows<1>(item, row);
  }
}

static void merge(const float* out, const float* maximum, const float* sum, int64_t splits, int64_t stride, int64_t dim, float* result) {
  float largest = maximum[0], total = 0;
  for (int64_t i = 1; i < splits; ++i) largest = std::max(largest, maximum[i * stride]);
  std::fill_n(result, dim, 0.0f);
  for (int64_t i = 0; i < splits; ++i) {
    if (sum[i * stride] == 0) continue;
    const float weight = std::exp(maximum[i * stride] - largest);
    total += weight * sum[i * stride];
    const float* part = out + i * stride * dim;
    for (int64_t d = 0; d < dim; d += kLanes) store_vector(result + d, load_vector(result + d) + load_vector(part + d) * weight);
  }
  for (int64_t d = 0; d < dim; d += kLanes) store_vector(result + d, load_vector(result + d) * (1 / total));
}

static Vector gate_of(Vector x, Gate kind) {
  // gelu_tanh: 0.5 * (1 + tanh(u)) is the logistic function of 2u.
  const Vector u = kind == Gate::silu ? x : (x + x * x * x * 0.044715f) * 1.5957691216f;
  return x / (exponential(-u) + 1.0f);
}

static void multiply_gate(float* gate, const float* up, Gate kind, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_vector(gate + i, gate_of(load_vector(gate + i), kind) * load_vector(up + i));
  if (i < n) store_some(gate + i, gate_of(load_some(gate + i, n - i), kind) * load_some(up + i, n - i), n - i);
}

static void add(float* to, const float* what, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += what[i];
}

static void round(const float* values, Float type, int64_t at, int64_t n, void* out) {
  uint16_t* const to = static_cast<uint16_t*>(out) + at;
  if (type == Float::bf16) {
    for (int64_t i = 0; i < n; ++i) to[i] = float_to_bf16(values[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = float_to_fp16(values[i]);
  }
}

Steps steps() { return {rms_norm, rotate, attend, merge, multiply_gate, add, round}; }
