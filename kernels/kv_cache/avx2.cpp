// AVX2 and FMA.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include <immintrin.h>

#include "attend.h"
#include "prefill.h"
#include "select.h"
#include "../common/region_avx2.h"

namespace tce::kv_cache::avx2 {

constexpr int kVectorBytes = 32;
#include "../common/vectors.inl"
#include "../common/attention.inl"
#include "attend.inl"
#include "prefill.inl"
#include "select.inl"

PrefillVariant prefill() { return prefill_variant<PlainFloats<4, 1>>(); }

}  // namespace tce::kv_cache::avx2

#include "../common/region_end.h"
