"""sparse_linear against F.linear of the same shape: decode (few rows) to prefill (many), sparsity 0 to 0.9, weights beyond the caches."""

import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_cpu_ext import SparseLinearConfig, kernel_isa
from torch_cpu_ext.core import memory
from torch_cpu_ext.sparse_linear import linear, magnitude_mask, pack

from common import COLD_BYTES, Row, copies, interleave, main, rotate, row
from peers import skip
from peers.products import OTHERS, PLAIN, Call, Layer, Product

SHAPE = (11008, 4096)  # out_features, in_features: an MLP projection of a 7B Llama
SMALL_SHAPES = ((4096, 4096), (1024, 4096), (1536, 576), (192, 576))  # the last two are SmolLM2's
ROWS = (1, 2, 4, 8, 16, 64, 512)
SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.9)
PEER_ROWS = (1, 8, 16, 512)  # where the peers other than F.linear are measured too
VARIANTS = {name: SparseLinearConfig(dtype=name) for name in ("bf16", "int8", "int4", "fp32")}
BAR_ROWS = {1: 41, 8: 15, 16: 15, 64: 9, 512: 9}  # rows of input that the bars speak of, and how often they are measured
FEW_ROWS = (1, 8, 16)  # of BAR_ROWS, where the peers with weights of 8 and 4 bits are measured


class Layers:
    """One weight, by the peers and packed in every way asked for, each copied until it outgrows the caches."""

    def __init__(
        self, shape: tuple[int, int], variants: Iterable[str], sparsities: Iterable[float], peers: Mapping[str, Layer] = PLAIN
    ) -> None:
        torch.manual_seed(0)
        self.shape = shape
        weight = torch.randn(shape) / math.sqrt(shape[1])
        self.peers: dict[str, Product] = {}
        self.peer_bytes: dict[str, float] = {}
        for name, peer in peers.items():
            if missing := peer.missing():
                skip(name, missing)
            else:
                size = peer.bytes_per_weight * weight.numel()
                self.peer_bytes[name] = size
                self.peers[name] = peer.make(weight, math.ceil(COLD_BYTES / size))
        self.packed: dict[tuple[str, float], list[tuple[Tensor, ...]]] = {}
        for sparsity in sparsities:
            pruned = weight * magnitude_mask(weight, sparsity)
            for name in variants:
                config = VARIANTS[name]
                self.packed[name, sparsity] = copies(
                    pack(pruned, dtype=config.dtype, layout=config.layout, group_size=config.group_size, symmetric=config.symmetric)
                )

    def calls(self, m: int) -> dict[object, Call]:
        """A call a peer and a call a packing, each with its weights in rotation."""
        x = torch.randn(m, self.shape[1])
        found: dict[object, Call] = {name: rotate(product(x)) for name, product in self.peers.items()}
        for (name, sparsity), weights in self.packed.items():
            own = x if VARIANTS[name].dtype == "fp32" else x.bfloat16()
            group = VARIANTS[name].activation_group
            found[name, sparsity] = rotate(
                [lambda p=p, x=own, group=group: linear(x, p, None, self.shape[0], activation_group=group) for (p,) in weights]
            )
        return found


def read_calls() -> dict[object, Call]:
    """Two ways to read memory and do next to nothing; the faster one is what the machine can stream."""
    return dict(zip(("read by sum", "read by max"), memory.read_calls(COLD_BYTES), strict=True))


def measure(layers: Layers, m: int, repeats: int) -> Iterator[Row]:
    """Rows for one number of input rows."""
    times = interleave({**layers.calls(m), **read_calls()}, repeats)
    read = COLD_BYTES / min(times["read by sum"], times["read by max"]) / 1e9
    n, k = layers.shape
    for (name, sparsity), weights in layers.packed.items():
        seconds, size, dtype = times[name, sparsity], weights[0][0].numel(), VARIANTS[name].dtype
        speed = size / seconds / 1e9
        for peer in layers.peers:
            config = {
                "dtype": name,
                "sparsity": sparsity,
                "m": m,
                "n": n,
                "k": k,
                "kernel_isa": kernel_isa("sparse_linear", dtype),
                "bytes": size,
                "gb_per_s": round(speed, 2),
                "read_gb_per_s": round(read, 2),
                "share_of_read": round(speed / read, 3),
                "peer_gb_per_s": round(layers.peer_bytes[peer] / times[peer] / 1e9, 2),
            }
            yield row(f"M={m} {n}x{k} {name} sparsity {sparsity:g}", seconds, peer, times[peer], config)


def overhead() -> Row:
    """What a call costs when there is next to nothing to compute."""
    weight, x = torch.randn(16, 16), torch.randn(1, 16)
    packed = pack(weight)
    op = torch.ops.torch_cpu_ext.sparse_linear.default
    times = interleave({"ours": lambda: op(x, packed, None, 16), "peer": lambda: F.linear(x, weight)}, 51)
    return row("call overhead, 16x16", times["ours"], "F.linear fp32", times["peer"], {"dtype": "bf16", "m": 1, "n": 16, "k": 16})


def pages() -> Row:
    """A plain read of memory in huge pages, where packed weights lie, against one in pages of 4 KiB."""
    small = torch.empty(COLD_BYTES, dtype=torch.uint8).fill_(1).view(torch.float32)
    times = interleave({"huge": memory.read_calls(COLD_BYTES)[0], "small": small.sum}, 15)
    speeds = {f"{name}_gb_per_s": round(COLD_BYTES / time / 1e9, 1) for name, time in times.items()}
    return row("plain read, huge pages", times["huge"], "small pages", times["small"], speeds)


def structured() -> Iterator[Row]:
    """One row of input times weights with a 2:4 pattern, in the layout for it against the sparse one: the same bytes."""
    weight = torch.randn(SHAPE) / math.sqrt(SHAPE[1])
    weight *= magnitude_mask(weight, 0.5, pattern="2:4")
    x = torch.randn(1, SHAPE[1]).bfloat16()
    options: dict[str, dict[str, str]] = {"ours": {"pattern": "2:4"}, "peer": {"layout": "sparse"}}
    before = torch.get_num_threads()
    for dtype in ("bf16", "int8"):
        packed = {side: copies(pack(weight, dtype=dtype, **chosen)) for side, chosen in options.items()}
        for threads in sorted({1, before}):
            torch.set_num_threads(threads)
            calls = {side: rotate([lambda p=p: linear(x, p, None, SHAPE[0]) for (p,) in weights]) for side, weights in packed.items()}
            times = interleave(calls, 31)
            config = {"dtype": dtype, "pattern": "2:4", "m": 1, "n": SHAPE[0], "k": SHAPE[1], "threads": threads}
            yield row(f"M=1 {SHAPE[0]}x{SHAPE[1]} {dtype} 2:4, threads {threads}", times["ours"], "sparse layout", times["peer"], config)
    torch.set_num_threads(before)


def rows(quick: bool) -> Iterator[Row]:
    """All results, or a few of them."""
    yield overhead()
    yield pages()
    if quick:
        layers = Layers((4096, 4096), ("bf16", "int8"), (0.5,))
        for m in (1, 8, 64):
            yield from measure(layers, m, 7)
        return
    yield from structured()
    for shape in SMALL_SHAPES:
        yield from measure(Layers(shape, VARIANTS, (0.0, 0.5)), 1, 21)
    layers = Layers(SHAPE, VARIANTS, SPARSITIES)
    for m in ROWS:
        yield from measure(layers, m, 15 if m < 64 else 5)
    del layers
    layers = Layers(SHAPE, [name for name in VARIANTS if name != "fp32"], (0.0, 0.5), OTHERS)
    for m in PEER_ROWS:
        yield from measure(layers, m, 15 if m < 64 else 5)


def peer_bars() -> dict[str, float | None]:
    """Nothing pruned, against the other low-precision products; None where a peer is absent."""
    layers = Layers(SHAPE, ("int8", "int4"), (0.0,), {name: OTHERS[name] for name in OTHERS if name != "compiled bf16"})
    found = [r for m in FEW_ROWS for r in measure(layers, m, BAR_ROWS[m])]

    def worst(name: str, peer: str, what: Callable[[Row], float]) -> float | None:
        return min((what(r) for r in found if r["config"]["dtype"] == name and r["peer"] == peer), default=None)

    def speed(r: Row) -> float:
        return float(r["ratio"])

    def bytes_per_s(r: Row) -> float:
        return float(r["config"]["gb_per_s"] / r["config"]["peer_gb_per_s"])

    return {
        "1, 8 and 16 rows, int8, times torchao int8, the worst": worst("int8", "torchao int8", speed),
        "1, 8 and 16 rows, int4, times torchao int4, the worst": worst("int4", "torchao int4", speed),
        "1, 8 and 16 rows, int4, bytes a second, times those of llama.cpp Q4_0, the worst": worst("int4", "llama.cpp Q4_0", bytes_per_s),
        "1, 8 and 16 rows, int4, bytes a second, times those of llama.cpp Q4_1, the worst": worst("int4", "llama.cpp Q4_1", bytes_per_s),
    }


def bars() -> dict[str, float | None]:
    """What bars.toml promises."""
    layers = Layers(SHAPE, ("bf16", "int8", "int4"), (0.5,))
    found = {m: {r["config"]["dtype"]: r for r in measure(layers, m, r) if r["peer"] == "F.linear bf16"} for m, r in BAR_ROWS.items()}
    one = found[1]
    read = {name: row["config"]["share_of_read"] for name, row in one.items()}
    del layers
    return {
        **peer_bars(),
        "one row, bf16 at 50 %, times F.linear bf16": one["bf16"]["ratio"],
        "one row, int8 at 50 %, times F.linear bf16": one["int8"]["ratio"],
        "one row, int4 at 50 %, times F.linear bf16": one["int4"]["ratio"],
        "one row, bf16 at 50 %, share of the plain read": read["bf16"],
        "one row, int8 at 50 %, share of the plain read": read["int8"],
        "one row, int4 at 50 %, share of the plain read": read["int4"],
        "8 and 16 rows, int8 at 50 %, times F.linear bf16, the worse": min(found[m]["int8"]["ratio"] for m in FEW_ROWS[1:]),
        "64 and 512 rows at 50 %, bf16 and int8, times F.linear bf16, the worst": min(
            found[m][name]["ratio"] for m in (64, 512) for name in ("bf16", "int8")
        ),
        "call overhead (us)": overhead()["ours_ms"] * 1e3,
        "import after torch (ms)": _median(_import_ms, 5),
        "first build (s)": _build_s(),
    }


def _median(measure: Callable[[], float], repeats: int) -> float:
    return sorted(measure() for _ in range(repeats))[repeats // 2]


def _run(code: str, **environment: str) -> float:
    import os

    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return float(done.stdout)


def _import_ms() -> float:
    return _run("import time, torch; t = time.perf_counter(); import torch_cpu_ext; print((time.perf_counter() - t) * 1e3)")


def _build_s() -> float:
    with tempfile.TemporaryDirectory() as folder:
        code = "import time, torch_cpu_ext as tce; t = time.perf_counter(); tce.load('sparse_linear'); print(time.perf_counter() - t)"
        return _run(code, TORCH_CPU_EXT_CACHE_DIR=folder, TORCH_CPU_EXT_STRICT="1")


if __name__ == "__main__":
    main(rows, bars)
