"""Everything a user can choose about kv_cache."""

from dataclasses import dataclass

from ..core.config import Config, require
from .pages import DTYPES
from .selection import ANCHORS

IMPORTANCE = ("snapkv", "h2o", "tova", "streaming", "key_norm", "random")
ATTENTION = ("snapkv", "h2o", "tova")  # those that are made of attention
_QUANTISED = ("int8", "int4")


@dataclass(frozen=True)
class KVCrushConfig(Config):
    """Which keys and values a cache keeps, and how it stores them (KVCrush, arXiv:2503.00022).

    Args:
        budget: tokens that each KV head keeps, the first and last ones included; or, as a float in ``(0, 1]``, their share of the tokens
            seen so far, at least ``start + recent + 1``. Only a number of tokens bounds the memory of endless decoding.
        ratio: share of ``budget - start - recent`` that goes to representatives, in ``[0, 1]``; 0 is importance alone, the methods as they
            were published.
        importance: what is important. ``"snapkv"``: the attention of the last ``window`` queries (SnapKV, arXiv:2404.14469). ``"h2o"``:
            that of all queries (H2O, arXiv:2306.14048). ``"tova"``: that of the last query (TOVA, arXiv:2401.06104). ``"streaming"``: the
            latest tokens (StreamingLLM, arXiv:2309.17453). ``"key_norm"``: keys of small norm (arXiv:2406.11430). ``"random"``: a control.
        window: queries that ``"snapkv"`` scores are made of, and signatures where the scores are no attention.
        pool: ``"snapkv"`` scores become the largest among this many neighbouring tokens, an odd number; SnapKV has 7.
        sample: ``"h2o"`` looks at every ``sample``-th query.
        value_norm: whether scores are multiplied by the norm of the token's value.
        gqa: how the scores of the query heads that share a KV head become one: ``"mean"``, ``"max"`` or ``"sum"``; or
            ``"layer"``, the mean of all query heads of the layer, so that a prompt's KV heads all keep the same tokens.
        start: tokens at the start that are always kept.
        recent: tokens at the end that are always kept.
        anchor: what signatures are compared with, ``"mean"``, ``"inv_mean"``, ``"zeros"``, ``"ones"``, ``"alternate"`` or ``"random"``; see
            `torch_cpu_ext.kv_cache.select`.
        anchors: number of anchors, 1 to 8; the others are random.
        seed: of what is random; each layer adds its number.
        layers: how layers share: ``"uniform"``, or ``"pyramid"``, lower layers keep more (PyramidKV, arXiv:2406.02069); the same in total.
        heads: how the KV heads of a layer share: ``"uniform"``, or ``"ada"``, those with more of the largest scores keep more (Ada-KV,
            arXiv:2407.11550); the same in total.
        log_count: whether a representative's attention scores get the logarithm of the number of tokens that it speaks for.
        dtype: what keys and values are stored in: ``"auto"`` (fp32 for models in float32, else bf16), ``"fp32"``, ``"bf16"``, ``"int8"`` or
            ``"int4"``; of the latter two the first ``start`` and last ``recent`` tokens stay as ``"auto"`` would have them.
        representative_dtype: of representatives, ``"int8"`` or ``"int4"``; None: as the others.
        evict: ``"prefill"``: after each call of more than 8 tokens, so that a prompt in chunks never needs the memory of all of it.
            ``"decode"``: before the first call of one token after calls of several, for the same choice as with a whole prompt.
            ``"manual"``: by `KVCrushCache.compress`.
        decode_evict: whether decoding drops pages of 16 tokens, so as to stay within the budget and up to two pages; with
            ``evict="manual"`` from the first `KVCrushCache.compress` that dropped something on.
    Raises:
        ValueError: a value is not among those accepted.
    """

    budget: int | float = 0.25
    ratio: float = 0.25
    importance: str = "snapkv"
    window: int = 16
    pool: int = 1
    sample: int = 1
    value_norm: bool = False
    gqa: str = "layer"
    start: int = 4
    recent: int = 32
    anchor: str = "mean"
    anchors: int = 1
    seed: int = 0
    layers: str = "uniform"
    heads: str = "uniform"
    log_count: bool = True
    dtype: str = "auto"
    representative_dtype: str | None = None
    evict: str = "prefill"
    decode_evict: bool = True

    def __post_init__(self) -> None:
        def one_of(field: str, values: tuple[str, ...]) -> None:
            require(getattr(self, field) in values, self, field, f"one of {', '.join(values)}")

        def at_least(field: str, least: int) -> None:
            value = getattr(self, field)
            require(type(value) is int and value >= least, self, field, f"an integer of at least {least}")

        at_least("start", 0)
        at_least("recent", 1)
        if isinstance(self.budget, float):
            require(0 < self.budget <= 1, self, "budget", "a share above 0 and up to 1, or a number of tokens")
        else:
            least = self.start + self.recent + 1
            at_least_accepted = f"a share above 0 and up to 1, or an integer of at least start + recent + 1 = {least}"
            require(type(self.budget) is int and self.budget >= least, self, "budget", at_least_accepted)
        require(_is_number(self.ratio) and 0 <= self.ratio <= 1, self, "ratio", "a number from 0 to 1")
        one_of("importance", IMPORTANCE)
        at_least("window", 1)
        require(type(self.pool) is int and self.pool > 0 and self.pool % 2 == 1, self, "pool", "an odd positive integer")
        at_least("sample", 1)
        attention = self.importance in ATTENTION
        require(not self.value_norm or attention, self, "value_norm", f"False unless importance is one of {', '.join(ATTENTION)}")
        one_of("gqa", ("mean", "max", "sum", "layer"))
        one_of("anchor", ANCHORS)
        require(type(self.anchors) is int and 1 <= self.anchors <= 8, self, "anchors", "an integer from 1 to 8")
        require(type(self.seed) is int and 0 <= self.seed < 2**62, self, "seed", "an integer from 0 to 2**62 - 1")
        one_of("layers", ("uniform", "pyramid"))
        one_of("heads", ("uniform", "ada"))
        if self.importance == "streaming":
            require(self.heads == "uniform", self, "heads", "uniform with the importance streaming, which is the same for all heads")
        one_of("dtype", ("auto", *DTYPES))
        require(self.representative_dtype in (None, *_QUANTISED), self, "representative_dtype", f"None or one of {', '.join(_QUANTISED)}")
        one_of("evict", ("prefill", "decode", "manual"))

    @property
    def fixed(self) -> int:
        """Tokens that are always kept."""
        return self.start + self.recent


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
