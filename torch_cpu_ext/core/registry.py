"""The catalogue of all ops: one `define` call an op, with schema, fake, reference and autograd side by side."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import jit

NAMESPACE = "torch_cpu_ext"
TECHNIQUES = ("sparse_linear", "kv_cache", "graph", "embedding", "lsh")


@dataclass(frozen=True)
class Op:
    """What the catalogue knows of one op.

    Args:
        name: without the namespace.
        schema: name and signature, as `define` got it.
        technique: the technique it belongs to.
        reference: the op in plain PyTorch.
        trains: whether it has gradients.
    """

    name: str
    schema: str
    technique: str
    reference: Callable[..., Any]
    trains: bool


CATALOGUE: dict[str, Op] = {}
_inside = threading.local()


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    tags: Sequence[torch.Tag] = (),
) -> None:
    """Registers ``torch.ops.torch_cpu_ext.<name>`` without needing a compiler.

    The compiled kernel comes with the technique's library, which the first call builds or loads; from then on the dispatcher goes straight
    to it. Without a compiler the reference runs.

    Args:
        schema: name and signature, e.g. ``"lsh_score(Tensor input, Tensor weight) -> Tensor"``; mutated tensors are marked.
        fake: shapes and dtypes of the result, for tracing; raises what the kernel would raise for wrong arguments.
        reference: the op in plain PyTorch.
        setup: ``(ctx, inputs, output)``, keeps what ``backward`` needs.
        backward: ``(ctx, *grads) -> grads``, made of ops PyTorch knows.
        tags: tags of the op.
    """
    name = schema.split("(")[0]
    technique = next(t for t in TECHNIQUES if name.startswith(t))
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema[len(name) :], tags=tuple(tags))
    torch.library.register_fake(qualified, fake)

    def stub(*args: Any, **kwargs: Any) -> Any:
        # Once the library is loaded its CPU kernel wins and this runs no more, except for arguments no CPU kernel takes (an empty tensor
        # list, a sparse tensor): those come back here a second time and get the reference.
        if getattr(_inside, "op", None) == name or not jit.load(technique):
            return reference(*args, **kwargs)
        _inside.op = name
        try:
            return getattr(torch.ops.torch_cpu_ext, name)(*args, **kwargs)
        finally:
            _inside.op = None

    torch.library.impl(qualified, "CompositeExplicitAutograd", stub)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup)
    CATALOGUE[name] = Op(name, schema, technique, reference, backward is not None)
