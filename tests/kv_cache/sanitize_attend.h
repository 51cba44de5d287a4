// The part of sanitize_main.cpp for pages and attention over them.
#pragma once

namespace {

struct NamedAttend {
  const char* name;
  AttendVariant variant;
};

std::vector<NamedAttend> attend_variants() {
  std::vector<NamedAttend> result{{"scalar", scalar::attend()}};
  if (avx2::attend) result.push_back({"avx2", avx2::attend()});
  if (avx512::attend) result.push_back({"avx512", avx512::attend()});
  if (avx512_vnni::attend) result.push_back({"avx512_vnni", avx512_vnni::attend()});
  if (avx512_bf16::attend) result.push_back({"avx512_bf16", avx512_bf16::attend()});
  return result;
}

// A sparse page that keeps `keep` elements of each vector: its bitmap is not the pruner's, but fits.
void write_sparse(int64_t dim, int64_t keep, uint8_t* page) {
  std::vector<uint8_t> bits(16 * dim, 0);
  std::fill_n(bits.begin(), 16 * keep, 1);
  std::shuffle(bits.begin(), bits.end(), random_bits);
  std::memset(page, 0, 2 * dim);
  for (int64_t i = 0; i < 16 * dim; ++i) page[i / 8] |= static_cast<uint8_t>(bits[i] << i % 8);
  for (int64_t i = 0; i < 16 * keep; ++i) {
    const uint16_t value = float_to_bf16(normal());
    std::memcpy(page + 2 * dim + 2 * i, &value, 2);
  }
}

// Pages of a pool with numbers, none of which lies past the pool.
void fill_pages(PageType type, Kind kind, int64_t dim, int64_t bytes, int64_t count, uint8_t* pages) {
  const Exact numbers(16 * dim * 4), again(16 * dim * 4);
  for (int64_t page = 0; page < count; ++page) {
    if (type == PageType::sparse) {
      write_sparse(dim, (bytes - 2 * dim) / 32, pages + page * bytes);
    } else {
      for (int64_t i = 0; i < 16 * dim; ++i) numbers.get<float>()[i] = normal();
      write_page(numbers.get(), Float::fp32, dim, kind, type, pages + page * bytes);
    }
    if (!read_page(pages + page * bytes, bytes, dim, kind, type, again.get())) fail("a page that was written cannot be read");
  }
}

int64_t check_attend() {
  int64_t calls = 0;
  for (int64_t round = 0; round < 240; ++round) {
    const int64_t dims[] = {16, 32, 48, 80, 128}, dim = dims[draw(5)], heads = 1 + draw(3), rows_each = 1 + draw(6), length = 1 + draw(3);
    const int64_t tokens = 1 + draw(round % 20 == 0 ? 1200 : 90), width = divide_up(tokens, kPageTokens), rows = rows_each * length;
    const auto k_type = static_cast<PageType>(draw(5)), v_type = static_cast<PageType>(draw(5));
    const int64_t keep = 1 + draw(dim - dim / 8 - 1), count = heads * width;
    const auto bytes_of = [&](PageType type, Kind kind) {
      return type == PageType::sparse ? 2 * dim + 32 * keep : page_bytes(type, kind, dim);
    };
    const int64_t k_bytes = bytes_of(k_type, Kind::key), v_bytes = bytes_of(v_type, Kind::value);
    const Exact k(count * k_bytes, 4 * draw(3)), v(count * v_bytes, 4 * draw(3)), table(count * 4), lengths(heads * 8);
    const Exact bias(heads * width * kPageTokens * 4), q(heads * rows * dim * 4);
    fill_pages(k_type, Kind::key, dim, k_bytes, count, k.get());
    fill_pages(v_type, Kind::value, dim, v_bytes, count, v.get());
    for (int64_t i = 0; i < count; ++i) table.get<int32_t>()[i] = static_cast<int32_t>(count - 1 - i);
    for (int64_t i = 0; i < heads * width * kPageTokens; ++i) bias.get<float>()[i] = normal();
    for (int64_t i = 0; i < heads * rows * dim; ++i) q.get<float>()[i] = normal();
    std::vector<Part> parts;
    std::vector<int64_t> first_part{0}, all;
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t end = 1 + draw(tokens), size = part_tokens(end);
      lengths.get<int64_t>()[head] = end;
      for (int64_t begin = 0; begin < end; begin += size) parts.push_back({head, 0, begin, std::min(begin + size, end), 0, 0});
      first_part.push_back(static_cast<int64_t>(parts.size()));
      all.push_back(end);
    }
    const Pool pool{k.get(),
                    v.get(),
                    k_type,
                    v_type,
                    k_bytes,
                    v_bytes,
                    1,
                    table.get<int32_t>(),
                    width,
                    lengths.get<int64_t>(),
                    draw(2) ? bias.get<float>() : nullptr};
    const int64_t part_rows = static_cast<int64_t>(parts.size()) * rows;
    const Exact sums(part_rows * dim * 4), largest(part_rows * 4), total(part_rows * 4), scores(part_rows * kPartTokens * 4);
    const Exact out(heads * rows * dim * 4), lse(heads * rows * 4), mass(heads * width * kPageTokens * 4);
    std::vector<float> expected;
    for (const NamedAttend& named : attend_variants()) {
      std::memset(mass.get(), 0, heads * width * kPageTokens * 4);
      const Attention attention{heads,
                                dim,
                                rows,
                                length,
                                0.2f,
                                round % 3 ? 0.0f : 4.0f,
                                &pool,
                                parts.data(),
                                first_part.data(),
                                all.data(),
                                q.get(),
                                Float::fp32,
                                sums.get<float>(),
                                largest.get<float>(),
                                total.get<float>(),
                                scores.get<float>(),
                                out.get(),
                                lse.get<float>(),
                                mass.get<float>(),
                                width * kPageTokens};
      for (int64_t i = 0; i < static_cast<int64_t>(parts.size()); ++i)
        if (!named.variant.part(attention, i)) fail(std::string(named.name) + ": calls a whole page damaged");
      for (int64_t head = 0; head < heads; ++head) named.variant.join(attention, head);
      std::vector<float> result(out.get<float>(), out.get<float>() + heads * rows * dim);
      result.insert(result.end(), mass.get<float>(), mass.get<float>() + heads * width * kPageTokens);
      if (expected.empty()) expected = result;
      for (size_t i = 0; i < result.size(); ++i)
        if (!(std::abs(result[i] - expected[i]) <= 0.1f * (1 + std::abs(expected[i]))))
          fail(std::string(named.name) + ": attention gives other numbers, tokens " + std::to_string(tokens));
      ++calls;
      if (k_type != PageType::sparse) continue;
      // Whatever is in a bitmap, nothing outside of the page is read.
      std::vector<uint8_t> bitmap(k.get(), k.get() + 2 * dim);
      for (int64_t i = 0; i < 2 * dim; ++i) k.get()[i] = static_cast<uint8_t>(draw(256));
      for (int64_t i = 0; i < static_cast<int64_t>(parts.size()); ++i) named.variant.part(attention, i);
      std::copy(bitmap.begin(), bitmap.end(), k.get());
    }
  }
  return calls;
}

}  // namespace
