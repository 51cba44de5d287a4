"""sparse_linear: pruned, low-precision Linear layers that read fewer bytes of weights (SparAMX, arXiv:2502.12444)."""

from . import decode as _decode  # noqa: F401  (registers its op)
from .attention import attend, compress_kv, expand_kv, from_blocks, page_bytes, to_blocks
from .calibration import calibration_from_text
from .config import SparseLinearConfig
from .fused import gated, group
from .grid import QuantizationGrid
from .measure import KernelInfo, kernel_info
from .modules import SparseLinear
from .ops import check, linear, pack, unpack
from .prune_config import PruneConfig
from .pruner import PrunedLayer, PruneReport, prune
from .pruning import magnitude_mask, wanda_mask
from .swap import swap_linear
from .tune import tune

__all__ = [
    "KernelInfo",
    "PruneConfig",
    "PruneReport",
    "PrunedLayer",
    "QuantizationGrid",
    "SparseLinear",
    "SparseLinearConfig",
    "attend",
    "calibration_from_text",
    "check",
    "compress_kv",
    "expand_kv",
    "from_blocks",
    "gated",
    "group",
    "kernel_info",
    "linear",
    "magnitude_mask",
    "pack",
    "page_bytes",
    "prune",
    "swap_linear",
    "to_blocks",
    "tune",
    "unpack",
    "wanda_mask",
]
