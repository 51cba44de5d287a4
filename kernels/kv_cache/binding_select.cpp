// The ops of select.h: checks, allocation, split of the work.
#include "../common/parallel.h"

#include "select.h"

namespace tce::kv_cache {}  // namespace tce::kv_cache
