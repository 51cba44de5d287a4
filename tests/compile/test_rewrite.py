"""Which layers of a graph are packed, and why others are not. Runs the rewritten graph as it is, without Inductor."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_cpu_ext as tce
from torch_cpu_ext import SparseLinearConfig
from torch_cpu_ext.compile.rewrite import rewrite

INT8 = SparseLinearConfig()


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def sparse(linear: nn.Linear) -> nn.Linear:
    """The layer with 70 % zeros."""
    with torch.no_grad():
        linear.weight.mul_(torch.rand_like(linear.weight, dtype=torch.float32) > 0.7)
    return linear


def inspect(function, *args, config=None):
    """Compiles and calls ``function``; the layers found in its graph, and its result."""
    seen = []

    def backend(gm, inputs):
        new, _, slots, layers = rewrite(gm, inputs, config)
        seen.extend(layers)
        assert (new is gm) == (not slots)
        return lambda *given: new.forward(*given, *[slot.packed(given) for slot in slots])

    result = torch.compile(function, backend=backend, fullgraph=True)(*args)
    return seen, result


def reason(function, *args, config=INT8) -> str:
    """Why the one layer of ``function`` is left alone; the result must be eager's."""
    (layer,), result = inspect(function, *args, config=config)
    assert layer.config is None
    torch.testing.assert_close(result, function(*args))
    return layer.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_without_options_only_sparse_weights_are_packed_and_nothing_is_lost(dtype):
    model = nn.Sequential(sparse(nn.Linear(64, 48)), nn.Linear(48, 32), sparse(nn.Linear(32, 16, bias=False))).to(dtype)
    x = torch.randn(3, 64, dtype=dtype)
    layers, result = inspect(model, x)
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    assert [layer.config and layer.config.dtype for layer in layers] == [name, None, name]
    assert layers[1].reason == "weight is not sparse"
    assert all(layer.bytes_after < layer.bytes_before + 512 for layer in layers)  # 512: header and tail
    torch.testing.assert_close(result, model(x))


@torch.no_grad()
def test_float16_has_no_lossless_format_but_is_packed_when_asked_for():
    model, x = sparse(nn.Linear(64, 48)).half(), torch.randn(3, 64).half()
    assert reason(model, x, config=None) == "weight is torch.float16, which no packed format holds without loss"
    torch._dynamo.reset()
    (layer,), result = inspect(model, x, config=SparseLinearConfig(dtype="fp32"))
    assert layer.config
    torch.testing.assert_close(result, model(x))


@torch.no_grad()
def test_spellings_of_a_linear_layer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("buffer", torch.randn(16, 16))
            self.parameter = nn.Parameter(torch.randn(16, 16))
            self.inner = [nn.Linear(16, 16)]  # no submodule, but a module all the same

        def forward(self, x):
            x = F.linear(x, self.buffer)
            x = F.linear(weight=self.parameter, input=x, bias=None)
            return torch.ops.aten.linear.default(self.inner[0](x), self.parameter)

    model, x = Model(), torch.randn(2, 16)
    layers, result = inspect(model, x, config=SparseLinearConfig(dtype="fp32"))
    assert [bool(layer.config) for layer in layers] == [True] * 4
    torch.testing.assert_close(result, model(x))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(16,), (0, 16), (1, 16), (2, 3, 4, 16)])
def test_shapes_of_the_input(shape):
    model, x = nn.Linear(16, 24), torch.randn(shape)
    _, result = inspect(model, x, config=SparseLinearConfig(dtype="fp32"))
    torch.testing.assert_close(result, model(x))


def test_a_weight_that_trains_is_left():
    model, x = nn.Linear(16, 16), torch.randn(2, 16)
    assert reason(model, x) == "weight trains"
    torch._dynamo.reset()
    (layer,), _ = inspect(model.requires_grad_(False), x.requires_grad_(), config=INT8)
    assert layer.config


def test_no_grad_inside_the_graph_counts():
    model = nn.Linear(16, 16)

    def function(x):
        with torch.no_grad():
            return model(x)

    (layer,), _ = inspect(function, torch.randn(2, 16), config=INT8)
    assert layer.config


@torch.no_grad()
def test_weights_from_elsewhere_are_left():
    model, x = nn.Linear(16, 16), torch.randn(2, 16)
    text = "weight is no parameter or buffer of a module"
    assert reason(lambda x, w: F.linear(x, w), x, torch.randn(4, 16)) == text
    assert reason(lambda x, w: F.linear(x, w), x, nn.Parameter(torch.randn(4, 16))) == text
    assert reason(lambda x: F.linear(x, model.weight * 2), x) == text


@torch.no_grad()
@pytest.mark.parametrize(
    ("weight", "text"),
    [
        (torch.randn(16), "weight is 1-D"),
        (torch.randn(4, 16).double(), "weight is torch.float64"),
        (torch.randn(0, 16), "weight is empty"),
        (torch.randn(4, 16).index_fill(1, torch.tensor([3]), torch.nan), "weight has NaN or infinities"),
    ],
)
def test_weights_that_cannot_be_packed_are_left(weight, text):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(weight)

        def forward(self, x):
            return F.linear(x, self.weight).nan_to_num()

    assert reason(Model(), torch.randn(2, 16, dtype=weight.dtype)) == text


@torch.no_grad()
def test_int4_weights_beyond_float16_are_left():
    model = nn.Linear(16, 16)
    model.weight[3, 4] = 1e5
    assert reason(model, torch.randn(2, 16), config=SparseLinearConfig(dtype="int4")) == "weight is beyond the range of float16"


@torch.no_grad()
def test_head_dtype_reaches_the_output_embedding():
    """Tied or not; not other layers, and not where there is no embedding."""

    class Model(nn.Module):
        def __init__(self, tied):
            super().__init__()
            self.embedding, self.body, self.head = nn.Embedding(32, 16), nn.Linear(16, 16), nn.Linear(16, 32, bias=False)
            if tied:
                self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(self.body(self.embedding(ids)))

    for tied in (False, True):
        for config, expected in (
            (SparseLinearConfig(dtype="int4"), ["int4", "int8"]),
            (SparseLinearConfig(dtype="int4", head_dtype="bf16"), ["int4", "bf16"]),
            (SparseLinearConfig(dtype="int8", sparsity=0.5), ["int8", "int8"]),
        ):
            torch._dynamo.reset()
            layers, _ = inspect(Model(tied), torch.arange(5), config=config)
            assert [layer.config.dtype for layer in layers] == expected
            assert layers[1].config.sparsity == (None if tied else config.sparsity)
    torch._dynamo.reset()
    layers, _ = inspect(nn.Sequential(nn.Linear(16, 32)), torch.randn(2, 16), config=SparseLinearConfig(dtype="int4"))
    assert [layer.config.dtype for layer in layers] == ["int4"]


@torch.no_grad()
def test_a_bias_of_another_shape_is_left():
    class Model(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight, self.bias[:1])

    assert reason(Model(16, 24), torch.randn(2, 16)) == "bias is not (out_features,)"


@torch.no_grad()
def test_autocast_is_left():
    model, x = nn.Linear(16, 16), torch.randn(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert reason(model, x) == "autocast runs it in torch.bfloat16"

    def inside(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    torch._dynamo.reset()
    assert reason(inside, x) == "autocast runs it in torch.bfloat16"


@torch.no_grad()
@pytest.mark.parametrize("write", [lambda w: w.mul_(1.0), lambda w: torch.relu_(w), lambda w: w.t()])
def test_a_weight_with_uses_that_could_write_is_left(write):
    class Model(nn.Linear):
        def forward(self, x):
            write(self.weight)
            return F.linear(x, self.weight) + write(self.weight).sum()

    assert reason(Model(16, 16, bias=False), torch.randn(2, 16)) == "weight has other uses in the graph"


@torch.no_grad()
def test_tied_weights_are_not_pruned_but_a_layer_called_twice_is():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.twice, self.head = nn.Embedding(32, 16), nn.Linear(16, 16), nn.Linear(16, 32, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(self.twice(self.twice(self.embedding(ids))))

    layers, _ = inspect(Model(), torch.arange(5), config=SparseLinearConfig(dtype="fp32", sparsity=0.5))
    assert [layer.config.sparsity for layer in layers] == [0.5, 0.5, None]


@torch.no_grad()
def test_an_embedding_that_renormalises_its_weight_may_write_to_it():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 16))

        def forward(self, ids):
            return F.linear(F.embedding(ids, self.weight, max_norm=100.0), self.weight)

    layers, _ = inspect(Model(), torch.arange(5), config=INT8)
    assert {layer.reason for layer in layers} == {"weight has other uses in the graph"}


class Projections(nn.Module):
    """Three products of one input, as attention has them."""

    def __init__(self, bias: bool = False, write: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(64, 48, bias), nn.Linear(64, 16, bias), nn.Linear(64, 16, bias)
        self.write = write

    def forward(self, x):
        q = self.q(x).view(x.shape[0], 4, 12).transpose(0, 1)
        if self.write:
            x.mul_(2)
        return q, self.k(x) + 1, self.v(x)


def targets(function, *args, config=INT8):
    """The ops of the rewritten graph, by name, and its result."""
    found = []

    def backend(gm, inputs):
        new, _, slots, _ = rewrite(gm, inputs, config)
        found.extend(getattr(node.target, "__name__", node.target) for node in new.graph.nodes if node.op == "call_function")
        return lambda *given: new.forward(*given, *[slot.packed(given) for slot in slots])

    return found, torch.compile(function, backend=backend, fullgraph=True)(*args)


@pytest.mark.parametrize("packed_before", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_products_of_one_input_become_one_op(bias, packed_before):
    model, x = Projections(bias), torch.randn(3, 64)
    expected = tce.optimize(copy.deepcopy(model), INT8)(x)
    if packed_before:
        tce.optimize(model, INT8)
    found, result = targets(model, x, config=None if packed_before else INT8)
    assert [name for name in found if "sparse_linear" in name] == ["sparse_linear_group.default"]
    for ours, theirs in zip(result, expected, strict=True):
        assert ours.equal(theirs)


@torch.no_grad()
def test_a_write_to_the_input_keeps_products_apart():
    model, x = Projections(write=True), torch.randn(3, 64)
    expected = tce.optimize(copy.deepcopy(model), INT8)(x.clone())
    found, result = targets(model, x)
    assert sorted(name for name in found if "sparse_linear" in name) == ["sparse_linear.default", "sparse_linear_group.default"]
    for ours, theirs in zip(result, expected, strict=True):
        assert ours.equal(theirs)


def test_gradients_through_joined_products():
    model, x = tce.optimize(Projections(True), INT8), torch.randn(3, 64)
    grads = []
    for function in (model, torch.compile(model, backend="torch_cpu_ext", fullgraph=True)):
        y = x.clone().requires_grad_()
        model.zero_grad()
        sum(part.square().sum() for part in function(y)).backward()
        grads.append([y.grad, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
