// Which kernels run, and how their work is split among threads; shared by the bindings.
#pragma once

#include "../common/parallel.h"

#include <algorithm>

#include "decode.h"
#include "sparse_linear.h"

namespace tce::sparse_linear {

// With fewer rows of x, memory is the limit, and the AVX-512 kernels that keep all sums in registers do with less work.
constexpr int64_t kTileLeastRows = 5;

inline const Kernel<Variant> kFp32{"fp32", {{Isa::scalar, scalar::fp32}, {Isa::avx2, avx2::fp32}, {Isa::avx512, avx512::fp32}}};
inline const Kernel<Variant> kBf16{"bf16",
                                   {{Isa::scalar, scalar::bf16},
                                    {Isa::avx2, avx2::bf16},
                                    {Isa::avx512, avx512::bf16},
                                    {Isa::avx512_vnni, avx512_vnni::bf16},
                                    {Isa::avx512_bf16, bf16_dot_pays() ? avx512_bf16::bf16 : nullptr},
                                    {Isa::amx, amx::bf16, kTileLeastRows}}};
inline const Kernel<Variant> kInt8{"int8",
                                   {{Isa::scalar, scalar::int8},
                                    {Isa::avx2, avx2::int8},
                                    {Isa::avx512, avx512::int8},
                                    {Isa::avx512_vnni, avx512_vnni::int8},
                                    {Isa::amx, amx::int8, kTileLeastRows}}};

inline const Kernel<Variant> kInt4{"int4",
                                   {{Isa::scalar, scalar::int4},
                                    {Isa::avx2, avx2::int4},
                                    {Isa::avx512, avx512::int4},
                                    {Isa::avx512_vnni, avx512_vnni::int4},
                                    {Isa::amx, amx::int4, kTileLeastRows}}};

inline const Kernel<Steps> kSteps{"decode", {{Isa::scalar, scalar::steps}, {Isa::avx2, avx2::steps}, {Isa::avx512, avx512::steps}}};

inline const Variant& variant(DType dtype, int64_t rows) {
  const Kernel<Variant>* kernels[] = {&kFp32, &kBf16, &kInt8, &kInt4};
  return kernels[static_cast<int>(dtype)]->get(rows);
}

// Rows of x that one pass over the weights serves: their sums and 256 inputs of each stay in the second-level cache.
constexpr int64_t kRowTile = 512;
// Work is counted in bytes of weights times passes of eight rows. Below this much, waking a second thread costs more than it brings (0.7 us
// against 25 GB/s).
constexpr int64_t kSerialWork = 32 << 10;
// Threads take parts of a weight as they get done with the last one, since the machine rarely serves all of them equally. Parts are long
// enough for the hardware prefetcher and short enough for all threads to end together.
constexpr int64_t kPartWork = 128 << 10, kPartsPerThread = 32;

// Work of a product with m rows of x.
inline int64_t work_of(const Packed& weight, int64_t m) { return weight.bytes * divide_up(m, 8); }
inline int64_t threads_for(int64_t work) { return work < kSerialWork ? 1 : torch::stable::get_num_threads(); }

// Parts of so much work each that a product is split into.
inline int64_t parts_of(const Packed& weight, int64_t m, int64_t threads, int64_t part_work = kPartWork) {
  if (threads == 1) return 1;
  return std::min({divide_up(weight.panels(), 2), threads * kPartsPerThread, divide_up(work_of(weight, m), part_work)});
}

// First panel of part i of n: parts hold equally many bytes, not equally many panels. An even number, since kernels like pairs.
inline int64_t cut(const Packed& weight, int64_t i, int64_t n) {
  if (i == 0 || i == n) return i == 0 ? 0 : weight.panels();
  const int64_t first = weight.offset(0), wanted = first + (weight.offset(weight.panels()) - first) / n * i;
  int64_t low = 0, high = weight.panels();
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (weight.offset(middle) < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low / 2 * 2;
}

}  // namespace tce::sparse_linear
