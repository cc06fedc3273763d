"""How tensors lie in memory: what launchers say of strides, and how kernels use them."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


# Triton's own cdiv and next_power_of_2 are for kernels as well: a call from Python takes them
# microseconds, of which a launch has few.
def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(size: int) -> int:
    """Returns the next power of two, `size` itself if it is one."""
    return 1 << (size - 1).bit_length()


def strided(*tensors: Tensor) -> list[Any]:
    """Returns every tensor, followed by the stride of its batches and those of its other axes."""
    return [part for t in tensors for part in (t, t.stride(0), t.stride()[1:])]


def strides(*tensors: Tensor) -> list[Any]:
    """Returns of every tensor the stride of its batches, and those of its other axes."""
    return [part for t in tensors for part in (t.stride(0), t.stride()[1:])]


def in_pairs(x: Tensor) -> Tensor:
    """Views complex numbers (…) as pairs of real ones (…, 2): Triton has no complex pointers. Real
    numbers come back as they are.
    """
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def as_parts(x: Tensor) -> Tensor:
    """Views numbers (…) as their parts (…, 2), or (…, 1) if they are real."""
    return in_pairs(x) if x.is_complex() else x[..., None]


def flat(*tensors: Tensor) -> bool:
    """Whether the last two axes of all tensors are one axis in memory, without a gap."""
    return all(t.shape[-2] == 1 or t.stride(-2) == t.shape[-1] * t.stride(-1) for t in tensors)


def evens(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Whether the batches of each begin at multiples of 16 elements, as its steps do."""
    return tuple(t is not None and t.stride(0) % 16 == 0 == t.stride(1) % 16 for t in tensors)


def two_axes(tensors: Sequence[Tensor], apart: int) -> list[Tensor] | None:
    """Views tensors (b, n, …) of one shape as (b, n, h, d); None where their axes after n are more
    than two. Axes that lie in one another, without a gap, are one; but those before the axis
    `apart` and those from it on are kept apart.
    """
    shape, groups = tensors[0].shape, []
    for axis in range(2, len(shape)):
        if shape[axis] == 1:
            continue
        joined = groups and (groups[-1] >= apart or axis < apart) and all(
            t.stride(groups[-1]) == t.stride(axis) * shape[axis] for t in tensors)
        groups = [*groups[:-1], axis] if joined else [*groups, axis]  # the last axis of each
    if len(groups) > 2:
        return None
    first = groups[0] + 1 if len(groups) == 2 else 2
    h, d = shape[2:first].numel(), shape[first:].numel()
    views = []
    for t in tensors:
        stride = t.stride(groups[-1]) if groups else 1
        across = t.stride(groups[0]) if len(groups) == 2 else d * stride
        views.append(t.as_strided((*shape[:2], h, d), (t.stride(0), t.stride(1), across, stride)))
    return views


@triton.jit
def even(stride, EVEN: tl.constexpr):
    """Returns the batches' stride, which the compiler sees to be a multiple of 16 if EVEN, for wide
    loads.

    Kernels are not specialised for it: with 5 channels, say, n decides, and they would be compiled
    twice. (A hint, tl.multiple_of, does nothing to an argument.)
    """
    stride = tl.cast(stride, tl.int64)
    return stride // 16 * 16 if EVEN else stride


@triton.jit
def offset(channel, stride_h, stride_d, D: tl.constexpr):
    """Returns where channels are in the last two axes, of which D counts the last; with D = 0 they
    are one axis.
    """
    channel = channel.to(tl.int64)
    if D == 0:
        return channel * stride_d
    return channel // D * stride_h + channel % D * stride_d
