// The ops of prefill.h: checks, allocation, split of the work.
#include "../common/parallel.h"

#include "prefill.h"

namespace tce::kv_cache {}  // namespace tce::kv_cache
