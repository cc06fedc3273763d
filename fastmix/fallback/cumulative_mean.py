"""cumulative_mean in pure PyTorch: a running sum over a running count."""

import torch
from torch import Tensor

from fastmix.dtypes import wide
from fastmix.fallback._scan import scan
from fastmix.fallback._segments import concatenated, output_buffer, segments


def _count(at: slice, like: Tensor) -> Tensor:
    """1 + t for the steps `at`, shaped to divide sums (b, m, …)."""
    count = torch.arange(at.start + 1, at.stop + 1, device=like.device, dtype=like.dtype)
    return count.reshape(-1, *(1,) * (like.ndim - 2))


def _sums(steps: Tensor, total: Tensor, reverse: bool = False, out: Tensor | None = None) -> Tensor:
    """Every sum of steps (b, m, …) so far, on from total (b, …)."""
    return scan(total.new_ones(1, 1), steps, total, reverse, out)


def forward(x: Tensor) -> Tensor:
    """x (b, n, …), real → y (b, n, …)."""
    dtype = wide(x.dtype)
    total = torch.zeros_like(x[:, 0], dtype=dtype)
    whole = output_buffer(x) if x.dtype == dtype else None
    means = []
    for at in segments(x.shape[1], total.numel(), 1):
        buffer = None if whole is None else whole[:, at]
        sums = _sums(x[:, at].to(dtype), total, out=buffer)
        total = sums[:, -1].clone()
        means.append(torch.div(sums, _count(at, sums), out=buffer).to(x.dtype))
    return concatenated(means) if whole is None else whole


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """dx_t = Σ_{s ≥ t} grad_s / (s + 1)."""
    dtype = wide(x.dtype)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.zeros_like(x[:, 0], dtype=dtype)
    for at in reversed(segments(x.shape[1], total.numel(), 1)):
        buffer = grad_x[:, at] if x.dtype == dtype else torch.empty_like(x[:, at], dtype=dtype)
        torch.div(grad[:, at], _count(at, buffer), out=buffer)
        total = _sums(buffer, total, reverse=True, out=buffer)[:, 0].clone()
        if x.dtype != dtype:
            grad_x[:, at] = buffer
    return grad_x
