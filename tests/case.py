"""What `cases.py` says of an op, and how a good argument is spoilt."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Args = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """Good arguments, and what the op must make of them."""

    name: str
    args: Args
    expected: Callable[[], tuple[Tensor, Tensor | float]]  # the result (float64 where it is not exact), and how far off each element may be


@dataclass(frozen=True)
class Bad:
    """Arguments an op must refuse: the message, and what spoils good arguments."""

    message: str
    spoil: Callable[[Args], Args]
    traced: bool = True  # whether the fake must refuse them too; it cannot where the contents of a tensor are at fault


@dataclass(frozen=True)
class Case:
    """One op."""

    op: str
    samples: Callable[[], list[Sample]]
    few: Callable[[], list[Sample]]  # one or two of each kind, for what takes long: tracers, opcheck, the reference under every stride
    bad: list[Bad]
    trains: tuple[str, ...] = ()
    dense: Callable[[Args], Tensor] | None = None  # the same function in differentiable PyTorch, for the gradients
    mutates: tuple[str, ...] = ()
    strided: tuple[str, ...] = ()  # arguments that may have any strides
    batched: str | None = None  # the argument whose first dimension may be dynamic
    dynamic_shape: bool = False  # the shape of the result depends on data


def replaced(**values: Any) -> Callable[[Args], Args]:
    """Spoils arguments by other values; a callable gets the good value."""
    return lambda args: args | {name: value(args[name]) if callable(value) else value for name, value in values.items()}
