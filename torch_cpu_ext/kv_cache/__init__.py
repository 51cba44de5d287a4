"""kv_cache: key-value caches that keep what matters (KVCrush, arXiv:2503.00022)."""

from . import prefill  # noqa: F401  (register their ops)
from .pages import Attended, append, attend, pack, page_bytes, unpack
from .selection import Selection, select, sign

__all__ = ["Attended", "Selection", "append", "attend", "pack", "page_bytes", "select", "sign", "unpack"]
