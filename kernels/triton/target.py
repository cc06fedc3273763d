"""What kernels are compiled for, and how they are launched there.

Every launcher's choices (tiles, warps, stages of pipelined loads, registers) are rows of a Table
in its own file. "Counted" in a reason means: when the row was written, with Triton 3.6 to 3.9, what
the compiler made of the kernel without it was looked at, as bench/triton_static.py does. The table
of that program says what became of the rows; of the choices that lost nobody keeps a table, so
another version of Triton may not need the row. No row has been measured on a GPU yet.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton

from fastmix._triton import interpreted

# Kinds of target with choices of their own. sm80: compute capability 8.x; sm90: 9.0; sm100: 10.x;
# sm120: beyond, with as little shared memory as 8.6.
CUDA = "sm80 sm90 sm100 sm120"
FAMILIES = (*CUDA.split(), "amd", "interpreter")
ANY = "*"


# As @triton.jit finds it when the kernels' files are imported.
INTERPRETED = interpreted()


def _device() -> Any:
    """Returns what a target is looked up by: the current device, or None in the interpreter."""
    return None if INTERPRETED else triton.runtime.driver.active.get_current_device()


@functools.cache
def _target(device: Any) -> tuple[str, Any]:
    """Returns the backend and the architecture of the current device."""
    if INTERPRETED:
        return "interpreter", 0
    target = triton.runtime.driver.active.get_current_target()
    return target.backend, target.arch


def arch() -> int:
    """Returns the compute capability, 90 for 9.0, or 0 on AMD and in the interpreter."""
    backend, capability = _target(_device())
    return capability if backend == "cuda" else 0


def is_amd() -> bool:
    return _target(_device())[0] == "hip"


def is_cuda() -> bool:
    return _target(_device())[0] == "cuda"


def family() -> str:
    """Returns which of FAMILIES kernels are launched for."""
    return _family(_device())


@functools.cache
def _family(device: Any) -> str:
    if INTERPRETED:
        return "interpreter"
    capability = arch()
    if not capability:
        return "amd"
    if capability < 90:
        return "sm80"
    if capability < 100:
        return "sm90"
    return "sm100" if capability in (100, 101, 103) else "sm120"


class Row(NamedTuple):
    """Options of some kernels' launches, and why.

    Each of the first four names one, several (with spaces between) or ANY. Shapes are classes of
    shapes, which the file with the table defines.
    """

    kernels: str
    families: str
    dtypes: str
    shapes: str
    options: dict
    reason: str


class Table:
    """Rows of choices, later ones over earlier ones."""

    def __init__(self, *rows: Row) -> None:
        self.rows = rows
        self._chosen: dict[tuple, dict[str, Any]] = {}

    def choose(self, kernel: str, dtype: torch.dtype, *shapes: str) -> dict[str, Any]:
        """Returns the options of all rows that are for this kernel, the target in use, this dtype
        and one of these classes of shapes.
        """
        key = (kernel, family(), dtype, shapes)
        if key not in self._chosen:
            options: dict[str, Any] = {}
            for row in self.rows:
                if all(named == ANY or set(named.split()) & set(names) for named, names in zip(
                        row[:4], ((kernel,), (key[1],), (str(dtype).removeprefix("torch."),),
                                  shapes), strict=True)):
                    options |= row.options
            self._chosen[key] = options
        return dict(self._chosen[key])


def float32_precision() -> str:
    """Returns how products of float32 operands are formed: as torch's own switch says."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
