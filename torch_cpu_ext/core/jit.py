"""Builds a technique's C++ library at its first use, keeps it in a cache, loads it.

A build is found again by a hash of everything that shaped it, happens in a temporary folder under an ``flock`` (a killed builder leaves no
lock behind), and appears in the cache by one atomic rename.
"""

import atexit
import contextlib
import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from . import env, isa
from .errors import BuildError, FallbackWarning
from .progress import step

_log = logging.getLogger("torch_cpu_ext.jit")

PACKAGE = Path(__file__).resolve().parent.parent
# In a wheel the sources lie inside the package; in a checkout (an editable install) beside it.
SOURCES = PACKAGE / "_kernels" if (PACKAGE / "_kernels").is_dir() else PACKAGE.parent / "kernels"
PREBUILT = PACKAGE / "_lib"

_FLAGS = (
    "-O3",
    "-fno-math-errno",  # lets rounding and square roots vectorise; NaN and infinities keep their meaning
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # stable ABI of torch 2.10 and later
)


class Library:
    """One technique's library: builds it, loads it, answers for the instruction sets inside.

    Args:
        technique: name of a folder of kernels.
    """

    def __init__(self, technique: str) -> None:
        self.technique = technique
        self.path: Path | None = None  # where it was loaded from
        self.error: BuildError | None = None
        self._lock = threading.RLock()
        self._handle: ctypes.CDLL | None = None

    def load(self) -> bool:
        """Whether the compiled kernels are there; builds and loads them at the first call.

        Raises:
            BuildError: they cannot be built, and ``TORCH_CPU_EXT_STRICT=1``; without it a failure gives one `FallbackWarning`.
        """
        if self._handle is not None:
            return True
        with self._lock:
            if self._handle is not None:
                return True
            if env.flag("DISABLE_JIT"):
                return False
            isa.current()  # a wrong TORCH_CPU_EXT_ISA is an error before a build, which loads what it has made, registers anything
            if self.error is None:
                try:
                    self._open(find_or_build(self.technique))
                    return True
                except BuildError as error:
                    self.error = error
                    if not env.flag("STRICT"):
                        warnings.warn(
                            f"{self.technique}: running the slow PyTorch reference, since the C++ kernels are not available.\n{error}",
                            FallbackWarning,
                            stacklevel=4,
                        )
            if env.flag("STRICT"):
                raise self.error
            return False

    def _open(self, path: Path) -> None:
        level = isa.level(isa.current())
        try:
            handle = ctypes.CDLL(str(path))
            handle.tce_kernel_isa.restype = ctypes.c_int
            handle.tce_set_isa(level, isa.emulated())
            torch.ops.load_library(str(path))
        except (OSError, AttributeError) as error:
            raise BuildError(f"{path} cannot be loaded: {error}\nHint: `torch-cpu-ext clean` empties the cache.") from error
        self.path, self._handle = path, handle

    def apply_isa(self) -> None:
        """Tells the loaded kernels the cap now in force."""
        if self._handle is not None:
            self._handle.tce_set_isa(isa.level(isa.current()), isa.emulated())

    def kernel_isa(self, kernel: str) -> str:
        """The instruction set that ``kernel`` would run with now; ``"reference"`` where PyTorch would run in its place.

        Raises:
            ValueError: the technique has no kernel of that name.
        """
        if not self.load():
            return "reference"
        assert self._handle is not None
        number = self._handle.tce_kernel_isa(kernel.encode())
        if number < 0:
            raise ValueError(f"kernel must name a kernel of {self.technique}, got {kernel!r}")
        return isa.ISAS[number]


_libraries: dict[str, Library] = {}


def library(technique: str) -> Library:
    """The one `Library` of a technique.

    Raises:
        ValueError: there are no kernels of that name.
    """
    if technique not in _libraries:
        if technique not in available():
            raise ValueError(f"technique must be one of {', '.join(available())}, got {technique!r}")
        _libraries.setdefault(technique, Library(technique))
    return _libraries[technique]


def available() -> tuple[str, ...]:
    """The techniques that have kernels."""
    return tuple(sorted({p.parent.name for p in SOURCES.glob("*/binding*.cpp")}))


def load(technique: str) -> bool:
    """Builds or loads a technique's kernels ahead of their first use (before DataLoader workers fork, for instance).

    Args:
        technique: its name, e.g. ``"sparse_linear"``.
    Returns:
        True if the compiled kernels are in place, False if the PyTorch references will run.
    Raises:
        BuildError: they cannot be built, and ``TORCH_CPU_EXT_STRICT=1``.
        ValueError: there are no kernels of that name, or ``TORCH_CPU_EXT_ISA`` names no instruction set of this machine.
    """
    return library(technique).load()


def kernel_isa(technique: str, kernel: str) -> str:
    """The instruction set that a kernel would run with now, e.g. ``kernel_isa("sparse_linear", "int8") -> "avx512_vnni"``.

    Args:
        technique: name of the technique.
        kernel: name of one of its kernels; the technique's page lists them.
    Returns:
        One of `torch_cpu_ext.core.isa.ISAS`, or ``"reference"`` where PyTorch runs instead of a kernel.
    Raises:
        ValueError: there is no such technique or kernel.
    """
    return library(technique).kernel_isa(kernel)


def apply_isa() -> None:
    """Tells all loaded libraries the cap now in force."""
    for one in _libraries.values():
        one.apply_isa()


def isa_files(technique: str, everything: bool | None = None) -> list[str]:
    """The instruction sets, worst to best, that a build takes in: all there are files for, or those this machine can run.

    None leaves the choice to ``TORCH_CPU_EXT_BUILD_ISAS``.
    """
    if everything is None:
        everything = env.text("BUILD_ISAS") == "all"
    names = isa.ISAS if everything else isa.supported()
    return [name for name in names if (SOURCES / technique / f"{name}.cpp").is_file()]


def build_key(technique: str, everything: bool | None = None) -> str:
    """Hash of all that shapes a build except the compiler: sources, flags, `isa_files`, torch and package version."""
    from .. import __version__

    digest = hashlib.sha256()
    for part in (*_FLAGS, *isa_files(technique, everything), torch.__version__, __version__, platform.machine(), sys.platform):
        digest.update(part.encode() + b"\0")
    for folder in ("common", technique):
        for file in sorted((SOURCES / folder).rglob("*")):
            if file.is_file():
                digest.update(str(file.relative_to(SOURCES)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def compiler_id() -> str | None:
    """Short hash of the compiler's path, size and date (running it would cost more than loading the library); None if there is none."""
    command = shlex.split(env.compiler())
    path = shutil.which(command[0]) if command else None
    if path is None:
        return None
    stat = os.stat(path)
    return hashlib.sha256(repr((command, os.path.realpath(path), stat.st_size, stat.st_mtime_ns)).encode()).hexdigest()[:8]


def find_or_build(technique: str) -> Path:
    """Path of the library: prebuilt in the wheel, from the cache, or built now.

    Raises:
        BuildError: there is none and it cannot be built.
    """
    for everything in (True, False) if PREBUILT.is_dir() else ():  # a wheel's libraries are for all machines, or for this one
        prebuilt = PREBUILT / f"{technique}-{build_key(technique, everything)}.so"
        if prebuilt.is_file():
            return prebuilt
    name = f"{technique}-{build_key(technique)}"
    root, compiler = env.cache_dir(), compiler_id()
    if compiler is None:  # a library built with any compiler is better than none
        for folder in sorted(root.glob(f"{name}-*")):
            if (folder / f"{technique}.so").is_file():
                return folder / f"{technique}.so"
        raise BuildError(f"C++ compiler not found: {env.compiler()}\n{_hint('')}")
    target = root / f"{name}-{compiler}" / f"{technique}.so"
    if target.is_file():
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / f"{name}-{compiler}.lock").touch()
    except OSError as error:
        root = _private_folder()
        _log.warning("the cache %s cannot be written (%s): building in %s for this process only", env.cache_dir(), error.strerror, root)
        target = root / target.parent.name / target.name
    with open(root / f"{name}-{compiler}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel drops it with the process, however that ends
        if not target.is_file():
            with step(f"building {technique} (once; kept in {root})"):
                _build(technique, target)
    return target


def _private_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="torch_cpu_ext-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _build(technique: str, target: Path) -> None:
    """Compiles into a temporary folder beside ``target.parent``, then renames it into place."""
    from torch.utils import cpp_extension

    prefix = f".{target.parent.name}-"
    try:
        for stale in target.parent.parent.glob(f"{prefix}*"):  # what a killed builder left: the lock is ours, so nobody works there
            shutil.rmtree(stale, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent.parent))
    except OSError as error:
        raise BuildError(f"building {technique} failed:\n{error}\n{_hint(str(error))}") from error
    name = f"torch_cpu_ext_{technique}_{work.name[-8:]}"
    try:
        flags = [*_FLAGS, f"-fmacro-prefix-map={SOURCES}=kernels", f"-I{SOURCES}"]
        with _build_environment():
            cpp_extension.load(
                name=name,
                sources=[str(f) for f in _sources(technique, work)],
                extra_cflags=flags,
                build_directory=str(work),
                is_python_module=False,
                verbose=env.flag("VERBOSE"),
            )
        os.rename(work / f"{name}.so", work / target.name)
        for file in work.iterdir():  # objects and ninja files are not worth keeping
            if file != work / target.name:
                file.unlink()
        if target.parent.exists():  # a folder without the library, left by something else
            shutil.rmtree(target.parent)
        os.replace(work, target.parent)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise BuildError("\n".join([f"building {technique} failed:", *lines[:30], _hint(str(error))])) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sources(technique: str, work: Path) -> list[Path]:
    """What to compile, in the order in which compilers start: what takes long comes first, so that no core waits at the end.

    The bindings become one source, written into ``work``: to read torch's headers takes longer than to compile one of them.
    """
    folder = SOURCES / technique
    bindings = work / "bindings.cpp"
    bindings.write_text("".join(f'#include "{file}"\n' for file in sorted(folder.glob("binding*.cpp"))))
    kernels = [folder / f"{name}.cpp" for name in reversed(isa_files(technique)) if _compiles(name)]
    others = [file for file in sorted(folder.glob("*.cpp")) if file.stem not in isa.ISAS and not file.stem.startswith("binding")]
    return [bindings, *kernels, *others]


@contextlib.contextmanager
def _build_environment() -> Iterator[None]:
    """CXX and MAX_JOBS as `cpp_extension` reads them, for the time of a build."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    jobs = max(1, min(len(os.sched_getaffinity(0)), pages >> 30))
    values = {"CXX": env.compiler(), "MAX_JOBS": os.environ.get("MAX_JOBS", str(jobs))}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _compiles(name: str) -> bool:
    """Whether the compiler knows an instruction set; a file it does not know is left out of the build."""
    if name == "scalar":
        return True
    program = f'#include "common/region_{name}.h"\nint f() {{ return 0; }}\n#include "common/region_end.h"\n'
    command = [*shlex.split(env.compiler()), "-std=c++20", "-fsyntax-only", "-Werror", f"-I{SOURCES}", "-x", "c++", "-"]
    done = subprocess.run(command, input=program, text=True, capture_output=True)
    if done.returncode:
        _log.warning("the compiler %s does not know %s: its kernels are left out", env.compiler(), name)
        _log.info("%s", done.stderr)
    return done.returncode == 0


def _hint(message: str) -> str:
    if "ninja" in message.lower() and "required" in message.lower():
        return "Hint: `pip install ninja`."
    if "No space left" in message:
        return "Hint: free some space, or name another folder in TORCH_CPU_EXT_CACHE_DIR."
    if shutil.which(shlex.split(env.compiler())[0]) is None:
        return "Hint: install a C++20 compiler (`apt install g++`), or name yours in TORCH_CPU_EXT_CXX."
    return (
        f"Hint: the compiler must know C++20 (g++ 11 or clang 14); this is {env.compiler()}. TORCH_CPU_EXT_VERBOSE=1 shows the whole log."
    )
