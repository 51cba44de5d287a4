// The body of select.h, for every instruction set. The including file has, of its own:
//   unsigned lane_bits(Integers mask)           bit i is lane i of a comparison's result
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

// Which keys at positions from `at` on are among the largest.
static Integers among(Integers key, const Threshold& threshold, int64_t at) {
  const Integers early = iota() + static_cast<int32_t>(at) < static_cast<int32_t>(threshold.cut);  // all ones, which is -1
  return key > early + threshold.key;
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

// The bits of f(keys, offset) for `count` scores, at most kBlock.
template <typename F>
static uint64_t block_bits(const float* score, int64_t count, const F& f) {
  uint64_t bits = 0;
  for (int64_t i = 0; i < kBlock; i += kLanes) bits |= static_cast<uint64_t>(lane_bits(f(keys(score + i), i))) << i;
  return bits & lowest(count);
}

template <typename F>
static void for_bits(uint64_t bits, const F& f) {
  for (; bits; bits &= bits - 1) f(std::countr_zero(bits));
}

// ------------------------------------------------------------------------------------------------------------------------------ threshold

// Which keys are from `low` to `low + last`.
static Integers within(Integers key, int32_t low, uint32_t last) {
  return reinterpret_cast<Unsigned>(key) - static_cast<uint32_t>(low) <= last;
}

// A key, and how many scores that have it are among the largest.
struct Found {
  int32_t key;
  int64_t equal;
};

// The key of the count-th largest of the scores whose keys are from `low` to `low + last`, 11 bits of it at a time.
static Found narrow(const float* score, int64_t begin, int64_t end, int64_t count, int32_t low, uint32_t last) {
  constexpr int digit_bits = 11;
  uint32_t histogram[2][1 << digit_bits];  // two, as neighbours are often alike, and adding to one number twice in a row takes long
  while (last > 0) {
    const int shift = std::max(0, static_cast<int>(std::bit_width(last)) - digit_bits);
    const uint32_t digits = (last >> shift) + 1;
    for (auto& table : histogram) std::fill(table, table + digits, 0);
    for_blocks(score, begin, end, [&](int64_t, const float* scores, int64_t size) {
      uint32_t digit[kBlock];
      const uint64_t bits = block_bits(scores, size, [&](Integers key, int64_t i) {
        const Unsigned shifted = (reinterpret_cast<Unsigned>(key) - static_cast<uint32_t>(low)) >> shift;
        std::memcpy(digit + i, &shifted, sizeof(shifted));
        return within(key, low, last);
      });
      if (bits == ~uint64_t{0}) {
        for (int64_t i = 0; i < kBlock; ++i) ++histogram[i % 2][digit[i]];
      } else {
        for_bits(bits, [&](int i) { ++histogram[i % 2][digit[i]]; });
      }
    });
    uint32_t digit = digits - 1;
    int64_t here = histogram[0][digit] + histogram[1][digit];
    for (; here < count && digit > 0; here = histogram[0][digit] + histogram[1][digit]) {
      count -= here;
      --digit;
    }
    low = static_cast<int32_t>(static_cast<uint32_t>(low) + (digit << shift));
    if (here == count) return {low - 1, 0};
    last = (uint32_t{1} << shift) - 1;
  }
  return {low, count};
}

// The same over all keys. Where there are many scores, a sample says between which keys the result lies in all likelihood; then only the
// scores between them need a histogram.
static Found find(const float* score, int64_t begin, int64_t end, int64_t count) {
  constexpr uint32_t all = 2u * kInfinity + 1;
  constexpr int64_t least = 4096, most_samples = 4096, room = 8192;
  const int64_t size = end - begin;
  if (size < least) return narrow(score, begin, end, count, kNan, all);
  float buffer[room + kBlock];
  const int64_t samples = std::min(size / 32, most_samples), step = size / samples, rank = count * samples / size;
  for (int64_t i = 0; i < samples; ++i) std::memcpy(buffer + i, score + begin + i * step, sizeof(float));
  // 3.2 standard deviations of the rank of a median, which is the worst case.
  const int64_t margin = static_cast<int64_t>(1.6f * std::sqrt(static_cast<float>(samples))) + 1;
  const int32_t high = rank - margin < 1 ? kInfinity : narrow(buffer, 0, samples, rank - margin, kNan, all).key + 1;
  const int32_t low = rank + margin > samples ? kNan : narrow(buffer, 0, samples, rank + margin, kNan, all).key;
  const uint32_t last = static_cast<uint32_t>(high) - static_cast<uint32_t>(low);
  int64_t above = 0, between = 0;
  for_blocks(score, begin, end, [&](int64_t, const float* scores, int64_t n) {
    uint64_t higher = 0;
    const uint64_t bits = block_bits(scores, n, [&](Integers key, int64_t i) {
      higher |= static_cast<uint64_t>(lane_bits(key > high)) << i;
      return within(key, low, last);
    });
    above += std::popcount(higher & lowest(n));
    if (between <= room) {
      float* next = buffer + between;
      for_bits(bits, [&](int i) { std::memcpy(next++, scores + i, sizeof(float)); });
    }
    between += std::popcount(bits);
  });
  if (count <= above || count > above + between) return narrow(score, begin, end, count, kNan, all);
  if (between > room) return narrow(score, begin, end, count - above, low, last);
  return narrow(buffer, 0, between, count - above, low, last);
}

static Threshold threshold(const float* score, int64_t begin, int64_t end, int64_t count) {
  if (count <= 0) return {INT32_MAX, 0};
  if (count >= end - begin) return {kNan - 1, 0};
  auto [key, equal] = find(score, begin, end, count);
  int64_t cut = 0;
  for (int64_t at = begin; equal > 0; at += kBlock)
    for_blocks(score, at, std::min(at + kBlock, end), [&](int64_t, const float* scores, int64_t size) {
      const uint64_t bits = block_bits(scores, size, [&](Integers key_here, int64_t) { return key_here == key; });
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
            bits |= among(keys(scores + i), s.thresholds[head], t + i) & bit;
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
        const uint64_t bits = block_bits(scores, size, [&](Integers key, int64_t i) { return among(key, threshold, t + i); });
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
  constexpr int64_t lanes = 8, planes = 8;
  int64_t counts[64] = {};
  const Word* words = o.signature + o.begin * o.words + word;
  const int64_t size = o.size();
  for (int64_t at = 0; at < size; at += 255 * lanes) {
    uint64_t plane[planes][lanes] = {};
    const int64_t end = std::min(at + 255 * lanes, size);
    for (int64_t i = at; i < end; i += lanes) {
      uint64_t carry[lanes] = {};
      if (o.words == 1 && i + lanes <= end)
        std::memcpy(carry, words + i, sizeof(carry));
      else
        for (int64_t lane = 0; lane < std::min(lanes, end - i); ++lane) carry[lane] = words[(i + lane) * o.words];
      for (int64_t p = 0; p < planes; ++p)
        for (int64_t lane = 0; lane < lanes; ++lane) {
          const uint64_t both = plane[p][lane] & carry[lane];
          plane[p][lane] ^= carry[lane];
          carry[lane] = both;
        }
    }
    for (int64_t p = 0; p < planes; ++p)
      for (int64_t lane = 0; lane < lanes; ++lane)
        for (int64_t bit = 0; bit < 64; ++bit) counts[bit] += static_cast<int64_t>(plane[p][lane] >> bit & 1) << p;
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

static void choose(const Choice& c) {
  int64_t count = 0;
  const auto keep = [&](int64_t unit, uint8_t kind, int64_t members) {
    c.index[count] = static_cast<int32_t>(unit);
    c.kind[count] = kind;
    c.members[count++] = static_cast<float>(members);
  };
  for (int64_t unit = c.first; unit < c.begin; ++unit) keep(unit, 0, 1);
  if (c.all) {
    for (int64_t unit = c.begin; unit < c.end; ++unit) keep(unit, 1, 1);
  } else {
    const int64_t size = c.end - c.begin, blocks = divide_up(size, kBlock), candidates = size - c.important;
    uint64_t* important = reinterpret_cast<uint64_t*>(c.scratch);
    uint64_t *taken = important + blocks, *representative = taken + blocks, *larger = representative + blocks;
    for_blocks(c.score, c.begin, c.end, [&](int64_t at, const float* scores, int64_t n) {
      important[(at - c.begin) / kBlock] = block_bits(scores, n, [&](Integers key, int64_t i) { return among(key, c.threshold, at + i); });
    });
    std::fill(taken, taken + 3 * blocks, 0);
    if (c.representatives > 0) {
      // `taken` is over places in the order: the important ones are no candidates. Representatives are searched by counting its zeros.
      for (int64_t block = 0; block < blocks; ++block)
        for_bits(important[block], [&](int i) {
          const uint32_t place = c.rank[block * kBlock + i];
          taken[place / kBlock] |= uint64_t{1} << place % kBlock;
        });
      Steps picks(candidates, 2 * candidates, 2 * c.representatives), edges(candidates, candidates, c.representatives);
      const int64_t least = candidates / c.representatives;
      int64_t block = 0, passed = 0, edge = 0;
      for (int64_t i = 0; i < c.representatives; ++i) {
        const int64_t pick = picks.next(), next_edge = edges.next();
        for (int64_t here = kBlock - std::popcount(taken[block]); passed + here <= pick; here = kBlock - std::popcount(taken[++block]))
          passed += here;
        const uint32_t unit = c.order[block * kBlock + nth_bit(~taken[block], pick - passed)];
        representative[unit / kBlock] |= uint64_t{1} << unit % kBlock;
        larger[unit / kBlock] |= static_cast<uint64_t>(next_edge - edge > least) << unit % kBlock;
        edge = next_edge;
      }
      for (int64_t i = 0; i < blocks; ++i)
        for_bits(important[i] | representative[i], [&](int bit) {
          const int64_t is = representative[i] >> bit & 1, more = larger[i] >> bit & 1;
          keep(c.begin + i * kBlock + bit, static_cast<uint8_t>(1 + is), is ? least + more : 1);
        });
    } else {
      for (int64_t i = 0; i < blocks; ++i) for_bits(important[i], [&](int bit) { keep(c.begin + i * kBlock + bit, 1, 1); });
    }
  }
  for (int64_t unit = c.end; unit < c.length; ++unit) keep(unit, 0, 1);
  *c.count = count;
  std::fill(c.index + count, c.index + c.most, -1);
  std::fill(c.kind + count, c.kind + c.most, uint8_t{255});
  std::fill(c.members + count, c.members + c.most, 0.0f);
}

}  // namespace selection

SelectVariant select() { return {selection::threshold, selection::sign, selection::order, selection::choose}; }
