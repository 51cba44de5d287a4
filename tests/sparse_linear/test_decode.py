"""The op of the fused decoder beyond what core/test_ops.py asks of every op: the cache, threads, tracers, memory, damage."""

import re

import pytest
import torch

from torch_cpu_ext.core.registry import CATALOGUE
from torch_cpu_ext.sparse_linear.decode import MAX_ROWS, PARTS, decode, read_cache, write_cache

from cases import CASES, DECODE_BOUND, PLAN, decode_sample, in_blocks
from support import TESTS, run_python, succeeded

CASE = CASES["sparse_linear_decode"]
POSITIONAL = ("hidden", "arena", "vectors", "plan", "cos", "sin", "positions", "starts", "kv", "length")


def call(args, function=decode):
    return function(*(args[name] for name in POSITIONAL), **{k: v for k, v in args.items() if k not in POSITIONAL})


def test_columns():
    assert PARTS == PLAN


def test_most_results_are_exact(isa):
    """Within float32 sums of the model in float64, where no value was rounded to the next code or bfloat16; some are."""
    errors = []
    for sample in CASE.samples():
        if sample.args["hidden"].dtype == torch.float32:
            expected, _ = sample.expected()
            errors.append(((call(sample.args) - expected).abs().amax() / expected.abs().amax()).item())
    close = sum(error < 1e-5 for error in errors)
    assert close >= 0.6 * len(errors), sorted(errors)
    assert max(errors) < DECODE_BOUND


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_change_nothing(threads, isa):
    samples = [
        *CASE.samples()[::4],
        decode_sample(hidden=256, heads=16, kv_heads=8, dim=32, inner=700, dtype="mixed", batch=2, length=300, vocabulary=500),
    ]
    for sample in samples:
        torch.set_num_threads(1)
        expected = call(sample.args)
        kv = sample.args["kv"].clone()
        torch.set_num_threads(threads)
        for _ in range(3):
            assert call(sample.args).equal(expected)
            assert sample.args["kv"].equal(kv)


@pytest.mark.parametrize("which", range(5))
def test_the_cache_gets_the_new_tokens_and_nothing_else(which, isa):
    args = dict(CASE.few()[which].args)
    length, tokens = args["length"], args["hidden"].shape[1]
    before = torch.randn(args["kv"].shape, generator=torch.Generator().manual_seed(which)).bfloat16()  # samples are shared: theirs is used
    ours, theirs = before.clone(), before.clone()
    call(args | {"kv": ours})
    call(args | {"kv": theirs}, CATALOGUE["sparse_linear_decode"].reference)
    whole = before.shape[4] * 16
    kept, expected = (read_cache(kv, whole) for kv in (ours, theirs))
    original = read_cache(before, whole)
    assert kept[..., :length, :].equal(original[..., :length, :])
    assert kept[..., length + tokens :, :].equal(original[..., length + tokens :, :])
    new, wanted = (kv[..., length : length + tokens, :].float() for kv in (kept, expected))
    assert not new.equal(original[..., length : length + tokens, :].float())
    torch.testing.assert_close(new, wanted, rtol=2**-7, atol=DECODE_BOUND * wanted.abs().max().item())


def test_token_by_token_is_all_at_once(isa):
    """Five new tokens of a text in one call and in five, with the same weights."""
    args = decode_sample(dtype="fp32", tokens=5, length=13, windows=(9, -1)).args
    kv, one = args["kv"].clone(), args["kv"].clone()
    together = call(args | {"kv": kv})
    for t in range(5):
        part = {"hidden": args["hidden"][:, t : t + 1], "positions": args["positions"][:, t : t + 1].contiguous(), "length": 13 + t}
        torch.testing.assert_close(call(args | part | {"kv": one}), together[:, t : t + 1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dim", [16, 80])
@pytest.mark.parametrize(("start", "tokens"), [(0, 1), (0, 16), (0, 40), (15, 1), (15, 2), (16, 16), (7, 30), (47, 1), (3, 0)])
def test_read_and_write(start, tokens, dim):
    """Against the drawing in kernels/sparse_linear/decode.h, as cases.py has it."""
    generator = torch.Generator().manual_seed(1)
    plain = torch.randn(2, 2, 1, 3, 48, dim).bfloat16()
    kv = in_blocks(plain, 4, generator)
    before = kv.clone()
    assert read_cache(kv, 48).equal(plain)
    assert read_cache(kv[1:2], 5).equal(plain[1:2, ..., :5, :])
    states = torch.randn(2, 2, 1, 3, tokens, dim)
    write_cache(kv, start, states)
    plain[..., start : start + tokens, :] = states.bfloat16()
    assert read_cache(kv, 48).equal(plain)
    assert kv[..., 3:, :, :].equal(before[..., 3:, :, :])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    """fullgraph, with a cache that is an input and is changed in place; the length may be dynamic."""
    args = CASE.few()[0].args
    torch._dynamo.reset()

    def run(hidden, kv, length):
        return call(args | {"hidden": hidden * 1, "kv": kv, "length": length}) + 1

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (20, 21, 31):
        ours, theirs = args["kv"].clone(), args["kv"].clone()
        assert compiled(args["hidden"], ours, length).equal(run(args["hidden"], theirs, length))
        assert ours.equal(theirs)
    torch._dynamo.reset()


def test_compile_inductor():
    args = CASE.few()[2].args
    torch._dynamo.reset()
    ours, theirs = args["kv"].clone(), args["kv"].clone()
    compiled = torch.compile(lambda hidden, kv: call(args | {"hidden": hidden * 2, "kv": kv}) * 2, fullgraph=True)
    assert compiled(args["hidden"], ours).equal(call(args | {"hidden": args["hidden"] * 2, "kv": theirs}) * 2)
    assert ours.equal(theirs)
    torch._dynamo.reset()


def test_export(tmp_path):
    args = CASE.few()[0].args

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("arena", args["arena"])

        def forward(self, hidden, kv):
            return call(args | {"hidden": hidden, "kv": kv, "arena": self.arena})

    program = torch.export.export(Module(), (args["hidden"], args["kv"].clone()))
    torch.export.save(program, tmp_path / "decode.pt2")
    ours, theirs = args["kv"].clone(), args["kv"].clone()
    loaded = torch.export.load(tmp_path / "decode.pt2").module()
    assert loaded(args["hidden"], ours).equal(call(args | {"kv": theirs}))
    assert ours.equal(theirs)


def test_modes():
    for sample in CASE.few():
        expected = call(sample.args)
        with torch.inference_mode():
            assert call(sample.args).equal(expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert call(sample.args).equal(expected)
        meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in sample.args.items()}
        assert call(meta).shape == expected.shape


def test_two_python_threads():
    from concurrent.futures import ThreadPoolExecutor

    samples = [s for s in CASE.few() for _ in range(3)]
    expected = [call(s.args) for s in samples]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            results = list(pool.map(lambda s: call(s.args | {"kv": s.args["kv"].clone()}), samples))
            assert all(a.equal(b) for a, b in zip(results, expected, strict=True))


def test_as_many_rows_as_it_says():
    sample = decode_sample(batch=MAX_ROWS)
    assert call(sample.args).shape == (MAX_ROWS, 1, 64)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_messages_of_any_number_of_threads(threads):
    """What is found wrong inside of the parallel region, too."""
    torch.set_num_threads(threads)
    for bad in CASE.bad:
        if not bad.traced:
            with pytest.raises(RuntimeError, match=re.escape(bad.message)):
                call(bad.spoil(CASE.few()[0].args))


def test_windows_that_are_none():
    """0 and any number below see all tokens; one that is longer than the text, too."""
    args = decode_sample(length=40, dtype="fp32").args
    expected = call(args)
    for window in (0, -5, -(1 << 63), 41, 1 << 40, (1 << 63) - 1):
        plan = args["plan"].clone()
        plan[:-1, PARTS.index("window")] = window
        assert call(args | {"plan": plan}).equal(expected), window


@pytest.mark.parametrize("part", ["fenced", "flips", "plans"])
def test_between_fences(part):
    """In a process of its own: a byte too many would be a crash."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['PARTS'][sys.argv[2]]()"
    print(succeeded(run_python(code, str(TESTS / "sparse_linear/decode_fences.py"), part, timeout=500)))
