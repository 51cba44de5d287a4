// Plain C++ for every machine.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include "attend.h"
#include "prefill.h"
#include "select.h"

namespace tce::kv_cache::scalar {

constexpr int kVectorBytes = 16;
#include "../common/vectors.inl"
#include "../common/attention.inl"
#include "attend.inl"
#include "prefill.inl"
#include "select.inl"

PrefillVariant prefill() { return prefill_variant<PlainFloats<2, 1>>(); }

}  // namespace tce::kv_cache::scalar
