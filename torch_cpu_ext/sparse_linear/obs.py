"""Optimal brain surgery on one layer: pruning (SparseGPT) and rounding (GPTQ) that change the weights still to come to make up for it."""

import logging

import torch
from torch import Tensor

from .grid import QuantizationGrid, Steps, grid_of, int4_steps, int8_steps
from .pruning import keep, largest, parse_pattern

_log = logging.getLogger("torch_cpu_ext.sparse_linear.obs")


def inverse_factor(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """The upper triangular ``U`` with ``inverse(hessian + damping * mean(diagonal) * identity) = U.T @ U``.

    Row ``j`` of it is all that column ``j`` needs (arXiv:2210.17323, section 3, step 3): ``1 / U[j, j] ** 2`` is the price of an error
    there, ``U[j, j:]`` how the later columns make up for it. Factorised in float64, since Hessians of real layers are nearly singular.

    Args:
        hessian: ``(in_features, in_features)``: the sum of ``x x^T`` over the inputs of a layer.
        damping: as a share of the mean of the diagonal; raised tenfold until the matrix can be factorised, with a message in the log.
    Returns:
        ``(in_features, in_features)``, float32.
    Raises:
        ValueError: ``hessian`` is not finite.
    """
    if not bool(hessian.isfinite().all()):
        raise ValueError("inverse_factor: hessian must be finite, got NaN or an infinity")
    mean = float(hessian.diagonal().double().mean()) if len(hessian) else 0.0
    while True:
        damped = hessian.double()
        damped.diagonal().add_(max(damping, 1e-9) * mean if mean > 0 else 1.0)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return factor.float()
        damping = max(10 * damping, 1e-3)
        if damping > 1e3:
            raise ValueError("inverse_factor: hessian must be positive semidefinite")
        _log.warning("a Hessian cannot be factorised; trying a damping of %g", damping)


def surgery(
    weight: Tensor,
    factor: Tensor,
    *,
    sparsity: float = 0.0,
    pattern: str = "unstructured",
    granularity: str = "row",
    mask: Tensor | None = None,
    block_size: int = 128,
    quantize: str | None = None,
    group_size: int = 32,
    symmetric: bool = False,
    zero_point: bool = True,
) -> tuple[Tensor, QuantizationGrid | None]:
    """Prunes and rounds a weight column by column; each column's error is made up for by the columns after it.

    Follows SparseGPT (arXiv:2301.00774, section 3, algorithm 1) with GPTQ's rounding in the same pass (its section 3.5). It departs in
    two places: scales of int4 groups are chosen from weights that have all changes so far, by the price of errors in each column, and the
    share pruned adds up to ``sparsity`` exactly over the blocks.

    Args:
        weight: ``(out_features, in_features)``, any float dtype; stays as it is.
        factor: of `inverse_factor`.
        sparsity: share of weights to prune.
        pattern: ``"unstructured"``: chosen for each block of columns when its turn comes; ``"n:m"``: for each m columns.
        granularity: ``"row"``: the same share of every output in every block; ``"layer"``: of the block as a whole.
        mask: True where weights stay, chosen beforehand; then ``sparsity``, ``pattern`` and ``granularity`` have no effect.
        block_size: columns whose changes are applied to the rest together; a multiple of ``group_size`` and of m.
        quantize: None, ``"int8"`` or ``"int4"``.
        group_size: of int4.
        symmetric: of int4.
        zero_point: of int4: zero is on the grid, so that pruned weights stay zero.
    Returns:
        The new weight in float32, and its grid if it was quantised.
    """
    inputs = weight.shape[1]
    columns = weight.detach().float().T.contiguous()  # (in_features, out_features): all steps work on whole columns
    groups_of = None if mask is not None else parse_pattern(pattern)
    steps: Steps | None = int8_steps(weight.detach().float()) if quantize == "int8" else None
    chosen: list[Steps] = []
    for start in range(0, inputs, block_size):
        stop = min(start + block_size, inputs)
        block, corner = columns[start:stop], factor[start:stop, start:stop]
        diagonal = corner.diagonal()[:, None]
        if mask is not None:
            kept = mask[:, start:stop].T.contiguous()
        else:
            kept = _choose(block / diagonal, start, inputs, sparsity, granularity, pattern)
        errors = torch.empty_like(block)
        for j in range(stop - start):
            if groups_of is not None and j % groups_of[1] == 0:  # again, now that the columns before have changed these
                n, m = groups_of
                kept[j : j + m] = keep((block[j : j + m] / diagonal[j : j + m]).abs().T, m - n).T
            if quantize == "int4" and j % group_size == 0:
                group = (block[j : j + group_size] * kept[j : j + group_size]).T[:, None]
                price = diagonal[j : j + group_size].T.square().reciprocal()  # of an error in each column
                chosen.append(int4_steps(group, price, symmetric=symmetric, zero_point=zero_point))
                steps = chosen[-1]
            new = block[j] * kept[j]
            if steps is not None:
                new = _round(new, steps)
            errors[j] = (block[j] - new) / corner[j, j]
            block[j + 1 :].addr_(corner[j, j + 1 :], errors[j], alpha=-1)
            block[j] = new
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    result = columns.T.contiguous()
    if quantize == "int8":
        assert steps is not None
        return result, QuantizationGrid("int8", 0, steps.scale)
    if quantize == "int4":
        minimum = None if chosen[0].minimum is None else torch.cat([s.minimum for s in chosen if s.minimum is not None], 1)
        both = [torch.cat([getattr(s, name) for s in chosen], 1) for name in ("scale", "zero")]
        return result, grid_of(Steps(both[0], both[1], minimum, chosen[0].limits), "int4", group_size)
    return result, None


def _choose(ratios: Tensor, start: int, inputs: int, sparsity: float, granularity: str, pattern: str) -> Tensor:
    """Which weights of a block stay, by ``(weight / U[j, j]) ** 2``; ``(columns, out_features)`` in and out."""
    scores = ratios.abs().T
    if parse_pattern(pattern) is not None:
        return largest(scores, sparsity, granularity, pattern).T.contiguous()
    outputs, stop = len(scores), start + scores.shape[1]
    each = 1 if granularity == "row" else outputs
    pruned = round(sparsity * each * stop) - round(sparsity * each * start)  # adds up exactly over the blocks
    return keep(scores.reshape(-1, scores.shape[1] * each), pruned).view(scores.shape).T.contiguous()


def _round(column: Tensor, steps: Steps) -> Tensor:
    return steps.round(column.reshape(-1, *[1] * (steps.scale.dim() - 1))).reshape(-1)
