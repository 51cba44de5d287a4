// What AMX instructions do: the tiles of one thread, and the arithmetic; pure functions of that state and of memory.
//
// Functions return null, or the rule that was broken, with the fault it raises in hardware. The rules and the order of the sums are those
// of the instructions' pages in the Intel SDM, volume 2. Hardware may round sums of floats differently in the last bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "decode.h"

namespace amx_emulator {

constexpr int kTiles = 8, kMaxRows = 16, kMaxBytes = 64;

struct Tile {
  uint8_t row[kMaxRows][kMaxBytes];
};

struct State {
  bool configured;
  uint8_t start_row;
  uint16_t bytes[kTiles];  // of a row
  uint8_t rows[kTiles];
  Tile tile[kTiles];
};

using Fault = const char*;

inline void release(State& s) { std::memset(&s, 0, sizeof(s)); }

// The 64 bytes of a configuration: palette, start row, 14 zeros, 8 x 2 bytes of row bytes, 16 zeros, 8 numbers of rows, 8 zeros.
inline Fault load_config(State& s, const uint8_t* from) {
  uint8_t config[64];
  std::memcpy(config, from, sizeof(config));
  if (config[0] == 0) {  // the initial state
    release(s);
    return nullptr;
  }
  if (config[0] > 1) return "#GP: the palette must be 0 or 1";
  for (int i = 2; i < 64; ++i)
    if ((i < 16 || (i >= 32 && i < 48) || i >= 56) && config[i] != 0) return "#GP: reserved bytes of a configuration must be zero";
  uint16_t bytes[kTiles];
  std::memcpy(bytes, config + 16, sizeof(bytes));
  for (int t = 0; t < kTiles; ++t) {
    if (bytes[t] > kMaxBytes) return "#GP: a tile must not have more than 64 bytes a row";
    if (config[48 + t] > kMaxRows) return "#GP: a tile must not have more than 16 rows";
    if ((bytes[t] == 0) != (config[48 + t] == 0)) return "#GP: rows and bytes of a tile must both be zero or neither";
  }
  release(s);
  s.configured = true;
  s.start_row = config[1];
  std::memcpy(s.bytes, bytes, sizeof(bytes));
  std::memcpy(s.rows, config + 48, kTiles);
  return nullptr;
}

inline void store_config(const State& s, uint8_t* to) {
  uint8_t config[64] = {};
  if (s.configured) {
    config[0] = 1;
    config[1] = s.start_row;
    std::memcpy(config + 16, s.bytes, sizeof(s.bytes));
    std::memcpy(config + 48, s.rows, sizeof(s.rows));
  }
  std::memcpy(to, config, sizeof(config));
}

inline Fault usable(const State& s, int t) {
  if (!s.configured) return "#UD: no configuration is loaded";
  if (s.rows[t] == 0) return "#UD: the tile is not configured";
  if (s.bytes[t] % 4 != 0) return "#UD: a row must be a multiple of four bytes";
  return nullptr;
}

inline Fault zero(State& s, int t) {
  if (const Fault fault = usable(s, t)) return fault;
  std::memset(&s.tile[t], 0, sizeof(Tile));
  s.start_row = 0;
  return nullptr;
}

// Row r comes from `base + r * stride`. Rows before the start row keep what they hold, so that an interrupted load can go on.
inline Fault load(State& s, int t, uint64_t base, int64_t stride) {
  if (const Fault fault = usable(s, t)) return fault;
  if (s.start_row >= s.rows[t]) return "#UD: the start row must be below the rows of the tile";
  for (int r = s.start_row; r < kMaxRows; ++r) {
    uint8_t row[kMaxBytes] = {};
    if (r < s.rows[t]) std::memcpy(row, reinterpret_cast<const void*>(base + static_cast<uint64_t>(r * stride)), s.bytes[t]);
    std::memcpy(s.tile[t].row[r], row, sizeof(row));
  }
  s.start_row = 0;
  return nullptr;
}

inline Fault store(State& s, int t, uint64_t base, int64_t stride) {
  if (const Fault fault = usable(s, t)) return fault;
  if (s.start_row >= s.rows[t]) return "#UD: the start row must be below the rows of the tile";
  for (int r = s.start_row; r < s.rows[t]; ++r)
    std::memcpy(reinterpret_cast<void*>(base + static_cast<uint64_t>(r * stride)), s.tile[t].row[r], s.bytes[t]);
  s.start_row = 0;
  return nullptr;
}

// A denormal counts as zero, on the way in and on the way out, with its sign.
inline float flushed(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7f800000) == 0) bits &= 0x80000000;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float widen_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return flushed(value);
}

inline float widen_fp16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                          : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// d[m][n] += sum over k of a[m][2k] * b[k][2n] + a[m][2k + 1] * b[k][2n + 1]. Even and odd terms have a sum each, from zero, by fused
// multiply-adds; then the two are added to each other, and to d.
template <float (*widen)(uint16_t)>
inline void multiply_floats(State& s, int d, int a, int b) {
  const int columns = s.bytes[d] / 4, terms = s.bytes[a] / 4;
  float wide[kMaxRows][kMaxBytes / 2];
  for (int k = 0; k < terms; ++k) {
    uint16_t row[kMaxBytes / 2];
    std::memcpy(row, s.tile[b].row[k], sizeof(row));
    for (int i = 0; i < kMaxBytes / 2; ++i) wide[k][i] = widen(row[i]);
  }
  Tile result{};
  for (int m = 0; m < s.rows[d]; ++m) {
    uint16_t x[kMaxBytes / 2];
    std::memcpy(x, s.tile[a].row[m], sizeof(x));
    float sums[kMaxBytes / 2] = {}, before[kMaxBytes / 4];
    for (int k = 0; k < terms; ++k) {
      const float pair[2] = {widen(x[2 * k]), widen(x[2 * k + 1])};
      for (int i = 0; i < kMaxBytes / 2; ++i) sums[i] = flushed(__builtin_fmaf(pair[i % 2], wide[k][i], sums[i]));
    }
    std::memcpy(before, s.tile[d].row[m], sizeof(before));
    for (int n = 0; n < columns; ++n) {
      const float sum = flushed(flushed(before[n]) + flushed(sums[2 * n] + sums[2 * n + 1]));
      std::memcpy(result.row[m] + 4 * n, &sum, 4);
    }
  }
  s.tile[d] = result;
}

// d[m][n] += sum over k and j < 4 of a[m][4k + j] * b[k][4n + j], in 32 bits that wrap around.
template <typename A, typename B>
inline void multiply_integers(State& s, int d, int a, int b) {
  const int columns = s.bytes[d] / 4, terms = s.bytes[a] / 4;
  Tile result{};
  for (int m = 0; m < s.rows[d]; ++m) {
    uint32_t sums[kMaxBytes / 4];
    std::memcpy(sums, s.tile[d].row[m], sizeof(sums));
    for (int k = 0; k < terms; ++k)
      for (int n = 0; n < kMaxBytes / 4; ++n)
        for (int j = 0; j < 4; ++j)
          sums[n] += static_cast<uint32_t>(static_cast<A>(s.tile[a].row[m][4 * k + j]) * static_cast<B>(s.tile[b].row[k][4 * n + j]));
    std::memcpy(result.row[m], sums, 4 * columns);
  }
  s.tile[d] = result;
}

inline Fault multiply(State& s, Op op, int d, int a, int b) {
  for (const int t : {d, a, b})
    if (const Fault fault = usable(s, t)) return fault;
  if (d == a || d == b || a == b) return "#UD: the three tiles must be different ones";
  if (s.bytes[d] != s.bytes[b]) return "#UD: destination and second factor must have equally long rows";
  if (s.rows[d] != s.rows[a]) return "#UD: destination and first factor must have equally many rows";
  if (s.bytes[a] / 4 != s.rows[b]) return "#UD: the second factor must have a row for every four bytes of a row of the first";
  switch (op) {
    case Op::tdpbf16ps:
      multiply_floats<widen_bf16>(s, d, a, b);
      break;
    case Op::tdpfp16ps:
      multiply_floats<widen_fp16>(s, d, a, b);
      break;
    case Op::tdpbssd:
      multiply_integers<int8_t, int8_t>(s, d, a, b);
      break;
    case Op::tdpbsud:
      multiply_integers<int8_t, uint8_t>(s, d, a, b);
      break;
    case Op::tdpbusd:
      multiply_integers<uint8_t, int8_t>(s, d, a, b);
      break;
    default:
      multiply_integers<uint8_t, uint8_t>(s, d, a, b);
  }
  s.start_row = 0;
  return nullptr;
}

inline Fault execute(State& s, const Instruction& i, const uint64_t* registers, uint64_t next) {
  const uint64_t address = i.address(registers, next);
  const int64_t stride = i.stride(registers);
  switch (i.op) {
    case Op::ldtilecfg:
      return load_config(s, reinterpret_cast<const uint8_t*>(address + static_cast<uint64_t>(stride)));
    case Op::sttilecfg:
      store_config(s, reinterpret_cast<uint8_t*>(address + static_cast<uint64_t>(stride)));
      return nullptr;
    case Op::tilerelease:
      release(s);
      return nullptr;
    case Op::tilezero:
      return zero(s, i.d);
    case Op::tileloadd:
    case Op::tileloaddt1:
      return load(s, i.d, address, stride);
    case Op::tilestored:
      return store(s, i.d, address, stride);
    default:
      return multiply(s, i.op, i.d, i.a, i.b);
  }
}

}  // namespace amx_emulator
