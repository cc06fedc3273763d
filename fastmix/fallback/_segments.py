"""Long sequences are worked through one segment of time after the other.

The temporaries of a segment stay in cache, and their memory is used again for the next.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmix import _torch_private

# Real numbers in one of a segment's temporaries: 2 MB in float32. An allocator hands out blocks
# of that size again and again, while large ones come fresh from the system, page by page.
SEGMENT = 1 << 19


def segments(n: int, per_step: int, multiple: int) -> list[slice]:
    """Slices of time that cover n, each but the last a multiple of `multiple` (64 for 0) long.

    `per_step` is how many real numbers a temporary holds for each step.
    """
    multiple = multiple or 64
    length = max(SEGMENT // max(per_step * multiple, 1), 4) * multiple
    return [slice(start, min(start + length, n)) for start in range(0, n, length)]


def concatenated(segments: Sequence[Tensor]) -> Tensor:
    """The segments as one tensor, without a copy where there is only one."""
    return segments[0] if len(segments) == 1 else torch.cat(list(segments), dim=1)


def output_buffer(x: Tensor, *others: Tensor | None) -> Tensor | None:
    """An empty tensor like x to write a function of all these into, or None under torch.func,
    which cannot differentiate what is written into memory that was there before.
    """
    if any(t is not None and _torch_private.is_wrapped(t) for t in (x, *others)):
        return None
    return torch.empty_like(x, memory_format=torch.contiguous_format)
