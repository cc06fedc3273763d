"""Twin of `gateloop_transformer.associative_scan` (0.2.5)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastmix.nn._helpers import pad_at_dim as pad_at_dim

__all__ = ["associative_scan"]


def associative_scan(
    operator: Callable[[list[Tensor], list[Tensor]], Sequence[Tensor]], elems: Sequence[Tensor]
) -> list[Tensor]:
    """All running results of an associative `operator` along axis 1, in about 2 log₂ n calls.

    elems: tensors (b, n, …). `operator(earlier, later)` takes two lists of such tensors and
    returns one; it need not commute. Returns a list. ValueError where lengths differ.
    """
    levels = [list(elems)]
    if not levels[0] or any(e.ndim < 2 or e.shape[1] != elems[0].shape[1] for e in elems):
        raise ValueError(
            "associative_scan: elems must be tensors (b, n, …) of one length n, "
            f"got {[tuple(e.shape) for e in elems]}")

    # Up: each level holds the totals of neighbouring pairs of the level below.
    while (n := levels[-1][0].shape[1]) > 1:
        pairs = n // 2 * 2
        levels.append(list(operator(
            [e[:, 0:pairs:2] for e in levels[-1]], [e[:, 1:pairs:2] for e in levels[-1]])))

    # Down: the scan of a level's pairs is that level's scan at 1, 3, 5, …; one more element
    # each gives 2, 4, 6, …; and at 0 it is the element itself.
    odd = levels.pop()
    while levels:
        level = levels.pop()
        m = (level[0].shape[1] - 1) // 2
        even = operator([o[:, :m] for o in odd], [e[:, 2::2] for e in level])
        odd = [torch.cat((e[:, :1], torch.stack((o[:, :m], x), dim=2).flatten(1, 2), o[:, m:]), 1)
               for e, o, x in zip(level, odd, even)]
    return odd
