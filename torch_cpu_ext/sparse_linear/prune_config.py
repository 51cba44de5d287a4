"""Everything a user can choose about pruning with calibration data."""

import re
from dataclasses import dataclass, field

from ..core.config import Config, require
from .ops import GROUP_SIZES
from .pruning import GRANULARITIES, PATTERNS, is_pattern, parse_pattern

METHODS = ("magnitude", "wanda", "sparsegpt")


@dataclass(frozen=True)
class PruneConfig(Config):
    """How `torch_cpu_ext.prune` changes the Linear layers of a model.

    Args:
        sparsity: share of weights to prune, in ``[0, 1)``; 0 only quantises. With a pattern ``n:m`` it must be 1 - n/m.
        method: ``"sparsegpt"``: SparseGPT (arXiv:2301.00774), which changes the weights that stay to make up for those that go; the best,
            hence the default. ``"wanda"``: Wanda (arXiv:2306.11695), magnitudes times the norms of the inputs; the weights that stay are
            not changed. ``"magnitude"``: magnitudes only; needs no calibration data.
        pattern: ``"unstructured"``, or ``"n:m"``, such as ``"2:4"``: of every m consecutive inputs of an output, n stay.
        granularity: where weights are compared: ``"row"`` prunes the same share of every output, ``"layer"`` of the whole weight
            (SparseGPT: of each block of columns).
        layer_sparsity: ``{regular expression: sparsity}``; the first that is found in a layer's dotted name counts in place of
            ``sparsity``. With ``n:m``, only 0 and 1 - n/m.
        damping: share of the mean of the Hessian's diagonal that is added to it before it is inverted (SparseGPT, GPTQ).
        block_size: columns whose changes are applied to the rest together, and for which SparseGPT chooses its mask; a multiple of m, and
            of ``group_size`` if int4 is quantised by GPTQ.
        quantize: ``"int8"`` or ``"int4"`` rounds what stays to values that packed weights of that dtype hold without further loss; None
            does not.
        quantize_method: ``"gptq"``: like SparseGPT, makes up for rounding errors (arXiv:2210.17323), in the same pass with
            ``method="sparsegpt"``. ``"nearest"``: each weight to the nearest value.
        group_size: consecutive inputs that share an int4 scale, 32, 64 or 128.
        symmetric: int4 codes around a fixed zero, which saves one or two bytes a group and costs accuracy.
    Raises:
        ValueError: a value is not among those accepted.
    """

    sparsity: float = 0.5
    method: str = "sparsegpt"
    pattern: str = "unstructured"
    granularity: str = "row"
    layer_sparsity: dict[str, float] = field(default_factory=dict)
    damping: float = 0.01
    block_size: int = 128
    quantize: str | None = None
    quantize_method: str = "gptq"
    group_size: int = 32
    symmetric: bool = False

    def __post_init__(self) -> None:
        require(0 <= self.sparsity < 1, self, "sparsity", "in [0, 1)")
        require(self.method in METHODS, self, "method", f"one of {', '.join(METHODS)}")
        require(self.granularity in GRANULARITIES, self, "granularity", f"one of {', '.join(GRANULARITIES)}")
        require(0 <= self.damping < float("inf"), self, "damping", "0 or more")
        require(self.block_size > 0, self, "block_size", "above 0")
        require(self.quantize in (None, "int8", "int4"), self, "quantize", "None, int8 or int4")
        require(self.quantize_method in ("nearest", "gptq"), self, "quantize_method", "nearest or gptq")
        require(self.group_size in GROUP_SIZES, self, "group_size", f"one of {', '.join(map(str, GROUP_SIZES))}")
        require(is_pattern(self.pattern), self, "pattern", PATTERNS)
        groups = parse_pattern(self.pattern)
        for expression, sparsity in self.layer_sparsity.items():
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"PruneConfig: layer_sparsity must have regular expressions, got {expression!r}: {error}") from None
            require(0 <= sparsity < 1, self, "layer_sparsity", "a dictionary of shares in [0, 1)")
        if groups is not None:
            share = 1 - groups[0] / groups[1]
            require(
                abs(self.sparsity - share) < 1e-6 or self.sparsity == 0, self, "sparsity", f"{share:g} or 0 for the pattern {self.pattern}"
            )
            fits = all(s == 0 or abs(s - share) < 1e-6 for s in self.layer_sparsity.values())
            require(fits, self, "layer_sparsity", f"a dictionary of 0 and {share:g} for the pattern {self.pattern}")
            require(self.block_size % groups[1] == 0, self, "block_size", f"a multiple of {groups[1]} for the pattern {self.pattern}")
        if self.quantize == "int4" and self.quantize_method == "gptq":
            require(self.block_size % self.group_size == 0, self, "block_size", f"a multiple of group_size, {self.group_size}")

    @property
    def calibrates(self) -> bool:
        """Whether it needs calibration data."""
        return self.method != "magnitude" or (self.quantize is not None and self.quantize_method == "gptq")

    def sparsity_of(self, name: str) -> float:
        """The share to prune of the layer of that name."""
        return next((s for expression, s in self.layer_sparsity.items() if re.search(expression, name)), self.sparsity)
