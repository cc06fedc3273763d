"""Looks at the numbers that come, on which it may depend which algorithm is right.

That costs a pass, and a wait where a device computes by itself, so it is done on CPUs only. On
other devices, and while a program is compiled, numbers count as ordinary. What vmap hides on a CPU
is read below it, for all slices at once.
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


def _is_visible(x: Tensor) -> bool:
    """Whether x can be looked at, for all slices at once where vmap hides them."""
    return is_readable(x) or is_anything(x)


def all_finite(*tensors: Tensor | None) -> bool:
    """False for a NaN or an infinity, of any slice that vmap hides; None has none."""
    return all(not _is_visible(x) or _everywhere(x.detach().sum().isfinite())
               or _everywhere(x.detach().isfinite().all()) for x in tensors if x is not None)


def first_false(condition: Tensor, axis: int) -> int:
    """The first index on an axis where it does not hold, in any slice that vmap hides; else the
    axis's length."""
    first, end = 0, condition.shape[axis]
    if _everywhere(condition):
        return end
    while end - first > 1:
        middle = (first + end) // 2
        if _everywhere(condition.narrow(axis, first, middle - first)):
            first = middle
        else:
            end = middle
    return first


def _everywhere(condition: Tensor) -> bool:
    return bool(_torch_private.innermost(condition).all())


def products_fit(x: Tensor, y: Tensor) -> bool:
    """Whether products of x (…, steps, d) and y, likewise, are finite and keep their digits,
    judged by the largest magnitudes of each (steps, d)."""
    if not (_is_visible(x) and _is_visible(y)):
        return True
    of_x, of_y = (t.detach().abs().amax((-2, -1)).log2() for t in (x, y))
    exponent = of_x + of_y  # -∞ where one is 0
    limit = 0.75 * math.log2(torch.finfo(x.dtype).max)
    return _everywhere((exponent.abs() < limit) | (exponent == -math.inf))
