// Runs every kernel of kv_cache that this machine can run on buffers of exactly the documented size, under the address and
// undefined-behaviour sanitizers; tests/sanitize.py builds and starts it. Results of one instruction set are compared with those of scalar.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../sanitize.h"
#include "attend.h"
#include "prefill.h"
#include "select.h"

using namespace tce;
using namespace tce::kv_cache;

namespace {

// ------------------------------------------------------------------------------------------------------------------------------ selection

struct Named {
  const char* name;
  SelectVariant variant;
};

std::vector<Named> select_variants() {
  std::vector<Named> result{{"scalar", scalar::select()}};
  if (avx2::select) result.push_back({"avx2", avx2::select()});
  if (avx512::select) result.push_back({"avx512", avx512::select()});
  if (avx512_vnni::select) result.push_back({"avx512_vnni", avx512_vnni::select()});
  return result;
}

void fill_scores(float* score, int64_t count, int64_t kind) {
  const float special[] = {NAN, -NAN, INFINITY, -INFINITY, 0.0f, -0.0f};
  for (int64_t i = 0; i < count; ++i) {
    float value = kind == 0 ? normal() : kind == 1 ? std::round(normal()) : kind == 2 ? 1.0f : draw(2) ? special[draw(6)] : normal();
    std::memcpy(reinterpret_cast<uint8_t*>(score) + i * 4, &value, 4);
  }
}

// Signatures of one row: the words of all units.
std::vector<uint64_t> signs(const SelectVariant& variant, const float* score, int64_t heads, int64_t tokens, int64_t begin, int64_t end,
                            int64_t page, int64_t step) {
  std::vector<Threshold> thresholds(heads);
  Signatures row{score, heads, tokens, begin, end, page, thresholds.data(), nullptr};
  const Exact words(row.units() * row.words_each() * 8);
  row.words = words.get<uint64_t>();
  for (int64_t head = 0; head < heads; ++head)
    thresholds[head] = variant.threshold(reinterpret_cast<const float*>(reinterpret_cast<const uint8_t*>(score) + head * tokens * 4), begin,
                                         end, (end - begin) / 2);
  for (int64_t from = 0; from < row.units(); from += step) variant.sign(row, from, std::min(from + step, row.units()));
  const std::vector<uint64_t> result(row.words, row.words + row.units() * row.words_each());
  int64_t bits = 0;
  for (const uint64_t word : result) bits += std::popcount(word);
  if (bits != heads * std::max<int64_t>(0, (end - begin) / 2)) fail("signatures of " + std::to_string(bits) + " bits in all");
  return result;
}

// One head's choice: units, kinds and members as bytes, one after another.
std::vector<uint8_t> choose(const SelectVariant& variant, const float* score, const Word* signature, int64_t units, int64_t words,
                            int64_t start, int64_t recent, int64_t budget, int64_t representatives, Anchor anchor, int64_t anchors) {
  const int64_t size = units - start - recent;
  const Exact order_scratch(order_bytes(size, words)), order(size * 4), rank(size * 4),
      scratch(choice_bytes(size, budget - start - recent - representatives, representatives));
  const Exact index(budget * 4), kind(budget), members(budget * 4);
  int64_t count = -1;
  Choice choice{score,
                0,
                units,
                start,
                units - recent,
                units <= budget,
                budget - start - recent - representatives,
                representatives,
                {},
                order.get<uint32_t>(),
                rank.get<uint32_t>(),
                scratch.get(),
                budget,
                index.get<int32_t>(),
                &count,
                kind.get(),
                members.get<float>()};
  if (!choice.all) {
    if (representatives > 0)
      variant.order({signature, words, choice.begin, choice.end, anchor, anchors, 7, order_scratch.get(), order.get<uint32_t>(),
                     rank.get<uint32_t>()});
    choice.threshold = variant.threshold(score, choice.begin, choice.end, choice.important);
  }
  variant.choose(choice);
  if (count != std::min(budget, units)) fail("a choice of " + std::to_string(count) + " units with a budget of " + std::to_string(budget));
  for (int64_t i = 1; i < count; ++i)
    if (choice.index[i] <= choice.index[i - 1]) fail("units that do not ascend");
  std::vector<uint8_t> result(index.get(), index.get() + budget * 4);
  result.insert(result.end(), kind.get(), kind.get() + budget);
  result.insert(result.end(), members.get(), members.get() + budget * 4);
  return result;
}

int64_t check_selection() {
  const std::vector<Named> variants = select_variants();
  int64_t calls = 0;
  for (const int64_t tokens : {1, 2, 15, 16, 17, 63, 64, 65, 127, 200, 1000, 4095, 4096, 5003, 9000, 40000}) {
    for (int64_t kind = 0; kind < 4; ++kind)
      for (const int64_t page : {1, 7, 16, 64, 100}) {
        const int64_t heads = tokens > 1000 ? 2 : 1 + draw(70);
        const Exact memory(heads * tokens * 4, draw(4));
        const float* score = memory.get<float>();
        fill_scores(memory.get<float>(), heads * tokens, kind);
        const int64_t begin = draw(2) ? 0 : draw(tokens + 1), end = draw(2) ? tokens : draw(tokens + 1), step = 1 + draw(tokens);
        const std::vector<uint64_t> expected = signs(variants[0].variant, score, heads, tokens, begin, end, page, tokens);
        for (const Named& named : variants) {
          if (signs(named.variant, score, heads, tokens, begin, end, page, step) != expected)
            fail(std::string(named.name) + ": other signatures, tokens " + std::to_string(tokens) + " page " + std::to_string(page));
          ++calls;
        }
      }
    for (int64_t kind = 0; kind < 4; ++kind)
      for (const int64_t words : {1, 2, 9}) {
        const Exact scores(tokens * 4, draw(4)), signature(tokens * words * 8, draw(8));
        fill_scores(scores.get<float>(), tokens, kind);
        for (int64_t i = 0; i < tokens * words * 8; ++i) signature.get()[i] = static_cast<uint8_t>(kind == 2 ? 5 : draw(256));
        const int64_t start = draw(std::min<int64_t>(tokens, 5)), recent = draw(tokens - start), least = start + recent + 1;
        const int64_t budget = least + draw(tokens - least + 2);
        for (const int64_t representatives : {int64_t{0}, (budget - start - recent) / 2, budget - start - recent}) {
          const Anchor anchor = static_cast<Anchor>(draw(6));
          const int64_t anchors = 1 + draw(3);
          std::vector<uint8_t> expected;
          for (const Named& named : variants) {
            const auto result = choose(named.variant, scores.get<float>(), signature.get<Word>(), tokens, words, start, recent, budget,
                                       representatives, anchor, anchors);
            if (expected.empty()) expected = result;
            if (result != expected) fail(std::string(named.name) + ": another choice, units " + std::to_string(tokens));
            ++calls;
          }
        }
      }
  }
  return calls;
}

}  // namespace

#include "sanitize_attend.h"
#include "sanitize_prefill.h"

int main() {
  std::printf("%lld calls of selection\n", static_cast<long long>(check_selection()));
  std::printf("%lld calls of attention over pages\n", static_cast<long long>(check_attend()));
  std::printf("%lld calls of prefill\n", static_cast<long long>(check_prefill()));
  return 0;
}
