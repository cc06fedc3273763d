"""cumulative_mean in pure PyTorch: a running sum over a running count."""

import torch

from fastmix.fallback._scan import joined, stretches


def _count(at, x, wide):
    """1 + t for the steps `at`, shaped to divide x (b, m, …)."""
    count = torch.arange(at.start + 1, at.stop + 1, device=x.device, dtype=wide)
    return count.reshape(-1, *(1,) * (x.ndim - 2))


def forward(x):
    """x (b, n, …), real → y (b, n, …)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total, means = None, []
    for at in stretches(x.shape[1], x[:, 0].numel(), 1):
        sums = x[:, at].cumsum(1, dtype=wide)
        sums = sums if total is None else sums + total
        total = sums[:, -1:]
        means.append((sums / _count(at, x, wide)).to(x.dtype))
    return joined(means)


def backward(grad, x):
    """dx_t = Σ_{s ≥ t} grad_s / (s + 1)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.zeros_like(x[:, :1], dtype=wide)
    for at in reversed(stretches(x.shape[1], x[:, 0].numel(), 1)):
        scaled = (grad[:, at] / _count(at, grad, wide)).flip(1)
        sums = scaled.cumsum(1).add_(total)
        total = sums[:, -1:]
        grad_x[:, at] = sums.flip(1)
    return grad_x
