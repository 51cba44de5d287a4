// Pages from numbers and back. Runs once a token, so plain C++ will do.
#include <cmath>

#include "attend.h"

namespace tce::kv_cache {
namespace {

// Where an element lies in the rows of a page: neighbours along the sum share a lane, lanes are tokens or elements.
struct Place {
  int64_t dim;
  Kind kind;
  int64_t lane;  // elements in a lane

  int64_t operator()(int64_t token, int64_t i) const {
    const int64_t along = kind == Kind::key ? i : token, across = kind == Kind::key ? token : i;
    return (along / lane * (kind == Kind::key ? kPageTokens : dim) + across) * lane + along % lane;
  }
};

constexpr int64_t lane_of(PageType type) { return int64_t{1} << static_cast<int>(type); }

// The number of a half byte in its lane, of number i along the sum.
constexpr int64_t half_of(int64_t i) { return i % 2 * 4 + i / 2; }

struct Grid {
  uint16_t scale, minimum;
};

float saturated(float value) { return std::min(std::max(value, -65504.0f), 65504.0f); }

// Of the numbers x[0], x[stride], ..., to codes from 0 to `most`.
Grid grid_of(const float* x, int64_t count, int64_t stride, int most) {
  float low = x[0], high = x[0];
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    const float value = x[i * stride];
    finite &= std::isfinite(value);
    low = std::min(low, value);
    high = std::max(high, value);
  }
  constexpr uint16_t nan = 0x7e00;
  if (!finite) return {nan, nan};
  const auto steps = static_cast<float>(most);
  return {float_to_fp16(std::min(high / steps - low / steps, 65504.0f)), float_to_fp16(saturated(low))};
}

int code_of(float x, const Grid& grid, int most) {
  const float scale = fp16_to_float(grid.scale);
  if (!(scale > 0)) return 0;
  const float code = std::nearbyint((x - fp16_to_float(grid.minimum)) * (1 / scale));
  return static_cast<int>(std::min(std::max(code, 0.0f), static_cast<float>(most)));
}

bool by_token(PageType type, Kind kind) { return type == PageType::int8 || kind == Kind::value; }

}  // namespace

void write_page(const void* x, Float float_type, int64_t dim, Kind kind, PageType type, uint8_t* page) {
  if (!has_grid(type)) {
    for (int64_t t = 0; t < kPageTokens; ++t)
      write_token(static_cast<const char*>(x) + t * dim * (float_type == Float::fp32 ? 4 : 2), float_type, dim, kind, type, t, page);
    return;
  }
  const Scratch scratch(kPageTokens * dim * 4);
  float* values = scratch.floats();
  for (int64_t i = 0; i < kPageTokens * dim; ++i) values[i] = load_float(x, float_type, i);
  const int most = type == PageType::int8 ? 255 : 15;
  const bool tokens = by_token(type, kind);
  const int64_t groups = grid_groups(type, kind, dim), rows = rows_bytes(type, dim);
  const Place place{dim, kind, lane_of(type)};
  if (type == PageType::int4) std::memset(page, 0, rows);
  for (int64_t g = 0; g < groups; ++g) {
    const Grid grid = tokens ? grid_of(values + g * dim, dim, 1, most) : grid_of(values + g, kPageTokens, dim, most);
    std::memcpy(page + rows + 2 * g, &grid.scale, 2);
    std::memcpy(page + rows + 2 * (groups + g), &grid.minimum, 2);
    for (int64_t i = 0; i < (tokens ? dim : kPageTokens); ++i) {
      const int64_t t = tokens ? g : i, j = tokens ? i : g, at = place(t, j);
      const int code = code_of(values[t * dim + j], grid, most);
      if (type == PageType::int8) {
        page[at] = static_cast<uint8_t>(code);
      } else {
        const int64_t half = half_of(at % 8);
        page[at / 8 * 4 + half / 2] |= static_cast<uint8_t>(code << half % 2 * 4);
      }
    }
  }
}

void read_page(const uint8_t* page, int64_t dim, Kind kind, PageType type, void* x) {
  const Place place{dim, kind, lane_of(type)};
  const bool tokens = by_token(type, kind);
  const int64_t groups = grid_groups(type, kind, dim), rows = rows_bytes(type, dim);
  for (int64_t t = 0; t < kPageTokens; ++t) {
    for (int64_t j = 0; j < dim; ++j) {
      const int64_t at = place(t, j), i = t * dim + j;
      if (type == PageType::fp32) {
        std::memcpy(static_cast<char*>(x) + 4 * i, page + 4 * at, 4);
        continue;
      }
      if (type == PageType::bf16) {
        std::memcpy(static_cast<char*>(x) + 2 * i, page + 2 * at, 2);
        continue;
      }
      const int64_t half = half_of(at % 8);
      const int code = type == PageType::int8 ? page[at] : page[at / 8 * 4 + half / 2] >> half % 2 * 4 & 15;
      uint16_t grid[2];
      std::memcpy(grid, page + rows + 2 * (tokens ? t : j), 2);
      std::memcpy(grid + 1, page + rows + 2 * (groups + (tokens ? t : j)), 2);
      static_cast<uint16_t*>(x)[i] = float_to_bf16(fp16_to_float(grid[0]) * static_cast<float>(code) + fp16_to_float(grid[1]));
    }
  }
}

void write_token(const void* x, Float float_type, int64_t dim, Kind kind, PageType type, int64_t slot, uint8_t* page) {
  const Place place{dim, kind, lane_of(type)};
  for (int64_t i = 0; i < dim; ++i) {
    const float value = load_float(x, float_type, i);
    if (type == PageType::fp32) {
      std::memcpy(page + 4 * place(slot, i), &value, 4);
    } else {
      const uint16_t bits = float_to_bf16(value);
      std::memcpy(page + 2 * place(slot, i), &bits, 2);
    }
  }
}

}  // namespace tce::kv_cache
