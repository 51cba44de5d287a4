"""Feeds damaged packed arrays to the ops, right before a page that must not be touched; test_linear.py starts it."""

import itertools
import struct

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import torch_cpu_ext as tce
from torch_cpu_ext.core.isa import supported
from torch_cpu_ext.core.registry import CATALOGUE
from torch_cpu_ext.sparse_linear import check, linear, pack, unpack

from cases import GRIDS, LAYOUTS, patterned_weight, random_weight
from support import Fence

OUTPUTS, INPUTS, REGULAR, ISAS = 35, 77, 72, supported()  # REGULAR: inputs of structured arrays
assert tce.load("sparse_linear")
fence = Fence(1 << 16)
generator = torch.Generator().manual_seed(0)
inputs = {k: [torch.randn(m, k, generator=generator) for m in (1, 3, 4, 6)] for k in (INPUTS, REGULAR)}
kinds = [*((dtype, {}) for dtype in ("fp32", "bf16", "int8")), ("int4", GRIDS[0]), ("int4", GRIDS[5])]
arrays = {
    (dtype, str(grid), layout, sparsity): bytes(
        pack(random_weight(OUTPUTS, INPUTS, sparsity, generator), dtype=dtype, layout=layout, **grid).tolist()
    )
    for (dtype, grid), layout, sparsity in itertools.product(kinds, LAYOUTS, (0.0, 0.5, 1.0))
}
for dtype, pattern in (("fp32", "2:4"), ("bf16", "2:4"), ("bf16", "1:4"), ("int8", "2:4"), ("int8", "4:8")):
    weight = patterned_weight(OUTPUTS, REGULAR, pattern, generator)
    arrays[dtype, pattern, "structured", 0.5] = bytes(pack(weight, dtype=dtype, pattern=pattern).tolist())
counts = {"refused": 0, "answered": 0}


def attempt(function, *args):
    """Whether the function answered; it may refuse with a RuntimeError whose message names the argument."""
    try:
        function(*args)
    except RuntimeError as error:
        if "packed must" not in str(error):
            raise AssertionError("the message does not name the argument") from error
        counts["refused"] += 1
        return False
    counts["answered"] += 1
    return True


def feed(data: bytes, batches=(0, 2), isas=ISAS, reference: bool = False) -> None:
    """All ops on one damaged array."""
    packed = fence.place(torch.frombuffer(bytearray(data), dtype=torch.uint8)) if data else torch.empty(0, dtype=torch.uint8)
    columns = REGULAR if data[16:17] == bytes([2]) else INPUTS
    intact = attempt(check, packed)
    unpacked = attempt(unpack, packed, OUTPUTS, columns)
    assert unpacked or not intact or struct.unpack_from("<qq", data, 24) != (OUTPUTS, columns), "check passes what unpack refuses"
    for name in isas:
        with tce.isa(name):
            for i in batches:
                answered = attempt(linear, inputs[columns][i], packed, None, OUTPUTS)
                assert answered or not unpacked, "linear refuses what unpack takes"
    if reference:
        attempt(CATALOGUE["sparse_linear_check"].reference, packed)
        attempt(CATALOGUE["sparse_linear"].reference, inputs[columns][0], packed, None, OUTPUTS)


def truncations() -> None:
    """Every length of the smaller arrays, and some of the larger; and a few bytes more."""
    for data in arrays.values():
        for length in range(0, len(data), 1 if len(data) < 2500 else 11):
            feed(data[:length], batches=(0,), isas=ISAS[-1:])
        # the same, with a header and a last offset that agree with the shorter array
        for length in range(0, len(data), 1 if len(data) < 1000 else 7):
            damaged = bytearray(data[:length])
            for at, value in ((40, length), (64 + 8 * 3, length - 64)):
                if length >= at + 8:
                    struct.pack_into("<q", damaged, at, value)
            feed(bytes(damaged), batches=(0, 3), isas=ISAS)
        for more in (1, 64, 4096):
            feed(data + bytes(more))


NUMBERS = [0, 1, 2, 3, 4, 15, 16, 17, 34, 36, 76, 78, 255, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 40, (1 << 40) + 1, 1 << 60, (1 << 63) - 1]


def headers() -> None:
    """Each field of the header and each offset set to every interesting number."""
    for data in arrays.values():
        for at in range(8, 24, 4):
            for value in NUMBERS:
                damaged = bytearray(data)
                struct.pack_into("<I", damaged, at, value & 0xFFFFFFFF)
                feed(bytes(damaged), reference=at < 20)
        offsets = [struct.unpack_from("<q", data, 64 + 8 * i)[0] for i in range(4)]
        near = [o + d for o in offsets for d in (-64, -8, -4, -1, 1, 4, 8, 64)]
        for at in range(24, 64 + 8 * 4, 8):
            for value in [*NUMBERS, *(-n for n in NUMBERS), *near, *offsets]:
                damaged = bytearray(data)
                struct.pack_into("<q", damaged, at, max(value, -(1 << 63)))
                feed(bytes(damaged), batches=(0,), isas=ISAS[-1:], reference=True)


def flips() -> None:
    """Bytes changed at random, in the streams above all; then many at once."""
    random = torch.Generator().manual_seed(1)

    def draw(end: int) -> int:
        return int(torch.randint(end, (), generator=random))

    for data in arrays.values():
        first = struct.unpack_from("<q", data, 64)[0]
        for i in range(250):
            damaged = bytearray(data)
            for _ in range(1 if i < 150 else 1 + draw(60)):
                at = first + draw(len(data) - first) if i % 3 else draw(len(data))
                damaged[at] = draw(256) if i % 2 else damaged[at] ^ 1 << draw(8)
            feed(bytes(damaged), reference=i % 25 == 0)
        for value in (0, 0xFF):  # all bitmaps empty, all full
            feed(data[:first] + bytes([value]) * (len(data) - first))
    # The header of one array on the streams of another
    for one, other in itertools.product(arrays.values(), arrays.values()):
        damaged = bytearray(other)
        damaged[8:40] = one[8:40]
        feed(bytes(damaged), reference=True)


def hypothesis() -> None:
    @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(
        st.sampled_from(sorted(arrays)),
        st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(min_size=1, max_size=12)), max_size=6),
        st.integers(0, 80),
        st.booleans(),
    )
    def damaged(key, edits, cut, mend):
        data = bytearray(arrays[key])
        for at, new in edits:
            at %= len(data)
            data[at : at + len(new)] = new
        data = data[: len(data) - cut]
        if mend:
            struct.pack_into("<q", data, 40, len(data))
            struct.pack_into("<q", data, 64 + 8 * 3, len(data) - 64)
        feed(bytes(data))

    damaged()

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.binary(max_size=600))
    def noise(data):
        feed(data, batches=(0,), reference=True)
        feed(next(iter(arrays.values()))[:24] + data, batches=(0,), reference=True)

    noise()


def report(part):
    def run() -> None:
        part()
        print(", ".join(f"{number} {kind}" for kind, number in counts.items()))
        assert counts["refused"]

    return run


PARTS = {part.__name__: report(part) for part in (truncations, headers, flips, hypothesis)}
