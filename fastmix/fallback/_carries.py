"""The carries of fallbacks: fastmix/ops/_carries.py says what carries are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmix.fallback._segments import concatenated


def segment_carries(states: Tensor, entry: Tensor, every: int, reverse: bool = False) -> Tensor:
    """The carries (b, ⌈m / every⌉, …) of a segment (b, m, …) entered from `entry` (b, …)."""
    if every == 0:
        return entry.unsqueeze(1)[:, :0]
    first = entry.unsqueeze(1)
    if reverse:
        return torch.cat([states[:, every::every], first], dim=1)
    return torch.cat([first, states[:, every - 1 : -1 : every]], dim=1)


def all_carries(by_segment: Sequence[Tensor], state: Tensor) -> Tensor:
    """The carries of all segments, and the last state of the sequence."""
    last = state.unsqueeze(1)[:, : 1 if by_segment[0].shape[1] else 0]
    return concatenated([*by_segment, last])
