"""The AMX kernels under the emulator: what they execute, and where they read and write. test_amx.py starts it as a process of its own."""

import itertools
import runpy
import sys

import torch

import torch_cpu_ext as tce
from torch_cpu_ext.sparse_linear import linear, pack

from amx_emulator.emulator import Emulator
from cases import FLOATS, GRIDS, LAYOUTS, PATTERNS, patterned_weight, product, random_weight
from support import TESTS, Fence, difference

emulator = Emulator().install()
generator = torch.Generator().manual_seed(0)
DTYPES = ("bf16", "int8", "int4")
PRODUCT = {"bf16": "tdpbf16ps", "int8": "tdpbsud", "int4": "tdpbsud"}
KINDS = [(dtype, layout) for dtype in DTYPES for layout in (*LAYOUTS, "structured")][:-1]  # int4 has no structured layout


def least_products(dtype: str, rows: int, outputs: int, inputs: int, group: int) -> int:
    """Products of full tiles that the arithmetic needs: 16 rows, 16 outputs, and 32 inputs of bf16 or one group of int8 or int4."""
    return -(-rows // 16) * -(-outputs // 16) * -(-inputs // (group if dtype == "int8" else 32))


def check_counts(dtype: str, rows: int, outputs: int, inputs: int, group: int, threads: int) -> None:
    """No product twice, each of the op's threads configures once and releases, and few rows use no tile."""
    counts = emulator.counts()
    executed = {op: n for op, n in counts.items() if op.startswith("tdp") and n}
    expected = least_products(dtype, rows, outputs, inputs, group) if rows > 4 else 0
    assert executed == ({PRODUCT[dtype]: expected} if expected else {}), (executed, expected)
    assert len(emulator.threads()) <= threads
    for one in emulator.threads():
        assert one["ldtilecfg"] == one["tilerelease"] == 1, one
    assert emulator.configured() == 0
    emulator.reset()


def instructions() -> None:
    """Every dtype, layout, kind of tail and group, with 1 and 2 threads: within the bound, equal bits, the least number of products."""
    rows, groups = itertools.cycle((5, 8, 15, 16, 17, 31, 32, 33, 47, 65, 4, 1)), itertools.cycle((32, 64, 64, 32, 32))
    sparsities, kinds, biases = (
        itertools.cycle((0.5, 0.0, 1.0, 0.9)),
        itertools.cycle(FLOATS.values()),
        itertools.cycle((None, torch.float32)),
    )
    shapes = [(m, n, k) for n, k in itertools.product((1, 15, 16, 17, 33, 48), (1, 31, 32, 33, 63, 64, 65, 100, 257)) for m in [next(rows)]]
    shapes += [
        (16, 32, 2048),
        (40, 261, 320),
        (70, 130, 577),
        (515, 65, 96),
        (1040, 33, 64),
    ]  # two threads, several blocks, tiles of 512 rows
    used = set()
    grids, patterns = itertools.cycle(GRIDS), itertools.cycle(PATTERNS)
    for (m, n, k), (dtype, layout) in itertools.product(shapes, KINDS):
        weight, group, kind, bias = random_weight(n, k, next(sparsities), generator), next(groups), next(kinds), next(biases)
        options = {"layout": layout}
        if dtype == "int4":
            group, options = 32, options | next(grids)
        elif layout == "structured":
            options = {"layout": "auto", "pattern": next(patterns)}
            weight = patterned_weight(n, k, options["pattern"], generator)
            k = weight.shape[1]
        x, b = torch.randn(m, k, generator=generator).to(kind), None if bias is None else torch.randn(n, generator=generator)
        packed = pack(weight, dtype=dtype, **options)
        exact, bound = product(x, weight, dtype, b, group, **options)
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            emulator.reset()
            results.append(linear(x, packed, b, n, activation_group=group))
            used.add(len(emulator.threads()))
            check_counts(dtype, m, n, k, group, threads)
        name = f"{dtype} {layout} {m} x {n} x {k} group={group} {kind}"
        assert results[0].equal(results[1]), f"{name}: 2 threads give other bits than 1"
        problem = difference(results[0], exact, bound)
        assert not problem, f"{name}: {problem}"
        if dtype == "int4" and m > 16:  # the same operations in the same order
            with tce.isa("avx512_vnni"):
                assert linear(x, packed, b, n).equal(results[0]), f"{name}: VNNI gives other bits"
    assert used == {0, 1, 2}, "no product used two threads"


def fences() -> None:
    """Arguments between pages that must not be touched; the emulator reads and writes just what the instructions would."""
    places = [Fence(1 << 18) for _ in range(3)]
    rows, groups, kinds = itertools.cycle((5, 16, 17, 33)), itertools.cycle((32, 64, 64)), itertools.cycle(FLOATS.values())
    grids = itertools.cycle(GRIDS)
    for (dtype, layout), n, k in itertools.product(KINDS, (1, 16, 17, 33), (1, 31, 33, 63, 64, 65, 128, 257)):
        for sparsity in (0.0, 0.5, 1.0):
            weight, group = random_weight(n, k, sparsity, generator), next(groups)
            options = {"layout": layout}
            if dtype == "int4":
                group, options = 32, options | next(grids)
            elif layout == "structured":
                weight, options = patterned_weight(n, k, "2:4", generator, sparsity), {"pattern": "2:4"}
            x, bias = torch.randn(next(rows), weight.shape[1], generator=generator).to(next(kinds)), torch.randn(n, generator=generator)
            plain = pack(weight, dtype=dtype, **options)
            expected = linear(x, plain, bias, n, activation_group=group)
            for at_end in (True, False):
                fenced = [fence.place(tensor, at_end) for fence, tensor in zip(places, (x, plain, bias), strict=True)]
                assert linear(*fenced, n, activation_group=group).equal(expected)


def damage() -> None:
    """Damaged arrays right before a fence: an error or a result, and no thread left configured after either."""
    module = runpy.run_path(str(TESTS / "sparse_linear/damage.py"))
    arrays, feed = module["arrays"], module["feed"]
    random = torch.Generator().manual_seed(1)

    def draw(end: int) -> int:
        return int(torch.randint(end, (), generator=random))

    for (dtype, _, layout, _), data in arrays.items():
        if dtype not in PRODUCT:
            continue
        first = int.from_bytes(data[64:72], "little")
        for i in range(20 if layout == "dense" else 120):
            damaged = bytearray(data)
            for _ in range(1 if i % 2 else 1 + draw(60)):
                damaged[first + draw(len(data) - first)] = draw(256) if i % 3 else 255
            feed(bytes(damaged), batches=(3,), isas=("amx",))
            assert emulator.configured() == 0
        for length in range(first, len(data), 97):  # with a header and a last offset that agree with the shorter array
            damaged = bytearray(data[:length])
            damaged[40:48], damaged[88:96] = length.to_bytes(8, "little"), (length - 64).to_bytes(8, "little", signed=True)
            feed(bytes(damaged), batches=(3,), isas=("amx",))
        for value in (0, 255):  # all bitmaps empty, all full
            feed(data[:first] + bytes([value]) * (len(data) - first), batches=(3,), isas=("amx",))
    assert module["counts"]["refused"] > 100
    assert module["counts"]["answered"] > 100
    assert sum(emulator.counts()[op] for op in set(PRODUCT.values())) > 1000


def names() -> None:
    """The kernels that run, and the cap."""
    assert {tce.kernel_isa("sparse_linear", dtype) for dtype in DTYPES} == {"amx"}
    assert tce.kernel_isa("sparse_linear", "fp32") == "avx512"
    packed, x = pack(torch.randn(16, 64), dtype="int8"), torch.randn(5, 64)
    with tce.isa("avx512_bf16"):
        assert tce.kernel_isa("sparse_linear", "int8") == "avx512_vnni"
        linear(x, packed, None, 16)
        assert not any(emulator.counts().values())
    linear(x, packed, None, 16)
    assert emulator.counts()["tdpbsud"] == 2


if __name__ == "__main__":
    {f.__name__: f for f in (instructions, fences, damage, names)}[sys.argv[1]]()
