"""Grids: the values that int8 and int4 weights can take."""

from dataclasses import dataclass

import torch
from torch import Tensor

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # shares of the full range that are tried; finer steps change little
_LARGEST = 64  # magnitude of a weight in steps of its scale, at most: weights rounded to bf16 keep their codes


@dataclass(frozen=True, eq=False)
class QuantizationGrid:
    """The values that each weight of a layer can take; `torch_cpu_ext.prune` leaves it on the layer as ``linear.quantization_grid``.

    ``weight = scale * code`` with codes from -127 to 127 (int8), ``scale * code + minimum`` with codes from 0 to 15 (int4), or
    ``scale * (code - 8)`` with codes from 1 to 15 (int4 without ``minimum``).

    Args:
        dtype: ``"int8"`` or ``"int4"``.
        group_size: consecutive inputs that share a scale; the last group of a row may be shorter. 0: the whole row, as for int8.
        scale: ``(out_features, groups)``, float32; the values of int4 are exact in float16.
        minimum: ``(out_features, groups)``, float32, or None. Where it is a whole number of steps below zero in all groups, zero is on the
            grid, as sparse layouts need it; otherwise it is exact in float16.
    """

    dtype: str
    group_size: int
    scale: Tensor
    minimum: Tensor | None = None

    @property
    def zero(self) -> Tensor | None:
        """``(out_features, groups)``: the code whose weight is exactly 0, or None if there is none in some group."""
        if self.minimum is None:
            return torch.full_like(self.scale, 8.0 if self.dtype == "int4" else 0.0)
        zero = (-self.minimum * inverse(self.scale)).round()
        return zero if bool(((zero >= 0) & (zero <= 15) & (zero * self.scale == -self.minimum)).all()) else None

    def codes(self, weight: Tensor) -> Tensor:
        """Codes of the values nearest to ``weight`` ``(out_features, in_features)``, int16."""
        return self._steps(weight.shape[1]).codes(weight.detach().float()).to(torch.int16)

    def dequantize(self, codes: Tensor) -> Tensor:
        """The weights of ``codes`` ``(out_features, in_features)``, float32."""
        return self._steps(codes.shape[1]).values(codes.float())

    def round(self, weight: Tensor) -> Tensor:
        """The values of the grid nearest to ``weight`` ``(out_features, in_features)``, float32."""
        return self.dequantize(self.codes(weight))

    def holds(self, weight: Tensor) -> bool:
        """Whether all of ``weight`` ``(out_features, in_features)`` are values of the grid, as far as its dtype can hold them."""
        groups = -(-weight.shape[1] // self.group_size) if self.group_size else 1
        return self.scale.shape == (len(weight), groups) and bool(self.round(weight).to(weight.dtype).equal(weight.detach()))

    def _steps(self, inputs: int) -> "Steps":
        def spread(values: Tensor) -> Tensor:
            return values.repeat_interleave(self.group_size or inputs, 1)[:, :inputs]

        zero = self.zero
        if zero is None:
            assert self.minimum is not None
            return Steps(spread(self.scale), spread(torch.zeros_like(self.scale)), spread(self.minimum), (0, 15))
        limits = (-127, 127) if self.dtype == "int8" else (0, 15) if self.minimum is not None else (1, 15)
        return Steps(spread(self.scale), spread(zero), None, limits)


@dataclass(frozen=True, eq=False)
class Steps:
    """Rounding: ``value = scale * (code - zero)``, plus ``minimum`` if there is one (then ``zero`` is 0); tensors that broadcast.

    Args:
        scale: what one step is worth.
        zero: code of 0.
        minimum: value of code 0, or None.
        limits: smallest and largest code.
    """

    scale: Tensor
    zero: Tensor
    minimum: Tensor | None
    limits: tuple[int, int]

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest codes, as floats."""
        shifted = weight if self.minimum is None else weight - self.minimum
        return (shifted * inverse(self.scale)).round_().add_(self.zero).clamp_(*self.limits)

    def values(self, codes: Tensor) -> Tensor:
        """The values of codes."""
        values = self.scale * (codes - self.zero)
        return values if self.minimum is None else values + self.minimum

    def round(self, weight: Tensor) -> Tensor:
        """The nearest values."""
        return self.values(self.codes(weight))


def inverse(scale: Tensor) -> Tensor:
    """``1 / scale``, and 0 where that is no finite number: a group of zeros has scale 0."""
    result = scale.reciprocal()
    return torch.where(result.isfinite(), result, 0.0)


def int8_steps(weight: Tensor) -> Steps:
    """One scale an output, ``max(abs(row)) / 127``; ``weight`` ``(out_features, in_features)``, float32."""
    scale = weight.abs().amax(1, keepdim=True) / 127 if weight.shape[1] else weight.new_zeros(len(weight), 1)
    return Steps(scale, torch.zeros_like(scale), None, (-127, 127))


def int4_steps(groups: Tensor, importance: Tensor | None, *, symmetric: bool, zero_point: bool) -> Steps:
    """The best of some grids for each group: the full range of its weights, or a share of it, by the squared error of rounding.

    Clipping the largest weights of a group makes the steps of all others finer.

    Args:
        groups: ``(out_features, groups, group_size)``, float32; zero where weights are pruned.
        importance: of each input in the squared error, ``(groups, group_size)``; None for equal ones.
        symmetric: codes 1 to 15 around a zero that is code 8.
        zero_point: a grid that holds zero, at a code of its own in each group; else the smallest weight has code 0.
    Returns:
        `Steps` whose tensors are ``(out_features, groups, 1)``.
    Raises:
        ValueError: the weights are too large for scales in float16.
    """
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    best: Steps | None = None
    for share in SHRINKS:
        if symmetric:
            steps = _zero_point(torch.maximum(-low, high) * (share / 7), torch.full_like(low, 8.0), (1, 15))
        elif zero_point:
            scale = half((high.clamp(min=0) - low.clamp(max=0)) * (share / 15))
            steps = _zero_point(scale, (-low.clamp(max=0) * share * inverse(scale)).round_().clamp_(0, 15), (0, 15))
        else:
            scale = torch.maximum((high - low) * (share / 15), torch.maximum(-low, high) / _LARGEST)
            steps = Steps(half(scale), torch.zeros_like(low), half(low + (high - low) * ((1 - share) / 2)), (0, 15))
        errors = (steps.round(groups) - groups).square_()
        error = (errors if importance is None else errors * importance).sum(2, keepdim=True)
        if best is None:
            best, least = steps, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        minimum = steps.minimum
        if minimum is not None and best.minimum is not None:
            minimum = torch.where(better, minimum, best.minimum)
        best = Steps(torch.where(better, steps.scale, best.scale), torch.where(better, steps.zero, best.zero), minimum, steps.limits)
    assert best is not None
    if not bool(best.scale.isfinite().all()) or (best.minimum is not None and not bool(best.minimum.isfinite().all())):
        raise ValueError("int4 scales must be finite in float16, but weights are too large or not finite")
    return best


def _zero_point(scale: Tensor, zero: Tensor, limits: tuple[int, int]) -> Steps:
    return Steps(half(scale), zero, None, limits)


def half(values: Tensor) -> Tensor:
    """Rounded to what float16 can hold, as packed weights store it."""
    return values.half().float()


def nearest(
    weight: Tensor, dtype: str, *, group_size: int, symmetric: bool, zero_point: bool, importance: Tensor | None = None
) -> QuantizationGrid:
    """The grid for rounding each weight to the nearest value.

    Args:
        weight: ``(out_features, in_features)``, float32; zero where pruned.
        dtype: ``"int8"`` (the other arguments have no effect then) or ``"int4"``.
        group_size: 32, 64 or 128.
        symmetric: zero is code 8 in every group.
        zero_point: zero is on the grid.
        importance: of each input in the squared error, ``(in_features,)``; None for equal ones.
    """
    if dtype == "int8":
        return QuantizationGrid("int8", 0, int8_steps(weight).scale)
    outputs, inputs = weight.shape
    groups = -(-inputs // group_size)
    padding = (0, groups * group_size - inputs)  # the first weight again: it widens no range
    if padding[1]:
        weight = torch.cat([weight, weight[:, -1:].expand(-1, padding[1])], 1)
    if importance is not None:
        importance = torch.nn.functional.pad(importance, padding).view(groups, group_size)
    steps = int4_steps(weight.reshape(outputs, groups, group_size), importance, symmetric=symmetric, zero_point=zero_point)
    return grid_of(steps, "int4", group_size)


def grid_of(steps: Steps, dtype: str, group_size: int) -> QuantizationGrid:
    """The grid of `Steps` whose tensors are ``(out_features, groups, 1)``."""
    scale, minimum = steps.scale.squeeze(2), steps.minimum
    if minimum is None and steps.limits == (0, 15):
        minimum = -steps.zero * steps.scale
    return QuantizationGrid(dtype, group_size, scale, None if minimum is None else minimum.squeeze(2))
