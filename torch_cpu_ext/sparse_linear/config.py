"""Everything a user can choose about sparse_linear."""

from dataclasses import dataclass, replace

from ..core.config import Config, require
from .ops import DTYPES, GROUP_SIZES, LAYOUTS
from .pruning import GRANULARITIES, PATTERNS, is_pattern, parse_pattern


@dataclass(frozen=True)
class SparseLinearConfig(Config):
    """How `torch_cpu_ext.optimize` packs the Linear layers of a model (SparAMX, arXiv:2502.12444).

    Args:
        dtype: how weights are stored and multiplied. ``"int8"``: one scale an output, activations quantised on the way in; the least
            loss for its bytes, hence the default. ``"int4"``: a scale for every group of inputs, activations quantised likewise; the fewest
            bytes. ``"bf16"``: weights and activations rounded to bfloat16. ``"fp32"``: nothing is rounded.
        sparsity: share of weights to prune by magnitude before packing, in ``(0, 1)``; None prunes nothing and keeps the zeros that are
            there. Weights that another module shares (a tied ``lm_head``) are packed unpruned.
        granularity: where magnitudes are compared: ``"row"`` prunes the same share of every output, ``"layer"`` of the whole weight.
        pattern: ``"unstructured"``, or ``"n:m"``, such as ``"2:4"``: of every m consecutive inputs of an output, n stay; then ``sparsity``
            is 1 - n/m, or None for weights that have the pattern already. Those that have it are stored in the structured layout if m is a
            power of two up to 64, ``dtype`` is not int4 and ``layout`` is ``"auto"``; all others as unstructured ones are.
        layout: ``"sparse"``, ``"dense"``, or ``"auto"``, which takes what needs fewer bytes, for each layer.
        group_size: inputs that share a scale in int4 weights, 32, 64 or 128.
        symmetric: whether the grid of int4 weights is centred on zero. False costs up to 2 bytes more a group and is more accurate.
        head_dtype: `dtype` of the output embedding (``lm_head``), which ``get_output_embeddings`` of the model or of a part
            of it names; None: int8 where ``dtype`` is int4, which would cost accuracy there, else ``dtype``.
        activation_group: inputs that share a scale when layers quantise their activations, 32 or 64; 32 for int4 weights.
        fuse: run the layers of a transformers model that are Llama-shaped in one op where a call has few tokens (decoding), and its gated
            MLPs in one op up to the activation.
        keep_original: keep the dense weights, so that `restore` gives them back exactly whatever was rounded or pruned; costs their memory.
    Raises:
        ValueError: a value is not among those accepted.
    """

    dtype: str = "int8"
    sparsity: float | None = None
    granularity: str = "row"
    pattern: str = "unstructured"
    layout: str = "auto"
    group_size: int = 32
    symmetric: bool = False
    head_dtype: str | None = None
    activation_group: int = 32
    fuse: bool = True
    keep_original: bool = False

    def __post_init__(self) -> None:
        require(self.dtype in DTYPES, self, "dtype", f"one of {', '.join(DTYPES)}")
        require(self.sparsity is None or 0 < self.sparsity < 1, self, "sparsity", "None or between 0 and 1, both excluded")
        require(self.granularity in GRANULARITIES, self, "granularity", f"one of {', '.join(GRANULARITIES)}")
        require(is_pattern(self.pattern), self, "pattern", PATTERNS)
        groups = parse_pattern(self.pattern)
        if groups is not None:
            share = 1 - groups[0] / groups[1]
            fits = self.sparsity is None or abs(self.sparsity - share) < 1e-6
            require(fits, self, "sparsity", f"{share:g} or None for the pattern {self.pattern}")
        require(self.layout in ("auto", *LAYOUTS), self, "layout", f"one of auto, {', '.join(LAYOUTS)}")
        require(self.group_size in GROUP_SIZES, self, "group_size", "32, 64 or 128")
        require(self.head_dtype is None or self.head_dtype in DTYPES, self, "head_dtype", f"None or one of {', '.join(DTYPES)}")
        int4 = "int4" in (self.dtype, self.head_dtype)
        require(
            self.activation_group == 32 or (self.activation_group == 64 and not int4),
            self,
            "activation_group",
            "32 for int4 weights" if int4 else "32 or 64",
        )

    def for_head(self) -> "SparseLinearConfig":
        """The config of the output embedding: with ``head_dtype`` as its dtype."""
        return replace(self, dtype=self.head_dtype or ("int8" if self.dtype == "int4" else self.dtype), head_dtype=None)
