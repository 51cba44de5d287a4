"""Smaller, faster models on CPUs: published techniques as PyTorch operators, modules and one-line swappers.

Importing registers the ops and needs no compiler; the first use of a technique builds its C++ library, or loads it from the cache.
"""

__version__ = "0.1.0"

from .core.checkpoint import load_checkpoint, save_checkpoint
from .core.errors import BuildError, CorruptFileError, FallbackWarning
from .core.isa import isa
from .core.jit import kernel_isa, load
from .core.swap import optimize, report, restore
from .sparse_linear import PruneConfig, SparseLinear, SparseLinearConfig, calibration_from_text, prune, swap_linear

__all__ = [
    "BuildError",
    "CorruptFileError",
    "FallbackWarning",
    "PruneConfig",
    "SparseLinear",
    "SparseLinearConfig",
    "calibration_from_text",
    "isa",
    "kernel_isa",
    "load",
    "load_checkpoint",
    "optimize",
    "prune",
    "report",
    "restore",
    "save_checkpoint",
    "swap_linear",
]
