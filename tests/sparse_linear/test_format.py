"""The packed format does not change: bytes, hashes, and what they stand for."""

import hashlib

import pytest
import torch

from torch_cpu_ext.core.registry import CATALOGUE
from torch_cpu_ext.sparse_linear import check, pack, unpack

from cases import DTYPES, GRIDS, LAYOUTS, given_grid, pack_by_hand, random_weight, stored
from support import difference

reference = CATALOGUE["sparse_linear_pack"].reference

# sha256 of the packed form of `fixed_weight()`. A change here breaks files that users have saved: raise the format version instead.
GOLDEN = {
    ("fp32", "dense"): "9eb1d0fbb259318d7dcc1f49e4be619bafc6e4e63b0523060b5a34f05118dbae",
    ("fp32", "sparse"): "d4754d6f35779777573cf4106d70d0f0712eec8d7de0329d5ac604926e86598b",
    ("bf16", "dense"): "8276684240298644666923d41dda7256dd5cc9e73fc5bfd2c91cd02b73a3ff38",
    ("bf16", "sparse"): "be03d99a1e224bb1f48ecee0b9fcdc73c318500a10c41e907cd8239af5694917",
    ("int8", "dense"): "2d9e34eeae6b84f2aacdc228fe02072cb6f62820b6ec22db42478623acc06863",
    ("int8", "sparse"): "474c758b38a04b17ab9ad61dcfade07078eae4e70e539d6bc27c2b2924bdfca0",
    ("int4", "dense"): "22246506e3a462e95b3e95d857bc71c63c3fc7c33e3741af084564199ec6cbd7",
    ("int4", "sparse"): "ab0b02ae75228e23e4272681eef8daf1a94d21bf842442a34c5df89ed7eb26ab",
    ("int4", "dense", "symmetric"): "c1c2f7de9579138399d0efbd3f0f7297f326cb264e4f4ee1436c7911e1b200a8",
    ("int4", "sparse", "symmetric"): "ba467414cd044983ab74628bf696c645fa77ebb00f43aa68faca615aabc5bda9",
}


def fixed_weight() -> torch.Tensor:
    """18 x 70, about half zeros, exact in every dtype, without a random generator."""
    i = torch.arange(18 * 70)
    return torch.where(i * 7 % 11 < 5, 0, (i * 37 % 255 - 127)).float().view(18, 70) / 64


def special_weight() -> torch.Tensor:
    """Zeros of both signs, denormals, the largest numbers, values that round up to the next power of two or to infinity."""
    values = [0.0, -0.0, 1e-45, -1e-45, 1e-40, 1.1754942e-38, 3.4028235e38, -3.4028235e38, 1.00390625, 1.01171875, 3.3961776e38, 1.0, -2.5]
    return torch.tensor(values).repeat(37)[: 17 * 28].view(17, 28)


@pytest.mark.parametrize("key", GOLDEN, ids=" ".join)
def test_golden(key):
    dtype, layout, *symmetric = key
    grid = {"symmetric": bool(symmetric)}
    packed = pack(fixed_weight(), dtype=dtype, layout=layout, **grid)
    assert hashlib.sha256(packed.numpy().tobytes()).hexdigest() == GOLDEN[key]
    assert unpack(packed, 18, 70).equal(torch.from_numpy(stored(fixed_weight(), dtype, layout, **grid)))


def weights():
    generator = torch.Generator().manual_seed(0)
    for sparsity in (0.0, 0.5, 0.9, 1.0, "one"):
        yield random_weight(37, 131, sparsity, generator)
    yield fixed_weight()
    yield special_weight()
    yield torch.zeros(16, 64)
    yield -torch.zeros(3, 5)
    yield special_weight()[:, 2:5]  # int8: rows whose scale is a denormal, or whose inverse overflows
    yield torch.tensor([[1e-38, 0.0, 5e-39], [1e-45, 0.0, 0.0], [3e-37, 0.0, 1e-37]])
    yield torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 127.0]])  # int8: ties go to the even code
    yield torch.randn(20, 33, generator=generator).bfloat16()
    yield torch.randn(20, 33, generator=generator).half()


def int4_weights():
    """Those of `weights` that float16 scales can hold, and those that are special to int4."""
    yield from (weight for weight in weights() if float(weight.abs().max()) < 1e4)
    small = [0.0, -0.0, 1e-45, -1e-45, 1e-40, 3e-8, -3e-8, 1e-7, -4e-7, 6e-6, 1e-3]
    yield torch.tensor(small).repeat(64)[: 17 * 40].view(17, 40)  # scales that are denormals of float16, or that round to a zero
    yield torch.tensor([1e-9, 0.0, -5e-10])[:, None].expand(3, 40)  # symmetric: a scale of -0
    yield torch.tensor([65504.0, -65504.0, 1.0])[None].repeat(2, 20)
    yield torch.full((3, 33), 0.3)
    yield torch.full((3, 33), -0.3)  # no range, and nothing near zero
    yield 5 + torch.randn(20, 100, generator=torch.Generator().manual_seed(1)).abs()  # sparse: zero is outside of what the weights span
    yield torch.tensor([[-7.5, 0.5, 1.5, 2.5, 3.5, 7.5, -0.5, -1.5]])  # ties


def schemes(dtype):
    """Weights with every grid there is."""
    if dtype == "int4":
        yield from ((weight, grid) for weight in int4_weights() for grid in GRIDS)
    else:
        yield from ((weight, {}) for weight in weights())


@pytest.mark.parametrize("layout", [*LAYOUTS, "auto"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_reference_and_drawing_agree(dtype, layout):
    """Byte for byte, for one and two threads and any strides."""
    for weight, grid in schemes(dtype):
        expected = reference(weight, dtype=dtype, layout=layout, **grid)
        if layout != "auto":
            assert expected.numpy().tobytes() == pack_by_hand(weight, dtype, layout, **grid), (weight, grid)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert pack(weight, dtype=dtype, layout=layout, **grid).equal(expected), (weight, grid)
            assert pack(weight.T.contiguous().T, dtype=dtype, layout=layout, **grid).equal(expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-45, -1e-45, 1e-9, -1e-9, 6e-8, -0.01, 3.0])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_given_scales_of_any_kind(dtype, layout, scale):
    """Zeros of both signs, and scales whose inverse overflows: zeros come out. Negative ones are scales like others."""
    weight = random_weight(17, 70, 0.3, torch.Generator().manual_seed(0))
    for grid in GRIDS if dtype == "int4" else [{}]:
        values = given_grid(weight, dtype, torch.Generator().manual_seed(0), **grid)
        values["scale"] = torch.full_like(values["scale"], scale)
        packed = pack(weight, dtype=dtype, layout=layout, **values)
        assert packed.numpy().tobytes() == pack_by_hand(weight, dtype, layout, **values)
        assert packed.equal(reference(weight, dtype=dtype, layout=layout, **values))
        assert unpack(packed, 17, 70).equal(torch.from_numpy(stored(weight, dtype, layout, **values)))


def gguf_blocks(kind, generator, rows=19, blocks=5):
    """Weights as GGUF stores them: blocks of 32 codes, a float16 scale and, in Q4_1, a float16 minimum; and these grids."""
    codes = torch.randint(16, (rows, blocks, 32), generator=generator)
    ends = torch.rand(rows, blocks, 32, generator=generator).argsort(2)  # places in each block
    codes.scatter_(2, ends[:, :, :1], 0)
    scale = (torch.randn(rows, blocks, generator=generator) * 0.01).half().float()
    if kind == "Q4_0":
        return (scale[..., None] * (codes - 8)).flatten(1), {"symmetric": True, "scale": scale}
    codes.scatter_(2, ends[:, :, 1:2], 15)
    scale = scale.abs()
    minimum = (torch.randn(rows, blocks, generator=generator) * 0.1).half().float()
    return (scale[..., None] * codes + minimum[..., None]).flatten(1), {"scale": scale, "minimum": minimum}


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_gguf_blocks_are_kept(kind):
    """A block that uses its smallest code (Q4_1: and its largest), as those of llama.cpp do, is found again; any other by its grid."""
    for seed in range(5):
        weight, grid = gguf_blocks(kind, torch.Generator().manual_seed(seed))
        assert unpack(pack(weight, dtype="int4", layout="dense", symmetric=kind == "Q4_0"), *weight.shape).equal(weight)
        packed = pack(weight, dtype="int4", layout="dense", **grid)
        assert unpack(packed, *weight.shape).equal(weight)
        assert pack(weight, dtype="int4", layout="dense", symmetric=kind == "Q4_0").equal(packed)
        if kind == "Q4_0":
            assert unpack(pack(weight, dtype="int4", layout="sparse", symmetric=True), *weight.shape).equal(weight)
        one = weight.unflatten(1, (-1, 32)).median(2, keepdim=True).values.expand(-1, -1, 32).flatten(1)  # a single code in each block
        assert unpack(pack(one, dtype="int4", layout="dense", **grid), *weight.shape).equal(one)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_int8_rows_keep_their_codes_with_their_scale(layout):
    """No row needs code 127 where the scale is given."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(19, 1, generator=generator) + 0.01
    weight = torch.randint(-90, 91, (19, 77), generator=generator) * scale
    assert unpack(pack(weight, dtype="int8", layout=layout, scale=scale), 19, 77).equal(weight)
    assert not unpack(pack(weight, dtype="int8", layout=layout), 19, 77).equal(weight)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_int4_error_is_at_most_half_a_step(layout, grid):
    """Against the weights themselves, without any model of how codes are found; with what rounding the grid to float16 adds."""
    weight = random_weight(37, 300, 0.4, torch.Generator().manual_seed(0))
    restored = unpack(pack(weight, dtype="int4", layout=layout, **grid), 37, 300)
    for begin in range(0, 300, grid["group_size"]):
        part, found = weight[:, begin:][:, : grid["group_size"]], restored[:, begin:][:, : grid["group_size"]]
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        if layout == "sparse":
            low, high = low.clamp(max=0), high.clamp(min=0)
        largest = torch.maximum(-low, high)
        if grid["symmetric"]:  # what lies opposite of the largest weight may be one step out of reach
            step = largest / 8
            bound = step.expand_as(part).clone()
            bound[(part.abs() < 7 * step)] = 0
            bound = torch.maximum(bound, step / 2)
        else:  # sparse: zero is moved to a code, which moves the ends by half a step
            step = (high - low) / 15
            bound = step * (1.0 if layout == "sparse" else 0.5)
        assert bool(((part - found).abs() <= bound + largest * 2**-10).all())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_nan_and_infinity_are_kept(dtype):
    nan, inf = float("nan"), float("inf")
    weight = torch.tensor([[nan, inf, -inf, 0.0, 1.0], [-nan, 0.0, 0.0, 0.0, 3e38]])
    payload = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -8388607], dtype=torch.int32).view(torch.float32)  # NaNs bf16 rounding could lose
    weight = torch.cat([weight, torch.nn.functional.pad(payload, (0, 1))[None]])
    for layout in LAYOUTS:
        packed = pack(weight, dtype=dtype, layout=layout)
        assert packed.equal(reference(weight, dtype=dtype, layout=layout))
        assert difference(unpack(packed, 3, 5), weight.bfloat16().float() if dtype == "bf16" else weight, 0) is None
        assert check(packed).tolist()[5] == int((weight != 0).sum())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (16, 129), (36, 130)])
def test_int8_refuses_what_has_no_code(value, place):
    weight = torch.randn(37, 131)
    weight[place] = value
    for function in (pack, reference):
        with pytest.raises(RuntimeError, match="weight must be finite to be packed as int8, got NaN or an infinity"):
            function(weight, dtype="int8")


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_again_gives_the_same_bytes(dtype):
    for weight, grid in schemes(dtype):
        for layout in LAYOUTS:
            packed = pack(weight, dtype=dtype, layout=layout, **grid)
            again = unpack(packed, *weight.shape)
            if not bool(again.isfinite().all()):  # int8: 127 steps of the largest number's scale can round to infinity
                continue
            if dtype == "int8":  # scales of very small rows are not reproduced to the last bit; what they stand for is
                again = unpack(pack(again, dtype=dtype, layout=layout), *weight.shape)
                torch.testing.assert_close(again, unpack(packed, *weight.shape), rtol=3e-7, atol=1e-38)
            elif dtype == "int4":  # rounding may leave an end of the grid unused; what is there stays within the rounding of the scales
                again = unpack(pack(again, dtype=dtype, layout=layout, **grid), *weight.shape)
                step = weight.abs().max() / 8
                assert bool(((again - unpack(packed, *weight.shape)).abs() <= step).all())
            else:
                assert pack(again, dtype=dtype, layout=layout).equal(packed)


def test_auto_takes_the_smaller_and_dense_on_a_tie():
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        for sparsity in (0.0, 0.02, 0.1, 0.2, 0.5, 1.0):
            weight = random_weight(33, 65, sparsity, generator)
            sizes = {layout: pack(weight, dtype=dtype, layout=layout).numel() for layout in LAYOUTS}
            chosen = LAYOUTS[int(check(pack(weight, dtype=dtype))[2])]
            assert chosen == ("sparse" if sizes["sparse"] < sizes["dense"] else "dense")
    assert LAYOUTS[int(check(pack(torch.zeros(0, 5)))[2])] == "dense"


def test_layouts_stand_for_the_same_weight():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 131, generator=generator)
    for dtype in DTYPES:
        weight = random_weight(37, 131, 0.5, generator)
        # int4 that is not symmetric has other grids in the two layouts: in the sparse one, zero must be on it
        dense, sparse = (pack(weight, dtype=dtype, layout=layout, symmetric=dtype == "int4") for layout in LAYOUTS)
        assert unpack(dense, 37, 131).equal(unpack(sparse, 37, 131))
        outputs = [torch.ops.torch_cpu_ext.sparse_linear(x, packed, None, 37) for packed in (dense, sparse)]
        assert outputs[0].equal(outputs[1])
