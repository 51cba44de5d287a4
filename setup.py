"""Builds wheels and sdists; settings are in pyproject.toml.

The C++ sources go into the package as ``torch_cpu_ext/_kernels`` and are compiled at first use. With ``TORCH_CPU_EXT_PREBUILD=1`` the
compiled libraries go in too (`--no-build-isolation` is needed then, since torch compiles them).
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PREBUILD = os.environ.get("TORCH_CPU_EXT_PREBUILD", "0") not in ("", "0")


class BuildWithKernels(build_py):
    """Adds compiled libraries to the build folder when asked to."""

    def run(self) -> None:
        super().run()
        if not PREBUILD or self.editable_mode:
            return
        sys.path.insert(0, str(ROOT))
        from torch_cpu_ext.core import jit

        target = Path(self.build_lib) / "torch_cpu_ext" / "_lib"
        target.mkdir(parents=True, exist_ok=True)
        for technique in jit.available():
            shutil.copy(jit.find_or_build(technique), target / f"{technique}-{jit.build_key(technique)}.so")


class PlatformWheel(Distribution):
    """A distribution whose wheel is for this platform when libraries are inside."""

    def has_ext_modules(self) -> bool:
        return PREBUILD


setup(
    packages=[*find_packages(include=["torch_cpu_ext*"]), "torch_cpu_ext._kernels"],
    package_dir={"torch_cpu_ext._kernels": "kernels"},
    package_data={"torch_cpu_ext": ["py.typed"], "torch_cpu_ext._kernels": ["**/*.h", "**/*.cpp", "**/*.inl"]},
    cmdclass={"build_py": BuildWithKernels},
    distclass=PlatformWheel,
)
