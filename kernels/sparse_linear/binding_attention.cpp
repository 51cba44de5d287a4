// The ops of attention over pruned keys and values: checks, allocation, split of the work.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "../common/kv_binding.h"
#include "attention.h"
#include "work.h"

namespace tce::sparse_linear {
namespace {

const Kernel<AttentionVariant> kAttention{"attention",
                                          {{Isa::scalar, scalar::attention},
                                           {Isa::avx2, avx2::attention},
                                           {Isa::avx512, avx512::attention},
                                           {Isa::avx512_vnni, avx512_vnni::attention},
                                           {Isa::avx512_bf16, bf16_dot_pays() ? avx512_bf16::attention : nullptr}}};

void check_pages(const Tensor& pages, int64_t head_dim, const char* op, const char* argument) {
  STD_TORCH_CHECK(pages.dim() == 4 && pages.scalar_type() == ScalarType::Byte, op, ": ", argument,
                  " must be a 4-D uint8 tensor (batch, KV heads, pages, bytes), got ", pages.dim(), "-D ",
                  torch::headeronly::toString(pages.scalar_type()));
  STD_TORCH_CHECK(valid_page_bytes(pages.size(3), head_dim), op, ": ", argument, " must have pages of a size that fits head_dim ", head_dim,
                  ", got ", pages.size(3), " bytes");
}

Tensor compress(Tensor x, std::string kind_name, double sparsity) {
  static const char* op = "sparse_linear_compress_kv";
  const Float type = float_type(x, op, "x");
  STD_TORCH_CHECK(x.dim() == 4, op, ": x must be 4-D (batch, KV heads, tokens, head_dim), got ", x.dim(), "-D");
  const int64_t tokens = x.size(2), d = x.size(3);
  check_head_dim(d, op);
  STD_TORCH_CHECK(tokens % kBlockTokens == 0, op, ": x must have a multiple of 16 tokens, got ", tokens);
  const Kind kind = kind_of(kind_name, op);
  const int64_t keep = sparsity >= 0 && sparsity < 1 ? static_cast<int64_t>(std::nearbyint((1 - sparsity) * static_cast<double>(d))) : 0;
  STD_TORCH_CHECK(keep > 0, op, ": sparsity must be at least 0 and leave one element a vector, got ", sparsity);
  x = torch::stable::contiguous(x);
  const int64_t bytes = page_bytes(d, keep), count = x.size(0) * x.size(1) * (tokens / kBlockTokens);
  Tensor pages = torch::stable::empty({x.size(0), x.size(1), tokens / kBlockTokens, bytes}, ScalarType::Byte);
  const uint8_t* source = static_cast<const uint8_t*>(x.const_data_ptr());
  uint8_t* target = static_cast<uint8_t*>(pages.mutable_data_ptr());
  parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      write_page(source + i * kBlockTokens * d * (type == Float::fp32 ? 4 : 2), type, d, kind, keep, target + i * bytes);
  });
  return pages;
}

Tensor expand(Tensor pages, std::string kind_name, int64_t head_dim) {
  static const char* op = "sparse_linear_expand_kv";
  check_head_dim(head_dim, op);
  check_pages(pages, head_dim, op, "pages");
  const Kind kind = kind_of(kind_name, op);
  pages = torch::stable::contiguous(pages);
  const int64_t bytes = pages.size(3), count = pages.size(0) * pages.size(1) * pages.size(2);
  Tensor x = torch::stable::empty({pages.size(0), pages.size(1), pages.size(2) * kBlockTokens, head_dim}, ScalarType::BFloat16);
  const uint8_t* source = static_cast<const uint8_t*>(pages.const_data_ptr());
  uint16_t* target = static_cast<uint16_t*>(x.mutable_data_ptr());
  std::atomic<bool> intact{true};
  parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (!read_page(source + i * bytes, bytes, head_dim, kind, target + i * kBlockTokens * head_dim)) intact = false;
  });
  STD_TORCH_CHECK(intact, op, ": pages must be intact, got a page whose bitmap does not fit its size");
  return x;
}

// Pages and tail of the keys or the values. What the inner loops read must be contiguous; the outer two dimensions may have any strides.
Blocks blocks_of(Tensor& pages, Tensor& tail, int64_t batch, int64_t kv_heads, int64_t d, bool keys, const char* op) {
  const char *pages_name = keys ? "k_pages" : "v_pages", *tail_name = keys ? "k_tail" : "v_tail";
  check_pages(pages, d, op, pages_name);
  STD_TORCH_CHECK(pages.size(0) == batch && pages.size(1) == kv_heads, op, ": ", pages_name, " must have batch ", batch, " and ", kv_heads,
                  " KV heads, got ", pages.size(0), " and ", pages.size(1));
  const int64_t inner[3] = {keys ? d / 2 : kBlockTokens / 2, keys ? kBlockTokens : d, 2};
  STD_TORCH_CHECK(tail.dim() == 6 && tail.scalar_type() == ScalarType::BFloat16, op, ": ", tail_name,
                  " must be a 6-D bfloat16 tensor of blocks, got ", tail.dim(), "-D ", torch::headeronly::toString(tail.scalar_type()));
  STD_TORCH_CHECK(
      tail.size(0) == batch && tail.size(1) == kv_heads && tail.size(3) == inner[0] && tail.size(4) == inner[1] && tail.size(5) == 2, op,
      ": ", tail_name, " must be (", batch, ", ", kv_heads, ", blocks, ", inner[0], ", ", inner[1], ", 2), got (", tail.size(0), ", ",
      tail.size(1), ", blocks, ", tail.size(3), ", ", tail.size(4), ", ", tail.size(5), ")");
  if (pages.stride(3) != 1 || pages.stride(2) != pages.size(3)) pages = torch::stable::contiguous(pages);
  if (tail.stride(5) != 1 || tail.stride(4) != 2 || tail.stride(3) != 2 * inner[1] || tail.stride(2) != 2 * inner[0] * inner[1])
    tail = torch::stable::contiguous(tail);
  return {static_cast<const uint8_t*>(pages.const_data_ptr()), pages.size(3),      pages.stride(0),   pages.stride(1), pages.size(2),
          static_cast<const uint8_t*>(tail.const_data_ptr()),  tail.stride(0) * 2, tail.stride(1) * 2};
}

std::tuple<Tensor, Tensor> attend(Tensor query, Tensor k_pages, Tensor v_pages, Tensor k_tail, Tensor v_tail, Tensor spans, double scale) {
  static const char* op = "sparse_linear_attend";
  const Float type = float_type(query, op, "query");
  STD_TORCH_CHECK(query.dim() == 4, op, ": query must be 4-D (batch, heads, length, head_dim), got ", query.dim(), "-D");
  const int64_t batch = query.size(0), q_heads = query.size(1), length = query.size(2), d = query.size(3);
  check_head_dim(d, op);
  STD_TORCH_CHECK(k_pages.dim() == 4, op, ": k_pages must be a 4-D uint8 tensor (batch, KV heads, pages, bytes), got ", k_pages.dim(),
                  "-D ", torch::headeronly::toString(k_pages.scalar_type()));
  const int64_t kv_heads = k_pages.size(1);
  STD_TORCH_CHECK(kv_heads > 0 && q_heads % kv_heads == 0, op, ": query must have a multiple of the ", kv_heads, " KV heads, got ",
                  q_heads);
  const Blocks k = blocks_of(k_pages, k_tail, batch, kv_heads, d, true, op), v = blocks_of(v_pages, v_tail, batch, kv_heads, d, false, op);
  STD_TORCH_CHECK(k_pages.size(2) == v_pages.size(2), op, ": v_pages must have as many pages as k_pages, ", k_pages.size(2), ", got ",
                  v_pages.size(2));
  STD_TORCH_CHECK(k_tail.size(2) == v_tail.size(2), op, ": v_tail must have as many blocks as k_tail, ", k_tail.size(2), ", got ",
                  v_tail.size(2));
  STD_TORCH_CHECK(spans.dim() == 3 && spans.scalar_type() == ScalarType::Long && spans.size(0) == batch && spans.size(1) == kv_heads &&
                      spans.size(2) == 3,
                  op, ": spans must be an int64 tensor of shape (", batch, ", ", kv_heads, ", 3), got ", spans.dim(), "-D ",
                  torch::headeronly::toString(spans.scalar_type()), " with ", spans.numel(), " elements");

  const int64_t heads = batch * kv_heads, rows = q_heads / kv_heads * length;
  query = torch::stable::contiguous(query);
  spans = torch::stable::contiguous(spans);
  std::vector<Span> checked(heads);
  if (heads) std::memcpy(checked.data(), spans.const_data_ptr(), heads * sizeof(Span));
  int64_t splits = 0, bytes = 0;
  for (const Span& span : checked) {
    STD_TORCH_CHECK(span.pages >= 0 && span.pages <= k.count, op, ": spans must have at most ", k.count, " pages, got ", span.pages);
    STD_TORCH_CHECK(span.tail >= 0 && span.tail <= k_tail.size(2) * kBlockTokens, op, ": spans must have at most ",
                    k_tail.size(2) * kBlockTokens, " tokens in the tail, got ", span.tail);
    STD_TORCH_CHECK(span.first >= 0 && span.first <= span.tokens(), op, ": spans must begin with a token from 0 to ", span.tokens(),
                    ", got ", span.first);
    splits = std::max(splits, divide_up(span.tokens(), kSplitTokens));
    bytes += span.pages * (k.page_bytes + v.page_bytes) + span.tail * 4 * d;
  }

  Tensor out = torch::stable::new_empty(query, {batch, q_heads, length, d});
  Tensor lse = torch::stable::empty({batch, q_heads, length}, ScalarType::Float);
  if (heads * rows == 0) return {out, lse};
  const int64_t parts = heads * splits * rows;
  const Scratch scratch(parts * (d + 2) * 4);
  float* sums = reinterpret_cast<float*>(scratch.get());
  const PageAttention attention{heads,
                                kv_heads,
                                d,
                                rows,
                                length,
                                static_cast<float>(scale),
                                k,
                                v,
                                checked.data(),
                                query.const_data_ptr(),
                                type,
                                splits,
                                sums,
                                sums + parts * d,
                                sums + parts * (d + 1),
                                out.mutable_data_ptr(),
                                static_cast<float*>(lse.mutable_data_ptr())};
  const AttentionVariant& kernel = kAttention.get();
  const int64_t threads = bytes < kSerialBytes ? 1 : torch::stable::get_num_threads();
  std::atomic<bool> intact{true};
  for_each_dynamic(heads * splits, threads, [&](int64_t i) {
    if (!kernel.split(attention, i / splits, i % splits)) intact = false;
  });
  STD_TORCH_CHECK(intact, op, ": pages must be intact, got a page whose bitmap does not fit its size");
  for_each_dynamic(heads, splits > 1 ? threads : 1, [&](int64_t i) { kernel.join(attention, i); });
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_cpu_ext, CPU, m) {
  m.impl("sparse_linear_compress_kv", TORCH_BOX(&compress));
  m.impl("sparse_linear_expand_kv", TORCH_BOX(&expand));
  m.impl("sparse_linear_attend", TORCH_BOX(&attend));
}

}  // namespace tce::sparse_linear
