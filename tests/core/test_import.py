"""Importing is cheap: no compiler, no extra, nothing heavy that torch itself does not import; and the ops are there."""

import torch_cpu_ext as tce

from support import run_python, succeeded

HEAVY = ["torch.utils.cpp_extension", "torch._dynamo", "torch._inductor", "transformers", "typer", "rich", "safetensors", "tqdm", "ninja"]
HEAVY += ["setuptools", "psutil", "threadpoolctl", "gguf", "accelerate", "numpy.testing", "torch.testing", "unittest"]


def test_lean():
    code = """
        import sys
        import torch
        before = set(sys.modules)
        import torch_cpu_ext
        print(*sorted(set(sys.modules) - before))
    """
    added = succeeded(run_python(code)).split()
    heavy = [name for name in added if any(name == h or name.startswith(f"{h}.") for h in HEAVY)]
    assert not heavy
    foreign = {name.split(".")[0] for name in added} - {"torch_cpu_ext", "torch"}
    assert foreign <= {"fcntl", "progress"} | set(__import__("sys").stdlib_module_names), foreign


def test_no_compiler_and_no_cache(tmp_path):
    """Importing, tracing, and building modules on the meta device start no process and write no file."""
    code = """
        import subprocess, os
        def forbidden(*args, **kwargs): raise AssertionError(f"started {args}")
        import torch
        subprocess.Popen.__init__ = forbidden
        os.system = os.posix_spawn = forbidden
        import torch_cpu_ext as tce
        for name in ("sparse_linear", "sparse_linear_pack", "sparse_linear_unpack", "sparse_linear_check"):
            assert getattr(torch.ops.torch_cpu_ext, name).default is not None
        x, packed = torch.empty(3, 8, device="meta"), torch.empty(100, dtype=torch.uint8, device="meta")
        assert torch.ops.torch_cpu_ext.sparse_linear(x, packed, None, 5).shape == (3, 5)
        tce.SparseLinear(8, 5, device="meta")
        repr(tce.SparseLinear(8, 5))
        tce.report(torch.nn.Linear(2, 2))
    """
    succeeded(run_python(code, TORCH_CPU_EXT_CACHE_DIR=str(tmp_path / "cache"), TORCH_CPU_EXT_STRICT="1"))
    assert not (tmp_path / "cache").exists()


def test_variables_do_not_matter_at_import():
    """A wrong one is an error where it is used."""
    succeeded(
        run_python("import torch_cpu_ext", TORCH_CPU_EXT_ISA="nonsense", TORCH_CPU_EXT_CACHE_DIR="/dev/null/x", TORCH_CPU_EXT_STRICT="1")
    )


def test_public_names():
    for name in tce.__all__:
        assert getattr(tce, name) is not None
    assert sorted(tce.__all__) == tce.__all__


def test_import_twice_and_in_a_thread():
    code = """
        import threading, torch
        errors = []
        def load():
            try:
                import torch_cpu_ext
            except BaseException as error:
                errors.append(error)
        threads = [threading.Thread(target=load) for _ in range(4)]
        for t in threads: t.start()
        for t in threads: t.join()
        assert not errors, errors
    """
    succeeded(run_python(code))
