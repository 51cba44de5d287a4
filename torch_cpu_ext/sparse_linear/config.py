"""Everything a user can choose about sparse_linear."""

from dataclasses import dataclass

from ..core.config import Config, require
from .ops import DTYPES, LAYOUTS
from .pruning import GRANULARITIES, PATTERNS, is_pattern, parse_pattern


@dataclass(frozen=True)
class SparseLinearConfig(Config):
    """How `torch_cpu_ext.optimize` packs the Linear layers of a model (SparAMX, arXiv:2502.12444).

    Args:
        dtype: how weights are stored and multiplied. ``"int8"``: one scale an output, activations quantised on the way in; the fewest
            bytes, hence the default. ``"bf16"``: weights and activations rounded to bfloat16. ``"fp32"``: nothing is rounded.
        sparsity: share of weights to prune by magnitude before packing, in ``(0, 1)``; None prunes nothing and keeps the zeros that are
            there. Weights that another module shares (a tied ``lm_head``) are packed unpruned.
        granularity: where magnitudes are compared: ``"row"`` prunes the same share of every output, ``"layer"`` of the whole weight.
        pattern: ``"unstructured"``, or ``"n:m"``, such as ``"2:4"``: of every m consecutive inputs of an output, n stay; then ``sparsity``
            is 1 - n/m. Weights are stored as unstructured ones are.
        layout: ``"sparse"``, ``"dense"``, or ``"auto"``, which takes what needs fewer bytes, for each layer.
        activation_group: inputs that share a scale when int8 layers quantise their activations, 32 or 64.
        keep_original: keep the dense weights, so that `restore` gives them back exactly whatever was rounded or pruned; costs their memory.
    Raises:
        ValueError: a value is not among those accepted.
    """

    dtype: str = "int8"
    sparsity: float | None = None
    granularity: str = "row"
    pattern: str = "unstructured"
    layout: str = "auto"
    activation_group: int = 32
    keep_original: bool = False

    def __post_init__(self) -> None:
        require(self.dtype in DTYPES, self, "dtype", f"one of {', '.join(DTYPES)}")
        require(self.sparsity is None or 0 < self.sparsity < 1, self, "sparsity", "None or between 0 and 1, both excluded")
        require(self.granularity in GRANULARITIES, self, "granularity", f"one of {', '.join(GRANULARITIES)}")
        require(is_pattern(self.pattern), self, "pattern", PATTERNS)
        groups = parse_pattern(self.pattern)
        if groups is not None:
            share = 1 - groups[0] / groups[1]
            fits = self.sparsity is not None and abs(self.sparsity - share) < 1e-6
            require(fits, self, "sparsity", f"{share:g} for the pattern {self.pattern}")
        require(self.layout in ("auto", *LAYOUTS), self, "layout", f"one of auto, {', '.join(LAYOUTS)}")
        require(self.activation_group in (32, 64), self, "activation_group", "32 or 64")
