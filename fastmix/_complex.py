"""Complex numbers as real ones: their real and imaginary parts, stacked in front (2, …)."""

import torch
from torch import Tensor


def times(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack((x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]))
