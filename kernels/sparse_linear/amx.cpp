// AMX (tdpbf16ps, tdpbsud) with VBMI2 to expand: bf16, int8 and int4 weights times more rows of x than the AVX-512 streams take.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>

#include <immintrin.h>

#include "sparse_linear.h"
#include "../common/region_amx.h"

namespace tce::sparse_linear::amx {

#include "sparse_linear.inl"
#include "avx512.inl"
#include "vbmi2.inl"
#include "int4.inl"

// A tile is up to 16 rows of up to 64 bytes, and there are eight. 16 rows of a packed panel are a second factor as they are:
//
//   tmm0 tmm1   sums of row tile 0, panels 0 and 1    = tmm4 (x, row tile 0) times tmm6 (panel 0), tmm7 (panel 1)
//   tmm2 tmm3   sums of row tile 1                    = tmm5 (x, row tile 1) times the same
//
// A row tile is an equal share of the rows of x, at most 16. The last one of a call ends with the last row and repeats some of the one
// before, so that all have one size: one configuration serves a whole call, and nothing outside x is read.
constexpr int64_t kTileRows = 16;

// In assembly: gcc 12's intrinsics do not tell the compiler that they read or write memory.
template <int T>
static void load_tile(const void* at, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(at), "r"(stride), "i"(T) : "memory");
}
template <int T>
static void store_tile(void* at, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(at), "r"(stride), "i"(T) : "memory");
}
template <int T>
static void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}

struct Configuration {  // of ldtilecfg
  uint8_t palette = 1, start_row = 0, zeros[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(Configuration) == 64);

// What is loaded on this thread: rows of x and of the weights in a tile; zero between calls. Loading costs more than a product.
static thread_local int64_t loaded[2];

static void configure(int64_t x_rows, int64_t weight_rows) {
  if (loaded[0] == x_rows && loaded[1] == weight_rows) return;
  Configuration c;
  for (int t = 0; t < 8; ++t) {
    c.rows[t] = static_cast<uint8_t>(t < 6 ? x_rows : weight_rows);
    c.row_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? 4 * weight_rows : kRow);
  }
  asm volatile("ldtilecfg %0" : : "m"(c));
  loaded[0] = x_rows;
  loaded[1] = weight_rows;
}

// Configured tiles make every switch of threads slower and keep a core from sleeping deeply.
static void release() {
  if (loaded[0] != 0) asm volatile("tilerelease");
  loaded[0] = loaded[1] = 0;
}

// Products of codes: signed x, unsigned weights.
struct Codes {
  using X = int8_t;

  template <int C, int A, int B>
  static void multiply() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
};

// Hands out the tiles of a panel in order.
template <typename T>
struct Source {
  Cursor c;
  const uint8_t *words = nullptr, *values = nullptr;  // sparse: what is next in the current chunk
  int64_t row = 0;

  // The next `tile_rows` packed rows: where they are in a dense panel, else in `slot`. Rows behind the last are zeros. Null if the panel's
  // bitmap and bytes disagree.
  [[gnu::noinline]] const uint8_t* next(const Packed& w, int64_t tile_rows, uint8_t* slot) {
    const int64_t count = std::min(tile_rows, w.rows() - row);
    const uint8_t* from = slot;
    if (w.layout == Layout::dense) {
      from = c.at;
      c.at += count * kRow;
      for (int64_t r = 0; r < count; ++r) prefetch(from + r * kRow);
    } else {
      if (row % kChunkRows<T> == 0) {
        const int64_t chunk = std::min(kChunkRows<T>, w.rows() - row);
        if (!readable<T>(c, chunk)) return nullptr;
        words = c.at;
        values = words + chunk * kWord<T>;
      }
      c.at = values = T::expand(words, values, count, slot);
      words += count * kWord<T>;
    }
    row += count;
    if (count == tile_rows) return from;
    if (from != slot) std::memcpy(slot, from, count * kRow);
    std::memset(slot + count * kRow, 0, (tile_rows - count) * kRow);
    return slot;
  }
};

// int4: a tile of bytes, one for each code of a unit of 32 inputs, with the grids of its group behind it.
struct UnitTile {
  uint8_t codes[2 * kUnitRows * kRow];
  float scale[kPanel], minimum[kPanel];
};

struct Int4 : Codes {
  static constexpr DType dtype = DType::int4;

  static const uint8_t* expand_row(const uint8_t* words, const uint8_t* values, const uint8_t* zeros, uint8_t* out) {
    prefetch(values);
    const __m512i zero = _mm512_loadu_si512(zeros);
    const Halves row = expand_int4(words, values, {zero, _mm512_slli_epi16(zero, 4)});
    _mm512_storeu_si512(out, _mm512_or_si512(row.low, row.high));
    return values;
  }

  static int64_t tile_rows(const Product&) { return 2 * kUnitRows; }
};

template <>
struct Source<Int4> {
  Cursor c;
  int64_t unit = 0;
  Unit group = {};
  uint8_t zeros[kRow] = {};

  [[gnu::noinline]] const uint8_t* next(const Packed& w, int64_t, uint8_t* slot) {
    Unit one;
    if (w.layout == Layout::dense)
      for (int64_t r = 0; r < kUnitRows; ++r) prefetch(c.at + r * kRow);
    if (!expand_units<Int4>(w, c, unit++, 1, &one, group, zeros)) return nullptr;
    auto* tile = reinterpret_cast<UnitTile*>(slot);
    for (int64_t r = 0; r < kUnitRows; ++r) {
      const Halves row = split(_mm512_loadu_si512(one.codes + r * kRow));
      _mm512_storeu_si512(tile->codes + 2 * r * kRow, row.low);
      _mm512_storeu_si512(tile->codes + (2 * r + 1) * kRow, _mm512_srli_epi16(row.high, 4));
    }
    std::memcpy(tile->scale, one.scale, sizeof(one.scale));
    std::memcpy(tile->minimum, one.minimum, sizeof(one.minimum));
    return slot;
  }
};

// Tiles are kept for 8 steps along k: with more than two row tiles, each such block serves all of them before the next one is expanded, and
// with fewer, expanding a tile does not wait for the loads of the one before.
constexpr int64_t kBlockTiles = 8, kTileBytes = kTileRows * kRow;
static_assert(sizeof(UnitTile) <= kTileBytes);

// The tiles of P panels, fetched one step ahead of their use: the core expands while the tile unit multiplies.
template <typename T, int P>
struct Weights {
  const Packed& packed;
  int64_t tile_rows;
  uint8_t* slots;  // [kBlockTiles][P][kTileBytes]
  Source<T> source[P];
  const uint8_t* tiles[kBlockTiles][P] = {};
  int64_t fetched = 0;

  bool fetch() {
    const int64_t slot = fetched++ % kBlockTiles;
    for (int i = 0; i < P; ++i) {
      tiles[slot][i] = source[i].next(packed, tile_rows, slots + (slot * P + i) * kTileBytes);
      if (!tiles[slot][i]) return false;
    }
    return true;
  }
};

// What the calls of one run share.
struct Job {
  const Product& p;
  int64_t row_begin, row_end;  // of x
  int64_t x_rows, tile_rows;   // of a tile of x, of a tile of the weights
  int64_t tile_inputs;         // that a step along k takes
  float* sums;                 // [row tile][panel][16][16], as tilestored writes them
  int32_t* integers;           // codes: [2][row tile & 1][panel][16][16], products that are not yet in `sums`
  uint8_t* slots;

  int64_t tiles() const { return divide_up(p.weight.inputs, tile_inputs); }  // along k
  int64_t row_tiles() const { return divide_up(row_end - row_begin, x_rows); }
  int64_t start(int64_t row_tile) const { return std::max<int64_t>(0, std::min(row_begin + row_tile * x_rows, row_end - x_rows)); }
};
constexpr int64_t kSums = kTileRows * kPanel;

// Calls f(tile, row tile, panel) for the R x P tiles of sums; the number of the tile is a constant.
template <int R, int P, typename F>
static void for_sums(const F& f) {
  f(std::integral_constant<int, 0>(), 0, 0);
  if constexpr (P == 2) f(std::integral_constant<int, 1>(), 0, 1);
  if constexpr (R == 2) f(std::integral_constant<int, 2>(), 1, 0);
  if constexpr (R == 2 && P == 2) f(std::integral_constant<int, 3>(), 1, 1);
}

// Adds R x P tiles of x times weights, step t along k, to the tiles of sums.
template <typename T, int R, int P>
static void multiply(const Job& job, int64_t row_tile, int64_t t, const uint8_t* const* weights) {
  const int64_t stride = job.p.padded_inputs() * sizeof(typename T::X);
  const uint8_t* x = static_cast<const uint8_t*>(job.p.x) + t * job.tile_rows * 4;
  load_tile<6>(weights[0], kRow);
  if constexpr (P == 2) load_tile<7>(weights[1], kRow);
  load_tile<4>(x + job.start(row_tile) * stride, stride);
  if constexpr (R == 2) load_tile<5>(x + job.start(row_tile + 1) * stride, stride);
  for_sums<R, P>([](auto tile, int r, int panel) {
    (void)r, (void)panel;
    T::template multiply<tile.value, 4 + tile.value / 2, 6 + tile.value % 2>();
  });
}

// Adds the integer products of step t to the sums, with the scales of x and those of int4 `weights`.
template <typename T, int R, int P>
static void add_scaled(const Job& job, int64_t row_tile, int64_t t, const int32_t* integers, const uint8_t* const* weights) {
  const int64_t groups = job.p.x_groups();
  for (int64_t r = 0; r < R; ++r) {
    const int64_t first = job.start(row_tile + r) * groups + t;
    for (int64_t row = 0; row < job.x_rows; ++row) {
      const __m512 scale = _mm512_set1_ps(job.p.x_scale[first + row * groups]);
      const int32_t x_offset = job.p.x_offset[first + row * groups];  // -128 times the sum of the group's codes
      const __m512i offset = _mm512_set1_epi32(x_offset);
      const __m512 x_sum = _mm512_mul_ps(scale, _mm512_set1_ps(static_cast<float>(x_offset) / -128));
      for (int64_t i = 0; i < P; ++i) {
        const __m512i product = _mm512_loadu_si512(integers + (r * P + i) * kSums + row * kPanel);
        float* sum = job.sums + ((row_tile + r) * P + i) * kSums + row * kPanel;
        if constexpr (T::dtype == DType::int4) {
          const auto* tile = reinterpret_cast<const UnitTile*>(weights[i]);
          const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(product), scale);
          const __m512 scaled = _mm512_fmadd_ps(value, _mm512_loadu_ps(tile->scale), _mm512_loadu_ps(sum));
          _mm512_storeu_ps(sum, _mm512_fmadd_ps(x_sum, _mm512_loadu_ps(tile->minimum), scaled));
          continue;
        }
        const __m512 value = _mm512_cvtepi32_ps(_mm512_add_epi32(product, offset));
        _mm512_storeu_ps(sum, _mm512_fmadd_ps(value, scale, _mm512_loadu_ps(sum)));
      }
    }
  }
}

// Steps [begin, end) along k of R row tiles. Weights are fetched up to step `limit`. False if they are damaged.
template <typename T, int R, int P>
static bool run_steps(const Job& job, int64_t row_tile, int64_t begin, int64_t end, int64_t limit, Weights<T, P>& weights) {
  constexpr bool scaled = has_codes(T::dtype);
  float* sums = job.sums + row_tile * P * kSums;
  if constexpr (!scaled) {  // the sums stay in the tiles for a whole block
    for_sums<R, P>([&](auto tile, int r, int panel) {
      if (begin == 0) {
        zero_tile<tile.value>();
      } else {
        load_tile<tile.value>(sums + (r * P + panel) * kSums, kRow);
      }
    });
  }
  for (int64_t t = begin; t < end; ++t) {
    if constexpr (scaled) for_sums<R, P>([](auto tile, int, int) { zero_tile<tile.value>(); });
    multiply<T, R, P>(job, row_tile, t, weights.tiles[t % kBlockTiles]);
    if (weights.fetched == t + 1 && t + 1 < limit && !weights.fetch()) return false;
    if constexpr (scaled) {  // one step behind, when they have come out of the tiles
      int32_t *products = job.integers + t % 2 * 4 * kSums, *before = job.integers + (t + 1) % 2 * 4 * kSums;
      for_sums<R, P>([&](auto tile, int r, int panel) { store_tile<tile.value>(products + (r * P + panel) * kSums, kRow); });
      if (t > begin) add_scaled<T, R, P>(job, row_tile, t - 1, before, weights.tiles[(t - 1) % kBlockTiles]);
      if (t + 1 == end) add_scaled<T, R, P>(job, row_tile, t, products, weights.tiles[t % kBlockTiles]);
    }
  }
  if constexpr (!scaled) {
    for_sums<R, P>([&](auto tile, int r, int panel) { store_tile<tile.value>(sums + (r * P + panel) * kSums, kRow); });
  }
  return true;
}

template <typename T, int P>
static bool run_panels(const Job& job, int64_t panel) {
  const Product& p = job.p;
  const int64_t tiles = job.tiles(), row_tiles = job.row_tiles(), block = row_tiles <= 2 ? tiles : kBlockTiles;
  Weights<T, P> weights{p.weight, job.tile_rows, job.slots, {}};
  for (int i = 0; i < P; ++i) weights.source[i].c = cursor(p.weight, panel + i);
  if (has_codes(T::dtype) || tiles == 0) std::fill_n(job.sums, row_tiles * P * kSums, 0.0f);
  if (tiles > 0 && !weights.fetch()) return false;
  for (int64_t begin = 0; begin < tiles; begin += block) {
    const int64_t end = std::min(begin + block, tiles);
    for (int64_t i = 0; i < row_tiles; i += 2) {
      const int64_t limit = i + 2 < row_tiles ? end : tiles;  // the last rows of x free the place of the next block's first tile
      const bool intact = i + 1 < row_tiles ? run_steps<T, 2, P>(job, i, begin, end, limit, weights)
                                            : run_steps<T, 1, P>(job, i, begin, end, limit, weights);
      if (!intact) return false;
    }
  }
  for (int i = 0; i < P; ++i) {
    if (weights.source[i].c.at != weights.source[i].c.end) return false;
    for (int64_t row = job.row_begin; row < job.row_end; ++row) {
      const int64_t tile = (row - job.row_begin) / job.x_rows;
      store<T>(p, row, panel + i, job.sums + (tile * P + i) * kSums + (row - job.start(tile)) * kPanel);
    }
  }
  return true;
}

template <typename T>
static bool run_tiles(const Product& p, int64_t panel_begin, int64_t panel_end, int64_t row_begin, int64_t row_end) {
  const int64_t x_rows = divide_up(p.m, divide_up(p.m, kTileRows));
  const int64_t tile_rows = T::tile_rows(p), tile_inputs = tile_rows * 4 / sizeof(typename T::X);
  Job job{p, row_begin, row_end, x_rows, tile_rows, tile_inputs, nullptr, nullptr, nullptr};
  const int64_t slots = kBlockTiles * 2 * kTileBytes, integers = 2 * 4 * kSums * 4, sums = job.row_tiles() * 2 * kSums * 4;
  const Scratch scratch(slots + integers + sums);
  job.slots = scratch.get();
  job.integers = reinterpret_cast<int32_t*>(job.slots + slots);
  job.sums = reinterpret_cast<float*>(job.slots + slots + integers);
  configure(job.x_rows, job.tile_rows);
  for (int64_t panel = panel_begin; panel < panel_end; panel += 2) {
    if (!(panel + 1 < panel_end ? run_panels<T, 2>(job, panel) : run_panels<T, 1>(job, panel))) return false;
  }
  return true;
}

struct Bf16 {
  static constexpr DType dtype = DType::bf16;
  using X = uint16_t;

  static __m512i expand_row(const uint8_t* words, const uint8_t*& values) { return expand_bf16(words, values); }
  static const uint8_t* expand(const uint8_t* words, const uint8_t* values, int64_t rows, uint8_t* out) {
    return expand_rows<Bf16>(words, values, rows, out);
  }

  static int64_t tile_rows(const Product&) { return kTileRows; }

  template <int C, int A, int B>
  static void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
};

struct Int8 : Codes {
  static constexpr DType dtype = DType::int8;

  static __m512i expand_row(const uint8_t* words, const uint8_t*& values) { return expand_int8(words, values); }
  static const uint8_t* expand(const uint8_t* words, const uint8_t* values, int64_t rows, uint8_t* out) {
    return expand_rows<Int8>(words, values, rows, out);
  }

  // A step along k is one group of x: its products get one scale.
  static int64_t tile_rows(const Product& p) { return p.x_group / 4; }
};

template <typename T>
static constexpr Variant tile_variant() {
  return {sizeof(typename T::X), prepare<T>, run_tiles<T>, release};
}

Variant bf16() { return tile_variant<Bf16>(); }
Variant int8() { return tile_variant<Int8>(); }
Variant int4() { return tile_variant<Int4>(); }

}  // namespace tce::sparse_linear::amx

#include "../common/region_end.h"
