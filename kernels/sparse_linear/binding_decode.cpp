// The op of the fused decoder: a stack of Llama-shaped layers for a few rows, from one array of packed weights.
#include "../common/binding.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "decode.h"
#include "format.h"
#include "team.h"
#include "work.h"

namespace tce::sparse_linear {
namespace {

const char* const kOp = "sparse_linear_decode";
constexpr int64_t kMaxRows = 8;

// The columns of `plan`: where in the arena or among the vectors each part of a layer begins, -1 where there is none; the tokens that a
// query sees, itself included, -1 for all; what is added to a position to give the layer's line of cosines and sines, -1 where it does not
// rotate. The order of decode.py.
enum Part {
  kInputNorm,
  kQ,
  kK,
  kV,
  kO,
  kPostNorm,
  kGate,
  kUp,
  kDown,
  kQNorm,
  kKNorm,
  kQBias,
  kKBias,
  kVBias,
  kOBias,
  kGateBias,
  kUpBias,
  kDownBias,
  kWindow,
  kAttentionNorm,  // of what attention adds
  kMlpNorm,        // of what the MLP adds
  kRope,
  kQNormAll,  // of all heads together
  kKNormAll,
  kParts
};

struct Linear {
  Packed weight;
  const float* bias;
};

// The arena and what is found in it.
class Arena {
 public:
  Arena(const Tensor& arena, const Tensor& vectors, const Tensor& plan)
      : data_(static_cast<const uint8_t*>(arena.const_data_ptr())),
        bytes_(arena.numel()),
        vectors_(static_cast<const float*>(vectors.const_data_ptr())),
        count_(vectors.numel()),
        plan_(static_cast<const int64_t*>(plan.const_data_ptr())) {}

  int64_t at(int64_t layer, int part) const { return plan_[layer * kParts + part]; }

  // n floats, or null where there are none.
  const float* floats(int64_t layer, int part, int64_t n) const {
    const int64_t at = this->at(layer, part);
    if (at < 0) return nullptr;
    STD_TORCH_CHECK(at <= count_ && n <= count_ - at, kOp, ": plan must name places among the vectors, got ", at);
    return vectors_ + at;
  }

  // Asks for the headers and offsets of a layer's weights, which `linear` reads: they are cold when their turn comes.
  void fetch(int64_t layer) const {
    for (int part : {kQ, kK, kV, kO, kGate, kUp, kDown}) {
      const int64_t at = this->at(layer, part);
      for (int64_t line = 0; line < kFetch && at >= 0 && at + line * 64 < bytes_; ++line) __builtin_prefetch(data_ + at + line * 64);
    }
  }

  Linear linear(int64_t layer, int part, int bias, int64_t outputs, int64_t inputs) const {
    const int64_t at = this->at(layer, part);
    STD_TORCH_CHECK(at >= 0 && at <= bytes_ - static_cast<int64_t>(sizeof(Header)), kOp, ": plan must name offsets inside the arena, got ",
                    at);
    Header header;
    std::memcpy(&header, data_ + at, sizeof(header));
    STD_TORCH_CHECK(header.bytes >= 0 && header.bytes <= bytes_ - at, kOp, ": arena must be intact, got a packed weight that leaves it");
    Linear result{{}, bias < 0 ? nullptr : floats(layer, bias, outputs)};
    const char* problem = open(data_ + at, header.bytes, result.weight);
    STD_TORCH_CHECK(!problem, kOp, ": arena must be intact, got ", problem);
    STD_TORCH_CHECK(result.weight.outputs == outputs && result.weight.inputs == inputs, kOp, ": arena must hold ", outputs, " x ", inputs,
                    " at ", at, ", got ", result.weight.outputs, " x ", result.weight.inputs);
    return result;
  }

 private:
  static constexpr int64_t kFetch = 16;  // lines: the offsets of 120 panels, 1920 outputs
  const uint8_t* data_;
  int64_t bytes_;
  const float* vectors_;
  int64_t count_;
  const int64_t* plan_;
};

// Sizes that all layers share.
struct Shape {
  int64_t batch, tokens, hidden, heads, kv_heads, dim, inner, blocks;
  int64_t rows() const { return batch * tokens; }
  int64_t queries() const { return tokens * (heads / kv_heads); }  // that a key-value head serves at once
};

// How the products of a few rows with several weights are split among a team.
class Split {
 public:
  Split(std::initializer_list<const Linear*> linears, int64_t rows, int64_t threads) {
    int64_t work = 0;
    for (const Linear* linear : linears) work += work_of(linear->weight, rows);
    threads = std::min(threads, threads_for(work));
    for (const Linear* linear : linears) {
      weights_[count_] = &linear->weight;
      parts_[count_ + 1] = parts_[count_] + parts_of(linear->weight, rows, threads, kStretchPart);
      ++count_;
    }
  }

  int64_t items() const { return parts_[count_]; }
  int64_t job_of(int64_t item) const {
    int64_t job = 0;
    while (item >= parts_[job + 1]) ++job;
    return job;
  }
  // First panel of an item of this job; of the item after its last, where its panels end.
  int64_t panel(int64_t job, int64_t item) const { return cut(*weights_[job], item - parts_[job], parts_[job + 1] - parts_[job]); }

  // What a thread of the team reads first.
  Team::Stretch begin(const Team& team, int64_t thread) const {
    const int64_t first = team.first(thread, items()), end = team.first(thread + 1, items());
    if (first == end) return {nullptr, 0};
    const int64_t job = job_of(first);
    const Packed& weight = *weights_[job];
    const int64_t at = weight.offset(panel(job, first));
    return {weight.data + at, weight.offset(panel(job, std::min(end, parts_[job + 1]))) - at};
  }

 private:
  static constexpr int64_t kStretchPart = 32 << 10, kMost = 3;
  const Packed* weights_[kMost];
  int64_t parts_[kMost + 1] = {0}, count_ = 0;
};

// Products of the same rows of x with several weights, in one stage of a team.
class Products {
 public:
  Products(int64_t rows, int64_t inputs) : rows_(rows), slot_(round_up(inputs, kChunk) * rows), scratch_(kMost * bytes_per_slot()) {}

  struct Job {
    const Linear* linear;
    float* out;
  };

  void run(Team& team, const float* x, std::initializer_list<Job> jobs, const Split& split, const Split& next) {
    Product products[kMost];
    const Variant* kernels[kMost];
    int64_t count = 0;
    for (const Job& job : jobs) {
      const Packed& weight = job.linear->weight;
      Product& p = products[count] = {weight, rows_, nullptr, nullptr, nullptr, 32, job.linear->bias, job.out, Float::fp32};
      // Without tiles: a thread of a team does not know its last product, after which it would have to release them.
      kernels[count] = &variant(weight.dtype, std::min(rows_, kTileLeastRows - 1));
      if (count > 0 && weight.dtype == products[count - 1].weight.dtype) {
        p.x = products[count - 1].x;
        p.x_scale = products[count - 1].x_scale;
        p.x_offset = products[count - 1].x_offset;
      } else {
        p.x = scratch_.get() + count * bytes_per_slot();
        p.x_scale = reinterpret_cast<float*>(static_cast<uint8_t*>(p.x) + slot_ * 4);
        p.x_offset = reinterpret_cast<int32_t*>(p.x_scale + slot_ / 32);
        kernels[count]->prepare(p, x, Float::fp32, 0, rows_);
      }
      ++count;
    }
    std::atomic<bool> intact{true};
    team.each(
        split.items(),
        [&](int64_t item) {
          const int64_t job = split.job_of(item);
          if (!kernels[job]->run(products[job], split.panel(job, item), split.panel(job, item + 1), 0, rows_)) intact = false;
        },
        [&](int64_t thread) { return next.begin(team, thread); });
    STD_TORCH_CHECK(intact, kOp, ": arena must be intact, got a panel whose bitmap and bytes disagree");
  }

 private:
  static constexpr int64_t kMost = 3;
  int64_t bytes_per_slot() const { return round_up(slot_ * 4 + slot_ / 32 * 8, 64); }
  int64_t rows_, slot_;  // slot_: elements of prepared x
  Scratch scratch_;
};

class Decoder {
 public:
  Decoder(Team& team, const Shape& shape, int64_t layers, const Arena& arena, const float* cos, const float* sin, const int64_t* positions,
          const int64_t* starts, uint16_t* kv, int64_t length, float epsilon, float scale, float softcap, Gate gate)
      : team_(team),
        s_(shape),
        layers_(layers),
        arena_(arena),
        steps_(kSteps.get()),
        cos_(cos),
        sin_(sin),
        positions_(positions),
        starts_(starts),
        kv_(kv),
        length_(length),
        splits_(divide_up(length + shape.tokens, kSplit)),
        epsilon_(epsilon),
        scale_(scale),
        softcap_(softcap),
        gate_kind_(gate),
        products_(shape.rows(), std::max({shape.hidden, shape.heads * shape.dim, shape.inner})),
        normed_(shape.rows() * shape.hidden),
        q_(shape.rows() * shape.heads * shape.dim),
        k_(shape.rows() * shape.kv_heads * shape.dim),
        v_(k_.size()),
        query_(q_.size()),
        attended_(q_.size()),
        gate_(shape.rows() * shape.inner),
        up_(gate_.size()),
        delta_(normed_.size()),
        partial_(splits_ * q_.size()),
        maximum_(splits_ * shape.rows() * shape.heads),
        sum_(maximum_.size()),
        first_(shape.batch * shape.queries()),
        last_(first_.size()) {
    if (layers > 0) next_ = open(0);
  }

  void layer(int64_t i, float* hidden) {
    const int64_t rows = s_.rows(), threads = team_.threads();
    const Layer layer = next_;
    if (i + 1 < layers_) next_ = open(i + 1);
    const auto& [q, k, v, o, gate, up, down] = layer;
    const Split qkv({&q, &k, &v}, rows, threads), out({&o}, rows, threads), wide({&gate, &up}, rows, threads),
        narrow({&down}, rows, threads);
    norm(i, kInputNorm, kAttentionNorm, hidden);
    products_.run(team_, normed_.data(), {{&q, q_.data()}, {&k, k_.data()}, {&v, v_.data()}}, qkv, out);
    cache(i);
    attend(i, out);
    products_.run(team_, attended_.data(), {{&o, delta_.data()}}, out, wide);
    norm_delta(i, kAttentionNorm);
    steps_.add(hidden, delta_.data(), rows * s_.hidden);
    norm(i, kPostNorm, kMlpNorm, hidden);
    products_.run(team_, normed_.data(), {{&gate, gate_.data()}, {&up, up_.data()}}, wide, narrow);
    steps_.multiply_gate(gate_.data(), up_.data(), gate_kind_, rows * s_.inner);
    products_.run(team_, gate_.data(), {{&down, delta_.data()}}, narrow,
                  i + 1 < layers_ ? Split({&next_.q, &next_.k, &next_.v}, rows, threads) : Split({}, rows, threads));
    norm_delta(i, kMlpNorm);
    steps_.add(hidden, delta_.data(), rows * s_.hidden);
  }

  // The final norm, if the last line of the plan has one.
  void finish(int64_t layers, float* hidden) {
    if (arena_.at(layers, 0) < 0) return;
    norm(layers, 0, 0, hidden);
    std::copy(normed_.begin(), normed_.end(), hidden);
  }

  void head(const Linear& head, const float* hidden, float* logits) {
    products_.run(team_, hidden, {{&head, logits}}, Split({&head}, s_.rows(), team_.threads()), Split({}, 0, 1));
  }

 private:
  struct Layer {
    Linear q, k, v, o, gate, up, down;
  };

  // The weights of a layer; asks for the headers of the layer after it, which are cold when their turn comes.
  Layer open(int64_t i) const {
    if (i + 1 < layers_) arena_.fetch(i + 1);
    const int64_t width = s_.heads * s_.dim, kv_width = s_.kv_heads * s_.dim;
    return {arena_.linear(i, kQ, kQBias, width, s_.hidden),          arena_.linear(i, kK, kKBias, kv_width, s_.hidden),
            arena_.linear(i, kV, kVBias, kv_width, s_.hidden),       arena_.linear(i, kO, kOBias, s_.hidden, width),
            arena_.linear(i, kGate, kGateBias, s_.inner, s_.hidden), arena_.linear(i, kUp, kUpBias, s_.inner, s_.hidden),
            arena_.linear(i, kDown, kDownBias, s_.hidden, s_.inner)};
  }

  // Before attention or MLP; may be missing where there is a norm after it, `after`.
  void norm(int64_t layer, int part, int after, const float* hidden) {
    const float* weight = arena_.floats(layer, part, s_.hidden);
    if (!weight) {
      STD_TORCH_CHECK(arena_.at(layer, after) >= 0, kOp, ": plan must have a norm in each layer, got none in layer ", layer);
      std::copy_n(hidden, normed_.size(), normed_.data());
      return;
    }
    for (int64_t r = 0; r < s_.rows(); ++r)
      steps_.rms_norm(hidden + r * s_.hidden, weight, epsilon_, s_.hidden, normed_.data() + r * s_.hidden);
  }

  // What attention or MLP gave, where a norm of its own comes before it is added.
  void norm_delta(int64_t layer, int part) {
    const float* weight = arena_.floats(layer, part, s_.hidden);
    if (!weight) return;
    for (int64_t r = 0; r < s_.rows(); ++r) {
      float* row = delta_.data() + r * s_.hidden;
      steps_.rms_norm(row, weight, epsilon_, s_.hidden, row);
    }
  }

  uint16_t* block_of(int64_t layer, int64_t which, int64_t b, int64_t head) const {
    return kv_ + (((layer * 2 + which) * s_.batch + b) * s_.kv_heads + head) * s_.blocks * kBlockTokens * s_.dim;
  }

  // Norms and rotates the queries and keys, where the layer does; writes keys and values to the cache.
  void cache(int64_t layer) {
    const float *q_norm = arena_.floats(layer, kQNorm, s_.dim), *k_norm = arena_.floats(layer, kKNorm, s_.dim);
    const int64_t width = s_.heads * s_.dim, kv_width = s_.kv_heads * s_.dim;
    const float *q_all = arena_.floats(layer, kQNormAll, width), *k_all = arena_.floats(layer, kKNormAll, kv_width);
    const int64_t dim = s_.dim, half = dim / 2, group = s_.heads / s_.kv_heads, rope = arena_.at(layer, kRope);
    for (int64_t b = 0; b < s_.batch; ++b) {
      for (int64_t t = 0; t < s_.tokens; ++t) {
        const int64_t row = b * s_.tokens + t, slot = length_ + t, in_block = slot % kBlockTokens;
        const int64_t line = positions_[row] + std::max(rope, int64_t{0});
        const float *cos = cos_ + line * half, *sin = sin_ + line * half;
        if (q_all) steps_.rms_norm(q_.data() + row * width, q_all, epsilon_, width, q_.data() + row * width);
        if (k_all) steps_.rms_norm(k_.data() + row * kv_width, k_all, epsilon_, kv_width, k_.data() + row * kv_width);
        for (int64_t h = 0; h < s_.heads; ++h) {
          float* q = q_.data() + (row * s_.heads + h) * dim;
          if (q_norm) steps_.rms_norm(q, q_norm, epsilon_, dim, q);
          if (rope >= 0) steps_.rotate(q, cos, sin, dim);
          // As attention reads them: [batch][key-value head][token][head of the group]
          float* query = query_.data() + (((b * s_.kv_heads + h / group) * s_.tokens + t) * group + h % group) * dim;
          std::copy_n(q, dim, query);
        }
        for (int64_t h = 0; h < s_.kv_heads; ++h) {
          float* k = k_.data() + (row * s_.kv_heads + h) * dim;
          if (k_norm) steps_.rms_norm(k, k_norm, epsilon_, dim, k);
          if (rope >= 0) steps_.rotate(k, cos, sin, dim);
          const float* v = v_.data() + (row * s_.kv_heads + h) * dim;
          uint16_t *keys = block_of(layer, 0, b, h) + (slot - in_block) * dim, *values = block_of(layer, 1, b, h) + (slot - in_block) * dim;
          for (int64_t d = 0; d < dim; ++d) {
            keys[key_place(in_block, d)] = float_to_bf16(k[d]);
            values[value_place(in_block, d, dim)] = float_to_bf16(v[d]);
          }
        }
      }
    }
  }

  // Which tokens each query sees: from the end of the padding or the start of the window to itself. Returns the first one that any sees.
  int64_t see(int64_t layer) {
    const int64_t group = s_.heads / s_.kv_heads, window = arena_.at(layer, kWindow);
    int64_t least = length_;
    for (size_t i = 0; i < first_.size(); ++i) {
      const int64_t row = static_cast<int64_t>(i) / group, start = starts_ ? starts_[row / s_.tokens] : 0;
      last_[i] = length_ + row % s_.tokens + 1;
      first_[i] = window > 0 ? std::max(start, last_[i] - window) : start;
      least = std::min(least, first_[i]);
    }
    return least;
  }

  void attend(int64_t layer, const Split& next) {
    const int64_t dim = s_.dim, queries = s_.queries(), heads = s_.batch * s_.kv_heads, stride = heads * queries;
    const int64_t total = length_ + s_.tokens, begin = see(layer) / kSplit, splits = divide_up(total, kSplit) - begin;
    const int64_t work = heads * (total - begin * kSplit) * dim * 4;
    const auto run = [&](int64_t item) {
      const int64_t head = item / splits, split = item % splits, b = head / s_.kv_heads, at = split * stride + head * queries;
      const int64_t first = (begin + split) * kSplit;
      const Stretch stretch{queries,
                            dim,
                            first,
                            std::min(first + kSplit, total),
                            first_.data() + b * queries,
                            last_.data() + b * queries,
                            scale_,
                            softcap_,
                            partial_.data() + at * dim,
                            maximum_.data() + at,
                            sum_.data() + at};
      steps_.attend(stretch, query_.data() + head * queries * dim, block_of(layer, 0, b, head % s_.kv_heads),
                    block_of(layer, 1, b, head % s_.kv_heads));
    };
    if (threads_for(work) == 1) {
      for (int64_t item = 0; item < heads * splits; ++item) run(item);
    } else {
      team_.each(heads * splits, run, [&](int64_t thread) { return next.begin(team_, thread); });
    }
    const int64_t group = s_.heads / s_.kv_heads;
    for (int64_t i = 0; i < stride; ++i) {
      const int64_t head = i / queries, b = head / s_.kv_heads, t = i % queries / group;
      const int64_t h = head % s_.kv_heads * group + i % group;
      float* result = attended_.data() + ((b * s_.tokens + t) * s_.heads + h) * dim;
      steps_.join(partial_.data() + i * dim, maximum_.data() + i, sum_.data() + i, splits, stride, dim, result);
    }
  }

  Team& team_;
  const Shape s_;
  const int64_t layers_;
  const Arena& arena_;
  const Steps steps_;
  const float *cos_, *sin_;
  const int64_t *positions_, *starts_;
  uint16_t* kv_;
  const int64_t length_, splits_;
  const float epsilon_, scale_, softcap_;
  const Gate gate_kind_;
  Products products_;
  Layer next_;  // of the layer whose turn it is
  std::vector<float> normed_, q_, k_, v_, query_, attended_, gate_, up_, delta_, partial_, maximum_, sum_;
  std::vector<int64_t> first_, last_;
};

void check_long(const Tensor& tensor, const char* argument, int64_t numel) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Long && tensor.is_contiguous() && tensor.is_cpu() && tensor.numel() == numel, kOp,
                  ": ", argument, " must be contiguous int64 with ", numel, " elements, got ",
                  torch::headeronly::toString(tensor.scalar_type()), " with ", tensor.numel());
}

Tensor decode(Tensor hidden, Tensor arena, Tensor vectors, Tensor plan, Tensor cos, Tensor sin, Tensor positions,
              std::optional<Tensor> starts, Tensor kv, int64_t length, int64_t heads, int64_t inner, double epsilon, double scale,
              std::string activation, int64_t vocabulary, double softcap) {
  const Float type = float_type(hidden, kOp, "hidden");
  STD_TORCH_CHECK(hidden.dim() == 3, kOp, ": hidden must be 3-D (batch, tokens, hidden size), got ", hidden.dim(), "-D");
  Shape s{hidden.size(0), hidden.size(1), hidden.size(2), heads, 0, 0, inner, 0};
  STD_TORCH_CHECK(s.rows() >= 1 && s.rows() <= kMaxRows, kOp, ": hidden must have 1 to ", kMaxRows, " rows (batch times tokens), got ",
                  s.rows());
  STD_TORCH_CHECK(arena.dim() == 1 && arena.scalar_type() == ScalarType::Byte && arena.is_contiguous() && arena.is_cpu(), kOp,
                  ": arena must be a contiguous 1-D uint8 CPU tensor, got ", arena.dim(), "-D ",
                  torch::headeronly::toString(arena.scalar_type()));
  STD_TORCH_CHECK(vectors.dim() == 1 && vectors.scalar_type() == ScalarType::Float && vectors.is_contiguous() && vectors.is_cpu(), kOp,
                  ": vectors must be contiguous 1-D float32, got ", vectors.dim(), "-D ",
                  torch::headeronly::toString(vectors.scalar_type()));
  STD_TORCH_CHECK(plan.dim() == 2 && plan.size(0) >= 1 && plan.size(1) == kParts, kOp, ": plan must be (layers + 1, ",
                  static_cast<int>(kParts), "), got ", plan.dim(), "-D with ", plan.numel(), " elements");
  check_long(plan, "plan", plan.numel());
  const int64_t layers = plan.size(0) - 1;
  STD_TORCH_CHECK(kv.dim() == 7 && kv.scalar_type() == ScalarType::BFloat16 && kv.is_contiguous() && kv.is_cpu() && kv.size(0) == layers &&
                      kv.size(1) == 2 && kv.size(2) == s.batch && kv.size(5) == kBlockTokens,
                  kOp, ": kv must be contiguous bfloat16 (", layers, ", 2, ", s.batch, ", key-value heads, blocks, 16, head size), got ",
                  kv.dim(), "-D ", torch::headeronly::toString(kv.scalar_type()), " with ", kv.numel(), " elements");
  s.kv_heads = kv.size(3);
  s.blocks = kv.size(4);
  s.dim = kv.size(6);
  STD_TORCH_CHECK(s.dim >= 16 && s.dim % 16 == 0, kOp, ": kv must have a head size that is a multiple of 16, got ", s.dim);
  // Outputs that a packed weight of the arena can have, since each panel of 16 has an offset of 8 bytes: no wild size is allocated.
  const int64_t most = 2 * arena.numel();
  STD_TORCH_CHECK(s.kv_heads >= 1 && heads >= 1 && heads <= most / s.dim && heads % s.kv_heads == 0, kOp,
                  ": heads must be a multiple of the ", s.kv_heads, " key-value heads, for which the arena has weights, got ", heads);
  STD_TORCH_CHECK(inner >= 1 && inner <= most, kOp, ": inner must be the width of the MLP, for which the arena has weights, got ", inner);
  STD_TORCH_CHECK(length >= 0 && length <= s.blocks * kBlockTokens - s.tokens, kOp, ": length must be 0 to ",
                  s.blocks * kBlockTokens - s.tokens, " (tokens that kv holds, less the new ones), got ", length);
  check_long(positions, "positions", s.rows());
  STD_TORCH_CHECK(cos.dim() == 2 && cos.size(1) == s.dim / 2 && cos.scalar_type() == ScalarType::Float && cos.is_contiguous(), kOp,
                  ": cos must be contiguous float32 (positions, ", s.dim / 2, "), got ", cos.dim(), "-D ",
                  torch::headeronly::toString(cos.scalar_type()));
  STD_TORCH_CHECK(sin.dim() == 2 && sin.size(0) == cos.size(0) && sin.size(1) == s.dim / 2 && sin.scalar_type() == ScalarType::Float &&
                      sin.is_contiguous(),
                  kOp, ": sin must be of the shape and dtype of cos, got ", sin.dim(), "-D ",
                  torch::headeronly::toString(sin.scalar_type()));
  const int64_t* rows = static_cast<const int64_t*>(positions.const_data_ptr());
  int64_t farthest = 0;
  for (int64_t i = 0; i < s.rows(); ++i) {
    STD_TORCH_CHECK(rows[i] >= 0 && rows[i] < cos.size(0), kOp, ": positions must be 0 to ", cos.size(0) - 1, ", got ", rows[i]);
    farthest = std::max(farthest, rows[i]);
  }
  if (starts) {
    check_long(*starts, "starts", s.batch);
    const int64_t* first = static_cast<const int64_t*>(starts->const_data_ptr());
    for (int64_t b = 0; b < s.batch; ++b)
      STD_TORCH_CHECK(first[b] >= 0 && first[b] <= length, kOp, ": starts must be 0 to ", length, " (length), got ", first[b]);
  }
  STD_TORCH_CHECK(vocabulary >= 0 && vocabulary <= most, kOp, ": vocabulary must be the rows of a head that the arena has, or 0, got ",
                  vocabulary);
  STD_TORCH_CHECK(activation == "silu" || activation == "gelu_tanh", kOp, ": activation must be silu or gelu_tanh, got ", activation);

  STD_TORCH_CHECK(softcap >= 0 && softcap < 1e30, kOp, ": softcap must be 0 or positive, got ", softcap);

  const Arena parts(arena, vectors, plan);
  for (int64_t i = 0; i < layers; ++i)
    STD_TORCH_CHECK(parts.at(i, kRope) < cos.size(0) - farthest, kOp, ": plan must name lines of cos, got ", parts.at(i, kRope),
                    " beside position ", farthest);
  hidden = torch::stable::contiguous(hidden);
  std::vector<float> state(s.rows() * s.hidden);
  for (size_t i = 0; i < state.size(); ++i) state[i] = load_float(hidden.const_data_ptr(), type, i);
  const bool head = vocabulary > 0;
  Tensor out = torch::stable::new_empty(hidden, {s.batch, s.tokens, head ? vocabulary : s.hidden});
  std::vector<float> logits(s.rows() * vocabulary);
  Team::run(torch::stable::get_num_threads(), [&](Team& team) {
    Decoder decoder(team, s, layers, parts, static_cast<const float*>(cos.const_data_ptr()),
                    static_cast<const float*>(sin.const_data_ptr()), rows,
                    starts ? static_cast<const int64_t*>(starts->const_data_ptr()) : nullptr, static_cast<uint16_t*>(kv.mutable_data_ptr()),
                    length, static_cast<float>(epsilon), static_cast<float>(scale), static_cast<float>(softcap),
                    activation == "silu" ? Gate::silu : Gate::gelu_tanh);
    for (int64_t i = 0; i < layers; ++i) decoder.layer(i, state.data());
    decoder.finish(layers, state.data());
    if (head) decoder.head(parts.linear(layers, 1, -1, vocabulary, s.hidden), state.data(), logits.data());
  });
  if (head) state.swap(logits);
  for (size_t i = 0; i < state.size(); ++i) store_float(out.mutable_data_ptr(), type, i, state[i]);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_cpu_ext, CPU, m) { m.impl("sparse_linear_decode", TORCH_BOX(&decode)); }

}  // namespace tce::sparse_linear
