"""The C++ and CUDA kernels: what runs where, and their registration.

    build.py    compilers, flags, compiling csrc/; standard library only, setup.py runs it
    library.py  the compiled library: built ahead, in the user's cache, or compiled on first use
    cuda.py     fft_conv on GPUs: the wrapper round its kernels, their limits and shapes

A library registers its own kernels for CPUs when torch loads it.
"""

import functools
import warnings
from collections.abc import Callable

import torch

from fastmix.native import build, cuda, library
from fastmix.ops._register import LIBRARY, OPERATORS, on_first_use

# By device: the operators that have a file of their name.
KERNELS = {device: tuple(sorted({file.stem for file in build.sources().glob(f"{device}/*.cpp")}
                                & set(OPERATORS)))
           for device in ("cpu", "cuda")}


def why_not(operator: str, device_type: str) -> str | None:
    """None if the kernels of `operator` run on such tensors here, else the reason."""
    if device_type not in KERNELS:
        return f"the C++ kernels are for cpu and cuda, not for {device_type}"
    if operator not in KERNELS[device_type]:
        return f"{operator} has no {'CUDA ' if device_type == 'cuda' else ''}C++ kernel"
    return library.why_not(device_type)


def prepare() -> None:
    """Compiles the library for CPUs, if need be, and loads it. RuntimeError where it cannot."""
    library.load("cpu")


def forced(operator: str, device_type: str) -> tuple[Callable, ...] | None:
    """(forward, backward) for GPUs; nothing is ever registered over the kernels for CPUs."""
    if device_type == "cpu":
        return None
    return tuple(functools.partial(cuda.run, f"{operator}{suffix}", True)
                 for suffix in ("", "_backward"))


def _first_use() -> bool:
    """Compiles the library for CPUs. Whether torch has its kernels now."""
    try:
        prepare()
    except RuntimeError as error:
        warnings.warn(f"fastmix runs its pure PyTorch fallback on the CPU: {error}",
                      RuntimeWarning, stacklevel=2)
        return False
    return True


def register() -> None:
    """Registers the kernels that are there already; others come on first use."""
    # Without a look at the devices: that is for first use.
    if torch.backends.cuda.is_built() and torch.version.hip is None:
        for operator in KERNELS["cuda"]:
            for name in (operator, f"{operator}_backward"):
                LIBRARY.impl(name, functools.partial(cuda.run, name, False), "CUDA")
    try:
        if library.existing("cpu") is not None:
            return prepare()
    except RuntimeError:
        pass  # first use gives the reason
    on_first_use("cpu", _first_use)


register()
