"""kv_cache: key-value caches that keep what matters (KVCrush, arXiv:2503.00022)."""

from . import pages, prefill, selection  # noqa: F401  (register their ops)
from .selection import Selection, select, sign

__all__ = ["Selection", "select", "sign"]
