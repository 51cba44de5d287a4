"""Pruning and rounding of one weight: masks with calibration data, SparseGPT, GPTQ, grids."""

import pytest
import torch

from torch_cpu_ext.sparse_linear import PruneConfig, QuantizationGrid, magnitude_mask, wanda_mask
from torch_cpu_ext.sparse_linear.grid import nearest
from torch_cpu_ext.sparse_linear.obs import inverse_factor, surgery
from torch_cpu_ext.sparse_linear.pruner import prune_weight


def correlated(inputs, tokens=500):
    """Inputs of a layer as models have them: correlated, of unequal size."""
    return torch.randn(tokens, inputs) @ (torch.randn(inputs, inputs) * torch.rand(inputs)) + torch.randn(tokens, inputs)


def error(before, after, x):
    return float(((after - before) @ x.T).square().sum())


@pytest.fixture
def layer():
    """Weight, inputs, Hessian, factor."""
    weight, x = torch.randn(48, 256), correlated(256)
    hessian = x.T @ x
    return weight, x, hessian, inverse_factor(hessian)


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8", "3:4", "1:8"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_patterns_hold(layer, pattern, method):
    weight, _, hessian, factor = layer
    n, m = map(int, pattern.split(":"))
    config = PruneConfig(sparsity=1 - n / m, method=method, pattern=pattern)
    result, _ = prune_weight(weight, config, config.sparsity, hessian, factor)
    assert (result.view(48, -1, m).count_nonzero(2) == n).all()


def test_the_largest_of_each_group_stay():
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0]])
    assert magnitude_mask(weight, 0.5, pattern="2:4").tolist() == [[False, True, True, False, True, True, False, False]]
    norms = torch.tensor([9.0, 1, 1, 1, 1, 1, 5, 1])
    assert wanda_mask(weight, norms, 0.5, pattern="2:4").tolist() == [[True, True, False, False, True, False, True, False]]


@pytest.mark.parametrize("granularity", ["row", "layer"])
def test_wanda_with_equal_norms_is_magnitude(granularity):
    weight = torch.randn(20, 100)
    assert wanda_mask(weight, torch.full((100,), 3.0), 0.6, granularity).equal(magnitude_mask(weight, 0.6, granularity))


def test_wanda_weighs_by_norm():
    mask = wanda_mask(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([10.0, 1.0, 1.0, 0.0]), 0.5)
    assert mask.tolist() == [[True, False, True, False]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 6), 0.5, "row", "2:4"), "in_features must be a multiple of 4 for the pattern 2:4, got 6"),
        ((torch.zeros(2, 8), 0.4, "row", "2:4"), "sparsity must be 0.5 for the pattern 2:4, got 0.4"),
        ((torch.zeros(2, 8), 0.5, "row", "4:2"), "pattern must be unstructured or n:m with n below m, such as 2:4, got '4:2'"),
        ((torch.zeros(2, 8), 0.5, "row", "half"), "pattern must be unstructured or n:m with n below m, such as 2:4, got 'half'"),
        ((torch.zeros(2, 8), 0.5, "row", "0:4"), "pattern must be unstructured or n:m with n below m, such as 2:4, got '0:4'"),
    ],
)
def test_masks_refuse(arguments, message):
    with pytest.raises(ValueError, match=f"magnitude_mask: {message}"):
        magnitude_mask(*arguments)
    with pytest.raises(ValueError, match=f"wanda_mask: {message}"):
        wanda_mask(arguments[0], torch.ones(arguments[0].shape[1]), *arguments[1:])


def test_wanda_refuses():
    with pytest.raises(ValueError, match=r"wanda_mask: input_norm must have shape \(8,\), got \(7,\)"):
        wanda_mask(torch.zeros(2, 8), torch.ones(7), 0.5)
    with pytest.raises(ValueError, match="wanda_mask: weight times input_norm must be finite"):
        wanda_mask(torch.ones(2, 8), torch.tensor([float("inf")]).expand(8), 0.5)


@pytest.mark.parametrize("inputs", [1, 7, 64, 200])
def test_the_factor_is_of_the_inverse(inputs):
    x = correlated(inputs)
    hessian = x.T @ x
    factor = inverse_factor(hessian, 0.01)
    assert factor.equal(factor.triu())
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(inputs)
    torch.testing.assert_close(factor.double().T @ factor.double() @ damped, torch.eye(inputs).double(), rtol=0, atol=1e-3)


def test_singular_hessians_are_damped():
    x = torch.randn(3, 64)
    for hessian in (x.T @ x, torch.zeros(64, 64), torch.ones(64, 64)):
        for damping in (0.01, 0.0):
            assert inverse_factor(hessian, damping).isfinite().all()
    assert inverse_factor(torch.zeros(0, 0)).shape == (0, 0)
    with pytest.raises(ValueError, match="hessian must be finite"):
        inverse_factor(torch.full((3, 3), float("nan")))
    with pytest.raises(ValueError, match="hessian must be positive semidefinite"):
        inverse_factor(-torch.eye(3) + 1e-3 * torch.ones(3, 3))


@pytest.mark.parametrize("granularity", ["row", "layer"])
def test_with_uncorrelated_inputs_sparsegpt_is_magnitude(granularity):
    """Then no weight can make up for another, and the price of a weight is its square."""
    weight = torch.randn(30, 100)
    result, _ = surgery(weight, inverse_factor(torch.eye(100)), sparsity=0.6, granularity=granularity, block_size=100)
    assert result.equal(weight * magnitude_mask(weight, 0.6, granularity))


def test_the_compensation_is_the_best_there_is():
    """With the mask given, the last column's error aside, weights are the least-squares solution on the columns that stay at the end."""
    weight, x = torch.randn(5, 40), correlated(40)
    hessian = x.T @ x
    mask = torch.ones(5, 40, dtype=torch.bool)
    mask[:, :10] = False  # all pruned columns come first, so that one pass over the columns is exact
    result, _ = surgery(weight, inverse_factor(hessian, 1e-7), mask=mask, block_size=16)
    rest, first = slice(10, 40), slice(0, 10)
    best = weight[:, rest] + torch.linalg.solve(hessian[rest, rest], hessian[rest, first] @ weight[:, first].T).T
    torch.testing.assert_close(result[:, rest], best, rtol=1e-2, atol=1e-2)
    assert not result[:, first].any()


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_methods_rank_by_error(layer, sparsity):
    weight, x, hessian, factor = layer
    errors = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        result, _ = prune_weight(weight, PruneConfig(method=method), sparsity, hessian, factor)
        errors[method] = error(weight, result, x)
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


@pytest.mark.parametrize("granularity", ["row", "layer"])
@pytest.mark.parametrize(("inputs", "sparsity"), [(256, 0.5), (200, 0.37), (33, 0.9), (1, 0.3), (300, 0.0)])
def test_sparsity_is_exact(granularity, inputs, sparsity):
    weight, x = torch.randn(17, inputs), correlated(inputs)
    result, _ = surgery(weight, inverse_factor(x.T @ x), sparsity=sparsity, granularity=granularity, block_size=64)
    if granularity == "row":
        assert (result == 0).sum(1).tolist() == [round(sparsity * inputs)] * 17
    else:
        assert int((result == 0).sum()) == round(sparsity * 17 * inputs)


def test_block_size_changes_the_mask_only():
    weight, x = torch.randn(20, 192), correlated(192)
    factor = inverse_factor(x.T @ x)
    mask = magnitude_mask(weight, 0.5)
    one, many = (surgery(weight, factor, mask=mask, block_size=size)[0] for size in (192, 32))
    torch.testing.assert_close(one, many, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_gptq_has_less_error_than_rounding(layer, quantize, sparsity):
    weight, x, hessian, factor = layer
    errors = {}
    for method in ("nearest", "gptq"):
        config = PruneConfig(method="magnitude", quantize=quantize, quantize_method=method)
        pruned = weight * magnitude_mask(weight, sparsity)
        result, _ = prune_weight(weight, config, sparsity, hessian, factor)
        errors[method] = error(pruned, result, x)
    assert errors["gptq"] < errors["nearest"]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("quantize_method", ["nearest", "gptq"])
@pytest.mark.parametrize(
    ("quantize", "group_size", "symmetric"), [("int8", 32, False), ("int4", 32, False), ("int4", 128, False), ("int4", 64, True)]
)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_results_lie_on_their_grid(layer, pattern, method, quantize_method, quantize, group_size, symmetric, kind):
    """With a mask zero is a value of the grid; the codes survive the rounding of weights to bf16."""
    weight, _, hessian, factor = layer
    config = PruneConfig(
        method=method, pattern=pattern, quantize=quantize, quantize_method=quantize_method, group_size=group_size, symmetric=symmetric
    )
    result, grid = prune_weight(weight, config, 0.5, hessian, factor)
    assert isinstance(grid, QuantizationGrid)
    assert (grid.dtype, grid.group_size) == (quantize, 0 if quantize == "int8" else group_size)
    assert grid.scale.shape == (48, 1 if quantize == "int8" else 256 // group_size)
    assert (grid.minimum is None) == (quantize == "int8" or symmetric)
    assert grid.zero is not None
    assert grid.round(result).equal(result)
    codes = grid.codes(result.to(kind))
    assert codes.equal(grid.codes(result))
    assert grid.dequantize(codes).equal(result)
    low, high = (-127, 127) if quantize == "int8" else (1, 15) if symmetric else (0, 15)
    assert codes.min() >= low
    assert codes.max() <= high
    assert (result == 0).float().mean() >= 0.5
    if quantize == "int4":
        assert grid.scale.half().float().equal(grid.scale)


@pytest.mark.parametrize("quantize_method", ["nearest", "gptq"])
@pytest.mark.parametrize(("shift", "spread"), [(0.0, 1.0), (3.0, 0.01), (-50.0, 2.0), (0.0, 1e-4)])
@pytest.mark.parametrize("inputs", [256, 100, 33, 1])
def test_dense_int4_has_a_minimum(quantize_method, shift, spread, inputs):
    weight, x = torch.randn(20, inputs) * spread + shift, correlated(inputs)
    hessian = x.T @ x
    config = PruneConfig(sparsity=0.0, quantize="int4", quantize_method=quantize_method)
    result, grid = prune_weight(weight, config, 0.0, hessian, inverse_factor(hessian))
    assert grid is not None
    assert grid.minimum is not None
    assert grid.minimum.half().float().equal(grid.minimum)
    codes = grid.codes(result)
    assert grid.dequantize(codes).equal(result)
    assert grid.codes(result.bfloat16()).equal(codes)
    if quantize_method == "nearest":
        step = grid.scale.repeat_interleave(32, 1)[:, :inputs]
        largest = (result - weight).abs() / step
        assert largest.median() <= 0.5  # the most extreme weights may be clipped


def test_clipping_pays():
    """One outlier a group: with the full range all others would be coarse."""
    weight = torch.randn(64, 32)
    weight[:, 5] *= 2
    grid = nearest(weight, "int4", group_size=32, symmetric=False, zero_point=True)
    whole = (weight.amax(1) - weight.amin(1)) / 15
    assert (grid.scale[:, 0] < whole * 0.99).any()
    assert (grid.scale[:, 0] <= whole * 1.001).all()


def test_importance_moves_the_grid():
    weight = torch.randn(64, 32)
    weight[:, 3] = 4.0
    plain = nearest(weight, "int4", group_size=32, symmetric=False, zero_point=True)
    importance = torch.ones(32)
    importance[3] = 1e4
    pointed = nearest(weight, "int4", group_size=32, symmetric=False, zero_point=True, importance=importance)
    miss = [(grid.round(weight)[:, 3] - 4).abs().mean() for grid in (plain, pointed)]
    assert miss[1] < miss[0]


def test_groups_of_zeros():
    weight = torch.zeros(4, 64)
    for symmetric in (False, True):
        for zero_point in (False, True):
            grid = nearest(weight, "int4", group_size=32, symmetric=symmetric, zero_point=zero_point)
            assert not grid.round(weight).any()
    assert not nearest(weight, "int8", group_size=32, symmetric=False, zero_point=False).round(weight).any()
    with pytest.raises(ValueError, match="int4 scales must be finite in float16"):
        nearest(torch.full((4, 64), 1e9), "int4", group_size=32, symmetric=True, zero_point=True)


def test_zeros_that_are_there_stay(layer):
    weight, _, hessian, factor = layer
    weight = weight * magnitude_mask(weight, 0.5)
    for quantize_method in ("nearest", "gptq"):
        config = PruneConfig(sparsity=0.0, quantize="int4", quantize_method=quantize_method)
        result, grid = prune_weight(weight, config, 0.0, hessian, factor)
        assert grid is not None
        assert grid.zero is not None
        assert not result[weight == 0].any()


@pytest.mark.parametrize("config", [PruneConfig(), PruneConfig(quantize="int4"), PruneConfig(pattern="2:4", quantize="int8")])
def test_deterministic_and_without_effect_on_the_weight(layer, config):
    weight, _, hessian, factor = layer
    before = weight.clone()
    first, _ = prune_weight(weight, config, 0.5, hessian, factor)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        again, _ = prune_weight(weight, config, 0.5, hessian.clone(), factor)
        torch.testing.assert_close(again, first, rtol=1e-3, atol=1e-3)
    assert prune_weight(weight, config, 0.5, hessian, factor)[0].equal(again)
    assert weight.equal(before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"method": "random"}, "method must be one of magnitude, wanda, sparsegpt, got 'random'"),
        ({"pattern": "4:2"}, "pattern must be unstructured or n:m"),
        ({"pattern": "1:4"}, "sparsity must be 0.75 or 0 for the pattern 1:4, got 0.5"),
        ({"pattern": "2:4", "layer_sparsity": {"a": 0.4}}, "layer_sparsity must be a dictionary of 0 and 0.5 for the pattern 2:4"),
        ({"pattern": "3:6", "block_size": 128}, "block_size must be a multiple of 6 for the pattern 3:6, got 128"),
        ({"granularity": "model"}, "granularity must be one of row, layer, got 'model'"),
        ({"layer_sparsity": {"(": 0.4}}, "layer_sparsity must have regular expressions, got '\\('"),
        ({"layer_sparsity": {"a": 2.0}}, "layer_sparsity must be a dictionary of shares"),
        ({"damping": -1.0}, "damping must be 0 or more"),
        ({"block_size": 0}, "block_size must be above 0"),
        ({"quantize": "int3"}, "quantize must be None, int8 or int4, got 'int3'"),
        ({"quantize_method": "awq"}, "quantize_method must be nearest or gptq, got 'awq'"),
        ({"group_size": 16}, "group_size must be one of 32, 64, 128, got 16"),
        ({"quantize": "int4", "block_size": 100}, "block_size must be a multiple of group_size, 32, got 100"),
    ],
)
def test_configs_refuse(fields, message):
    with pytest.raises(ValueError, match=f"PruneConfig: {message}"):
        PruneConfig(**fields)


def test_configs_as_dictionaries():
    config = PruneConfig(layer_sparsity={"a": 0.25}, pattern="unstructured", quantize="int4")
    assert PruneConfig.from_dict(config.to_dict()) == config
