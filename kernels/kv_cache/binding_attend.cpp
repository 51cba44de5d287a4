// The ops of attend.h: checks, allocation, split of the work.
#include "../common/kv_binding.h"
#include "../common/parallel.h"

#include <vector>

#include "attend.h"

namespace tce::kv_cache {
namespace {

const Kernel<AttendVariant> kAttend{"attend",
                                    {{Isa::scalar, scalar::attend},
                                     {Isa::avx2, avx2::attend},
                                     {Isa::avx512, avx512::attend},
                                     {Isa::avx512_vnni, avx512_vnni::attend},
                                     {Isa::avx512_bf16, bf16_dot_pays() ? avx512_bf16::attend : nullptr}}};

const char* name_of(const Tensor& tensor) { return torch::headeronly::toString(tensor.scalar_type()); }

// What the pages of a tensor are; their elements are whole bytes, or floats.
PageType page_type(const Tensor& pages, Kind kind, int64_t head_dim, const char* op, const std::string& argument) {
  PageType type = PageType::fp32;
  int64_t element = 4;
  switch (pages.scalar_type()) {
    case ScalarType::Float:
      break;
    case ScalarType::BFloat16:
      type = PageType::bf16;
      element = 2;
      break;
    case ScalarType::Char:
      type = PageType::int8;
      element = 1;
      break;
    case ScalarType::Byte:
      type = PageType::int4;
      element = 1;
      break;
    case ScalarType::Short:
      STD_TORCH_CHECK(valid_sparse_bytes(2 * pages.size(pages.dim() - 1), head_dim), op, ": ", argument,
                      " must have sparse pages of a size that fits head_dim ", head_dim, ", got ", pages.size(pages.dim() - 1),
                      " elements");
      return PageType::sparse;
    default:
      STD_TORCH_CHECK(false, op, ": ", argument, " must be float32, bfloat16, int8, uint8 (int4) or int16 (sparse), got ", name_of(pages));
  }
  const int64_t size = page_bytes(type, kind, head_dim) / element;
  STD_TORCH_CHECK(pages.size(pages.dim() - 1) == size, op, ": ", argument, " must have pages of ", size, " elements for head_dim ",
                  head_dim, ", got ", pages.size(pages.dim() - 1));
  return type;
}

int64_t bytes_of(const Tensor& pages, PageType type, Kind kind, int64_t head_dim) {
  return type == PageType::sparse ? 2 * pages.size(pages.dim() - 1) : page_bytes(type, kind, head_dim);
}

void check_intact(bool intact, const char* op) {
  STD_TORCH_CHECK(intact, op, ": sparse pages must be intact, got a page whose bitmap does not fit its size");
}

Tensor pack(Tensor x, std::string kind_name, std::string dtype) {
  static const char* op = "kv_cache_pack";
  const Float float_kind = float_type(x, op, "x");
  STD_TORCH_CHECK(x.dim() == 4, op, ": x must be 4-D (batch, KV heads, tokens, head_dim), got ", x.dim(), "-D");
  const int64_t tokens = x.size(2), d = x.size(3);
  check_head_dim(d, op);
  STD_TORCH_CHECK(tokens % kPageTokens == 0, op, ": x must have a multiple of 16 tokens, got ", tokens);
  const Kind kind = kind_of(kind_name, op);
  const char* names[] = {"fp32", "bf16", "int8", "int4"};
  const ScalarType types[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Char, ScalarType::Byte};
  int index = 0;
  while (index < 4 && dtype != names[index]) ++index;
  STD_TORCH_CHECK(index < 4, op, ": dtype must be fp32, bf16, int8 or int4, got ", dtype);
  const auto type = static_cast<PageType>(index);
  x = torch::stable::contiguous(x);
  const int64_t bytes = page_bytes(type, kind, d), count = x.size(0) * x.size(1) * (tokens / kPageTokens);
  const int64_t element = type == PageType::fp32 ? 4 : type == PageType::bf16 ? 2 : 1;
  Tensor pages = torch::stable::empty({x.size(0), x.size(1), tokens / kPageTokens, bytes / element}, types[index]);
  const auto* source = static_cast<const uint8_t*>(x.const_data_ptr());
  auto* target = static_cast<uint8_t*>(pages.mutable_data_ptr());
  parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      write_page(source + i * kPageTokens * d * (float_kind == Float::fp32 ? 4 : 2), float_kind, d, kind, type, target + i * bytes);
  });
  return pages;
}

Tensor unpack(Tensor pages, std::string kind_name, int64_t head_dim) {
  static const char* op = "kv_cache_unpack";
  check_head_dim(head_dim, op);
  const Kind kind = kind_of(kind_name, op);
  STD_TORCH_CHECK(pages.dim() == 4, op, ": pages must be 4-D (batch, KV heads, pages, elements), got ", pages.dim(), "-D");
  const PageType type = page_type(pages, kind, head_dim, op, "pages");
  pages = torch::stable::contiguous(pages);
  const int64_t bytes = bytes_of(pages, type, kind, head_dim), count = pages.size(0) * pages.size(1) * pages.size(2);
  const bool floats = type == PageType::fp32;
  Tensor x = torch::stable::empty({pages.size(0), pages.size(1), pages.size(2) * kPageTokens, head_dim},
                                  floats ? ScalarType::Float : ScalarType::BFloat16);
  const auto* source = static_cast<const uint8_t*>(pages.const_data_ptr());
  auto* target = static_cast<uint8_t*>(x.mutable_data_ptr());
  std::atomic<bool> intact{true};
  parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (!read_page(source + i * bytes, bytes, head_dim, kind, type, target + i * kPageTokens * head_dim * (floats ? 4 : 2)))
        intact = false;
  });
  check_intact(intact, op);
  return x;
}

// A pool for `batch` rows of `heads` KV heads; makes its table and lengths contiguous.
Pool pool_of(Tensor& k, Tensor& v, Tensor& table, Tensor& length, int64_t batch, int64_t heads, int64_t head_dim, const char* op,
             const std::string& suffix) {
  PageType types[2];
  for (int i = 0; i < 2; ++i) {
    const Tensor& pages = i == 0 ? k : v;
    const std::string name = (i == 0 ? "k_pages" : "v_pages") + suffix;
    STD_TORCH_CHECK(pages.dim() == 3, op, ": ", name, " must be 3-D (pages, heads, elements), got ", pages.dim(), "-D");
    types[i] = page_type(pages, i == 0 ? Kind::key : Kind::value, head_dim, op, name);
  }
  STD_TORCH_CHECK(v.size(0) == k.size(0) && v.size(1) == k.size(1), op, ": v_pages", suffix,
                  " must have as many pages and heads as k_pages, (", k.size(0), ", ", k.size(1), "), got (", v.size(0), ", ", v.size(1),
                  ")");
  STD_TORCH_CHECK(k.size(1) == 1 || k.size(1) == heads, op, ": k_pages", suffix, " must have 1 or ", heads, " heads, got ", k.size(1));
  const int64_t tables = k.size(1) == 1 ? heads : 1;
  STD_TORCH_CHECK(table.dim() == 3 && table.scalar_type() == ScalarType::Int && table.size(0) == batch && table.size(1) == tables, op,
                  ": table", suffix, " must be an int32 tensor of shape (", batch, ", ", tables, ", pages), got ", table.dim(), "-D ",
                  name_of(table), " with ", table.numel(), " elements");
  STD_TORCH_CHECK(length.dim() == 2 && length.scalar_type() == ScalarType::Long && length.size(0) == batch && length.size(1) == heads, op,
                  ": length", suffix, " must be an int64 tensor of shape (", batch, ", ", heads, "), got ", length.dim(), "-D ",
                  name_of(length), " with ", length.numel(), " elements");
  k = torch::stable::contiguous(k);
  v = torch::stable::contiguous(v);
  table = torch::stable::contiguous(table);
  length = torch::stable::contiguous(length);
  return {static_cast<const uint8_t*>(k.const_data_ptr()),
          static_cast<const uint8_t*>(v.const_data_ptr()),
          types[0],
          types[1],
          bytes_of(k, types[0], Kind::key, head_dim),
          bytes_of(v, types[1], Kind::value, head_dim),
          k.size(1),
          static_cast<const int32_t*>(table.const_data_ptr()),
          table.size(2),
          static_cast<const int64_t*>(length.const_data_ptr()),
          nullptr};
}

// That the tokens [begin, end) of a head have pages of the pool's.
void check_tokens(const Pool& pool, int64_t head, int64_t heads, int64_t begin, int64_t end, int64_t room, const char* op,
                  const std::string& suffix) {
  STD_TORCH_CHECK(end >= 0 && end <= pool.width * kPageTokens, op, ": length", suffix, " must be from 0 to ", pool.width * kPageTokens,
                  ", the tokens of its table, got ", end);
  const int32_t* line = pool.line(head, heads);
  for (int64_t i = begin / kPageTokens; i < divide_up(end, kPageTokens); ++i)
    STD_TORCH_CHECK(line[i] >= 0 && line[i] < room, op, ": table", suffix, " must have pages from 0 to ", room - 1, ", got ", line[i]);
}

std::string shape_of(const Tensor& x) {
  std::string text = "[";
  for (int64_t i = 0; i < x.dim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
  return text + "]";
}

void append(Tensor k_pages, Tensor v_pages, Tensor table, Tensor length, Tensor key, Tensor value) {
  static const char* op = "kv_cache_append";
  for (const auto& [name, x] : {std::pair{"key", &key}, std::pair{"value", &value}}) {
    float_type(*x, op, name);
    STD_TORCH_CHECK(x->dim() == 4, op, ": ", name, " must be 4-D (batch, KV heads, tokens, head_dim), got ", x->dim(), "-D");
  }
  const int64_t batch = key.size(0), heads = key.size(1), tokens = key.size(2), d = key.size(3);
  STD_TORCH_CHECK(value.size(0) == batch && value.size(1) == heads && value.size(2) == tokens && value.size(3) == d &&
                      value.scalar_type() == key.scalar_type(),
                  op, ": value must have the shape and dtype of key, ", shape_of(key), " ", name_of(key), ", got ", shape_of(value), " ",
                  name_of(value));
  const Float type = float_type(key, op, "key");
  check_head_dim(d, op);
  for (const auto& [name, pages] : {std::pair{"k_pages", &k_pages}, std::pair{"v_pages", &v_pages}}) {
    STD_TORCH_CHECK((pages->scalar_type() == ScalarType::Float || pages->scalar_type() == ScalarType::BFloat16) &&
                        pages->scalar_type() == k_pages.scalar_type(),
                    op, ": ", name, " must be float32 or bfloat16, the same for both, got ", name_of(*pages));
    STD_TORCH_CHECK(pages->is_contiguous(), op, ": ", name, " must be contiguous");
  }
  const Pool pool = pool_of(k_pages, v_pages, table, length, batch, heads, d, op, "");
  if (tokens == 0) return;
  for (int64_t head = 0; head < batch * heads; ++head) {
    const int64_t first = pool.length[head];
    STD_TORCH_CHECK(first >= 0, op, ": length must not be negative, got ", first);
    check_tokens(pool, head, heads, first, first + tokens, k_pages.size(0), op, "");
  }
  key = torch::stable::contiguous(key);
  value = torch::stable::contiguous(value);
  auto *k = static_cast<uint8_t*>(k_pages.mutable_data_ptr()), *v = static_cast<uint8_t*>(v_pages.mutable_data_ptr());
  const auto *from_k = static_cast<const uint8_t*>(key.const_data_ptr()), *from_v = static_cast<const uint8_t*>(value.const_data_ptr());
  const int64_t bytes = d * (type == Float::fp32 ? 4 : 2);
  parallel_for(0, batch * heads, divide_up(4096, tokens * d), [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      const int32_t* line = pool.line(head, heads);
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t slot = pool.length[head] + t, at = head * tokens + t;
        const int64_t page = pool.place(line[slot / kPageTokens], head, heads);
        write_token(from_k + at * bytes, type, d, Kind::key, pool.k_type, slot % kPageTokens, k + page * pool.k_bytes);
        write_token(from_v + at * bytes, type, d, Kind::value, pool.v_type, slot % kPageTokens, v + page * pool.v_bytes);
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> attend(Tensor query, std::vector<Tensor> k_pages, std::vector<Tensor> v_pages,
                                          std::vector<Tensor> tables, std::vector<Tensor> lengths, std::vector<Tensor> bias, double scale,
                                          double softcap, bool mass) {
  static const char* op = "kv_cache_attend";
  const Float type = float_type(query, op, "query");
  STD_TORCH_CHECK(query.dim() == 4, op, ": query must be 4-D (batch, heads, length, head_dim), got ", query.dim(), "-D");
  const int64_t batch = query.size(0), q_heads = query.size(1), length = query.size(2), d = query.size(3);
  check_head_dim(d, op);
  const size_t count = k_pages.size();
  STD_TORCH_CHECK(count > 0, op, ": k_pages must have one pool at least, got none");
  for (const auto& [name, size] : {std::pair{"v_pages", v_pages.size()}, {"tables", tables.size()}, {"lengths", lengths.size()}})
    STD_TORCH_CHECK(size == count, op, ": ", name, " must be as many as k_pages, ", count, ", got ", size);
  STD_TORCH_CHECK(bias.empty() || bias.size() == count, op, ": bias must be none or as many as k_pages, ", count, ", got ", bias.size());
  STD_TORCH_CHECK(softcap >= 0, op, ": softcap must not be negative, got ", softcap);
  STD_TORCH_CHECK(lengths[0].dim() == 2 && lengths[0].size(1) > 0, op, ": lengths must be 2-D (batch, KV heads), got ", lengths[0].dim(),
                  "-D with ", lengths[0].numel(), " elements");
  const int64_t kv_heads = lengths[0].size(1);
  STD_TORCH_CHECK(q_heads % kv_heads == 0, op, ": query must have a multiple of the ", kv_heads, " KV heads, got ", q_heads);
  std::vector<Pool> pools;
  for (size_t i = 0; i < count; ++i)
    pools.push_back(pool_of(k_pages[i], v_pages[i], tables[i], lengths[i], batch, kv_heads, d, op, "[" + std::to_string(i) + "]"));
  int64_t slots = 0;
  for (size_t i = 0; i < count; ++i) {
    const int64_t own = pools[i].width * kPageTokens;
    slots += own;
    if (bias.empty()) continue;
    STD_TORCH_CHECK(bias[i].dim() == 3 && bias[i].scalar_type() == ScalarType::Float && bias[i].size(0) == batch &&
                        bias[i].size(1) == kv_heads && bias[i].size(2) == own,
                    op, ": bias[", i, "] must be a float32 tensor of shape (", batch, ", ", kv_heads, ", ", own, "), got ", bias[i].dim(),
                    "-D ", name_of(bias[i]), " with ", bias[i].numel(), " elements");
    bias[i] = torch::stable::contiguous(bias[i]);
    pools[i].bias = static_cast<const float*>(bias[i].const_data_ptr());
  }

  const int64_t heads = batch * kv_heads, rows = q_heads / kv_heads * length;
  std::vector<Part> parts;
  std::vector<int64_t> first_part(heads + 1), tokens(heads);
  int64_t bytes = 0;
  for (int64_t head = 0; head < heads; ++head) {
    first_part[head] = static_cast<int64_t>(parts.size());
    for (int64_t i = 0, slot = 0; i < static_cast<int64_t>(count); slot += pools[i++].width * kPageTokens) {
      const int64_t end = pools[i].length[head];
      check_tokens(pools[i], head, kv_heads, 0, end, k_pages[i].size(0), op, "[" + std::to_string(i) + "]");
      const int64_t size = part_tokens(end);
      for (int64_t begin = 0; begin < end; begin += size)
        parts.push_back({head, i, begin, std::min(begin + size, end), tokens[head], slot});
      tokens[head] += end;
      bytes += divide_up(end, kPageTokens) * (pools[i].k_bytes + pools[i].v_bytes);
    }
  }
  first_part[heads] = static_cast<int64_t>(parts.size());

  query = torch::stable::contiguous(query);
  Tensor out = torch::stable::new_empty(query, {batch, q_heads, length, d});
  Tensor lse = torch::stable::empty({batch, q_heads, length}, ScalarType::Float);
  Tensor masses = torch::stable::empty({batch, kv_heads, mass ? slots : 0}, ScalarType::Float);
  if (masses.numel()) std::memset(masses.mutable_data_ptr(), 0, masses.numel() * 4);
  if (heads * rows == 0) return {out, lse, masses};
  const int64_t all_rows = static_cast<int64_t>(parts.size()) * rows;
  const Scratch scratch(all_rows * (d + 2 + (mass ? kPartTokens : 0)) * 4);
  float* sums = scratch.floats();
  const Attention attention{kv_heads,
                            d,
                            rows,
                            length,
                            static_cast<float>(scale),
                            static_cast<float>(softcap),
                            pools.data(),
                            parts.data(),
                            first_part.data(),
                            tokens.data(),
                            query.const_data_ptr(),
                            type,
                            sums,
                            sums + all_rows * d,
                            sums + all_rows * (d + 1),
                            mass ? sums + all_rows * (d + 2) : nullptr,
                            out.mutable_data_ptr(),
                            static_cast<float*>(lse.mutable_data_ptr()),
                            mass ? static_cast<float*>(masses.mutable_data_ptr()) : nullptr,
                            slots};
  const AttendVariant& kernel = kAttend.get();
  const int64_t threads = bytes < kSerialBytes ? 1 : torch::stable::get_num_threads();
  std::atomic<bool> intact{true};
  for_each_dynamic(first_part[heads], threads, [&](int64_t i) {
    if (!kernel.part(attention, i)) intact = false;
  });
  check_intact(intact, op);
  for_each_dynamic(heads, first_part[heads] > heads ? threads : 1, [&](int64_t i) { kernel.join(attention, i); });
  return {out, lse, masses};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_cpu_ext, CPU, m) {
  m.impl("kv_cache_pack", TORCH_BOX(&pack));
  m.impl("kv_cache_unpack", TORCH_BOX(&unpack));
  m.impl("kv_cache_append", TORCH_BOX(&append));
  m.impl("kv_cache_attend", TORCH_BOX(&attend));
}

}  // namespace tce::kv_cache
