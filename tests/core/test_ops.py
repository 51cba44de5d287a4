"""Every op of cases.py through every instruction set, thread count, tracer and kind of argument."""

import copy
import re
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import torch_cpu_ext as tce
from torch_cpu_ext.core.registry import CATALOGUE

from cases import CASES, Args, Case
from support import at_odd_address, difference

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def op(case: Case):
    return getattr(torch.ops.torch_cpu_ext, case.op)


def split(case: Case, args: Args) -> tuple[list, dict]:
    """Arguments as positional and keyword-only ones, as the schema has them."""
    schema = op(case).default._schema
    keywords = {a.name for a in schema.arguments if a.kwarg_only}
    return [args[a.name] for a in schema.arguments if not a.kwarg_only], {k: v for k, v in args.items() if k in keywords}


def call(case: Case, args: Args, function=None):
    """The result; several ones as a single vector, and where there are none, what was written to."""
    positional, keyword = split(case, args)
    result = (function or op(case))(*positional, **keyword)
    if result is None:
        result = [args[name] for name in case.mutates]
    return result if isinstance(result, Tensor) else torch.cat([one.double().flatten() for one in result])


BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.view(BITS[a.dtype.itemsize]).equal(b.view(BITS[b.dtype.itemsize]))


def with_grad(case: Case, args: Args) -> Args:
    return {k: v.detach().clone().requires_grad_() if k in case.trains and v is not None else v for k, v in args.items()}


def test_every_op_has_a_case():
    assert set(CASES) == set(CATALOGUE)
    for name, case in CASES.items():
        assert bool(case.trains) == CATALOGUE[name].trains
        mutable = tuple(a.name for a in op(case).default._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
        assert mutable == case.mutates


@every_case
def test_result(case, isa):
    """Within the bound, with equal bits for 1 and 2 threads, and without a change to the arguments."""
    problems = []
    before = copy.deepcopy([sample.args for sample in case.samples()])
    torch.set_num_threads(1)
    results = [call(case, sample.args) for sample in case.samples()]
    for sample, result in zip(case.samples(), results, strict=True):
        if problem := difference(result, *sample.expected()):
            problems.append(f"{sample.name}: {problem}")
    torch.set_num_threads(2)
    for sample, result, args in zip(case.samples(), results, before, strict=True):
        if not same_bits(result, call(case, sample.args)):
            problems.append(f"{sample.name}: 2 threads give other bits than 1")
        for name, value in sample.args.items():
            if isinstance(value, Tensor) and name not in case.mutates and not same_bits(value, args[name]):
                problems.append(f"{sample.name}: {name} was changed")
    assert not problems, f"{len(problems)} of {len(case.samples())} samples:\n" + "\n".join(problems[:20])


@every_case
def test_reference(case):
    problems = []
    samples = case.samples()
    for sample in [*samples[:: max(1, len(samples) // 300)], *case.few()]:
        expected, bound = sample.expected()
        if problem := difference(call(case, sample.args, CATALOGUE[case.op].reference), expected, bound):
            problems.append(f"{sample.name}: {problem}")
    assert not problems, f"{len(problems)} samples:\n" + "\n".join(problems[:20])


@every_case
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(case, grad):
    if grad and not case.trains:
        pytest.skip("does not train")
    for sample in case.few():
        args, kwargs = split(case, with_grad(case, sample.args) if grad else sample.args)
        torch.library.opcheck(op(case).default, tuple(args), kwargs)


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.trains], ids=lambda c: c.op)
def test_gradients(case, isa):
    """Against autograd through the dense function in float64; the gradient has the dtype of its argument, hence that rounding."""
    for sample in case.few():
        ours, dense = with_grad(case, sample.args), with_grad(case, sample.args)
        out = call(case, ours)
        cotangent = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
        out.backward(cotangent)
        case.dense(dense).backward(cotangent.double())
        for name in case.trains:
            if sample.args[name] is not None:
                ulp = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[sample.args["input"].dtype]
                torch.testing.assert_close(ours[name].grad, dense[name].grad, rtol=ulp, atol=16 * ulp, msg=lambda m, n=name: f"{n}: {m}")
                assert ours[name].grad.dtype == sample.args[name].dtype


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.trains], ids=lambda c: c.op)
def test_each_gradient_alone(case):
    """An argument that needs no gradient gets none, and costs the others nothing."""
    for sample in case.few():
        for name in case.trains:
            if sample.args[name] is None:
                continue
            args = {k: v.detach() if isinstance(v, Tensor) else v for k, v in sample.args.items()}
            args[name] = args[name].clone().requires_grad_()
            out = call(case, args)
            out.sum().backward()
            assert args[name].grad is not None
            assert all(v.grad is None for k, v in args.items() if isinstance(v, Tensor) and k != name)


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.trains], ids=lambda c: c.op)
def test_second_gradient(case):
    for sample in case.few():
        args = with_grad(case, sample.args)
        name = case.trains[0]
        (grad,) = torch.autograd.grad(call(case, args).float().square().sum(), args[name], create_graph=True)
        (second,) = torch.autograd.grad(grad.float().sum(), args[name])
        assert second.shape == args[name].shape
        assert bool(second.isfinite().all())


def strided(tensor: Tensor):
    """The same values under other strides and at other addresses."""
    if tensor.dim() >= 2:
        yield "transposed", tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if tensor.dim() >= 1:
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), 7)
        wide[..., 1::2] = tensor
        yield "every other element", wide[..., 1::2]
        longer = tensor.new_full((tensor.shape[0] + 2, *tensor.shape[1:]), 7)
        longer[1:-1] = tensor
        yield "a slice", longer[1:-1]
        if tensor.is_floating_point():
            yield "a lazily negated view", torch._neg_view(-tensor)
    yield "at an odd address", at_odd_address(tensor)


@every_case
def test_strides(case, isa):
    """Any strides where the op says so; any address everywhere."""
    for sample in case.few():
        expected = call(case, sample.args)
        for name, value in sample.args.items():
            if not isinstance(value, Tensor):
                continue
            for kind, other in strided(value) if name in case.strided else [("at an odd address", at_odd_address(value))]:
                assert other.equal(value), kind
                assert same_bits(call(case, sample.args | {name: other}), expected), f"{sample.name}: {name} {kind}"


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.strided], ids=lambda c: c.op)
def test_expanded(case):
    """One element or row repeated by a stride of zero."""
    for sample in case.few():
        for name in case.strided:
            value = sample.args[name]
            if value is None:
                continue
            views = [value[..., :1].expand(value.shape)] + ([value[:1].expand(value.shape)] if value.dim() > 1 else [])
            for view in views:
                assert same_bits(call(case, sample.args | {name: view}), call(case, sample.args | {name: view.clone()}))


@every_case
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_strides(case, data):
    """Views drawn by hypothesis: permuted dimensions, steps and offsets, under any instruction set and thread count."""
    if not case.strided:
        pytest.skip("takes contiguous tensors only")
    sample = data.draw(st.sampled_from(case.few()))
    args = dict(sample.args)
    for name in case.strided:
        value = args[name]
        if value is None or not value.dim():
            continue
        order = data.draw(st.permutations(range(value.dim())))
        steps = [data.draw(st.integers(1, 3)) for _ in order]
        offset = data.draw(st.integers(0, 5))
        store = value.new_full(([value.shape[d] * s + offset for d, s in zip(order, steps, strict=True)]), 7)
        view = store[tuple(slice(offset, offset + value.shape[d] * s, s) for d, s in zip(order, steps, strict=True))]
        view = view.permute([order.index(d) for d in range(value.dim())])
        view.copy_(value)
        args[name] = view
    torch.set_num_threads(data.draw(st.sampled_from([1, 2])))
    with tce.isa(data.draw(st.sampled_from(tce.core.isa.supported()))):
        assert same_bits(call(case, args), call(case, sample.args))


BAD = [pytest.param(case, bad, id=f"{case.op}-{i}") for case in CASES.values() for i, bad in enumerate(case.bad)]


@pytest.mark.parametrize(("case", "bad"), BAD)
def test_bad_arguments(case, bad):
    """Kernel, reference and fake say the same."""
    args = bad.spoil(case.few()[0].args)
    match = re.escape(bad.message)
    with pytest.raises(RuntimeError, match=match):
        call(case, args)
    with pytest.raises(RuntimeError, match=match):
        call(case, args, CATALOGUE[case.op].reference)
    if bad.traced:
        with FakeTensorMode() as mode, pytest.raises(RuntimeError, match=match):
            call(case, tree_map_only(Tensor, mode.from_tensor, args))


@every_case
def test_message_names_its_source(case):
    """Messages of the kernels show a path inside kernels/, not one of the build machine."""
    bad = case.bad[0]
    with pytest.raises(RuntimeError, match=r", kernels/\S+:\d+, ") as caught:
        call(case, bad.spoil(case.few()[0].args))
    assert "/kernels/" not in str(caught.value)


def layer(case: Case, args: Args) -> torch.nn.Module:
    """A module around the op whose only input is the batched argument; other tensors are its buffers."""

    schema, function = op(case).default._schema, op(case)
    positional = [a.name for a in schema.arguments if not a.kwarg_only]
    keyword = [a.name for a in schema.arguments if a.kwarg_only]

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, value in args.items():
                if name == case.batched:
                    continue
                if isinstance(value, Tensor):
                    self.register_buffer(name, value.clone())
                else:
                    setattr(self, name, value)

        def forward(self, batched):
            values = [batched if name == case.batched else getattr(self, name) for name in positional]
            result = function(*values, **{name: getattr(self, name) for name in keyword})
            return result if isinstance(result, Tensor) else torch.cat([one.flatten() for one in result])

    return Layer()


BATCHED = pytest.mark.parametrize("case", [c for c in CASES.values() if c.batched], ids=lambda c: c.op)


def batch(sample_input: Tensor, rows: int) -> Tensor:
    return torch.randn(rows, *sample_input.shape[1:]).to(sample_input.dtype)


def two_dimensional(case: Case):
    return [s for s in case.few() if s.args[case.batched].dim() > 1]


@BATCHED
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(case, dynamic):
    """fullgraph, equal bits; a dynamic batch compiled once from 2 rows, and from 1."""
    for sample in two_dimensional(case):
        module = layer(case, sample.args)
        for first in (1, 2):
            torch._dynamo.reset()
            compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
            for rows in (first, 3, 8, 1) if dynamic else (first,):
                x = batch(sample.args[case.batched], rows)
                assert same_bits(compiled(x), module(x))
    torch._dynamo.reset()


@BATCHED
def test_compile_does_not_recompile(case):
    sample = two_dimensional(case)[0]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer(case, sample.args), fullgraph=True, dynamic=True, backend=counter)
    for rows in (2, 3, 5, 40):
        compiled(batch(sample.args[case.batched], rows))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@BATCHED
def test_compile_inductor_with_gradients(case):
    sample = two_dimensional(case)[0]
    torch._dynamo.reset()
    module = layer(case, sample.args)
    x = batch(sample.args[case.batched], 4)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.compile(lambda t: module(t * 2).relu(), fullgraph=True)(ours).sum().backward()
    module(theirs * 2).relu().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch._dynamo.reset()


@BATCHED
def test_compile_reports_bad_arguments(case):
    """The fake's message reaches the user of torch.compile."""
    bad = next(b for b in case.bad if b.traced)
    args = bad.spoil(two_dimensional(case)[0].args)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=re.escape(bad.message)):
        torch.compile(layer(case, args), fullgraph=True, backend="eager")(args[case.batched])
    torch._dynamo.reset()


@BATCHED
def test_export(case, tmp_path):
    """Round trip through a file, static and with a dynamic batch from 1 up."""
    for i, sample in enumerate(two_dimensional(case)):
        module, x = layer(case, sample.args), batch(sample.args[case.batched], 3)
        for shapes, batches in [(None, (3,)), (({0: torch.export.Dim("batch", min=1, max=4096)},), (1, 2, 3, 600))]:
            program = torch.export.export(module, (x,), dynamic_shapes=shapes)
            torch.export.save(program, tmp_path / f"{i}.pt2")
            loaded = torch.export.load(tmp_path / f"{i}.pt2").module()
            for rows in batches:
                y = batch(x, rows)
                assert same_bits(loaded(y), module(y))


def test_jit_script():
    """TorchScript sees the ops through the dispatcher; kept as one smoke test, since PyTorch deprecates it."""
    case = CASES["sparse_linear"]
    args = case.few()[0].args

    def forward(input: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
        return torch.ops.torch_cpu_ext.sparse_linear(input, packed, bias, out_features, activation_group=32)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(forward)
        inputs = args["input"], args["packed"], args["bias"], args["out_features"]
        assert same_bits(scripted(*inputs), call(case, args))
        traced = torch.jit.trace(lambda x: forward(x, *inputs[1:]), inputs[:1])
        assert same_bits(traced(inputs[0]), call(case, args))


@BATCHED
def test_modes(case):
    """Equal bits under inference mode, autocast, vmap, deterministic algorithms, and inside another parallel region's thread."""
    for sample in two_dimensional(case):
        expected = call(case, sample.args)
        with torch.inference_mode():
            assert same_bits(call(case, sample.args), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert same_bits(call(case, sample.args), expected)
        torch.use_deterministic_algorithms(True)
        try:
            assert same_bits(call(case, sample.args), expected)
        finally:
            torch.use_deterministic_algorithms(False)
        meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in sample.args.items()}
        assert call(case, meta).shape == expected.shape


@BATCHED
def test_two_python_threads(case):
    from concurrent.futures import ThreadPoolExecutor

    samples = case.few()
    expected = [call(case, s.args) for s in samples]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            results = list(pool.map(lambda s: call(case, s.args), samples * 4))
            assert all(same_bits(a, b) for a, b in zip(results, expected * 4, strict=True))
