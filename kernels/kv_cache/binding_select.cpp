// The ops of select.h: checks, allocation, split of the work.
#include <algorithm>
#include <iterator>
#include <vector>

#include "../common/parallel.h"

#include "select.h"

namespace tce::kv_cache {
namespace {

const Kernel<SelectVariant> kSelect{
    "select",
    {{Isa::scalar, scalar::select}, {Isa::avx2, avx2::select}, {Isa::avx512, avx512::select}, {Isa::avx512_vnni, avx512_vnni::select}}};

constexpr int64_t kLargestPage = 1024, kMostWords = 1023, kMostAnchors = 8;
constexpr const char* kAnchors[] = {"random", "zeros", "ones", "mean", "inv_mean", "alternate"};

// Below this many scores, waking a second thread costs more than it brings.
constexpr int64_t kSerialScores = 16 << 10;
// Tokens whose signatures one thread writes at once.
constexpr int64_t kSignTokens = 2048;

int64_t threads_for(int64_t scores) { return scores < kSerialScores ? 1 : torch::stable::get_num_threads(); }

void check_score(const Tensor& score, const char* op, const char* dimensions) {
  STD_TORCH_CHECK(score.dim() == 3 && score.scalar_type() == ScalarType::Float, op, ": score must be a 3-D float32 tensor (", dimensions,
                  "), got ", score.dim(), "-D ", torch::headeronly::toString(score.scalar_type()));
  STD_TORCH_CHECK(score.size(2) <= INT32_MAX, op, ": score must have at most ", INT32_MAX, " ", std::strrchr(dimensions, ' ') + 1, ", got ",
                  score.size(2));
}

// The contents of an int64 tensor of one dimension (batch) or two (batch, heads).
std::vector<int64_t> values_of(Tensor tensor, const char* op, const char* argument, int64_t batch, int64_t heads = -1) {
  const bool fits =
      heads < 0 ? tensor.dim() == 1 && tensor.size(0) == batch : tensor.dim() == 2 && tensor.size(0) == batch && tensor.size(1) == heads;
  STD_TORCH_CHECK(fits && tensor.scalar_type() == ScalarType::Long, op, ": ", argument, " must be an int64 tensor of shape (", batch, ",",
                  heads < 0 ? "" : " " + std::to_string(heads), "), got ", tensor.dim(), "-D ",
                  torch::headeronly::toString(tensor.scalar_type()), " with ", tensor.numel(), " elements");
  tensor = torch::stable::contiguous(tensor);
  std::vector<int64_t> values(tensor.numel());
  if (!values.empty()) std::memcpy(values.data(), tensor.const_data_ptr(), values.size() * sizeof(int64_t));
  return values;
}

Tensor sign_op(Tensor score, Tensor begin, Tensor end, int64_t page) {
  static const char* op = "kv_cache_sign";
  check_score(score, op, "batch, signature heads, tokens");
  const int64_t batch = score.size(0), heads = score.size(1), tokens = score.size(2);
  const std::vector<int64_t> begins = values_of(begin, op, "begin", batch), ends = values_of(end, op, "end", batch);
  STD_TORCH_CHECK(page >= 1 && page <= kLargestPage, op, ": page must be from 1 to ", kLargestPage, ", got ", page);
  for (int64_t b = 0; b < batch; ++b) {
    STD_TORCH_CHECK(begins[b] >= 0, op, ": begin must be at least 0, got ", begins[b]);
    STD_TORCH_CHECK(ends[b] <= tokens, op, ": end must be at most ", tokens, ", got ", ends[b]);
  }
  score = torch::stable::contiguous(score);
  Tensor signature = torch::stable::empty({batch, divide_up(tokens, page), divide_up(heads * page, 64)}, ScalarType::Long);
  if (signature.numel())
    sign(static_cast<const float*>(score.const_data_ptr()), batch, heads, tokens, begins.data(), ends.data(), page,
         static_cast<uint64_t*>(signature.mutable_data_ptr()));
  return signature;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> select_op(Tensor score, Tensor signature, Tensor first, Tensor length, Tensor budget,
                                                     int64_t most, int64_t start, int64_t recent, double ratio, std::string anchor_name,
                                                     int64_t anchors, int64_t seed) {
  static const char* op = "kv_cache_select";
  check_score(score, op, "batch, KV heads, units");
  const int64_t batch = score.size(0), heads = score.size(1), units = score.size(2);
  STD_TORCH_CHECK(signature.dim() == 4 && signature.scalar_type() == ScalarType::Long, op,
                  ": signature must be a 4-D int64 tensor (batch, 1 or KV heads, units, words), got ", signature.dim(), "-D ",
                  torch::headeronly::toString(signature.scalar_type()));
  const int64_t signatures = signature.size(1), words = signature.size(3);
  STD_TORCH_CHECK(signature.size(0) == batch && (signatures == 1 || signatures == heads) && signature.size(2) == units, op,
                  ": signature must be (", batch, ", 1 or ", heads, ", ", units, ", words), got (", signature.size(0), ", ", signatures,
                  ", ", signature.size(2), ", words)");
  const std::vector<int64_t> firsts = values_of(first, op, "first", batch, heads), lengths = values_of(length, op, "length", batch, heads),
                             budgets = values_of(budget, op, "budget", batch, heads);
  STD_TORCH_CHECK(most >= 0, op, ": most must be at least 0, got ", most);
  STD_TORCH_CHECK(start >= 0 && start <= INT32_MAX, op, ": start must be from 0 to ", INT32_MAX, ", got ", start);
  STD_TORCH_CHECK(recent >= 0 && recent <= INT32_MAX, op, ": recent must be from 0 to ", INT32_MAX, ", got ", recent);
  STD_TORCH_CHECK(ratio >= 0 && ratio <= 1, op, ": ratio must be from 0 to 1, got ", ratio);
  STD_TORCH_CHECK((words > 0 || ratio == 0) && words <= kMostWords, op, ": signature must have 1 to ", kMostWords,
                  " words, or none where ratio is 0, got ", words);
  const auto anchor = std::find(std::begin(kAnchors), std::end(kAnchors), anchor_name);
  STD_TORCH_CHECK(anchor != std::end(kAnchors), op, ": anchor must be random, zeros, ones, mean, inv_mean or alternate, got ", anchor_name);
  STD_TORCH_CHECK(anchors >= 1 && anchors <= kMostAnchors, op, ": anchors must be from 1 to ", kMostAnchors, ", got ", anchors);
  score = torch::stable::contiguous(score);
  signature = torch::stable::contiguous(signature);

  Tensor index = torch::stable::empty({batch, heads, most}, ScalarType::Int);
  Tensor count = torch::stable::empty({batch, heads}, ScalarType::Long);
  Tensor kind = torch::stable::empty({batch, heads, most}, ScalarType::Byte);
  Tensor members = torch::stable::empty({batch, heads, most}, ScalarType::Float);
  const float* scores = static_cast<const float*>(score.const_data_ptr());
  const Word* words_of = static_cast<const Word*>(signature.const_data_ptr());
  std::vector<Choice> choices(batch * heads);
  std::vector<Order> orders;
  std::vector<int64_t> order_of(choices.size(), -1);
  int64_t total = 0, choice_scratch = 0, order_scratch = 0;
  for (int64_t i = 0; i < batch * heads; ++i) {
    STD_TORCH_CHECK(lengths[i] >= 0 && lengths[i] <= units, op, ": length must be from 0 to ", units, ", got ", lengths[i]);
    STD_TORCH_CHECK(firsts[i] >= 0 && firsts[i] <= lengths[i], op, ": first must be from 0 to the length, ", lengths[i], ", got ",
                    firsts[i]);
    STD_TORCH_CHECK(budgets[i] <= most, op, ": most must be at least each budget, ", budgets[i], ", got ", most);
    const int64_t live = lengths[i] - firsts[i];
    STD_TORCH_CHECK(budgets[i] >= live || budgets[i] >= start + recent + 1, op, ": budget must be at least start + recent + 1, ",
                    start + recent + 1, ", where units are dropped, got ", budgets[i]);
    Choice& choice = choices[i];
    choice.score = scores + i * units;
    choice.first = firsts[i];
    choice.length = lengths[i];
    choice.begin = std::min(firsts[i] + start, lengths[i]);
    choice.end = std::max(choice.begin, lengths[i] - recent);
    choice.all = live <= budgets[i];
    choice.most = most;
    choice.index = static_cast<int32_t*>(index.mutable_data_ptr()) + i * most;
    choice.count = static_cast<int64_t*>(count.mutable_data_ptr()) + i;
    choice.kind = static_cast<uint8_t*>(kind.mutable_data_ptr()) + i * most;
    choice.members = static_cast<float*>(members.mutable_data_ptr()) + i * most;
    total += live;
    if (choice.all) continue;
    const int64_t free = budgets[i] - start - recent, size = choice.end - choice.begin;
    choice.representatives = static_cast<int64_t>(std::floor(ratio * static_cast<double>(free) + 0.5));
    choice.important = free - choice.representatives;
    choice_scratch += choice_bytes(size, choice.important, choice.representatives);
    if (choice.representatives == 0) continue;
    const Word* own = words_of + (signatures == 1 ? i / heads : i) * units * words;
    const auto same = std::find_if(orders.begin(), orders.end(), [&](const Order& order) {
      return order.signature == own && order.begin == choice.begin && order.end == choice.end;
    });
    order_of[i] = same - orders.begin();
    if (same != orders.end()) continue;
    orders.push_back({own, words, choice.begin, choice.end, static_cast<Anchor>(anchor - kAnchors), anchors, static_cast<uint64_t>(seed),
                      nullptr, nullptr, nullptr});
    order_scratch += order_bytes(size, words) + 2 * round_up(size * 4, 64);
  }

  const Scratch scratch(order_scratch + choice_scratch);
  uint8_t* next = scratch.get();
  const auto take = [&](int64_t bytes) { return std::exchange(next, next + bytes); };
  for (Order& order : orders) {
    order.scratch = take(order_bytes(order.size(), words));
    order.order = reinterpret_cast<uint32_t*>(take(round_up(order.size() * 4, 64)));
    order.rank = reinterpret_cast<uint32_t*>(take(round_up(order.size() * 4, 64)));
  }
  for (int64_t i = 0; i < batch * heads; ++i) {
    Choice& choice = choices[i];
    if (choice.all) continue;
    choice.scratch = take(choice_bytes(choice.end - choice.begin, choice.important, choice.representatives));
    if (order_of[i] < 0) continue;
    choice.order = orders[order_of[i]].order;
    choice.rank = orders[order_of[i]].rank;
  }

  const SelectVariant& kernel = kSelect.get();
  const int64_t threads = threads_for(total), count_of_orders = static_cast<int64_t>(orders.size());
  for_each_dynamic(count_of_orders + batch * heads, threads, [&](int64_t i) {
    if (i < count_of_orders) return kernel.order(orders[i]);
    Choice& choice = choices[i - count_of_orders];
    if (!choice.all) choice.threshold = kernel.threshold(choice.score, choice.begin, choice.end, choice.important);
  });
  for_each_dynamic(batch * heads, threads, [&](int64_t i) { kernel.choose(choices[i]); });
  return {index, count, kind, members};
}

}  // namespace

void sign(const float* score, int64_t batch, int64_t heads, int64_t tokens, const int64_t* begin, const int64_t* end, int64_t page,
          uint64_t* words) {
  const SelectVariant& kernel = kSelect.get();
  const int64_t threads = threads_for(batch * heads * tokens);
  const int64_t units = divide_up(tokens, page), step = std::max<int64_t>(1, kSignTokens / page), steps = divide_up(units, step);
  std::vector<Threshold> thresholds(batch * heads);
  std::vector<Signatures> rows(batch);
  for (int64_t b = 0; b < batch; ++b)
    rows[b] = {score + b * heads * tokens,
               heads,
               tokens,
               std::min(begin[b], tokens),
               std::max<int64_t>(end[b], 0),
               page,
               thresholds.data() + b * heads,
               words + b * units * divide_up(heads * page, 64)};
  for_each_dynamic(batch * heads, threads, [&](int64_t i) {
    const Signatures& row = rows[i / heads];
    thresholds[i] = kernel.threshold(score + i * tokens, row.begin, row.end, (row.end - row.begin) / 2);
  });
  for_each_dynamic(batch * steps, threads, [&](int64_t i) {
    const int64_t from = i % steps * step;
    kernel.sign(rows[i / steps], from, std::min(from + step, units));
  });
}

STABLE_TORCH_LIBRARY_IMPL(torch_cpu_ext, CPU, m) {
  m.impl("kv_cache_sign", TORCH_BOX(&sign_op));
  m.impl("kv_cache_select", TORCH_BOX(&select_op));
}

}  // namespace tce::kv_cache
