"""Builds the torch-free kernels under the address and undefined-behaviour sanitizers and runs them; `make sanitize` starts it.

Every ``tests/<technique>/sanitize_main.cpp`` is linked with the format and kernel files of its technique that this machine can run. Where
only AMX is missing, it is emulated, and the sanitizers see every byte that its instructions read and write.
"""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch_cpu_ext.core import env, isa

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    "-std=c++20",
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
    "-w",
]


def main() -> int:
    isas, emulator = isa.supported(), []
    if isas[-1] == "avx512_bf16":
        isas, emulator = isa.ISAS, [ROOT / "tests" / "amx_emulator" / "emulator.cpp"]
    for program in sorted((ROOT / "tests").glob("*/sanitize_main.cpp")):
        technique = program.parent.name
        folder = ROOT / "kernels" / technique
        sources = [
            f for f in sorted(folder.glob("*.cpp")) if not f.stem.startswith("binding") and (f.stem not in isa.ISAS or f.stem in isas)
        ]
        with tempfile.TemporaryDirectory() as work:

            def compile(source: Path, folder: Path = folder, work: str = work) -> Path:
                target = Path(work) / f"{source.stem}.o"
                subprocess.run([env.compiler(), *FLAGS, f"-I{folder}", "-c", str(source), "-o", str(target)], check=True)
                return target

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(compile, [*sources, *emulator, program]))
            binary = Path(work) / "sanitize"
            subprocess.run([env.compiler(), *FLAGS, *map(str, objects), "-o", str(binary)], check=True)
            print(f"{technique}: {', '.join(f.stem for f in sources + emulator)}: ", end="", flush=True)
            # Not with detect_stack_use_after_return: gcc misaligns 64-byte vectors on that stack (gcc bug 110027).
            options = {"ASAN_OPTIONS": "detect_stack_use_after_return=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
            done = subprocess.run([str(binary)], env=os.environ | options)
            if done.returncode:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
