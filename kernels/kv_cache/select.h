// Signatures, and the choice of the tokens to keep: the torch-free interface of the kernels.
#pragma once

#include "kv_cache.h"

namespace tce::kv_cache {}  // namespace tce::kv_cache
