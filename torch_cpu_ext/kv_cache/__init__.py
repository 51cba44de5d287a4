"""kv_cache: key-value caches that keep what matters (KVCrush, arXiv:2503.00022)."""

from . import prefill, selection  # noqa: F401  (register their ops)
from .pages import Attended, append, attend, pack, page_bytes, unpack

__all__ = ["Attended", "append", "attend", "pack", "page_bytes", "unpack"]
