// Runs every kernel of sparse_linear that this machine can run on buffers of exactly the documented size, under the address and
// undefined-behaviour sanitizers; tests/sanitize.py builds and starts it. Results are compared with products in double.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <sys/syscall.h>
#include <unistd.h>

#include "../sanitize.h"
#include "attention.h"
#include "format.h"
#include "sparse_linear.h"

extern "C" int amx_emulator_install() __attribute__((weak));  // tests/amx_emulator, on machines without AMX

using namespace tce;
using namespace tce::sparse_linear;

namespace {

std::vector<uint8_t> pack(const Dense& weight, const Scheme& scheme) {
  const int64_t panels = divide_up(weight.outputs, kPanel), first = round_up(sizeof(Header) + (panels + 1) * 8, 64);
  std::vector<PanelPlan> plans;
  std::vector<int64_t> offsets{first};
  int64_t nonzeros = 0;
  for (int64_t i = 0; i < panels; ++i) {
    plans.push_back(plan_panel(weight, scheme, i));
    if (!plans.back().representable) fail("a weight is refused");
    nonzeros += plans.back().nonzeros;
    offsets.push_back(offsets.back() + plans.back().bytes);
  }
  std::vector<uint8_t> packed(offsets.back() + kTail);
  const int64_t bytes = packed.size();
  const Header header = header_of(scheme, weight.outputs, weight.inputs, bytes, nonzeros);
  std::memcpy(packed.data(), &header, sizeof(header));
  std::memcpy(packed.data() + sizeof(header), offsets.data(), offsets.size() * 8);
  for (int64_t i = 0; i < panels; ++i) {
    const Exact panel(offsets[i + 1] - offsets[i]);  // so that writing past a panel is seen
    write_panel(weight, scheme, i, panel.get());
    std::memcpy(packed.data() + offsets[i], panel.get(), offsets[i + 1] - offsets[i]);
  }
  return packed;
}

struct Named {
  const char* name;
  DType dtype;
  Variant variant;
};

std::vector<Named> variants() {
  std::vector<Named> all{{"scalar", DType::fp32, scalar::fp32()},
                         {"scalar", DType::bf16, scalar::bf16()},
                         {"scalar", DType::int8, scalar::int8()},
                         {"scalar", DType::int4, scalar::int4()}};
  const auto add = [&](const char* name, DType dtype, Variant (*make)()) {
    if (make) all.push_back({name, dtype, make()});
  };
  add("avx2", DType::fp32, avx2::fp32);
  add("avx2", DType::bf16, avx2::bf16);
  add("avx2", DType::int8, avx2::int8);
  add("avx2", DType::int4, avx2::int4);
  add("avx512", DType::fp32, avx512::fp32);
  add("avx512", DType::bf16, avx512::bf16);
  add("avx512", DType::int8, avx512::int8);
  add("avx512", DType::int4, avx512::int4);
  add("avx512_vnni", DType::bf16, avx512_vnni::bf16);
  add("avx512_vnni", DType::int8, avx512_vnni::int8);
  add("avx512_vnni", DType::int4, avx512_vnni::int4);
  add("avx512_bf16", DType::bf16, avx512_bf16::bf16);
  add("amx", DType::bf16, amx::bf16);
  add("amx", DType::int8, amx::int8);
  add("amx", DType::int4, amx::int4);
  return all;
}

// The buffers of one product, as binding.cpp lays them out, each of exactly its size.
struct Buffers {
  Product p;
  Exact x, x_scale, x_offset, out;
  Buffers(const Packed& weight, int64_t m, int64_t group, int64_t x_bytes, Float type)
      : p{weight, m, nullptr, nullptr, nullptr, group, nullptr, nullptr, type},
        x(m * p.padded_inputs() * x_bytes),
        x_scale(m * p.x_groups() * 4),
        x_offset(m * p.x_groups() * 4),
        out(m * weight.outputs * (type == Float::fp32 ? 4 : 2)) {
    p.x = x.get();
    p.x_scale = reinterpret_cast<float*>(x_scale.get());
    p.x_offset = reinterpret_cast<int32_t*>(x_offset.get());
    p.out = out.get();
  }
};

int64_t product(const Named& kernel, const std::vector<uint8_t>& array, int64_t m, int64_t group, Float type) {
  const Exact bytes(array.size(), draw(8));  // packed arrays may lie anywhere
  std::memcpy(bytes.get(), array.data(), array.size());
  Packed w;
  if (const char* problem = open(bytes.get(), array.size(), w)) fail(problem);
  const int64_t inputs = w.inputs, outputs = w.outputs;
  std::vector<float> dense(outputs * inputs);
  for (int64_t i = 0; i < w.panels(); ++i)
    if (unpack_panel(w, i, dense.data(), Float::fp32) < 0) fail("an intact panel is called damaged");

  const int64_t size = type == Float::fp32 ? 4 : 2;
  const Exact source(m * inputs * size, draw(2)), bias(outputs * 4);  // activations, too
  std::vector<double> values(m * inputs);
  for (int64_t i = 0; i < m * inputs; ++i) {
    float value = normal();
    if (type != Float::fp32) store_float(&value, type, 0, value);
    std::memcpy(source.get() + i * size, &value, size);
    values[i] = load_float(source.get(), type, i);
  }
  for (int64_t n = 0; n < outputs; ++n) store_float(bias.get(), Float::fp32, n, normal());
  Buffers b(w, m, group, kernel.variant.x_bytes, type);
  b.p.bias = reinterpret_cast<const float*>(bias.get());
  kernel.variant.prepare(b.p, source.get(), type, 0, m / 2);
  kernel.variant.prepare(b.p, source.get(), type, m / 2, m);
  const int64_t half = w.panels() / 2;  // as two threads would
  if (!kernel.variant.run(b.p, 0, half, 0, m) || !kernel.variant.run(b.p, half, w.panels(), 0, m)) fail("an intact array is refused");
  if (kernel.variant.finish) kernel.variant.finish();

  for (int64_t i = 0; i < m; ++i) {
    double step = 0;  // int8, int4: half a step of x
    for (int64_t k = 0; k < inputs; ++k) step = std::max(step, std::fabs(values[i * inputs + k]) / 254);
    for (int64_t n = 0; n < outputs; ++n) {
      double sum = b.p.bias[n], bound = 1e-30 + std::fabs(sum) * 1e-6;
      double largest = 0;
      for (int64_t k = 0; k < inputs; ++k) largest = std::max<double>(largest, std::fabs(dense[n * inputs + k]));
      for (int64_t k = 0; k < inputs; ++k) {
        const double a = values[i * inputs + k], v = dense[n * inputs + k];
        sum += a * v;
        bound += std::fabs(a * v) * (inputs + 4) * 1.3e-7;
        if (kernel.dtype == DType::bf16) bound += std::fabs(a * v) * 0.004;
        if (has_codes(kernel.dtype)) bound += std::fabs(v) * step;
        // Codes and minimums are multiplied on their own; either is at most twice the largest weight, or as far off as a given grid.
        if (kernel.dtype == DType::int4) bound += std::fabs(a) * (4 * largest + 1) * (inputs + 4) * 1.3e-7;
      }
      const double found = load_float(b.p.out, type, i * outputs + n);
      bound += std::fabs(sum) * (type == Float::fp32 ? 1e-7 : 0.004) + (type == Float::fp16 ? 0x1p-25 : 0);  // half a step of denormals
      if (!(std::fabs(found - sum) <= bound)) {
        fail(std::string(kernel.name) + ": " + std::to_string(found) + " instead of " + std::to_string(sum) + " at row " +
             std::to_string(i) + ", output " + std::to_string(n) + " of " + std::to_string(m) + " x " + std::to_string(outputs) + " x " +
             std::to_string(inputs));
      }
    }
  }
  return 1;
}

// A damaged array in memory of exactly its size: whatever the kernels answer, they must stay inside.
int64_t damaged(const Named& kernel, std::vector<uint8_t> array, int64_t m) {
  Header header;
  std::memcpy(&header, array.data(), sizeof(header));
  const int64_t first = round_up(sizeof(Header) + (divide_up(header.outputs, kPanel) + 1) * 8, 64);
  const int64_t edits = 1 + draw(4);
  for (int64_t i = 0; i < edits; ++i) {
    const int64_t kind = draw(8), size = array.size();
    if (kind == 0) {
      array[draw(size)] ^= 1 << draw(8);
    } else if (kind == 1) {
      array[draw(first)] = draw(256);
    } else if (kind < 6 && size > first) {
      std::fill_n(array.begin() + first + draw(size - first), 1, static_cast<uint8_t>(kind < 4 ? 255 : draw(256)));
    } else if (kind == 6 && size > first) {
      const int64_t at = first + draw(size - first);
      std::fill_n(array.begin() + at, std::min<int64_t>(size - at, draw(300)), 255);
    } else if (kind == 7 && size > first + kTail) {  // shorter, with a header and a last offset that agree
      array.resize(size - draw(size - first - kTail + 1));
      const int64_t bytes = array.size(), end = bytes - kTail;
      std::memcpy(array.data() + offsetof(Header, bytes), &bytes, 8);
      std::memcpy(array.data() + sizeof(Header) + divide_up(header.outputs, kPanel) * 8, &end, 8);
    }
  }
  const Exact bytes(array.size());
  std::memcpy(bytes.get(), array.data(), array.size());
  Packed w;
  if (open(bytes.get(), array.size(), w)) return 1;
  if (w.dtype != kernel.dtype || w.outputs > 1000 || w.inputs > 1000) return 1;
  std::vector<float> dense(w.outputs * w.inputs);
  bool intact = true;
  for (int64_t i = 0; i < w.panels(); ++i) intact &= unpack_panel(w, i, dense.data(), Float::fp32) >= 0;
  Buffers b(w, m, 32, kernel.variant.x_bytes, Float::fp32);
  const Exact source(m * w.inputs * 4);
  for (int64_t i = 0; i < m * w.inputs; ++i) store_float(source.get(), Float::fp32, i, normal());
  kernel.variant.prepare(b.p, source.get(), Float::fp32, 0, m);
  if (!kernel.variant.run(b.p, 0, w.panels(), 0, m) && intact) fail("the product refuses an array that unpacking takes");
  if (kernel.variant.finish) kernel.variant.finish();
  return 1;
}

Exact* special_source(Float type) {  // NaN, infinities, denormals, the largest numbers
  auto* source = new Exact(6 * 70 * 4);
  const float values[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 1e-45f, 1e-40f, 3e38f, -3e38f, 1.0f, 1e-38f};
  for (int64_t i = 0; i < 6 * 70; ++i) store_float(source->get(), type, i, i < 70 ? 1e-40f * (i % 3) : values[draw(11)]);
  return source;
}

// The ways to pack a dtype.
std::vector<Scheme> schemes(DType dtype) {
  std::vector<Scheme> all;
  for (Layout layout : {Layout::dense, Layout::sparse}) {
    if (dtype != DType::int4) all.push_back({dtype, layout, 0, false});
    for (int64_t group : {32, 64, 128})
      for (bool symmetric : {false, true})
        if (dtype == DType::int4) all.push_back({dtype, layout, group, symmetric});
  }
  const Pattern others[] = {{4, 8}, {1, 4}, {3, 4}, {1, 2}, {7, 16}, {63, 64}};
  for (const Pattern& pattern : {Pattern{2, 4}, others[draw(6)]})
    if (dtype != DType::int4) all.push_back({dtype, Layout::structured, 0, false, pattern});
  return all;
}

// A weight of which a pattern holds every value that is not zero.
std::unique_ptr<Exact> patterned(int64_t outputs, int64_t inputs, const Pattern& pattern, double density) {
  auto weight = std::make_unique<Exact>(outputs * inputs * 4, draw(4));
  std::memset(weight->get(), 0, outputs * inputs * 4);
  for (int64_t group = 0; group < outputs * inputs / pattern.m; ++group) {
    for (int64_t i = 0; i < pattern.n; ++i) {
      const float value = std::uniform_real_distribution<>()(random_bits) < density ? normal() : -0.0f;
      std::memcpy(weight->get() + 4 * (group * pattern.m + draw(pattern.m)), &value, 4);
    }
  }
  return weight;
}

// Grids as `pack` may be given them, at any address: of either sign, zeros of both, too small or too coarse for the weights.
struct Grids {
  int64_t count;
  Exact scale, minimum;

  Grids(const Scheme& scheme, int64_t outputs, int64_t inputs)
      : count(outputs * (scheme.dtype == DType::int4 ? divide_up(inputs, scheme.group_size) : 1)),
        scale(count * 4, draw(4)),
        minimum(count * 4, draw(4)) {
    const float special[] = {0.0f, -0.0f, 1e-45f, -1e-45f, 1e-9f, -1e-9f};
    for (int64_t i = 0; i < count; ++i) {
      const float values[] = {draw(3) ? normal() / 20 : special[draw(6)], normal()};
      std::memcpy(scale.get() + 4 * i, &values[0], 4);
      std::memcpy(minimum.get() + 4 * i, &values[1], 4);
    }
  }

  void give(const Scheme& scheme, Dense& weight) const {
    if (!has_codes(scheme.dtype)) return;
    weight.scale = scale.get();
    if (scheme.dtype == DType::int4 && !scheme.symmetric) weight.minimum = minimum.get();
  }
};

// Attention by every instruction set over pages and a tail of exactly their size; then over pages with damaged bytes.
int64_t attention(int64_t d, int64_t rows, int64_t length, const Span& span, int64_t k_keep, int64_t v_keep, Float type) {
  std::vector<AttentionVariant> kernels{scalar::attention()};
  if (avx2::attention) kernels.push_back(avx2::attention());
  if (avx512::attention) kernels.push_back(avx512::attention());
  if (avx512_vnni::attention) kernels.push_back(avx512_vnni::attention());
  if (avx512_bf16::attention) kernels.push_back(avx512_bf16::attention());
  const int64_t size = type == Float::fp32 ? 4 : 2, blocks = divide_up(span.tail, kBlockTokens), keep[2] = {k_keep, v_keep};
  std::vector<std::unique_ptr<Exact>> pages, tails;
  for (Kind kind : {Kind::key, Kind::value}) {
    const int64_t bytes = page_bytes(d, keep[static_cast<int>(kind)]);
    pages.push_back(std::make_unique<Exact>(span.pages * bytes, draw(4)));
    tails.push_back(std::make_unique<Exact>(blocks * block_bytes(d), draw(4)));
    const Exact x(kBlockTokens * d * size, draw(4));
    std::vector<uint16_t> back(kBlockTokens * d);
    for (int64_t i = 0; i < span.pages + blocks; ++i) {
      for (int64_t j = 0; j < kBlockTokens * d; ++j) {
        float value = normal();
        uint16_t bits = type == Float::fp16 ? float_to_fp16(value) : float_to_bf16(value);
        std::memcpy(x.get() + j * size, type == Float::fp32 ? static_cast<void*>(&value) : &bits, size);
      }
      if (i >= span.pages) {
        write_page(x.get(), type, d, kind, d, tails.back()->get() + (i - span.pages) * block_bytes(d));
        continue;
      }
      const Exact page(bytes, draw(4));
      write_page(x.get(), type, d, kind, keep[static_cast<int>(kind)], page.get());
      if (!read_page(page.get(), bytes, d, kind, back.data())) fail("an intact page is refused");
      std::memcpy(pages.back()->get() + i * bytes, page.get(), bytes);
    }
  }
  const int64_t splits = divide_up(span.tokens(), kSplitTokens), parts = splits * rows;
  std::vector<float> query(rows * d), sums(parts * d), largest(parts), total(parts), out(rows * d), first, lse(rows);
  for (float& value : query) value = normal();
  const auto blocks_of = [&](int i) { return Blocks{pages[i]->get(), page_bytes(d, keep[i]), 0, 0, span.pages, tails[i]->get(), 0, 0}; };
  const PageAttention a{
      1,           1,      d,           rows,           length,       0.1f,       blocks_of(0), blocks_of(1), &span, query.data(),
      Float::fp32, splits, sums.data(), largest.data(), total.data(), out.data(), lse.data()};
  for (const AttentionVariant& kernel : kernels) {
    for (int64_t i = 0; i < splits; ++i)
      if (!kernel.split(a, 0, i)) fail("an intact page is refused");
    kernel.join(a, 0);
    if (first.empty()) first = out;
    for (int64_t i = 0; i < rows * d; ++i)
      if (!(std::fabs(out[i] - first[i]) <= 0.02f)) fail("attention differs between instruction sets");
  }
  for (int i = 0; i < 8 && span.pages > 0; ++i) {
    uint8_t* page = pages[i % 2]->get() + draw(span.pages) * page_bytes(d, keep[i % 2]);
    for (int64_t j = draw(3); j >= 0; --j) page[draw(page_bytes(d, keep[i % 2]))] = static_cast<uint8_t>(draw(256));
    for (const AttentionVariant& kernel : kernels)
      for (int64_t j = 0; j < splits; ++j) kernel.split(a, 0, j);
  }
  return kernels.size();
}

}  // namespace

int main() {
  if (amx_emulator_install) {
    amx_emulator_install();
  } else {
    syscall(SYS_arch_prctl, 0x1023, 18);  // permission to use AMX tiles, if there are any
  }
  int64_t cases = 0;
  const int64_t sizes[] = {0, 1, 15, 16, 17, 31, 33, 63, 64, 65, 129, 257}, batches[] = {1, 2, 3, 4, 5, 7, 8, 9, 16, 19};
  const double densities[] = {0, 0.1, 0.5, 1};
  const std::vector<Named> kernels = variants();
  int64_t turn = 0;
  for (DType dtype : {DType::fp32, DType::bf16, DType::int8, DType::int4}) {
    for (int64_t outputs : {0, 1, 15, 16, 17, 33, 65}) {
      for (int64_t inputs : sizes) {
        for (double density : densities) {
          const Exact weight(outputs * inputs * 4, draw(4));
          for (int64_t i = 0; i < outputs * inputs; ++i) {
            const float value = std::uniform_real_distribution<>()(random_bits) < density ? normal() : 0.0f;
            std::memcpy(weight.get() + 4 * i, &value, 4);
          }
          for (const Scheme& scheme : schemes(dtype)) {
            Dense dense{weight.get(), Float::fp32, outputs, inputs};
            std::unique_ptr<Exact> own;
            if (scheme.layout == Layout::structured) {
              dense.inputs = round_up(inputs, scheme.pattern.m);
              own = patterned(outputs, dense.inputs, scheme.pattern, density);
              dense.data = own->get();
            }
            const Grids grids(scheme, outputs, dense.inputs);
            if (draw(3) == 0) grids.give(scheme, dense);
            const std::vector<uint8_t> array = pack(dense, scheme);
            for (const Named& kernel : kernels) {
              if (kernel.dtype != dtype) continue;
              const int64_t m = batches[++turn % 10];
              const Float type = turn % 3 == 0 ? Float::fp32 : turn % 3 == 1 ? Float::bf16 : Float::fp16;
              cases += product(kernel, array, m, turn % 2 || dtype == DType::int4 ? 32 : 64, type);
              for (int i = 0; i < 6; ++i) cases += damaged(kernel, array, batches[(turn + i) % 10]);
            }
          }
        }
      }
    }
  }
  // Special numbers on both sides.
  for (const Named& kernel : kernels) {
    for (Float type : {Float::fp32, Float::bf16, Float::fp16}) {
      const std::unique_ptr<Exact> weight(special_source(Float::fp32)), source(special_source(type));
      const float limit = kernel.dtype == DType::int4 ? 65504 : kernel.dtype == DType::int8 ? FLT_MAX : INFINITY;
      for (int64_t i = 0; i < 6 * 70; ++i)
        if (limit < INFINITY && !(std::fabs(load_float(weight->get(), Float::fp32, i)) <= limit))
          store_float(weight->get(), Float::fp32, i, i % 2 ? 1e-40f : 6e4f);
      for (const Scheme& scheme : schemes(kernel.dtype)) {
        if (scheme.layout == Layout::structured) continue;  // these weights have no pattern
        const std::vector<uint8_t> array = pack({weight->get(), Float::fp32, 6, 70}, scheme);
        Packed w;
        if (open(array.data(), array.size(), w)) fail("an intact array is refused");
        Buffers b(w, 6, 32, kernel.variant.x_bytes, type);
        kernel.variant.prepare(b.p, source->get(), type, 0, 6);
        if (!kernel.variant.run(b.p, 0, 1, 0, 6)) fail("an intact array is refused");
        for (int64_t i = 0; i < 6; ++i)
          if (!kernel.variant.run(b.p, 0, 1, i, i + 1)) fail("an intact array is refused");
        if (kernel.variant.finish) kernel.variant.finish();
        cases += 7;
      }
    }
  }
  for (int64_t d : {16, 48, 64, 128})
    for (int64_t rows : {1, 2, 3, 4, 5, 9})
      for (const Span& span : {Span{0, 1, 0}, Span{0, 0, 1}, Span{3, 2, 17}, Span{20, 5, 3}, Span{500, 34, 30}, Span{0, 0, 0}})
        for (int64_t length = 1; length <= rows; length += 2)
          cases += attention(d, rows / length * length, length, span, 1 + draw(d), 1 + draw(d),
                             draw(2)   ? Float::fp32
                             : draw(2) ? Float::bf16
                                       : Float::fp16);
  std::printf("%lld cases passed\n", static_cast<long long>(cases));
}
