"""`torch-cpu-ext info`: what a bug report needs."""

import os
import platform
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..core import env, isa, jit
from ..sparse_linear import KernelInfo, SparseLinear, SparseLinearConfig, kernel_info
from ..sparse_linear.ops import DTYPES
from . import machine
from .build import state
from .terminal import print_json, size


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    kernels: Annotated[bool, typer.Option("--kernels", help="Also measure each kernel of sparse_linear; builds it if need be.")] = False,
) -> None:
    """Show versions, instruction sets, compiler, cache, OpenMP runtimes and the state of each technique; builds nothing by itself."""
    values = collect()
    if kernels:
        values["kernels"] = [measured.to_dict() for measured in _measure()]
    if as_json:
        print_json(values)
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(values):
        table.add_row(name, value)
    Console().print(table, markup=False, highlight=False)


def _measure() -> list[KernelInfo]:
    """Each kernel with a weight of 4096 x 4096, half of it zeros."""
    weight = torch.nn.Linear(4096, 4096, bias=False)
    configs = [SparseLinearConfig(dtype=dtype, sparsity=0.5) for dtype in DTYPES]
    return [kernel_info(SparseLinear.from_linear(weight, config)) for config in configs]


def collect() -> dict[str, Any]:
    """All that `info` shows, as plain values."""
    from threadpoolctl import threadpool_info

    try:
        cap = isa.current()
    except ValueError as error:  # a wrong TORCH_CPU_EXT_ISA is for `info` to show, not to die of
        cap = f"error: {error}"
    path, version = machine.compiler()
    cache = env.cache_dir()
    return {
        "versions": {"torch_cpu_ext": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "platform": platform.platform(),
        "cpu": {
            "name": isa.cpu_name(),
            "isas": list(isa.supported()),
            "cap": cap,
            "features": sorted(name for name, value in torch.cpu.get_capabilities().items() if value is True),
        },
        "threads": {"cores": len(os.sched_getaffinity(0)), "intraop": torch.get_num_threads(), "interop": torch.get_num_interop_threads()},
        "openmp": [
            {"name": one["prefix"], "path": one["filepath"], "threads": one["num_threads"]}
            for one in threadpool_info()
            if one["user_api"] == "openmp"
        ],
        "compiler": {"command": env.compiler(), "path": path, "version": version},
        "cache": {"path": str(cache), "bytes": machine.folder_bytes(cache)},
        "techniques": {technique: state(technique) for technique in jit.available()},
        "environment": {name: os.environ[name] for name in env.VARIABLES if name in os.environ},
    }


def _speed(kernel: dict[str, Any]) -> str:
    return (
        f"{kernel['isa']}, AMX {'used' if kernel['amx'] else 'not used'}; {kernel['gb_per_s']:.1f} GB/s, "
        f"{kernel['share']:.2f} of a plain read ({kernel['read_gb_per_s']:.1f} GB/s)"
    )


def _lines(values: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, threads, compiler = values["cpu"], values["threads"], values["compiler"]
    found = f"{compiler['version']} ({compiler['path']})" if compiler["path"] else f"{compiler['command']} not found"
    lines = [
        *values["versions"].items(),
        ("platform", values["platform"]),
        ("CPU", cpu["name"]),
        ("instruction sets", ", ".join(cpu["isas"])),
        ("kernels use up to", cpu["cap"]),
        ("CPU features", ", ".join(cpu["features"])),
        ("threads", f"{threads['intraop']} in an op, {threads['interop']} between ops, on {threads['cores']} cores"),
        *((f"OpenMP {one['name']}", f"{one['path']} ({one['threads']} threads)") for one in values["openmp"]),
        ("compiler", found),
        ("cache", f"{values['cache']['path']} ({size(values['cache']['bytes'])})"),
        *values["techniques"].items(),
        *((one["kernel"], _speed(one)) for one in values.get("kernels", ())),
        *values["environment"].items(),
    ]
    if len(values["openmp"]) > 1:
        lines.append(("warning", "more than one OpenMP runtime is loaded: their threads compete for the cores"))
    return lines
