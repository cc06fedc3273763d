"""torch.vmap of an operator: one call with a larger batch where that is possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fastmix.ops._register import Operator


def vmap(operator: Operator, call: Callable, info: Any, in_dims: Sequence[int | None],
         *args: Any) -> tuple:
    """`call`, the operator or its autograd.Function, with the mapped axis folded into the batch.

    Where an argument that has no batch is mapped, there is a call for each of its slices.
    """
    values, mapped = _mapped_first(args, in_dims)

    def has_batch(i: int) -> bool:
        rank = operator.batched.get(i, -1)
        return rank is None or values[i].ndim - mapped[i] == rank

    if not all(has_batch(i) for i, m in enumerate(mapped) if m):
        return _loop(call, info.batch_size, mapped, values)
    for i in operator.tensors:
        if values[i] is not None and has_batch(i):
            full = values[i] if mapped[i] else values[i].expand(info.batch_size, *values[i].shape)
            values[i] = full.flatten(0, 1)
    out = call(*values)
    if isinstance(out, torch.Tensor):
        return out.unflatten(0, (info.batch_size, -1)), 0
    return tuple(o.unflatten(0, (info.batch_size, -1)) for o in out), (0,) * len(out)


def vmap_backward(operator: Operator, info: Any, in_dims: Sequence[int | None],
                  *args: Any) -> tuple:
    """The backward operator, called for each slice: gradients of parameters do not fold."""
    values, mapped = _mapped_first(args, in_dims)
    return _loop(operator.backward, info.batch_size, mapped, values)


def _mapped_first(args: Sequence, in_dims: Sequence[int | None]) -> tuple[list, list[bool]]:
    """The arguments with the mapped axis moved to the front, and which of them have one."""
    return ([a if dim is None else a.movedim(dim, 0) for a, dim in zip(args, in_dims)],
            [dim is not None for dim in in_dims])


def _loop(call: Callable, size: int, mapped: Sequence[bool], args: Sequence) -> tuple:
    runs = [call(*(a[i] if m else a for a, m in zip(args, mapped))) for i in range(size)]
    if isinstance(runs[0], torch.Tensor):
        return torch.stack(runs), 0
    return tuple(torch.stack(o) for o in zip(*runs)), (0,) * len(runs[0])
