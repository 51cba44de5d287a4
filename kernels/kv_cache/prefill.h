// Attention of a prompt, with the scores of its tokens: the torch-free interface of the kernels.
#pragma once

#include "kv_cache.h"

namespace tce::kv_cache {}  // namespace tce::kv_cache
