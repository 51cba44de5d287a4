"""SparseLinear as a module: state, copies, files, tracing."""

import copy
import io
import pickle
import subprocess
import warnings

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn

import torch_cpu_ext as tce
from torch_cpu_ext.sparse_linear import check, pack, unpack

from support import run_python, succeeded

DTYPES = pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])


def layer(dtype="int8", inputs=70, outputs=35, bias=True, kind=torch.float32, **config):
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=kind)
    with torch.no_grad():
        linear.weight.mul_(torch.rand(outputs, inputs) < 0.4)
    return tce.SparseLinear.from_linear(linear, tce.SparseLinearConfig(dtype=dtype, **config))


def same(a, b, x=None):
    x = torch.randn(3, a.in_features) if x is None else x
    return a(x).equal(b(x)) and a.packed.equal(b.packed)


@DTYPES
def test_forward_is_the_op(dtype):
    group = 32 if dtype == "int4" else 64
    one = layer(dtype, activation_group=group)
    x = torch.randn(2, 3, 70)
    assert one(x).equal(torch.ops.torch_cpu_ext.sparse_linear(x, one.packed, one.bias, 35, activation_group=group))
    assert one(x[0, 0]).shape == (35,)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@DTYPES
def test_weight_and_to_linear(dtype, kind):
    linear = nn.Linear(70, 35, dtype=kind)
    one = tce.SparseLinear.from_linear(linear, tce.SparseLinearConfig(dtype=dtype))
    assert one.weight.dtype == kind
    assert one.weight.shape == (35, 70)
    back = one.to_linear()
    assert type(back) is nn.Linear
    assert back.weight.equal(one.weight)
    assert back.bias is one.bias is linear.bias
    assert back.weight.equal(linear.weight) == (dtype == "fp32" or (dtype == "bf16" and kind == torch.bfloat16))
    x = torch.randn(4, 70).to(kind)
    assert back(x).dtype == one(x).dtype == kind
    with pytest.raises(AttributeError):
        one.weight = torch.zeros(35, 70)


def test_state_dict_is_packed_and_bias():
    assert list(layer().state_dict()) == ["bias", "packed"]
    assert list(layer(bias=False).state_dict()) == ["packed"]
    assert [n for n, _ in layer().named_parameters()] == ["bias"]
    assert [n for n, _ in layer().named_buffers()] == ["packed"]


@DTYPES
@pytest.mark.parametrize("assign", [False, True])
def test_load_packed_of_another_length(dtype, assign):
    one, other = layer(dtype), layer(dtype, sparsity=0.95)
    assert one.packed.shape != other.packed.shape
    state = {k: v.clone() for k, v in one.state_dict().items()}
    other.load_state_dict(state, assign=assign)
    assert same(one, other)
    empty = tce.SparseLinear(70, 35, dtype=dtype)
    empty.load_state_dict(state, assign=assign)
    assert same(one, empty)
    if not assign:
        state["packed"].zero_()  # a copy was made
        assert same(one, empty)


@DTYPES
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_load_dense(dtype, kind):
    linear = nn.Linear(70, 35, dtype=kind)
    one = tce.SparseLinear(70, 35, dtype=dtype)
    state = linear.state_dict()
    before = {k: v.clone() for k, v in state.items()}
    one.load_state_dict(state)
    assert list(state) == list(before)
    assert all(state[k].equal(v) for k, v in before.items())
    assert one.packed.equal(pack(linear.weight, dtype=dtype))
    assert one.weight.dtype == kind
    assert one.bias.equal(linear.bias)
    nested = nn.Sequential(nn.ReLU(), tce.SparseLinear(70, 35, dtype=dtype))
    nested.load_state_dict({"1.weight": linear.weight, "1.bias": linear.bias})
    assert nested[1].packed.equal(one.packed)


def test_int4_grids_are_those_of_the_config():
    linear = nn.Linear(200, 35)
    for size in (32, 64, 128):
        for symmetric in (False, True):
            one = tce.SparseLinear.from_linear(linear, tce.SparseLinearConfig(dtype="int4", group_size=size, symmetric=symmetric))
            assert one.packed.equal(pack(linear.weight, dtype="int4", group_size=size, symmetric=symmetric))
            assert check(one.packed).tolist()[6:] == [size, symmetric]
            dense = tce.SparseLinear(200, 35, dtype="int4", group_size=size, symmetric=symmetric)
            dense.load_state_dict(linear.state_dict())
            assert same(one, dense)
            other = tce.SparseLinear(200, 35, dtype="int4")  # a packed weight says its own
            other.load_state_dict(one.state_dict())
            assert same(one, other)


def damage(packed):
    packed = packed.clone()
    packed[64] ^= 1
    return packed


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda s: s | {"packed": s["packed"][:-1]}, "packed: .*truncated"),
        (lambda s: s | {"packed": damage(s["packed"])}, "packed: .*packed must be intact"),
        (lambda s: s | {"packed": s["packed"].float()}, "packed: .*uint8"),
        (lambda s: s | {"packed": pack(torch.zeros(35, 71), dtype="int8")}, r"must hold .* = \('int8', 35, 70\), got \('int8', 35, 71\)"),
        (lambda s: s | {"packed": pack(torch.zeros(35, 70), dtype="bf16")}, r"must hold .* = \('int8', 35, 70\), got \('bf16', 35, 70\)"),
        (lambda s: {"weight": torch.zeros(35, 71), "bias": s["bias"]}, r"weight must be \(35, 70\), got \(35, 71\)"),
        (
            lambda s: {"weight": torch.zeros(35, 70).double(), "bias": s["bias"]},
            "weight: .*must be float32, bfloat16 or float16, got Double",
        ),
        (lambda s: s | {"packed": pack(torch.zeros(35, 70), dtype="int4")}, r"must hold .* = \('int8', 35, 70\), got \('int4', 35, 70\)"),
        (lambda s: {"weight": torch.full((35, 70), float("nan")), "bias": s["bias"]}, "weight: .*must be finite"),
        (lambda s: s | {"weight": torch.zeros(35, 70)}, "Unexpected key"),
        (lambda s: {"bias": s["bias"]}, "Missing key.*packed"),
    ],
)
def test_load_refuses(values, message):
    """With the name of the module in front, and the layer as it was."""
    model = nn.Sequential(nn.ReLU(), layer())
    before, x = copy.deepcopy(model), torch.randn(3, 70)
    state = values({k.removeprefix("1."): v for k, v in model.state_dict().items()})
    with pytest.raises(RuntimeError, match=rf"(?s)Sequential:.*{message}"):
        model.load_state_dict({f"1.{k}": v for k, v in state.items()})
    assert model(x).equal(before(x))
    assert model[1].weight.equal(before[1].weight)


def test_load_reports_all_layers():
    model = nn.Sequential(layer(), layer(inputs=35))
    state = {k: (v[:-1] if k.endswith("packed") else v) for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"(?s)0\.packed.*1\.packed"):
        model.load_state_dict(state)


@DTYPES
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "state_dict", "safetensors"])
def test_copies(dtype, way):
    one = nn.Sequential(layer(dtype), nn.ReLU(), layer(dtype, inputs=35))
    if way == "deepcopy":
        other = copy.deepcopy(one)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(one))
    else:
        buffer = io.BytesIO()
        torch.save(one if way == "torch.save" else one.state_dict(), buffer)
        buffer.seek(0)
        if way == "torch.save":
            other = torch.load(buffer, weights_only=False)
        else:
            state = torch.load(buffer) if way == "state_dict" else load_safetensors(save_safetensors(one.state_dict()))
            other = nn.Sequential(tce.SparseLinear(70, 35, dtype=dtype), nn.ReLU(), tce.SparseLinear(35, 35, dtype=dtype))
            other.load_state_dict(state)
    x = torch.randn(3, 70)
    assert other(x).equal(one(x))
    other[0].packed.zero_()
    assert one(x).isfinite().all()
    assert repr(copy.deepcopy(one)) == repr(one)


def test_meta():
    """Built on meta, filled by assignment; a layer moved there can still be printed and traced."""
    with torch.device("meta"):
        one = tce.SparseLinear(70, 35)
    assert all(t.is_meta for t in [*one.parameters(), *one.buffers()])
    real = layer()
    one.load_state_dict(real.state_dict(), assign=True)
    assert same(one, real)
    other = tce.SparseLinear(70, 35, device="meta")
    other.load_state_dict(nn.Linear(70, 35).state_dict(), assign=True)
    assert other(torch.ones(2, 70)).shape == (2, 35)
    moved = copy.deepcopy(real).to("meta")
    assert "SparseLinear(in_features=70" in repr(moved)
    assert moved(torch.empty(4, 70, device="meta")).shape == (4, 35)
    tce.report(moved)


def test_repr():
    one = layer("bf16", sparsity=0.5, layout="sparse")
    size, zeros = one.packed.numel(), 1 - unpack(one.packed, 35, 70).count_nonzero() / (35 * 70)
    assert repr(one) == (
        f"SparseLinear(in_features=70, out_features=35, bias=True, dtype=bf16, layout=sparse, sparsity={zeros:.2f}, bytes={size})"
    )
    assert "layout=empty" in repr(tce.SparseLinear(3, 4))
    assert tce.SparseLinear(3, 4).sparsity == 0
    assert layer(layout="dense").layout == "dense"


def test_a_layer_without_weights_says_so():
    with pytest.raises(RuntimeError, match="packed must be intact, got an array too short for a header"):
        tce.SparseLinear(3, 4)(torch.ones(3))


def test_jit_script():
    one = layer().eval()
    x = torch.randn(3, 70)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Sequential(one))
        assert scripted(x).equal(one(x))
        buffer = io.BytesIO()
        torch.jit.save(scripted, buffer)
        buffer.seek(0)
        assert torch.jit.load(buffer)(x).equal(one(x))


@DTYPES
def test_gradients_reach_what_is_below_and_the_bias(dtype):
    """Enough for adapters: layers before it and its bias train, the weight does not."""
    below, one = nn.Linear(70, 70), layer(dtype)
    dense = one.weight
    x = torch.randn(5, 70)
    one(below(x)).square().sum().backward()
    grads = [p.grad.clone() for p in below.parameters()] + [one.bias.grad.clone()]
    below.zero_grad()
    one.bias.grad = None
    bias = one.bias.detach().clone().requires_grad_()
    out = one(below(x)).detach()  # the same values, so that only the backward pass differs
    dense_out = nn.functional.linear(below(x), dense, bias)
    dense_out.backward(2 * out)
    for ours, theirs in zip(grads, [*(p.grad for p in below.parameters()), bias.grad], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not one.packed.requires_grad


def test_optimizer_and_zero_grad_see_the_bias_only():
    one = layer()
    before = one.packed.clone()
    optimizer = torch.optim.SGD(one.parameters(), lr=1.0)
    one(torch.randn(3, 70)).sum().backward()
    optimizer.step()
    assert one.packed.equal(before)
    assert one.bias.grad.equal(torch.full((35,), 3.0))


def test_distributed_data_parallel():
    """One process is enough to see whether buffers and parameters are of kinds it can hold.

    In a process of its own, over the loopback device: where the network is shut off, gloo can hang in C++, out of reach of a signal.
    """
    code = """
        import torch
        from torch import distributed, nn

        import torch_cpu_ext as tce

        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        nn.parallel.DistributedDataParallel(nn.Linear(70, 35))(torch.randn(3, 70)).sum().backward()
        print("gloo works", flush=True)
        layer = tce.SparseLinear.from_linear(nn.Linear(70, 35))
        model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(70, 70), layer))
        model(torch.randn(3, 70)).sum().backward()
        assert model.module[1].bias.grad.equal(torch.full((35,), 3.0))
        distributed.destroy_process_group()
        print("done")
    """
    try:
        done = run_python(code, timeout=120, GLOO_SOCKET_IFNAME="lo")
    except subprocess.TimeoutExpired as error:
        if b"gloo works" not in (error.stdout or b""):
            pytest.skip("gloo hangs on this machine, without torch_cpu_ext too")
        raise
    if "gloo works" not in done.stdout and "gloo" in done.stderr:
        pytest.skip(f"gloo does not work on this machine: {done.stderr.strip().splitlines()[-1]}")
    assert "done" in succeeded(done)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: m.to("meta"), ValueError, "linear.weight must be on the CPU, got meta"),
        (lambda m: m.double(), TypeError, "linear.weight must be float32, bfloat16 or float16, got torch.float64"),
        (lambda m: nn.init.constant_(m.weight, float("inf")), ValueError, "linear.weight must be finite to be packed as int8"),
    ],
)
def test_from_linear_refuses(change, error, message):
    linear = nn.Linear(4, 4)
    change(linear)
    with pytest.raises(error, match=f"from_linear: {message}"):
        tce.SparseLinear.from_linear(linear)


def test_from_linear_refuses_what_float16_scales_cannot_hold():
    linear = nn.Linear(64, 4)
    config = tce.SparseLinearConfig(dtype="int4")
    for value in (65504.0, -65504.0):
        nn.init.constant_(linear.weight, value)
        assert tce.SparseLinear.from_linear(linear, config).weight.isfinite().all()
        with torch.no_grad():
            linear.weight[2, 40] = value * 1.01
        with pytest.raises(ValueError, match=r"linear\.weight must be within the range of float16 to be packed as int4, got 66159"):
            tce.SparseLinear.from_linear(linear, config)
    nn.init.constant_(linear.weight, float("nan"))
    with pytest.raises(ValueError, match=r"linear\.weight must be finite to be packed as int4"):
        tce.SparseLinear.from_linear(linear, config)


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 5), (5, 0), (0, 0), (1, 1)])
@DTYPES
def test_degenerate_sizes(dtype, inputs, outputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch: initialising zero-element tensors is a no-op
        linear = nn.Linear(inputs, outputs)
        one = tce.SparseLinear.from_linear(linear, tce.SparseLinearConfig(dtype=dtype))
        assert one(torch.ones(3, inputs)).shape == (3, outputs)
        assert one.to_linear().weight.shape == (outputs, inputs)
    assert 0 <= one.sparsity <= 1
    repr(one)


def test_wrong_input():
    with pytest.raises(RuntimeError, match=r"packed must hold 35 x 71 \(out_features x in_features\), got 35 x 70"):
        layer()(torch.ones(3, 71))


def test_spec_round_trip():
    int4 = layer("int4", group_size=64, symmetric=True)
    for one in (layer(), layer("bf16", bias=False, kind=torch.bfloat16), layer(activation_group=64), int4):
        other = tce.SparseLinear.from_spec(one.spec(), one.to_linear())
        other.load_state_dict(one.state_dict(), assign=True)
        assert other.spec() == one.spec()
        assert repr(other) == repr(one)
        assert other.weight.dtype == one.weight.dtype


def test_training_the_weight_is_refused():
    one = layer()
    with pytest.raises(RuntimeError, match=r"requires_grad_: the packed weight of a SparseLinear is a constant .*restore\(model\)"):
        one.requires_grad_()
    with pytest.raises(AttributeError, match="weight: the packed weight of a SparseLinear is a constant"):
        one.weight = nn.Parameter(torch.zeros(35, 70))
    with pytest.raises(AttributeError, match="weight: the packed weight of a SparseLinear is a constant"):
        one.weight = torch.zeros(35, 70)
    with pytest.raises(RuntimeError, match="only Tensors of floating point"):
        one.packed.requires_grad_()
    assert not one.weight.requires_grad
    assert [name for name, _ in one.named_parameters()] == ["bias"]
    assert not one.requires_grad_(False).bias.requires_grad


def test_freezing_a_whole_model_and_training_its_biases():
    model = nn.Sequential(layer(), nn.Linear(35, 2)).requires_grad_(False)
    model.requires_grad_()  # of a model: the parameters it has
    model(torch.randn(3, 70)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
