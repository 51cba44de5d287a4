"""kv_cache: key-value caches that keep what matters (KVCrush, arXiv:2503.00022)."""

from .pages import Attended, append, attend, pack, page_bytes, unpack
from .prefill import Prefill, prefill
from .selection import Selection, select, sign

__all__ = ["Attended", "Prefill", "Selection", "append", "attend", "pack", "page_bytes", "prefill", "select", "sign", "unpack"]
