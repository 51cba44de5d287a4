"""magnitude_mask: how many weights stay, and which."""

import pytest
import torch

import torch_cpu_ext as tce
from torch_cpu_ext.sparse_linear import magnitude_mask


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64), (17, 33), (4, 1000)])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.75, 0.9, 0.999])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_counts(shape, sparsity, kind):
    weight = torch.randn(shape).to(kind)
    mask = magnitude_mask(weight, sparsity)
    assert mask.dtype == torch.bool
    assert mask.shape == weight.shape
    assert (~mask).sum(1).tolist() == [round(sparsity * shape[1])] * shape[0]
    assert int((~magnitude_mask(weight, sparsity, "layer")).sum()) == round(sparsity * weight.numel())


@pytest.mark.parametrize("granularity", ["row", "layer"])
def test_the_largest_stay(granularity):
    weight = torch.randn(9, 50)
    mask = magnitude_mask(weight, 0.6, granularity)
    rows = zip(weight.abs(), mask, strict=True) if granularity == "row" else [(weight.abs(), mask)]
    for values, keep in rows:
        assert values[keep].min() >= values[~keep].max()


def test_granularity_matters():
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert magnitude_mask(weight, 0.5, "row").tolist() == [[False, True], [False, True]]
    assert magnitude_mask(weight, 0.5, "layer").tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize("granularity", ["row", "layer"])
def test_ties_go_to_the_lower_index(granularity):
    """Whatever the sign, and for any number of threads."""
    weight = torch.tensor([[1.0, -1.0, 1.0, -1.0]]).repeat(1, 500)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        mask = magnitude_mask(weight, 0.5, granularity)
        assert mask[0, :1000].all()
        assert not mask[0, 1000:].any()
    assert magnitude_mask(torch.zeros(2, 4), 0.5, granularity).sum() == 4
    assert magnitude_mask(torch.tensor([[-0.0, 0.0, 1e-45, 0.0]]), 0.5).tolist() == [[True, False, True, False]]


def test_deterministic_and_without_effect_on_the_weight():
    weight = torch.randn(40, 300).bfloat16()  # many ties
    before = weight.clone()
    first = magnitude_mask(weight, 0.5)
    assert all(magnitude_mask(weight.clone(), 0.5).equal(first) for _ in range(3))
    assert magnitude_mask(weight.T.contiguous().T, 0.5).equal(first)
    assert weight.equal(before)


def test_no_graph():
    assert not magnitude_mask(torch.randn(3, 3, requires_grad=True), 0.5).requires_grad


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("granularity", ["row", "layer"])
def test_empty(shape, granularity):
    assert magnitude_mask(torch.zeros(shape), 0.5, granularity).shape == shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), 0.5), r"weight must be 2-D \(out_features, in_features\), got 1-D"),
        ((torch.zeros(3, 3), 1.0), r"sparsity must be in \[0, 1\), got 1.0"),
        ((torch.zeros(3, 3), -0.1), r"sparsity must be in \[0, 1\), got -0.1"),
        ((torch.zeros(3, 3), float("nan")), r"sparsity must be in \[0, 1\), got nan"),
        ((torch.zeros(3, 3), 0.5, "column"), "granularity must be one of row, layer, got 'column'"),
        ((torch.tensor([[1.0, float("nan")]]), 0.5), "weight must be finite to be ranked, got NaN or an infinity"),
        ((torch.tensor([[1.0, float("-inf")]]), 0.0), "weight must be finite to be ranked, got NaN or an infinity"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=f"magnitude_mask: {message}"):
        magnitude_mask(*arguments)


@pytest.mark.parametrize("granularity", ["row", "layer"])
def test_optimize_prunes_by_it(granularity):
    linear = torch.nn.Linear(64, 30)
    mask = magnitude_mask(linear.weight, 0.7, granularity)
    expected = linear.weight.detach() * mask
    layer = tce.optimize(linear, tce.SparseLinearConfig(dtype="fp32", sparsity=0.7, granularity=granularity))
    assert layer.weight.equal(expected)
    assert abs(layer.sparsity - 0.7) < 0.01
    assert linear.weight.count_nonzero() == 64 * 30  # the layer that was given is not pruned
