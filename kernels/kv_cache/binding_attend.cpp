// The ops of attend.h: checks, allocation, split of the work.
#include "../common/parallel.h"

#include "attend.h"

namespace tce::kv_cache {}  // namespace tce::kv_cache
