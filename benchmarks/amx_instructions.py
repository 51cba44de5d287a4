"""The tile instructions that the AMX kernels execute, against the least that the arithmetic needs; counted by the tests' emulator.

No time is measured: an emulated instruction takes about 11 microseconds.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from amx_emulator.emulator import Emulator

SHAPES = (
    (5, 576, 576),
    (16, 1536, 576),
    (17, 1536, 576),
    (32, 576, 1536),
    (64, 1536, 576),
    (512, 576, 576),
)  # rows, out_features, in_features
QUICK = SHAPES[:3]
PRODUCT = {"bf16": "tdpbf16ps", "int8": "tdpbsud", "int4": "tdpbsud"}
COLUMNS = {
    "products": "tdpbf16ps or tdpbsud",
    "least": "products of 16 rows, 16 outputs and 32 inputs (int8, int4: a group of activations) that cover the work",
    "work": "share of the executed multiply-adds that are part of the work; the rest multiplies padding and repeated rows",
    "loads": "tileloadd a product; 1 is what blocks of two by two tiles need, more would have to be kept in the eight tiles for less",
    "stores": "tilestored a product; int8 and int4 store each product, to scale it by its group of activations",
    "configured": "ldtilecfg; one a thread",
}


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """One result a shape, dtype and group."""
    from torch_cpu_ext.sparse_linear import linear, pack

    emulator = Emulator().install()
    for m, n, k in QUICK if quick else SHAPES:
        weight, x = torch.randn(n, k) * (torch.rand(n, k) < 0.5), torch.randn(m, k)
        for dtype, group in (("bf16", 32), ("int8", 32), ("int8", 64), ("int4", 32)):
            packed = pack(weight, dtype=dtype)
            emulator.reset()
            linear(x, packed, None, n, activation_group=group)
            counts, terms = emulator.counts(), group if dtype == "int8" else 32
            products = counts[PRODUCT[dtype]]
            yield {
                "case": f"{m} x {k} times {n} x {k}, {dtype}" + (f", groups of {group}" if dtype == "int8" else ""),
                "products": products,
                "least": -(-m // 16) * -(-n // 16) * -(-k // terms),
                "work": round(m * n * k / (products * -(-m // -(-m // 16)) * 16 * terms), 3),
                "loads": round(counts["tileloadd"] / products, 3),
                "stores": round(counts["tilestored"] / products, 3),
                "configured": counts["ldtilecfg"],
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON list of rows")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--threads", type=int, default=None, help="threads of PyTorch (default: its own choice)")
    arguments = parser.parse_args()
    if torch.cpu.get_capabilities().get("amx_tile", False):
        raise SystemExit("amx_instructions: this machine executes AMX itself, and the emulator counts only what it has to execute")
    os.environ["TORCH_CPU_EXT_TEST_AMX"] = "emulate"
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    results = list(rows(arguments.quick))
    if arguments.json:
        print(json.dumps(results, indent=1))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("case")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for row in results:
        table.add_row(*(str(value) for value in row.values()))
    console = Console()
    console.print(table)
    for column, meaning in COLUMNS.items():
        console.print(f"{column}: {meaning}", style="dim", highlight=False)


if __name__ == "__main__":
    main()
