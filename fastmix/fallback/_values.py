"""Looks at the numbers that come, on which it may depend which algorithm is right.

That costs a pass, and a wait where a device computes by itself, so it is done on CPUs only. On
other devices, and while a program is compiled, numbers count as ordinary. Those that vmap hides on
a CPU may be anything.
"""

import math

import torch
from torch import Tensor

from fastmix import _torch_private


def is_readable(x: Tensor) -> bool:
    return (not torch.compiler.is_compiling() and not _torch_private.is_hidden(x)
            and is_on_host(x))


def is_on_host(x: Tensor) -> bool:
    """Whether x has memory of a CPU, whatever transforms have wrapped it."""
    x = _torch_private.innermost(x)
    return x.device.type == "cpu" and type(x) is Tensor


def is_anything(x: Tensor) -> bool:
    """Whether x is a CPU's, and torch.vmap hides its values."""
    return (not torch.compiler.is_compiling() and _torch_private.is_hidden(x)
            and not _torch_private.legacy_vmap_active() and is_on_host(x))


def all_finite(x: Tensor) -> bool:
    """False for a NaN or an infinity, and perhaps for numbers whose sum overflows."""
    return bool(x.detach().sum().isfinite()) if is_readable(x) else not is_anything(x)


def products_fit(x: Tensor, y: Tensor) -> bool:
    """Whether products of x (…, steps, d) and y, likewise, are finite and keep their digits,
    judged by the largest magnitudes of each (steps, d)."""
    if not (is_readable(x) and is_readable(y)):
        return not (is_anything(x) or is_anything(y))
    of_x, of_y = (t.detach().abs().amax((-2, -1)).log2() for t in (x, y))
    exponent = of_x + of_y  # -∞ where one is 0
    limit = 0.75 * math.log2(torch.finfo(x.dtype).max)
    return bool(((exponent.abs() < limit) | (exponent == -math.inf)).all())
