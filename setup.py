"""Builds csrc/ ahead of time where torch and a compiler are at hand.

Elsewhere, in an isolated build above all, the wheel is pure and fastmix compiles the same
sources on first use. pyproject.toml has everything else.
"""

import atexit
import importlib.util
import os
import runpy
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

build = runpy.run_path(str(Path(__file__).parent / "fastmix" / "native" / "build.py"))
torch = importlib.util.find_spec("torch")
ahead = torch is not None and build["compiler"]() is not None


class BuildWithLibrary(build_py):
    def run(self) -> None:
        for stale in (Path(self.build_lib) / "fastmix" / "native").glob("built-*"):
            stale.unlink()
        super().run()
        if ahead and not self.editable_mode:  # a checkout's sources may still change
            folder = Path(torch.origin).parent
            if build["torch_has_cuda"](folder) and build["cuda_compiler"]() is not None:
                try:
                    return self.make(folder, build["cuda_code"]())
                except RuntimeError as error:
                    print(f"fastmix: the kernels for CUDA are left out: {error}", file=sys.stderr)
            self.make(folder)

    def make(self, torch_folder: Path, cuda: Sequence[str] = ()) -> None:
        name = build["name_built_ahead"](bool(cuda))
        target = Path(self.build_lib) / "fastmix" / "native" / name
        build["build"](target, torch_folder, build["show_progress"], cuda=cuda)


class Platform(Distribution):
    def has_ext_modules(self) -> bool:
        return ahead


class WheelForAnyPython(bdist_wheel):
    """With the library in it a wheel fits one platform, but any Python and any torch."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if ahead else tag


here = Path(__file__).parent
elsewhere = {}
if not os.access(here, os.W_OK):  # setuptools builds in the checkout
    folder = tempfile.mkdtemp(prefix="fastmix-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    elsewhere = {"build": {"build_base": folder}, "egg_info": {"egg_base": folder}}

setup(distclass=Platform, options=elsewhere,
      cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": WheelForAnyPython})
