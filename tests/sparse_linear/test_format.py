"""The packed format does not change: bytes, hashes, and what they stand for."""

import hashlib

import pytest
import torch

from torch_cpu_ext.core.registry import CATALOGUE
from torch_cpu_ext.sparse_linear import check, pack, unpack

from cases import DTYPES, LAYOUTS, pack_by_hand, random_weight, stored
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
}


def fixed_weight() -> torch.Tensor:
    """18 x 70, about half zeros, exact in every dtype, without a random generator."""
    i = torch.arange(18 * 70)
    return torch.where(i * 7 % 11 < 5, 0, (i * 37 % 255 - 127)).float().view(18, 70) / 64


def special_weight() -> torch.Tensor:
    """Zeros of both signs, denormals, the largest numbers, values that round up to the next power of two or to infinity."""
    values = [0.0, -0.0, 1e-45, -1e-45, 1e-40, 1.1754942e-38, 3.4028235e38, -3.4028235e38, 1.00390625, 1.01171875, 3.3961776e38, 1.0, -2.5]
    return torch.tensor(values).repeat(37)[: 17 * 28].view(17, 28)


@pytest.mark.parametrize(("dtype", "layout"), GOLDEN)
def test_golden(dtype, layout):
    packed = pack(fixed_weight(), dtype=dtype, layout=layout)
    assert hashlib.sha256(packed.numpy().tobytes()).hexdigest() == GOLDEN[dtype, layout]
    assert unpack(packed, 18, 70).equal(torch.from_numpy(stored(fixed_weight(), dtype)))


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


@pytest.mark.parametrize("layout", [*LAYOUTS, "auto"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_reference_and_drawing_agree(dtype, layout):
    """Byte for byte, for one and two threads and any strides."""
    for weight in weights():
        expected = reference(weight, dtype=dtype, layout=layout)
        if layout != "auto":
            assert expected.numpy().tobytes() == pack_by_hand(weight, dtype, layout), weight
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert pack(weight, dtype=dtype, layout=layout).equal(expected), weight
            assert pack(weight.T.contiguous().T, dtype=dtype, layout=layout).equal(expected)


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
    for weight in weights():
        for layout in LAYOUTS:
            packed = pack(weight, dtype=dtype, layout=layout)
            again = unpack(packed, *weight.shape)
            if not bool(again.isfinite().all()):  # int8: 127 steps of the largest number's scale can round to infinity
                continue
            if dtype == "int8":  # scales of very small rows are not reproduced to the last bit; what they stand for is
                again = unpack(pack(again, dtype=dtype, layout=layout), *weight.shape)
                torch.testing.assert_close(again, unpack(packed, *weight.shape), rtol=3e-7, atol=1e-38)
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
        dense, sparse = (pack(weight, dtype=dtype, layout=layout) for layout in LAYOUTS)
        assert unpack(dense, 37, 131).equal(unpack(sparse, 37, 131))
        outputs = [torch.ops.torch_cpu_ext.sparse_linear(x, packed, None, 37) for packed in (dense, sparse)]
        assert outputs[0].equal(outputs[1])
