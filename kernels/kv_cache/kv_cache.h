// kv_cache: what its kernels share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../common/attention.h"
#include "../common/floats.h"
#include "../common/isa.h"
#include "../common/scratch.h"
#include "../common/sizes.h"

namespace tce::kv_cache {}  // namespace tce::kv_cache
