// The part of sanitize_main.cpp for attention of prompts.
#pragma once

namespace {

struct NamedPrefill {
  const char* name;
  PrefillVariant variant;
};

std::vector<NamedPrefill> prefill_variants(Float type) {
  std::vector<NamedPrefill> result{{"scalar", scalar::prefill()}};
  if (avx2::prefill) result.push_back({"avx2", avx2::prefill()});
  if (avx512::prefill) result.push_back({"avx512", avx512::prefill()});
  if (avx512_bf16::prefill && type == Float::bf16) result.push_back({"avx512_bf16", avx512_bf16::prefill()});
  return result;
}

// Every part of a prompt, in an order that no thread would keep; returns output, log-sum-exp and scores.
std::vector<float> run_prefill(const PrefillVariant& variant, Prompt p) {
  const int64_t heads = p.heads() * p.group, packed = p.heads() * p.blocks() * kBlockTokens, size = p.type == Float::fp32 ? 4 : 2;
  const int64_t elements = heads * p.length * p.head_dim;
  const Exact keys(packed * p.head_dim * variant.element), values(packed * p.head_dim * variant.element), biases(packed * 4);
  const Exact out(elements * size, size), lse(heads * p.length * 4), sums(heads * p.tokens * 4), score(heads * p.tokens * 4);
  p.keys = keys.get();
  p.values = values.get();
  p.biases = p.bias ? biases.get<float>() : nullptr;
  p.out = out.get();
  p.lse = lse.get<float>();
  p.score = score.get<float>();
  p.sums = p.pool > 1 ? sums.get<float>() : p.score;
  const auto each = [&](int64_t parts, void (*f)(const Prompt&, int64_t, int64_t)) {
    for (int64_t i = p.heads() * parts - 1; i >= 0; --i) f(p, i / parts, i % parts);
  };
  each(divide_up(p.blocks(), kPackBlocks), variant.pack);
  each(p.tiles(), variant.attend);
  each(divide_up(p.tokens, kScoreTokens), variant.score);
  if (p.pool > 1)
    for (int64_t i = 0; i < heads; ++i) variant.pool(p, i);
  std::vector<float> result;
  for (int64_t i = 0; i < elements; ++i) result.push_back(load_float(p.out, p.type, i));
  result.insert(result.end(), p.lse, p.lse + heads * p.length);
  result.insert(result.end(), p.score, p.score + heads * p.tokens);
  return result;
}

int64_t check_prefill() {
  int64_t calls = 0;
  for (const Float type : {Float::fp32, Float::bf16, Float::fp16})
    for (const int64_t d : {16, 48, 80})
      for (const int64_t tokens : {1, 15, 16, 33, 70, 257, 530})
        for (const int64_t group : {1, 3, 8}) {
          const int64_t batch = 1 + draw(2), kv_heads = 1 + draw(2), length = 1 + draw(std::min<int64_t>(tokens, 90));
          const int64_t size = type == Float::fp32 ? 4 : 2, heads = batch * kv_heads, shift = draw(4);
          const Exact q(heads * group * length * d * size, shift), k(heads * tokens * d * size, shift), v(heads * tokens * d * size, shift);
          const Exact first(heads * 8), bias(heads * tokens * 4);
          for (const auto& [memory, count] :
               {std::pair{&q, heads * group * length * d}, {&k, heads * tokens * d}, {&v, heads * tokens * d}})
            for (int64_t i = 0; i < count; ++i) {
              float value;
              store_float(&value, type, 0, normal());
              std::memcpy(memory->get() + i * size, &value, size);
            }
          for (int64_t i = 0; i < heads; ++i) first.get<int64_t>()[i] = draw(2) ? 0 : draw(tokens + 1);
          for (int64_t i = 0; i < heads * tokens; ++i) bias.get<float>()[i] = normal();
          const auto vectors = [&](const Exact& memory, int64_t of, int64_t count) {
            return Vectors{memory.get(), of * count * d, count * d, d};
          };
          Prompt p{batch, kv_heads, group, length, tokens, d, 0.2f, draw(2) ? 3.0f : 0.0f, type};
          p.q = vectors(q, kv_heads * group, length);
          p.k = vectors(k, kv_heads, tokens);
          p.v = vectors(v, kv_heads, tokens);
          p.first = draw(2) ? first.get<int64_t>() : nullptr;
          p.bias = draw(2) ? bias.get<float>() : nullptr;
          (draw(2) ? p.window : p.sample) = 1 + draw(9);
          p.pool = 1 + 2 * draw(5);
          std::vector<float> expected;
          for (const NamedPrefill& named : prefill_variants(type)) {
            const std::vector<float> result = run_prefill(named.variant, p);
            if (expected.empty()) expected = result;
            for (size_t i = 0; i < result.size(); ++i) {
              const float bound = (type == Float::fp32 ? 1e-4f : 0.02f) * (1 + std::abs(expected[i]));
              if (result[i] != expected[i] && !(std::abs(result[i] - expected[i]) <= bound))
                fail(std::string(named.name) + ": prefill gives other numbers, tokens " + std::to_string(tokens));
            }
            ++calls;
          }
        }
  return calls;
}

}  // namespace
