"""sparse_linear: pruned, low-precision Linear layers that read fewer bytes of weights (SparAMX, arXiv:2502.12444)."""

from . import decode as _decode  # noqa: F401  (registers its op)
from .attention import attend, compress_kv, expand_kv, from_blocks, page_bytes, to_blocks
from .config import SparseLinearConfig
from .measure import KernelInfo, kernel_info
from .modules import SparseLinear
from .ops import check, linear, pack, unpack
from .pruning import magnitude_mask
from .swap import swap_linear

__all__ = [
    "KernelInfo",
    "SparseLinear",
    "SparseLinearConfig",
    "attend",
    "check",
    "compress_kv",
    "expand_kv",
    "from_blocks",
    "kernel_info",
    "linear",
    "magnitude_mask",
    "pack",
    "page_bytes",
    "swap_linear",
    "to_blocks",
    "unpack",
]
