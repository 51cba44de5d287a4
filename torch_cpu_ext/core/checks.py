"""Checks of arguments that the fakes and references of all techniques share, in the words of PyTorch's C++ side."""

import torch
from torch import Tensor

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TYPE_NAMES = {
    "float64": "Double",
    "float32": "Float",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "int64": "Long",
    "int32": "Int",
    "int16": "Short",
    "int8": "Char",
    "uint8": "Byte",
    "uint16": "UInt16",
    "uint32": "UInt32",
    "uint64": "UInt64",
    "complex32": "ComplexHalf",
    "complex64": "ComplexFloat",
    "complex128": "ComplexDouble",
}


def check_float(op: str, argument: str, tensor: Tensor) -> None:
    """Refuses a tensor that is not of one of the `FLOATS`."""
    torch._check(
        tensor.dtype in FLOATS.values(), lambda: f"{op}: {argument} must be float32, bfloat16 or float16, got {type_name(tensor.dtype)}"
    )


def type_name(dtype: torch.dtype) -> str:
    """A dtype in the words of PyTorch's C++ side, so that messages do not depend on who raises them."""
    name = str(dtype).removeprefix("torch.")
    return _TYPE_NAMES.get(name, name.capitalize())


# ------------------------------------------------------------------------------------------------------------------------- keys and values

TOKENS = 16  # in a block or page of keys or values
KINDS = ("key", "value")


def check_kind(op: str, kind: str) -> None:
    """Refuses what is neither ``"key"`` nor ``"value"``."""
    torch._check(kind in KINDS, lambda: f"{op}: kind must be key or value, got {kind}")


def check_head_dim(op: str, head_dim: int) -> None:
    """Refuses vectors that do not fill blocks."""
    torch._check(head_dim > 0 and head_dim % TOKENS == 0, lambda: f"{op}: head_dim must be a positive multiple of 16, got {head_dim}")
