"""sparse_linear: pruned, low-precision Linear layers that read fewer bytes of weights (SparAMX, arXiv:2502.12444)."""

from . import decode as _decode  # noqa: F401  (registers its op)
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
    "check",
    "kernel_info",
    "linear",
    "magnitude_mask",
    "pack",
    "swap_linear",
    "unpack",
]
