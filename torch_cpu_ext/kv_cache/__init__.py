"""kv_cache: key-value caches that keep what matters (KVCrush, arXiv:2503.00022)."""

from .config import KVCrushConfig
from .pages import Attended, append, attend, pack, page_bytes, unpack
from .prefill import Prefill, prefill
from .selection import Selection, select, sign
from .swap import swap_attention

__all__ = [
    "Attended",
    "KVCrushConfig",
    "Prefill",
    "Selection",
    "append",
    "attend",
    "pack",
    "page_bytes",
    "prefill",
    "select",
    "sign",
    "swap_attention",
    "unpack",
]
