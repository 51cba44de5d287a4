"""Calibration: token windows out of texts, and what the inputs of Linear layers look like."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def calibration_from_text(tokenizer: Any, texts: Iterable[str], samples: int = 64, length: int = 512) -> list[Tensor]:
    """Windows of tokens, spread evenly over some texts, as `torch_cpu_ext.prune` takes them.

    Args:
        tokenizer: ``tokenizer(text)["input_ids"]`` is a list of token ids, as in Hugging Face transformers.
        texts: joined in their order, with an empty line between two.
        samples: number of windows. Methods that invert the Hessian want more tokens (``samples * length``) than a layer has inputs.
        length: tokens a window. Windows do not overlap.
    Returns:
        ``samples`` tensors ``(1, length)``, int64.
    Raises:
        ValueError: the texts have fewer than ``samples * length`` tokens, or a number is below 1.
    """
    for name, value in (("samples", samples), ("length", length)):
        if value < 1:
            raise ValueError(f"calibration_from_text: {name} must be at least 1, got {value}")
    ids = torch.tensor(tokenizer("\n\n".join(texts))["input_ids"], dtype=torch.int64)
    windows = len(ids) // length
    if windows < samples:
        raise ValueError(
            f"calibration_from_text: texts must have samples * length = {samples * length} tokens or more, got {len(ids)}; "
            "add text, or ask for fewer samples"
        )
    chosen = [i * windows // samples for i in range(samples)]
    return [ids[i * length : (i + 1) * length][None].clone() for i in chosen]


class Gram:
    """The sums of ``x x^T`` over the inputs of some Linear layers, in float32, while the model runs.

    Layers that are called with the same tensor (queries, keys and values) share one sum.
    """

    def __init__(self) -> None:
        self._sums: dict[frozenset[str], Tensor] = {}  # by the layers that were called with the same tensors
        self._now: list[tuple[Tensor, int, Tensor, set[str]]] = []  # of the item that runs: input, its version, its sum, its layers

    @contextmanager
    def watching(self, layers: dict[str, nn.Linear]) -> Iterator[None]:
        """Adds up what ``layers``, by name, are called with; call `next_item` after each forward pass of the model."""
        with ExitStack() as hooks:
            for name, layer in layers.items():
                hooks.enter_context(layer.register_forward_pre_hook(self._hook(name), with_kwargs=True))
            yield
        self._now.clear()

    def _hook(self, name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else kwargs["input"]
            now = -1 if x.is_inference() else x._version
            for tensor, version, _, names in self._now:
                if tensor is x and version == now:
                    names.add(name)
                    return
            rows = x.detach().reshape(-1, x.shape[-1]).float()
            self._now.append((x, now, rows.T @ rows, {name}))

        return hook

    def next_item(self) -> None:
        """Adds what the forward pass that just ended brought."""
        for _, _, product, names in self._now:
            key = frozenset(names)
            if key in self._sums:
                self._sums[key] += product
            else:
                self._sums[key] = product
        self._now.clear()

    def take(self) -> Iterator[tuple[list[str], Tensor]]:
        """The layers that share a sum, with it; the sums are forgotten one by one. Layers never called are in none."""
        keys: dict[str, list[frozenset[str]]] = {}
        for key in self._sums:
            for name in key:
                keys.setdefault(name, []).append(key)
        together: dict[tuple[frozenset[str], ...], list[str]] = {}
        for name, mine in keys.items():
            together.setdefault(tuple(mine), []).append(name)
        left = list(together.items())
        while left:
            shared, names = left.pop(0)
            total = self._sums[shared[0]]
            for key in shared[1:]:
                total = total + self._sums[key]
            for key in shared:
                if not any(key in other for other, _ in left):
                    del self._sums[key]
            yield sorted(names), total
