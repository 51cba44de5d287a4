"""Smaller, faster models on CPUs: published techniques as PyTorch operators, modules and one-line swappers.

Importing registers the ops and needs no compiler; the first use of a technique builds its C++ library, or loads it from the cache.
"""

from typing import Any

__version__ = "0.1.0"

from .core.checkpoint import load_checkpoint, save_checkpoint
from .core.errors import BuildError, CorruptFileError, FallbackWarning
from .core.isa import isa
from .core.jit import kernel_isa, load
from .core.swap import optimize, report, restore
from .kv_cache import KVCrushConfig, swap_attention
from .sparse_linear import (
    KernelInfo,
    PruneConfig,
    SparseLinear,
    SparseLinearConfig,
    calibration_from_text,
    kernel_info,
    prune,
    swap_linear,
    tune,
)

__all__ = [
    "BuildError",
    "CorruptFileError",
    "FallbackWarning",
    "KVCrushConfig",
    "KernelInfo",
    "PruneConfig",
    "SparseLinear",
    "SparseLinearConfig",
    "calibration_from_text",
    "isa",
    "kernel_info",
    "kernel_isa",
    "load",
    "load_checkpoint",
    "optimize",
    "prune",
    "report",
    "restore",
    "save_checkpoint",
    "swap_attention",
    "swap_linear",
    "tune",
]


def __getattr__(name: str) -> Any:
    """`TorchCpuExtConfig`, `SparseKVCache` and `KVCrushCache` need transformers, so they are imported only when asked for."""
    if name == "TorchCpuExtConfig":
        from .integrations.transformers import TorchCpuExtConfig

        return TorchCpuExtConfig
    if name == "SparseKVCache":
        from .integrations.sparse_kv import SparseKVCache

        return SparseKVCache
    if name == "KVCrushCache":
        from .integrations.kvcrush import KVCrushCache

        return KVCrushCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
