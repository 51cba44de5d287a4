"""The loader: killed builders, races, missing and broken compilers, caches that cannot be written, what makes a build another one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import pytest
import torch

from torch_cpu_ext import BuildError, FallbackWarning
from torch_cpu_ext.core import env, isa, jit

from support import ROOT, TESTS, environment, run_python, succeeded

# A technique that compiles in a second: no ops, only the loader's hooks.
TOY = """
extern "C" {
__attribute__((visibility("default"))) int tce_cap = -1;
__attribute__((visibility("default"))) void tce_set_isa(int isa, int) { tce_cap = isa; }
__attribute__((visibility("default"))) int tce_kernel_isa(const char* name) { return name[0] == 'k' ? tce_cap : -1; }
}
"""
TOY_SETUP = """
import os, pathlib, sys, threading
from torch_cpu_ext.core import jit
jit.SOURCES = pathlib.Path(os.environ["TOY_SOURCES"])
"""
CALL = """
import json, sys, warnings, torch, torch_cpu_ext
from torch_cpu_ext.core import jit
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(3):
        packed = torch.ops.torch_cpu_ext.sparse_linear_pack(torch.eye(5), dtype="int8")
        torch.ops.torch_cpu_ext.sparse_linear(torch.ones(2, 5), packed, None, 5)
print(json.dumps({
    "warnings": [[w.category.__name__, str(w.message)] for w in seen if w.category.__name__ == "FallbackWarning"],
    "path": str(jit.library("sparse_linear").path),
    "kernel": torch_cpu_ext.kernel_isa("sparse_linear", "int8"),
    "built": "torch.utils.cpp_extension" in sys.modules,
}))
"""


@pytest.fixture
def toy(tmp_path):
    """Environment of a process whose only technique is the toy, with an empty cache."""
    sources = tmp_path / "kernels"
    shutil.copytree(ROOT / "kernels" / "common", sources / "common")
    (sources / "toy").mkdir()
    (sources / "toy" / "binding.cpp").write_text(TOY)
    return {"TOY_SOURCES": str(sources), "TORCH_CPU_EXT_CACHE_DIR": str(tmp_path / "cache"), "TORCH_CPU_EXT_STRICT": "1"}


@pytest.fixture
def toy_here(toy, monkeypatch):
    """The same in this process."""
    for name, value in toy.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jit, "SOURCES", type(ROOT)(toy["TOY_SOURCES"]))
    return jit.Library("toy")


@pytest.fixture
def cache(library, tmp_path):
    """A copy of a cache that holds the built library."""
    if library.is_relative_to(jit.PREBUILT):
        pytest.skip("a prebuilt library is in use")
    shutil.copytree(library.parent, tmp_path / "cache" / library.parent.name)
    return tmp_path / "cache"


def libraries(cache):
    return sorted(str(p.relative_to(cache)) for p in type(ROOT)(cache).rglob("*.so"))


def compiler_script(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def start(code, **env_):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment(**env_),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=TESTS,
        start_new_session=True,
    )


# --------------------------------------------------------------------------------------------------------------------------- the happy way


def test_builds_once_and_keeps_only_the_library(toy_here, tmp_path):
    assert toy_here.load()
    assert toy_here.path.is_relative_to(tmp_path / "cache")
    assert toy_here.kernel_isa("k") == isa.current()
    with isa.isa("scalar"):
        toy_here.apply_isa()
        assert toy_here.kernel_isa("k") == "scalar"
    toy_here.apply_isa()
    assert [p.name for p in toy_here.path.parent.iterdir()] == ["toy.so"]
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name.startswith(".")]
    again = jit.Library("toy")
    assert again.load()
    assert again.path == toy_here.path
    with pytest.raises(ValueError, match="kernel must name a kernel of toy, got 'other'"):
        toy_here.kernel_isa("other")


def test_bindings_are_one_source(toy_here, tmp_path):
    """Torch's headers are read once, whatever the number of bindings."""
    folder = jit.SOURCES / "toy"
    (folder / "format.cpp").write_text("int tce_format() { return 1; }\n")
    (folder / "binding_more.cpp").write_text('extern "C" __attribute__((visibility("default"))) int tce_more() { return tce_cap; }\n')
    assert [file.name for file in jit._sources("toy", tmp_path)] == ["bindings.cpp", "format.cpp"]
    assert toy_here.load()
    assert toy_here._handle.tce_more() == isa.level(isa.current())


def test_a_built_library_is_used(cache):
    """No compiler, no build machinery, no warning: just the file."""
    facts = json.loads(succeeded(run_python(CALL, TORCH_CPU_EXT_CACHE_DIR=str(cache), TORCH_CPU_EXT_STRICT="1")))
    assert facts["path"].startswith(str(cache))
    assert facts["warnings"] == []
    assert not facts["built"]
    assert facts["kernel"] in isa.ISAS


def test_a_built_library_is_used_without_a_compiler(cache):
    done = run_python(CALL, TORCH_CPU_EXT_CACHE_DIR=str(cache), TORCH_CPU_EXT_STRICT="1", TORCH_CPU_EXT_CXX="/nonexistent/c++")
    facts = json.loads(succeeded(done))
    assert facts["path"].startswith(str(cache))
    assert facts["warnings"] == []


def test_unknown_technique():
    with pytest.raises(ValueError, match=r"technique must be one of .*sparse_linear.*, got 'dense_linear'"):
        jit.load("dense_linear")


# -------------------------------------------------------------------------------------------------------------------- kills and races


def test_killed_builder(toy, tmp_path):
    """A build that is killed, children and all, blocks nobody; the next process builds."""
    slow = compiler_script(tmp_path / "c++", 'case "$*" in *binding*) sleep 100;; esac; exec g++ "$@"')
    first = start(TOY_SETUP + "jit.load('toy')", **toy, TORCH_CPU_EXT_CXX=slow)
    cache = type(ROOT)(toy["TORCH_CPU_EXT_CACHE_DIR"])
    deadline = time.monotonic() + 60
    while not list(cache.glob(".toy*/build.ninja")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert first.poll() is None
    assert list(cache.glob(".*/build.ninja"))
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert libraries(cache) == []
    compiler_script(tmp_path / "c++", 'exec g++ "$@"')
    # a compiler of another size and date has another key: make the lock the killed one held the one to be taken
    os.utime(tmp_path / "c++", ns=(1, 1))
    succeeded(run_python(TOY_SETUP + "assert jit.load('toy'); print(jit.library('toy').path)", **toy, TORCH_CPU_EXT_CXX=slow, timeout=120))
    assert len(libraries(cache)) == 1


def test_killed_builder_with_the_same_compiler(toy):
    """The lock of the very same build, and the folder the killed one left, are no obstacle."""
    cache = type(ROOT)(toy["TORCH_CPU_EXT_CACHE_DIR"])
    code = TOY_SETUP + "jit._build = lambda *a: (print('building', flush=True), __import__('time').sleep(100))\njit.load('toy')"
    first = start(code, **toy)
    assert first.stdout.readline() == "building\n"
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert len(list(cache.glob("*.lock"))) == 1
    (left,) = (cache / f".{lock.stem}-left" for lock in cache.glob("*.lock"))  # as a builder killed in the middle leaves it
    left.mkdir()
    succeeded(run_python(TOY_SETUP + "assert jit.load('toy')", **toy, timeout=120))
    assert len(libraries(cache)) == 1
    assert len(list(cache.glob("*.lock"))) == 1
    assert list(cache.glob(".*")) == []


COUNTED = """
real = jit._build
def counted(*args):
    print("built", flush=True)
    real(*args)
jit._build = counted
"""


def test_two_processes_race(toy):
    """One builds, the other waits; both end with kernels."""
    code = TOY_SETUP + COUNTED + "assert jit.load('toy'); print(jit.kernel_isa('toy', 'k'))"
    both = [start(code, **toy) for _ in range(2)]
    outputs = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sorted(o[0].count("built") for o in outputs) == [0, 1]
    assert all(o[0].split()[-1] == isa.supported()[-1] for o in outputs)
    assert len(libraries(toy["TORCH_CPU_EXT_CACHE_DIR"])) == 1


def test_eight_threads_race(toy):
    code = (
        TOY_SETUP
        + COUNTED
        + """
barrier, results = threading.Barrier(8), []
def call():
    barrier.wait()
    results.append((jit.load("toy"), jit.kernel_isa("toy", "k")))
threads = [threading.Thread(target=call) for _ in range(8)]
for t in threads: t.start()
for t in threads: t.join()
assert len(results) == 8 and len(set(results)) == 1 and results[0][0], results
"""
    )
    assert succeeded(run_python(code, **toy)).count("built") == 1


def test_eight_threads_make_the_first_call_of_an_op(cache):
    """All of them get the kernel; the reference, which must not run, would raise."""
    code = """
        import threading, torch, torch_cpu_ext
        from torch_cpu_ext.core import registry, jit
        from torch_cpu_ext.sparse_linear import ops
        def forbidden(*args, **kwargs): raise AssertionError("the reference ran")
        ops._read_header = forbidden
        ops._inverse = forbidden
        barrier, results, weight = threading.Barrier(8), [], torch.randn(40, 30)
        def call():
            barrier.wait()
            results.append(torch.ops.torch_cpu_ext.sparse_linear_pack(weight, dtype="int8"))
        threads = [threading.Thread(target=call) for _ in range(8)]
        for t in threads: t.start()
        for t in threads: t.join()
        assert len(results) == 8 and all(r.equal(results[0]) for r in results)
        """
    succeeded(run_python(code, TORCH_CPU_EXT_CACHE_DIR=str(cache), TORCH_CPU_EXT_STRICT="1"))


# ------------------------------------------------------------------------------------------------------------------- without kernels


def test_no_compiler(tmp_path):
    """The reference runs, after exactly one warning that says what to do."""
    facts = json.loads(succeeded(run_python(CALL, TORCH_CPU_EXT_CACHE_DIR=str(tmp_path), TORCH_CPU_EXT_CXX="/nonexistent/c++")))
    ((category, message),) = facts["warnings"]
    assert category == "FallbackWarning"
    assert "sparse_linear" in message
    assert "/nonexistent/c++" in message
    assert "Hint: install a C++20 compiler" in message
    assert facts["kernel"] == "reference"
    assert not facts["built"]


def test_no_compiler_strict(tmp_path):
    code = """
        import torch, torch_cpu_ext
        for _ in range(2):  # at every call, not only at the first
            try:
                torch.ops.torch_cpu_ext.sparse_linear_pack(torch.eye(5))
            except torch_cpu_ext.BuildError as error:
                print(error)
            else:
                raise AssertionError("nothing was raised")
    """
    done = run_python(code, TORCH_CPU_EXT_CACHE_DIR=str(tmp_path), TORCH_CPU_EXT_CXX="/nonexistent/c++", TORCH_CPU_EXT_STRICT="1")
    text = succeeded(done)
    assert text.count("C++ compiler not found: /nonexistent/c++") == 2
    assert text.count("Hint: install a C++20 compiler (`apt install g++`), or name yours in TORCH_CPU_EXT_CXX.") == 2


def test_compiler_that_fails(toy_here, tmp_path, monkeypatch):
    """The message has the compiler's first lines and a hint; nothing is left behind; the next load does not try again."""
    log = tmp_path / "log"
    body = f'case "$*" in *--version*|*-fsyntax-only*) exec g++ "$@";; esac; echo "$*" >> {log}'
    script = compiler_script(tmp_path / "c++", f'{body}; echo "binding.cpp:1: error: the moon is in the wrong phase" >&2; exit 1')
    monkeypatch.setenv("TORCH_CPU_EXT_CXX", script)
    with pytest.raises(BuildError, match="the moon is in the wrong phase") as caught:
        toy_here.load()
    assert "building toy failed" in str(caught.value)
    assert "Hint: the compiler must know C++20" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 33
    assert libraries(tmp_path / "cache") == []
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    tries = log.read_text().count("\n")
    with pytest.raises(BuildError, match="the moon is in the wrong phase"):
        toy_here.load()
    assert log.read_text().count("\n") == tries
    monkeypatch.setenv("TORCH_CPU_EXT_STRICT", "0")
    other = jit.Library("toy")
    with pytest.warns(FallbackWarning, match="the moon is in the wrong phase"):
        assert not other.load()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not other.load()  # and not a second time
    assert other.kernel_isa("k") == "reference"


def test_compiler_that_cannot_even_tell_its_version(toy_here, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_CPU_EXT_CXX", compiler_script(tmp_path / "c++", "exit 1"))
    with pytest.raises(BuildError, match="building toy failed") as caught:
        toy_here.load()
    assert f"{tmp_path / 'c++'}" in str(caught.value)
    assert "Hint" in str(caught.value)


def test_failed_link(toy_here, tmp_path, monkeypatch):
    script = compiler_script(tmp_path / "c++", 'case "$*" in *-shared*) echo "ld: No space left on device"; exit 1;; esac; exec g++ "$@"')
    monkeypatch.setenv("TORCH_CPU_EXT_CXX", script)
    with pytest.raises(BuildError, match="Hint: free some space"):
        toy_here.load()
    assert libraries(tmp_path / "cache") == []


def test_cache_that_cannot_be_written(toy_here, tmp_path, monkeypatch, caplog):
    """Builds in a folder of this process, with a log line; even root cannot make a folder under a file."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_CPU_EXT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert toy_here.load()
    assert not toy_here.path.is_relative_to(tmp_path)
    assert "cannot be written" in caplog.text
    monkeypatch.setenv("TORCH_CPU_EXT_CACHE_DIR", "/dev/null/x")
    monkeypatch.setenv("TORCH_CPU_EXT_CXX", "/nonexistent/c++")
    with pytest.raises(BuildError, match="compiler not found"):
        jit.Library("toy").load()


def test_the_private_folder_goes_with_its_process(toy, tmp_path):
    toy["TORCH_CPU_EXT_CACHE_DIR"] = "/dev/null/x"
    (tmp_path / "tmp").mkdir()
    succeeded(run_python(TOY_SETUP + "assert jit.load('toy')", **toy, TMPDIR=str(tmp_path / "tmp")))
    assert list((tmp_path / "tmp").glob("torch_cpu_ext-*")) == []


def test_disable_jit(tmp_path):
    facts = json.loads(succeeded(run_python(CALL, TORCH_CPU_EXT_CACHE_DIR=str(tmp_path / "c"), TORCH_CPU_EXT_DISABLE_JIT="1")))
    assert facts["warnings"] == []
    assert facts["kernel"] == "reference"
    assert facts["path"] == "None"
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF" + bytes(60)])
def test_corrupt_library(toy_here, content):
    """A clear error that names the file and what to do."""
    path = jit.find_or_build("toy")
    path.unlink()  # the building process has it mapped
    path.write_bytes(content)
    with pytest.raises(BuildError, match="cannot be loaded") as caught:
        toy_here.load()
    assert str(path) in str(caught.value)
    assert "Hint" in str(caught.value)


def test_library_without_hooks(toy_here):
    """Another library under the right name."""
    source = jit.SOURCES / "toy" / "binding.cpp"
    source.write_text("int nothing;")
    with pytest.raises(BuildError, match="cannot be loaded"):
        toy_here.load()


def test_folder_without_library(toy_here, tmp_path):
    """Whatever lies at the place of a build is replaced."""
    path = jit.find_or_build("toy")
    path.unlink()
    (path.parent / "other").write_text("")
    assert toy_here.load()
    assert [p.name for p in path.parent.iterdir()] == ["toy.so"]


# --------------------------------------------------------------------------------------------------------- instruction sets by variable


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("name", ["avx1024", "AVX2", "amx"])
def test_wrong_isa(name, built, toy, cache):
    """A ValueError that names the variable and what is accepted, at every call, with and without a built library."""
    if name in isa.supported():
        pytest.skip(f"this machine has {name}")
    code = """
        import torch, torch_cpu_ext
        for _ in range(3):
            try:
                torch.ops.torch_cpu_ext.sparse_linear_pack(torch.eye(5))
            except ValueError as error:
                print(error)
            else:
                raise AssertionError("nothing was raised")
    """
    if not built:  # a build loads what it has made: the check must come before
        code = code.replace("import torch, torch_cpu_ext", "import torch, torch_cpu_ext\n        from torch_cpu_ext.core import jit")
        code = code.replace("for _", "jit._build = lambda *a: exit('built before the check')\n        for _")
        cache = cache / "empty"
    text = succeeded(run_python(code, TORCH_CPU_EXT_CACHE_DIR=str(cache), TORCH_CPU_EXT_ISA=name, TORCH_CPU_EXT_STRICT="1"))
    assert text.count("TORCH_CPU_EXT_ISA must be ") == 3
    assert f"got '{name}'" in text
    for accepted in isa.supported():
        assert accepted in text


@pytest.mark.parametrize("name", isa.supported())
def test_isa_by_variable(name, cache):
    facts = json.loads(succeeded(run_python(CALL, TORCH_CPU_EXT_CACHE_DIR=str(cache), TORCH_CPU_EXT_ISA=name, TORCH_CPU_EXT_STRICT="1")))
    assert facts["kernel"] == min(name, "avx512_vnni", key=isa.ISAS.index)


# ------------------------------------------------------------------------------------------------------------------------ what is a build


def test_changed_source_is_another_build(tmp_path, monkeypatch):
    copy = tmp_path / "kernels"
    shutil.copytree(ROOT / "kernels", copy)
    monkeypatch.setattr(jit, "SOURCES", copy)
    keys = {jit.build_key("sparse_linear")}
    for file in ("common/isa.h", "sparse_linear/sparse_linear.inl", "sparse_linear/binding.cpp"):
        (copy / file).write_text((copy / file).read_text() + "\n")
        keys.add(jit.build_key("sparse_linear"))
    (copy / "sparse_linear" / "new.cpp").write_text("")
    keys.add(jit.build_key("sparse_linear"))
    (copy / "sparse_linear" / "new.cpp").rename(copy / "sparse_linear" / "newer.cpp")
    keys.add(jit.build_key("sparse_linear"))
    assert len(keys) == 6
    (copy / "other").mkdir()
    (copy / "other" / "binding.cpp").write_text("")
    assert jit.build_key("sparse_linear") in keys  # another technique's files are none of its business


def test_copied_sources_are_the_same_build(tmp_path, monkeypatch):
    key = jit.build_key("sparse_linear")
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    monkeypatch.setattr(jit, "SOURCES", tmp_path / "kernels")
    assert jit.build_key("sparse_linear") == key


def test_versions_flags_and_isas_are_part_of_the_key(monkeypatch):
    import torch_cpu_ext

    keys = [jit.build_key("sparse_linear")]
    for target, name, value in [
        (torch, "__version__", "2.99.0"),
        (torch_cpu_ext, "__version__", "0.0.0"),
        (jit, "_FLAGS", ("-O0",)),
        (isa, "supported", lambda: ("scalar",)),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            keys.append(jit.build_key("sparse_linear"))
    with monkeypatch.context() as patch:
        patch.setenv("TORCH_CPU_EXT_BUILD_ISAS", "all")
        if isa.supported() != isa.ISAS:
            keys.append(jit.build_key("sparse_linear"))
    assert len(set(keys)) == len(keys)
    assert jit.build_key("sparse_linear") == keys[0]


def test_compiler_is_part_of_the_name(tmp_path, monkeypatch):
    ids = set()
    for body in ("a", "bc"):
        monkeypatch.setenv("TORCH_CPU_EXT_CXX", compiler_script(tmp_path / body, body))
        ids.add(jit.compiler_id())
        monkeypatch.setenv("TORCH_CPU_EXT_CXX", f"{tmp_path / body} -with -flags")
        ids.add(jit.compiler_id())
    assert len(ids) == 4
    monkeypatch.setenv("TORCH_CPU_EXT_CXX", "/nonexistent/c++")
    assert jit.compiler_id() is None


def test_variables_are_read_at_use(monkeypatch):
    monkeypatch.setenv("TORCH_CPU_EXT_CACHE_DIR", "~/somewhere")
    assert env.cache_dir() == type(ROOT).home() / "somewhere"
    monkeypatch.delenv("TORCH_CPU_EXT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert env.cache_dir() == type(ROOT)("/xdg/torch_cpu_ext")
    monkeypatch.delenv("TORCH_CPU_EXT_CXX", raising=False)
    monkeypatch.setenv("CXX", "clang++")
    assert env.compiler() == "clang++"
    monkeypatch.setenv("TORCH_CPU_EXT_CXX", " other ")
    assert env.compiler() == "other"
    for value, expected in [("", False), ("0", False), ("1", True), ("yes", True)]:
        monkeypatch.setenv("TORCH_CPU_EXT_VERBOSE", value)
        assert env.flag("VERBOSE") is expected


def test_every_variable_that_is_read_is_documented():
    import re

    read = set()
    for file in (ROOT / "torch_cpu_ext").rglob("*.py"):
        read |= {f"TORCH_CPU_EXT_{name}" for name in re.findall(r"""env\.(?:text|flag)\(["'](\w+)["']\)""", file.read_text())}
    assert read <= set(env.VARIABLES)


def test_compiler_environment_is_restored(toy_here, monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setenv("CXX", "before")
    monkeypatch.setenv("TORCH_CPU_EXT_CXX", "g++")
    assert toy_here.load()
    assert os.environ["CXX"] == "before"
    assert "MAX_JOBS" not in os.environ


def test_a_compiler_that_knows_no_avx512(toy_here, tmp_path, monkeypatch):
    """Files of instruction sets the compiler rejects are left out, and the rest works."""
    for name in isa.supported():
        (jit.SOURCES / "toy" / f"{name}.cpp").write_text(f"int in_{name};")
    script = compiler_script(
        tmp_path / "c++",
        'case "$*" in *-fsyntax-only*) if grep -q region_avx512; then exit 1; else exit 0; fi;; esac; '
        f'echo "$*" >> {tmp_path}/log; exec g++ "$@"',
    )
    monkeypatch.setenv("TORCH_CPU_EXT_CXX", script)
    assert toy_here.load()
    log = (tmp_path / "log").read_text()
    assert "scalar.cpp" in log
    assert "avx512.cpp" not in log
