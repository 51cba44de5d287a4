// AVX-512 BF16 (vdpbf16ps).
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include <immintrin.h>

#include "attend.h"
#include "prefill.h"
#include "../common/region_avx512_bf16.h"

namespace tce::kv_cache::avx512_bf16 {

constexpr int kVectorBytes = 64;
#include "../common/vectors.inl"
#include "../common/attention.inl"
#include "attend.inl"
#include "prefill.inl"

}  // namespace tce::kv_cache::avx512_bf16

#include "../common/region_end.h"
