// The body of select.h, for every instruction set. The including file has, of its own:
//   unsigned greater(Integers a, Integers b)    bit i says whether lane i of a is greater
//   int64_t nth_bit(uint64_t bits, int64_t n)   the place of the set bit with n set ones below it

namespace selection {

// Keys: the bits of a float are a sign and a magnitude, and magnitudes of floats are ordered like integers.
using Unsigned = uint32_t __attribute__((vector_size(kVectorBytes)));
constexpr int32_t kInfinity = 0x7f800000, kNan = -kInfinity - 1;

static Integers keys(const float* score) {
  const Integers bits = reinterpret_cast<Integers>(load_vector(score));
  const Integers sign = bits >> 31, magnitude = bits & 0x7fffffff;
  const Integers key = (magnitude ^ sign) - sign;
  return magnitude > kInfinity ? Integers{} + kNan : key;
}

static Integers iota() {
  Integers value;
  for (int i = 0; i < kLanes; ++i) value[i] = i;
  return value;
}

// Below which key scores at positions from `at` on are not among the largest, or at it.
static Integers limit(const Threshold& threshold, int64_t at) {
  const Integers early = iota() + static_cast<int32_t>(at) < static_cast<int32_t>(threshold.cut);  // all ones, which is -1
  return early + threshold.key;
}

// Calls f(position, scores, how many) for each kBlock scores; behind the last there is memory to read.
template <typename F>
static void for_blocks(const float* score, int64_t begin, int64_t end, const F& f) {
  int64_t at = begin;
  for (; at + kBlock <= end; at += kBlock) f(at, score + at, kBlock);
  if (at < end) {
    float rest[kBlock] = {};
    std::memcpy(rest, score + at, (end - at) * sizeof(float));
    f(at, rest, end - at);
  }
}

static uint64_t lowest(int64_t count) { return ~uint64_t{0} >> (64 - count); }

// The bits that f(keys, offset) gives for `count` scores, at most kBlock.
template <typename F>
static uint64_t block_bits(const float* score, int64_t count, const F& f) {
  uint64_t bits = 0;
  for (int64_t i = 0; i < kBlock; i += kLanes) bits |= static_cast<uint64_t>(f(keys(score + i), i)) << i;
  return bits & lowest(count);
}

template <typename F>
static void for_bits(uint64_t bits, const F& f) {
  for (; bits; bits &= bits - 1) f(std::countr_zero(bits));
}

// ------------------------------------------------------------------------------------------------------------------------------ threshold

// Which keys are from `low` to `high`.
static unsigned within(Integers key, int32_t low, int32_t high) {
  return greater(key, Integers{} + (low - 1)) & ~greater(key, Integers{} + high);
}

// A key, and how many scores that have it are among the largest.
struct Found {
  int32_t key;
  int64_t equal;
};

// The key of the count-th largest of the scores whose keys are from `low` to `high`, 11 bits of it at a time.
static Found narrow(const float* score, int64_t begin, int64_t end, int64_t count, int32_t low, int32_t high) {
  constexpr int digit_bits = 11;
  constexpr uint32_t group = 32;
  alignas(64) uint32_t histogram[2][1 << digit_bits];  // two, as adding to one number twice in a row takes long, and neighbours are alike
  while (low < high) {
    const uint32_t last = static_cast<uint32_t>(high) - static_cast<uint32_t>(low);
    const int shift = std::max(0, static_cast<int>(std::bit_width(last)) - digit_bits);
    const uint32_t groups = (last >> shift) / group + 1;
    for (auto& table : histogram) std::fill(table, table + groups * group, 0);
    for_blocks(score, begin, end, [&](int64_t, const float* scores, int64_t size) {
      uint32_t digit[kBlock];
      const uint64_t bits = block_bits(scores, size, [&](Integers key, int64_t i) {
        const Unsigned shifted = (reinterpret_cast<Unsigned>(key) - static_cast<uint32_t>(low)) >> shift;
        std::memcpy(digit + i, &shifted, sizeof(shifted));
        return within(key, low, high);
      });
      if (bits == ~uint64_t{0}) {
        for (int64_t i = 0; i < kBlock; ++i) ++histogram[i % 2][digit[i]];
      } else {
        for_bits(bits, [&](int i) { ++histogram[i % 2][digit[i]]; });
      }
    });
    // From the highest down: a group of digits, then one digit.
    int64_t at = groups - 1;
    for (; at >= 0; --at) {
      uint32_t here = 0;
      for (uint32_t i = 0; i < group; ++i) here += histogram[0][at * group + i] + histogram[1][at * group + i];
      if (here >= count) break;
      count -= here;
    }
    int64_t digit = at * group + group - 1, here = 0;
    for (;; --digit, count -= here) {
      here = static_cast<int64_t>(histogram[0][digit]) + histogram[1][digit];
      if (here >= count) break;
    }
    low = static_cast<int32_t>(static_cast<uint32_t>(low) + (static_cast<uint32_t>(digit) << shift));
    if (here == count) return {low - 1, 0};
    high = std::min(high, low + static_cast<int32_t>((uint32_t{1} << shift) - 1));  // no score above was counted
  }
  return {low, count};
}

// The same over all keys. Where there are many scores, a sample says between which keys the result lies in all likelihood; then only the
// scores between them need a histogram.
static Found find(const float* score, int64_t begin, int64_t end, int64_t count) {
  constexpr int64_t least = 4096, most_samples = 4096, room = 8192;
  const int64_t size = end - begin;
  if (size < least) return narrow(score, begin, end, count, kNan, kInfinity);
  float buffer[room + kBlock];
  const int64_t samples = std::min(size / 32, most_samples), step = size / samples, rank = count * samples / size;
  for (int64_t i = 0; i < samples; ++i) std::memcpy(buffer + i, score + begin + i * step, sizeof(float));
  // 3.2 standard deviations of the rank of a median, which is the worst case.
  const int64_t margin = static_cast<int64_t>(1.6f * std::sqrt(static_cast<float>(samples))) + 1;
  const auto sampled = [&](int64_t n) {
    const Found found = narrow(buffer, 0, samples, n, kNan, kInfinity);
    return found.key + (found.equal == 0);
  };
  const int32_t high = rank > margin ? sampled(rank - margin) : kInfinity;
  const int32_t low = rank + margin <= samples ? sampled(rank + margin) : kNan;
  int64_t above = 0, between = 0;
  for_blocks(score, begin, end, [&](int64_t, const float* scores, int64_t n) {
    uint64_t higher = 0;
    const uint64_t bits = block_bits(scores, n, [&](Integers key, int64_t i) {
      const unsigned over = greater(key, Integers{} + high);
      higher |= static_cast<uint64_t>(over) << i;
      return greater(key, Integers{} + (low - 1)) & ~over;
    });
    above += std::popcount(higher & lowest(n));
    if (between <= room) {
      float* next = buffer + between;
      for_bits(bits, [&](int i) { std::memcpy(next++, scores + i, sizeof(float)); });
    }
    between += std::popcount(bits);
  });
  if (count <= above || count > above + between) return narrow(score, begin, end, count, kNan, kInfinity);
  if (between > room) return narrow(score, begin, end, count - above, low, high);
  return narrow(buffer, 0, between, count - above, low, high);
}

static Threshold threshold(const float* score, int64_t begin, int64_t end, int64_t count) {
  if (count <= 0) return {INT32_MAX, 0};
  if (count >= end - begin) return {kNan - 1, 0};
  auto [key, equal] = find(score, begin, end, count);
  int64_t cut = 0;
  for (int64_t at = begin; equal > 0; at += kBlock)
    for_blocks(score, at, std::min(at + kBlock, end), [&](int64_t, const float* scores, int64_t size) {
      const uint64_t bits = block_bits(scores, size, [&](Integers here, int64_t) { return within(here, key, key); });
      const int64_t here = std::popcount(bits);
      if (here >= equal) cut = at + nth_bit(bits, equal - 1) + 1;
      equal -= here;
    });
  return {key, cut};
}

// ----------------------------------------------------------------------------------------------------------------------------------- sign

// Pages of one token: the bits of a head belong to words of different tokens. They are collected in halves of words, which are as wide as
// keys; a stretch of tokens of one head after another, as heads may lie a power of two apart in memory.
static void sign_tokens(const Signatures& s, int64_t from, int64_t to) {
  constexpr int64_t stretch = 512;
  const int64_t words = s.words_each();
  for (int64_t at = from; at < to; at += stretch) {
    const int64_t size = std::min(stretch, to - at);
    for (int64_t word = 0; word < words; ++word) {
      int32_t halves[2][stretch] = {};
      for (int64_t head = 64 * word; head < std::min(64 * word + 64, s.heads); ++head) {
        const int32_t bit = static_cast<int32_t>(1u << head % 32);
        int32_t* half = halves[head % 64 / 32];
        for_blocks(s.score + head * s.tokens, at, at + size, [&](int64_t t, const float* scores, int64_t) {
          for (int64_t i = 0; i < kBlock; i += kLanes) {
            Integers bits;
            std::memcpy(&bits, half + (t - at) + i, sizeof(bits));
            bits |= (keys(scores + i) > limit(s.thresholds[head], t + i)) & bit;
            std::memcpy(half + (t - at) + i, &bits, sizeof(bits));
          }
        });
      }
      for (int64_t i = 0; i < size; ++i)
        s.words[(at + i) * words + word] = static_cast<uint32_t>(halves[0][i]) | static_cast<uint64_t>(static_cast<uint32_t>(halves[1][i]))
                                                                                     << 32;
    }
  }
}

static void sign(const Signatures& s, int64_t from, int64_t to) {
  const int64_t words = s.words_each();
  std::fill(s.words + from * words, s.words + to * words, 0);
  if (s.page == 1) return sign_tokens(s, std::max(from, s.begin), std::min(to, s.end));
  for (int64_t unit = from; unit < to; ++unit) {
    uint64_t* out = s.words + unit * words;
    const int64_t begin = std::max(unit * s.page, s.begin), end = std::min((unit + 1) * s.page, s.end);
    for (int64_t head = 0; head < s.heads; ++head)
      for_blocks(s.score + head * s.tokens, begin, end, [&](int64_t t, const float* scores, int64_t size) {
        const Threshold& threshold = s.thresholds[head];
        const uint64_t bits = block_bits(scores, size, [&](Integers key, int64_t i) { return greater(key, limit(threshold, t + i)); });
        const int64_t place = head * s.page + t - unit * s.page, shift = place % 64;
        out[place / 64] |= bits << shift;
        if (shift + size > 64) out[place / 64 + 1] |= bits >> (64 - shift);
      });
  }
}

// ---------------------------------------------------------------------------------------------------------------------------------- order

// The output of SplitMix64 (Steele, Lea, Flood 2014) behind the first `number` ones.
static uint64_t random_word(uint64_t seed, uint64_t number) {
  uint64_t z = seed + (number + 1) * 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

// The bits that more than half of the units have in one word. Eight bit planes count up to 255 units in all 64 bits at once.
static uint64_t majority(const Order& o, int64_t word) {
  using Words = uint64_t __attribute__((vector_size(kVectorBytes)));
  constexpr int64_t lanes = kVectorBytes / 8, planes = 8;
  int64_t counts[64] = {};
  const Word* words = o.signature + o.begin * o.words + word;
  const int64_t size = o.size();
  for (int64_t at = 0; at < size; at += 255 * lanes) {
    Words plane[planes] = {};
    const int64_t end = std::min(at + 255 * lanes, size);
    for (int64_t i = at; i < end; i += lanes) {
      Words carry = {};
      if (o.words == 1 && i + lanes <= end)
        std::memcpy(&carry, words + i, sizeof(carry));
      else
        for (int64_t lane = 0; lane < std::min(lanes, end - i); ++lane) carry[lane] = words[(i + lane) * o.words];
      for (Words& one : plane) {
        const Words both = one & carry;
        one ^= carry;
        carry = both;
      }
    }
    for (int64_t p = 0; p < planes; ++p)
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const uint64_t bits = plane[p][lane];
        for (int64_t bit = 0; bit < 64; ++bit) counts[bit] += static_cast<int64_t>(bits >> bit & 1) << p;
      }
  }
  uint64_t result = 0;
  for (int64_t bit = 0; bit < 64; ++bit) result |= static_cast<uint64_t>(2 * counts[bit] > size) << bit;
  return result;
}

static uint64_t anchor_word(const Order& o, int64_t number, int64_t word) {
  switch (number == 0 ? o.anchor : Anchor::random) {
    case Anchor::random:
      return random_word(o.seed, number * o.words + word);
    case Anchor::zeros:
      return 0;
    case Anchor::ones:
      return ~uint64_t{0};
    case Anchor::mean:
      return majority(o, word);
    case Anchor::inv_mean:
      return ~majority(o, word);
    case Anchor::alternate:
      return 0xaaaaaaaaaaaaaaaa;
  }
  return 0;
}

// Calls f(part, place of the source) for all `size` places, `kParts` parts of them in turn: what one part counts does not wait for another.
constexpr int64_t kParts = 4;
template <typename F>
static void in_parts(int64_t size, const F& f) {
  const int64_t each = size / kParts;
  for (int64_t i = 0; i < each; ++i)
    for (int64_t part = 0; part < kParts; ++part) f(part, part * each + i);
  for (int64_t i = kParts * each; i < size; ++i) f(kParts - 1, i);
}

// Counting sort by each distance, the last one first.
static void order(const Order& o) {
  const int64_t size = o.size(), bins = 64 * o.words + 1;
  uint64_t* anchor = reinterpret_cast<uint64_t*>(o.scratch);
  uint32_t* place = reinterpret_cast<uint32_t*>(anchor + o.words);  // (bins, kParts)
  uint32_t* spare = place + bins * kParts;
  uint16_t* distance = reinterpret_cast<uint16_t*>(spare + size);
  const Word* signature = o.signature + o.begin * o.words;
  for (int64_t number = o.anchors - 1; number >= 0; --number) {
    for (int64_t word = 0; word < o.words; ++word) anchor[word] = anchor_word(o, number, word);
    if (o.words == 1) {
      const uint64_t only = anchor[0];
      for (int64_t i = 0; i < size; ++i) distance[i] = static_cast<uint16_t>(std::popcount(signature[i] ^ only));
    } else {
      for (int64_t i = 0; i < size; ++i) {
        int sum = 0;
        for (int64_t word = 0; word < o.words; ++word) sum += std::popcount(signature[i * o.words + word] ^ anchor[word]);
        distance[i] = static_cast<uint16_t>(sum);
      }
    }
    uint32_t* to = number % 2 ? spare : o.order;  // the last one, number 0, goes to o.order
    const uint32_t* from = number == o.anchors - 1 ? nullptr : number % 2 ? o.order : spare;
    const auto unit = [&](int64_t i) { return from ? from[i] : static_cast<uint32_t>(i); };
    std::fill(place, place + bins * kParts, 0);
    in_parts(size, [&](int64_t part, int64_t i) { ++place[distance[unit(i)] * kParts + part]; });
    uint32_t before = 0;
    for (int64_t i = 0; i < bins * kParts; ++i) before += std::exchange(place[i], before);
    in_parts(size, [&](int64_t part, int64_t i) {
      const uint32_t which = unit(i), at = place[distance[which] * kParts + part]++;
      to[at] = which;
      o.rank[which] = at;
    });
  }
}

// --------------------------------------------------------------------------------------------------------------------------------- choose

// floor((first + i * step) / divisor) for i = 0, 1, ... without a division each.
class Steps {
 public:
  Steps(int64_t first, int64_t step, int64_t divisor)
      : value_(first / divisor), rest_(first % divisor), step_(step / divisor), step_rest_(step % divisor), divisor_(divisor) {}
  int64_t next() {
    const int64_t value = value_;
    const bool carry = rest_ + step_rest_ >= divisor_;
    value_ += step_ + carry;
    rest_ += step_rest_ - (carry ? divisor_ : 0);
    return value;
  }

 private:
  int64_t value_, rest_, step_, step_rest_, divisor_;
};

// Lists the set bits of bitmap(0), bitmap(1), ...; returns how many they are. Eight at a time, whether they are there or not, since a loop
// that ends with the bits is guessed wrong at nearly every word; `list` has room for that.
constexpr int64_t kAtOnce = 8;
template <typename F>
static int64_t list_bits(int64_t words, const F& bitmap, uint32_t* list) {
  int64_t count = 0;
  for (int64_t word = 0; word < words; ++word) {
    uint64_t bits = bitmap(word);
    const int64_t here = std::popcount(bits);
    for (int64_t done = 0; done < here; done += kAtOnce)
      for (int64_t i = 0; i < kAtOnce; ++i, bits &= bits - 1)
        list[count + done + i] = static_cast<uint32_t>(word * kBlock + std::countr_zero(bits));
    count += here;
  }
  return count;
}

// Chooses among the evictable units and writes those kept, from the given place of the results on; returns how many they are.
static int64_t choose_evictable(const Choice& c, int64_t at) {
  const int64_t size = c.end - c.begin, blocks = divide_up(size, kBlock), candidates = size - c.important;
  uint64_t* kept = reinterpret_cast<uint64_t*>(c.scratch);
  uint64_t* taken = kept + blocks;
  uint32_t* before = reinterpret_cast<uint32_t*>(taken + blocks);
  uint32_t* picked = before + blocks;
  uint32_t* list = picked + c.representatives;
  for_blocks(c.score, c.begin, c.end, [&](int64_t unit, const float* scores, int64_t n) {
    kept[(unit - c.begin) / kBlock] =
        block_bits(scores, n, [&](Integers key, int64_t i) { return greater(key, limit(c.threshold, unit + i)); });
  });
  const auto word_kept = [&](int64_t block) { return kept[block]; };
  if (c.representatives > 0) {
    // `taken` is over places in the order: the important units are no candidates. Representatives are found by counting its zeros.
    std::fill(taken, taken + blocks, 0);
    const int64_t important = list_bits(blocks, word_kept, list);
    for (int64_t i = 0; i < important; ++i) {
      const uint32_t place = c.rank[list[i]];
      taken[place / kBlock] |= uint64_t{1} << place % kBlock;
    }
    Steps picks(candidates, 2 * candidates, 2 * c.representatives);
    int64_t block = 0, passed = 0;
    for (int64_t i = 0; i < c.representatives; ++i) {
      const int64_t pick = picks.next();
      for (int64_t here = kBlock - std::popcount(taken[block]); passed + here <= pick; here = kBlock - std::popcount(taken[++block]))
        passed += here;
      picked[i] = c.order[block * kBlock + nth_bit(~taken[block], pick - passed)];
      kept[picked[i] / kBlock] |= uint64_t{1} << picked[i] % kBlock;
    }
  }
  const int64_t count = list_bits(blocks, word_kept, list);
  for (int64_t i = 0; i < count; ++i) c.index[at + i] = static_cast<int32_t>(c.begin + list[i]);
  std::fill(c.kind + at, c.kind + at + count, uint8_t{1});
  std::fill(c.members + at, c.members + at + count, 1.0f);
  if (c.representatives > 0) {
    uint32_t sum = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      before[block] = sum;
      sum += std::popcount(kept[block]);
    }
    Steps edges(candidates, candidates, c.representatives);
    int64_t edge = 0;
    for (int64_t i = 0; i < c.representatives; ++i) {
      const int64_t next = edges.next();
      const uint32_t block = picked[i] / kBlock;
      const int64_t place = at + before[block] + std::popcount(kept[block] & ((uint64_t{1} << picked[i] % kBlock) - 1));
      c.kind[place] = 2;
      c.members[place] = static_cast<float>(next - std::exchange(edge, next));
    }
  }
  return count;
}

static void choose(const Choice& c) {
  int64_t count = 0;
  const auto keep = [&](int64_t begin, int64_t end, uint8_t kind) {
    for (int64_t unit = begin; unit < end; ++unit, ++count) {
      c.index[count] = static_cast<int32_t>(unit);
      c.kind[count] = kind;
      c.members[count] = 1;
    }
  };
  keep(c.first, c.begin, 0);
  if (c.all)
    keep(c.begin, c.end, 1);
  else
    count += choose_evictable(c, count);
  keep(c.end, c.length, 0);
  *c.count = count;
  std::fill(c.index + count, c.index + c.most, -1);
  std::fill(c.kind + count, c.kind + c.most, uint8_t{255});
  std::fill(c.members + count, c.members + c.most, 0.0f);
}

}  // namespace selection

SelectVariant select() { return {selection::threshold, selection::sign, selection::order, selection::choose}; }
