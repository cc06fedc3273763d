"""Builds csrc/ ahead of time where torch and a compiler are at hand.

Elsewhere, in an isolated build above all, the wheel is pure and fastmix compiles the same
sources on first use. pyproject.toml has everything else.
"""

import importlib.util
import runpy
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

build = runpy.run_path(str(Path(__file__).parent / "fastmix" / "_build.py"))
torch = importlib.util.find_spec("torch")
ahead = torch is not None and build["compiler"]() is not None


class BuildWithLibrary(build_py):
    def run(self):
        super().run()
        if ahead and not self.editable_mode:  # a checkout's sources may still change
            folder = Path(torch.origin).parent
            cuda = build["torch_has_cuda"](folder) and build["cuda_compiler"]() is not None
            name = f"_native{'-cuda' if cuda else ''}-{build['fingerprint']()}.so"
            build["build"](Path(self.build_lib) / "fastmix" / name, folder, build["show_progress"],
                           cuda=build["cuda_code"]() if cuda else ())


class Platform(Distribution):
    def has_ext_modules(self):
        return ahead


class WheelForAnyPython(bdist_wheel):
    """With the library in it a wheel fits one platform, but any Python and any torch."""

    def get_tag(self):
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if ahead else tag


setup(distclass=Platform,
      cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": WheelForAnyPython})
