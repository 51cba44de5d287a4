// The body of a fused decoder's steps that every instruction set includes, inside its region and its namespace; after common/attention.inl.

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

// Dense blocks of one head.
struct Dense {
  const uint16_t *keys, *values;

  template <typename T>
  bool score(int64_t block, const Stretch& a, const float* q, float* scores, int64_t stride) const {
    const int64_t at = block * kBlockTokens * a.dim;
    // The values are needed next and lie elsewhere.
    score_block<T>(reinterpret_cast<const uint8_t*>(keys + at), reinterpret_cast<const uint8_t*>(values + at), a, q, scores, stride);
    return true;
  }

  template <typename T>
  bool mix(int64_t block, const Stretch& a, const float* weights, int64_t stride) const {
    mix_block<T>(reinterpret_cast<const uint8_t*>(values + block * kBlockTokens * a.dim), a, weights, stride);
    return true;
  }
};

template <typename T>
static void attend(const Stretch& a, const float* query, const uint16_t* keys, const uint16_t* values) {
  constexpr int64_t most = 16;  // queries at a time
  float scores[most * kSplit];
  for (int64_t row = 0; row < a.rows; row += most)
    attend_stretch<T>(a.part(row, std::min(most, a.rows - row)), Dense{keys, values}, query + row * a.dim, scores, scores, kSplit);
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

template <typename T>
static Steps decoder_steps() {
  return {rms_norm, rotate, attend<T>, join_stretches, multiply_gate, add, round};
}
