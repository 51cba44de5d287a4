// Vectors of floats for code that every instruction set compiles inside its own region and namespace. The including file says how long
// those of the machine are, constexpr int kVectorBytes: gcc 12 makes code several times slower of vectors that it has to split.

using Vector = float __attribute__((vector_size(kVectorBytes)));
using Integers = int32_t __attribute__((vector_size(kVectorBytes)));
constexpr int kLanes = kVectorBytes / 4;

static Vector load_vector(const void* from) {
  Vector value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

static void store_vector(void* to, Vector value) { std::memcpy(to, &value, sizeof(value)); }

// The floats in the lower and in the upper halves of 32 bits: a bf16 is the upper half of a float.
static Vector lower(Integers pair) { return reinterpret_cast<Vector>(pair << 16); }
static Vector upper(Integers pair) { return reinterpret_cast<Vector>(pair & static_cast<int32_t>(0xffff0000)); }

// To the next bf16, ties to even, in the upper halves. Not for a NaN with bits in its lower half.
static Integers round_bf16(Vector v) {
  const Integers bits = reinterpret_cast<Integers>(v);
  return (bits + 0x7fff + (bits >> 16 & 1)) & static_cast<int32_t>(0xffff0000);
}

// The lanes `By` further on, around the end.
template <int By>
static Vector rotated(Vector v) {
  if constexpr (kLanes == 4) return __builtin_shufflevector(v, v, By, (By + 1) % 4, (By + 2) % 4, (By + 3) % 4);
  if constexpr (kLanes == 8)
    return __builtin_shufflevector(v, v, By, (By + 1) % 8, (By + 2) % 8, (By + 3) % 8, (By + 4) % 8, (By + 5) % 8, (By + 6) % 8,
                                   (By + 7) % 8);
  if constexpr (kLanes == 16)
    return __builtin_shufflevector(v, v, By, (By + 1) % 16, (By + 2) % 16, (By + 3) % 16, (By + 4) % 16, (By + 5) % 16, (By + 6) % 16,
                                   (By + 7) % 16, (By + 8) % 16, (By + 9) % 16, (By + 10) % 16, (By + 11) % 16, (By + 12) % 16,
                                   (By + 13) % 16, (By + 14) % 16, (By + 15) % 16);
}

template <int Width = kLanes / 2>
static float sum_lanes(Vector v) {
  v += rotated<Width>(v);
  if constexpr (Width > 1) return sum_lanes<Width / 2>(v);
  return v[0];
}

template <int Width = kLanes / 2>
static float max_lanes(Vector v) {
  const Vector other = rotated<Width>(v);
  v = other > v ? other : v;
  if constexpr (Width > 1) return max_lanes<Width / 2>(v);
  return v[0];
}

// exp(x) for x up to 88, off by 2 in the last place at most; 0 below -87.3, NaN of NaN. As 2^n * 2^f with |f| <= 1/2: the polynomial is the
// Taylor series of exp in f * ln 2.
static Vector exponential_up_to_88(Vector x) {
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
  const Integers power = (reinterpret_cast<Integers>(shifted) + 127) << 23;  // the last bits of shifted are n
  return x < -87.3f ? Vector{} : p * reinterpret_cast<Vector>(power);
}

// The same, large but finite above 88.
static Vector exponential(Vector x) { return exponential_up_to_88(x > 88.0f ? Vector{} + 88.0f : x); }

// 2^x for x up to 127, off by 2 in the last place at most; 0 below -125, NaN of NaN, 1 of 0. The polynomial has the least relative error
// for |f| <= 1/2.
static Vector power_of_two(Vector x) {
  const Vector shifted = x + 12582912.0f;  // the adder rounds to whole numbers
  const Vector f = x - (shifted - 12582912.0f);
  Vector p = f * 0.00132647273f + 0.00967151299f;
  p = p * f + 0.0555073359f;
  p = p * f + 0.240222424f;
  p = p * f + 0.693147004f;
  p = p * f + 1.0f;
  const Integers power = (reinterpret_cast<Integers>(shifted) + 127) << 23;  // the last bits of shifted are the whole number
  return x < -125.0f ? Vector{} : p * reinterpret_cast<Vector>(power);
}

// Asks for a cache line. In assembly, because gcc 12 drops __builtin_prefetch where a pragma sets the target.
static void fetch(const void* at) {
#if defined(__x86_64__)
  asm volatile("prefetcht0 %0" : : "m"(*static_cast<const char*>(at)));
#else
  __builtin_prefetch(at);
#endif
}
