"""sparse_linear where numbers or memory are special: NaN, infinities, denormals, large sizes, fences, forks, damaged arrays."""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import torch_cpu_ext as tce
from torch_cpu_ext.core.registry import CATALOGUE
from torch_cpu_ext.sparse_linear import linear, pack, unpack

from cases import DTYPES, FLOATS, GRIDS, LAYOUTS, given_grid, product, random_weight
from support import TESTS, difference, run_python, succeeded

NAN, INF = float("nan"), float("inf")
reference = CATALOGUE["sparse_linear"].reference
BATCHES = (1, 2, 3, 4, 5, 9, 17)


def both(isa_only, *args, **kwargs):
    """Kernel and reference."""
    yield linear(*args, **kwargs)
    yield reference(*args, **kwargs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_special_weights(isa, dtype, layout):
    """NaN and infinities in the weight do what they do in a dense product, in their own output only."""
    weight = random_weight(35, 70, 0.5, torch.Generator().manual_seed(0))
    weight[0, 3], weight[17, 69], weight[34, 0], weight[20, 33] = NAN, INF, -INF, INF
    weight[20, 34] = -INF
    packed = pack(weight, dtype=dtype, layout=layout)
    for m in BATCHES:
        x = torch.randn(m, 70).abs() + 0.1
        for out in both(isa, x, packed, None, 35):
            assert out[:, [0, 20]].isnan().all()
            assert bool((out[:, 17] == INF).all())
            assert bool((out[:, 34] == -INF).all())
            others = [n for n in range(35) if n not in (0, 17, 20, 34)]
            exact, bound = product(x, weight[others], dtype, None, 32)
            assert difference(out[:, others], exact, bound) is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FLOATS.values(), ids=FLOATS)
def test_special_input(isa, dtype, layout, kind):
    """A zero weight times an infinity is NaN, as in a dense product; rows do not touch each other. Codes: the whole row becomes NaN."""
    weight = random_weight(35, 70, 0.5, torch.Generator().manual_seed(0))
    weight[:, 69] = weight[:, 69].abs() + 0.5
    weight[2], weight[5, 69] = 0, 0
    packed = pack(weight, dtype=dtype, layout=layout)
    for m in BATCHES:
        for special in (NAN, INF, -INF):
            x = torch.randn(m, 70).to(kind)
            clean = linear(x, packed, None, 35)
            row = m // 2
            x[row, 69] = special
            for out in both(isa, x, packed, None, 35):
                assert out.dtype == kind
                if dtype in ("int8", "int4") or special != special:
                    assert out[row].isnan().all()
                else:
                    positive = torch.ones(35, dtype=torch.bool)
                    positive[[2, 5]] = False
                    assert bool((out[row, positive] == special).all())
                    assert out[row, ~positive].isnan().all()
            out = linear(x, packed, None, 35)
            keep = [i for i in range(m) if i != row]
            assert out[keep].equal(clean[keep])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_nan_anywhere_in_quantised_input(isa, dtype, layout):
    """Wherever it stands: in the first group, the last, or a tail of one input."""
    for inputs in (1, 31, 32, 33, 64, 65, 129, 257):
        packed = pack(random_weight(17, inputs, 0.5, torch.Generator().manual_seed(0)), dtype=dtype, layout=layout)
        for place in {0, inputs // 2, inputs - 1}:
            for m, group in ((1, 32), (6, 64 if dtype == "int8" else 32)):
                x = torch.ones(m, inputs)
                x[m - 1, place] = NAN
                out = linear(x, packed, torch.ones(17), 17, activation_group=group)
                assert out[m - 1].isnan().all()
                assert out[: m - 1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormals_and_zeros(isa, dtype):
    """Nothing becomes NaN or large; a group of the input or a row of the weight that is all denormals counts as nearly nothing."""
    weight = torch.randn(18, 70)
    weight[3] = 1e-40
    weight[4] = torch.tensor([1e-38, 0.0] * 35)
    weight[5] = -0.0
    for layout in LAYOUTS:
        packed = pack(weight, dtype=dtype, layout=layout)
        assert unpack(packed, 18, 70).isfinite().all()
        for m in (1, 3, 6):
            x = torch.randn(m, 70)
            x[:, :32] = torch.tensor([1e-40, 0.0] * 16)
            x[:, 32:64] = -0.0
            exact, bound = product(x, weight, dtype, None, 32, layout)
            for out in both(isa, x, packed, None, 18):
                assert difference(out, exact, bound + 1e-36) is None


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_rounding_of_the_output(isa, kind):
    """To nearest, ties to even, overflow to infinity, denormals kept: as PyTorch casts."""
    values = [
        1.0,
        65504.0,
        65519.0,
        65520.0,
        -65520.0,
        1e-5,
        6e-8,
        2.98e-8,
        2.99e-8,
        -1e-7,
        1 + 2**-8,
        1 + 3 * 2**-8,
        1 + 2**-11,
        3.3e38,
        0.0,
    ]
    bias = torch.tensor([*values, 1 + 3 * 2**-11, NAN, INF, -INF, 3.4e38])
    packed = pack(torch.zeros(20, 3), dtype="fp32")
    out = linear(torch.zeros(2, 3, dtype=FLOATS[kind]), packed, bias, 20)
    assert difference(out, bias.to(FLOATS[kind]).expand(2, 20), 0) is None


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_every_16_bit_number_is_read_right(isa, kind):
    """All 65536 of them as input, as bias, and as a weight to pack."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(FLOATS[kind])
    packed = pack(torch.ones(1, 1), dtype="fp32")
    assert difference(linear(x[:, None].float(), packed, None, 1)[:, 0], x.float(), 0) is None
    assert difference(linear(x[:, None], packed, None, 1)[:, 0].float(), x.float(), 0) is None
    assert difference(linear(torch.zeros(1, 0), pack(torch.zeros(1 << 16, 0)), x, 1 << 16)[0], x.float(), 0) is None
    assert difference(unpack(pack(x.view(256, 256), dtype="fp32"), 256, 256), x.view(256, 256).float(), 0) is None


def test_unpack_rounds_as_pytorch_casts():
    values = torch.randint(-(1 << 31), (1 << 31) - 1, (300, 300)).to(torch.int32).view(torch.float32)
    packed = pack(values, dtype="fp32", layout="dense")
    for name, kind in FLOATS.items():
        assert difference(unpack(packed, 300, 300, dtype=name), values.to(kind), 0) is None


@pytest.mark.parametrize("group", [32, 64])
def test_int8_error_is_that_of_quantisation(isa, group):
    """Against the product of the unrounded numbers, without any model of how int8 works: half a step of each factor."""
    weight, x = random_weight(33, 259, 0.3, torch.Generator().manual_seed(0)), torch.randn(7, 259) * torch.logspace(-3, 3, 7)[:, None]
    out = linear(x, pack(weight, dtype="int8"), None, 33, activation_group=group)
    w_step = (weight.abs().amax(1) / 254).double()
    padded = torch.nn.functional.pad(x, (0, -259 % group)).unflatten(1, (-1, group))
    x_step = (padded.abs().amax(2, keepdim=True) / 254).expand_as(padded).flatten(1)[:, :259].double()
    bound = x.double().abs() @ w_step.expand(259, 33) + x_step @ weight.double().abs().T + x_step.sum(1, keepdim=True) * w_step
    assert difference(out, x.double() @ weight.double().T, bound * 1.001) is None


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_int4_error_is_that_of_quantisation(isa, layout, grid):
    """Against the product of the weights that unpacking gives with unrounded inputs: half a step of each input."""
    weight, x = random_weight(33, 259, 0.3, torch.Generator().manual_seed(0)), torch.randn(7, 259) * torch.logspace(-3, 3, 7)[:, None]
    packed = pack(weight, dtype="int4", layout=layout, **grid)
    restored = unpack(packed, 33, 259).double()
    padded = torch.nn.functional.pad(x, (0, -259 % 32)).unflatten(1, (-1, 32))
    x_step = (padded.abs().amax(2, keepdim=True) / 254).expand_as(padded).flatten(1)[:, :259].double()
    bound = x_step @ restored.abs().T + 1e-5 * (x.double().abs() @ restored.abs().T)
    for m in (1, 2, 3, 4, 7):
        assert difference(linear(x[:m], packed, None, 33), x[:m].double() @ restored.T, bound[:m]) is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_int4_codes_and_inputs_at_their_ends(isa, layout):
    """The largest sums there are: 16 bits hold a unit of 32 inputs, no more."""
    for sign, grid in ((1.0, {"symmetric": False}), (-1.0, {"symmetric": False}), (-1.0, {"symmetric": True})):
        weight = torch.full((17, 128), sign)
        weight[:, ::32] = 0  # so that the others have code 15, or 0
        packed = pack(weight, dtype="int4", layout=layout, **grid)
        for value in (1.0, -1.0):
            for m in (1, 2, 3, 4, 5, 8, 16):
                x = torch.full((m, 128), value)
                exact, bound = product(x, weight, "int4", None, 32, layout, **grid)
                assert difference(linear(x, packed, None, 17), exact, bound) is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_int4_with_given_grids(isa, layout):
    """Scales of both signs, minimums far from the weights, zeros at every code."""
    generator = torch.Generator().manual_seed(0)
    weight = random_weight(35, 200, 0.5, generator)
    for grid in GRIDS:
        values = given_grid(weight, "int4", generator, **grid)
        packed = pack(weight, dtype="int4", layout=layout, **values)
        for m in BATCHES:
            x = torch.randn(m, 200, generator=generator)
            exact, bound = product(x, weight, "int4", None, 32, layout, **values)
            for out in both(isa, x, packed, None, 35):
                assert difference(out, exact, bound) is None


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_long_rows_do_not_overflow(isa, dtype):
    """More inputs than 32 bits could sum up at full scale."""
    inputs = 200_000
    packed = pack(torch.ones(17, inputs), dtype=dtype, layout="dense")
    for m in (1, 5):
        out = linear(torch.ones(m, inputs), packed, None, 17, activation_group=64 if dtype == "int8" else 32)
        torch.testing.assert_close(out, torch.full((m, 17), float(inputs)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_and_tall(isa, dtype):
    """Sizes where every part of the blocking is in use, for one and two threads."""
    generator = torch.Generator().manual_seed(0)
    for m, outputs, inputs in [(1, 1031, 517), (4, 517, 1031), (33, 261, 769), (513, 95, 257), (1100, 33, 80)]:
        weight = random_weight(outputs, inputs, 0.6, generator)
        x = torch.randn(m, inputs, generator=generator)
        for layout in LAYOUTS:
            packed = pack(weight, dtype=dtype, layout=layout)
            exact, bound = product(x, weight, dtype, None, 32, layout)
            results = []
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                results.append(linear(x, packed, None, outputs))
            assert difference(results[0], exact, bound) is None
            assert all(result.equal(results[0]) for result in results)


def test_the_name_of_the_kernel_follows_the_cap(isa):
    """The best kernel that there is under the cap, and not one above it."""
    ladder = tce.core.isa.ISAS
    intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()  # there vdpbf16ps is slower than what replaces it
    expected = {
        "fp32": min(isa, "avx512", key=ladder.index),
        "bf16": min(isa, "avx512_vnni" if intel else "avx512_bf16", key=ladder.index),
        "int8": min(isa, "avx512_vnni", key=ladder.index),
        "int4": min(isa, "avx512_vnni", key=ladder.index),
    }
    for kernel, name in expected.items():
        found = tce.kernel_isa("sparse_linear", kernel)
        assert ladder.index(found) <= ladder.index(isa)
        if isa != "amx":
            assert found == name


def test_after_a_fork():
    """The kernels work in a forked child (a DataLoader worker), with one thread."""
    code = """
        import os, torch, torch_cpu_ext
        from torch_cpu_ext.sparse_linear import linear, pack
        torch.set_num_threads(1)
        packed, x = pack(torch.randn(300, 300), dtype="int8"), torch.randn(9, 300)
        expected = linear(x, packed, None, 300)
        pid = os.fork()
        if pid == 0:
            os._exit(0 if linear(x, packed, None, 300).equal(expected) else 1)
        assert os.waitpid(pid, 0)[1] == 0
    """
    succeeded(run_python(code, TORCH_CPU_EXT_STRICT="1"))


def test_memory_mapped_at_any_offset(tmp_path):
    """A packed array in the middle of a mapped file, as safetensors gives it."""
    weight = random_weight(40, 100, 0.5, torch.Generator().manual_seed(0))
    for dtype in DTYPES:
        packed = pack(weight, dtype=dtype)
        for offset in (1, 2, 3, 5, 8, 13):
            path = tmp_path / f"{dtype}-{offset}"
            path.write_bytes(bytes(offset) + packed.numpy().tobytes())
            mapped = torch.from_numpy(np.memmap(path, np.uint8, "c", offset))
            x = torch.randn(3, 100)
            assert linear(x, mapped, None, 40).equal(linear(x, packed, None, 40))


# Where a fault would end the process, the test runs in another one.


@pytest.mark.parametrize(("at_end", "offset"), [(True, 100), (False, -1)])
def test_a_fence_kills(at_end, offset):
    """The tests below would see one byte too many."""
    code = """
        import ctypes, sys, torch
        from support import Fence
        tensor = Fence(5000).place(torch.arange(100, dtype=torch.uint8), sys.argv[1] == "True")
        assert ctypes.c_ubyte.from_address(tensor.data_ptr() + 99).value == 99
        ctypes.c_ubyte.from_address(tensor.data_ptr() + int(sys.argv[2])).value
    """
    assert run_python(code, str(at_end), str(offset)).returncode == -signal.SIGSEGV


def test_nothing_is_touched_outside_the_arguments():
    """Arguments between pages that must not be touched: each byte past either end would be a crash."""
    print(succeeded(run_python("import runpy, sys; runpy.run_path(sys.argv[1])", str(TESTS / "sparse_linear/fences.py"))))


@pytest.mark.parametrize("part", ["truncations", "headers", "flips", "hypothesis"])
def test_damaged_arrays(part):
    """A RuntimeError or a result, never a crash, whatever the bytes."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['PARTS'][sys.argv[2]]()"
    print(succeeded(run_python(code, str(TESTS / "sparse_linear/damage.py"), part, timeout=500)))
