// The op of prefill.h: checks, allocation, split of the work.
#include "../common/kv_binding.h"
#include "../common/parallel.h"

#include <cmath>
#include <vector>

#include "prefill.h"
#include "select.h"

namespace tce::kv_cache {
namespace {

const Kernel<PrefillVariant> kPrefill{"prefill",
                                      {{Isa::scalar, scalar::prefill}, {Isa::avx2, avx2::prefill}, {Isa::avx512, avx512::prefill}}};
const Kernel<PrefillVariant> kPrefillBf16{"prefill_bf16",
                                          {{Isa::scalar, scalar::prefill},
                                           {Isa::avx2, avx2::prefill},
                                           {Isa::avx512, avx512::prefill},
                                           {Isa::avx512_bf16, bf16_dot_pays() ? avx512_bf16::prefill : nullptr}}};

// Below this many products, waking a second thread costs more than it brings.
constexpr int64_t kSerialProducts = 1 << 20;

Vectors vectors_of(Tensor& tensor) {
  if (tensor.stride(3) != 1) tensor = torch::stable::contiguous(tensor);
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prefill(Tensor query, Tensor key, Tensor value, std::optional<Tensor> first,
                                                   std::optional<Tensor> bias, double scale, double softcap, int64_t window, int64_t sample,
                                                   int64_t pool, int64_t start, int64_t recent, bool sign) {
  static const char* op = "kv_cache_prefill";
  const auto name = [](const Tensor& tensor) { return torch::headeronly::toString(tensor.scalar_type()); };
  const Float type = float_type(query, op, "query");
  STD_TORCH_CHECK(query.dim() == 4, op, ": query must be 4-D (batch, heads, length, head_dim), got ", query.dim(), "-D");
  const int64_t batch = query.size(0), heads = query.size(1), length = query.size(2), d = query.size(3);
  check_head_dim(d, op);
  for (const Tensor* tensor : {&key, &value}) {
    const char* argument = tensor == &key ? "key" : "value";
    STD_TORCH_CHECK(tensor->dim() == 4 && tensor->scalar_type() == query.scalar_type(), op, ": ", argument, " must be a 4-D ", name(query),
                    " tensor (batch, KV heads, tokens, head_dim), got ", tensor->dim(), "-D ", name(*tensor));
    STD_TORCH_CHECK(tensor->size(0) == batch && tensor->size(3) == d, op, ": ", argument, " must have batch ", batch, " and head_dim ", d,
                    ", got ", tensor->size(0), " and ", tensor->size(3));
  }
  const int64_t kv_heads = key.size(1), tokens = key.size(2);
  STD_TORCH_CHECK(value.size(1) == kv_heads && value.size(2) == tokens, op, ": value must have ", kv_heads, " KV heads and ", tokens,
                  " tokens, got ", value.size(1), " and ", value.size(2));
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, op, ": query must have a multiple of the ", kv_heads, " KV heads, got ", heads);
  STD_TORCH_CHECK(length <= tokens, op, ": query must be of at most the ", tokens, " tokens of key, got ", length);
  if (first) {
    STD_TORCH_CHECK(first->dim() == 2 && first->scalar_type() == ScalarType::Long && first->size(0) == batch && first->size(1) == kv_heads,
                    op, ": first must be an int64 tensor of shape (", batch, ", ", kv_heads, "), got ", first->dim(), "-D ", name(*first),
                    " with ", first->numel(), " elements");
  }
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 3 && bias->scalar_type() == ScalarType::Float && bias->size(0) == batch && bias->size(1) == kv_heads &&
                        bias->size(2) == tokens,
                    op, ": bias must be a float32 tensor of shape (", batch, ", ", kv_heads, ", ", tokens, "), got ", bias->dim(), "-D ",
                    name(*bias), " with ", bias->numel(), " elements");
  }
  STD_TORCH_CHECK(softcap >= 0 && std::isfinite(softcap), op, ": softcap must be 0 or positive, got ", softcap);
  for (const auto& [argument, number] : {std::pair{"window", window}, {"sample", sample}, {"start", start}, {"recent", recent}})
    STD_TORCH_CHECK(number >= 0, op, ": ", argument, " must not be negative, got ", number);
  STD_TORCH_CHECK(window == 0 || sample == 0, op, ": window and sample must not both be given, got window ", window, " and sample ",
                  sample);
  STD_TORCH_CHECK(pool > 0 && pool % 2 == 1, op, ": pool must be odd and positive, got ", pool);
  const bool scored = window > 0 || sample > 0;
  STD_TORCH_CHECK(!sign || scored, op, ": sign must come with window or sample, got neither");

  const Vectors q = vectors_of(query), k = vectors_of(key), v = vectors_of(value);
  std::vector<int64_t> starts(first ? batch * kv_heads : 0);
  if (!starts.empty()) std::memcpy(starts.data(), torch::stable::contiguous(*first).const_data_ptr(), starts.size() * sizeof(int64_t));
  for (const int64_t begin : starts)
    STD_TORCH_CHECK(begin >= 0 && begin <= tokens, op, ": first must be 0 to ", tokens, " (tokens), got ", begin);
  if (bias) bias = torch::stable::contiguous(*bias);

  Tensor out = torch::stable::new_empty(query, {batch, heads, length, d});
  Tensor lse = torch::stable::empty({batch, heads, length}, ScalarType::Float);
  Tensor score = torch::stable::empty({batch, heads, scored ? tokens : 0}, ScalarType::Float);
  Tensor signature = torch::stable::empty({batch, sign ? tokens : 0, divide_up(heads, 64)}, ScalarType::Long);
  if (batch * heads * tokens == 0) return {out, lse, score, signature};

  const PrefillVariant& kernel = (type == Float::bf16 ? kPrefillBf16 : kPrefill).get();
  const int64_t padded = batch * kv_heads * round_up(tokens, kBlockTokens), packed = padded * d * kernel.element;
  const Scratch scratch(2 * packed + (bias ? padded * 4 : 0) + (scored && pool > 1 ? batch * heads * tokens * 4 : 0));
  Prompt p{batch, kv_heads, heads / kv_heads, length, tokens, d, static_cast<float>(scale), static_cast<float>(softcap), type, q, k, v};
  p.first = first ? starts.data() : nullptr;
  p.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  p.window = window;
  p.sample = sample;
  p.pool = pool;
  p.keys = scratch.get();
  p.values = p.keys + packed;
  p.biases = bias ? reinterpret_cast<float*>(p.values + packed) : nullptr;
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.score = scored ? static_cast<float*>(score.mutable_data_ptr()) : nullptr;
  p.sums = scored && pool > 1 ? reinterpret_cast<float*>(p.values + packed + (bias ? padded * 4 : 0)) : p.score;

  const int64_t threads = batch * heads * length * tokens * d < kSerialProducts ? 1 : torch::stable::get_num_threads();
  const auto each = [&](int64_t parts, void (*f)(const Prompt&, int64_t, int64_t), bool backwards) {
    for_each_dynamic(p.heads() * parts, threads, [&](int64_t i) { f(p, i / parts, backwards ? parts - 1 - i % parts : i % parts); });
  };
  each(divide_up(p.blocks(), kPackBlocks), kernel.pack, false);
  if (length) each(p.tiles(), kernel.attend, true);  // the longest ones first
  if (scored) each(divide_up(tokens, kScoreTokens), kernel.score, false);
  if (scored && pool > 1) for_each_dynamic(batch * heads, threads, [&](int64_t i) { kernel.pool(p, i); });
  if (sign) {
    std::vector<int64_t> begins(batch), ends(batch);
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t least = p.first ? *std::min_element(p.first + b * kv_heads, p.first + (b + 1) * kv_heads) : 0;
      begins[b] = start < tokens - least ? least + start : tokens;
      ends[b] = std::max(begins[b], recent < tokens ? tokens - recent : 0);
    }
    kv_cache::sign(p.score, batch, heads, tokens, begins.data(), ends.data(), 1, static_cast<uint64_t*>(signature.mutable_data_ptr()));
  }
  return {out, lse, score, signature};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_cpu_ext, CPU, m) { m.impl("kv_cache_prefill", TORCH_BOX(&prefill)); }

}  // namespace tce::kv_cache
