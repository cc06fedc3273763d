"""cumulative_mean in pure PyTorch: a running sum over a running count."""

import torch

from fastmix.fallback._scan import joined, room, scan, stretches


def _count(at, like):
    """1 + t for the steps `at`, shaped to divide sums (b, m, …)."""
    count = torch.arange(at.start + 1, at.stop + 1, device=like.device, dtype=like.dtype)
    return count.reshape(-1, *(1,) * (like.ndim - 2))


def _sums(steps, total, reverse=False, out=None):
    """Every sum of steps (b, m, …) so far, on from total (b, …)."""
    return scan(total.new_ones(1, 1), steps, total, reverse, out)


def forward(x):
    """x (b, n, …), real → y (b, n, …)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros_like(x[:, 0], dtype=wide)
    whole = room(x) if x.dtype == wide else None
    means = []
    for at in stretches(x.shape[1], total.numel(), 1):
        place = None if whole is None else whole[:, at]
        sums = _sums(x[:, at].to(wide), total, out=place)
        total = sums[:, -1].clone()
        means.append(torch.div(sums, _count(at, sums), out=place).to(x.dtype))
    return joined(means) if whole is None else whole


def backward(grad, x):
    """dx_t = Σ_{s ≥ t} grad_s / (s + 1)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.zeros_like(x[:, 0], dtype=wide)
    for at in reversed(stretches(x.shape[1], total.numel(), 1)):
        place = grad_x[:, at] if x.dtype == wide else torch.empty_like(x[:, at], dtype=wide)
        torch.div(grad[:, at], _count(at, place), out=place)
        total = _sums(place, total, reverse=True, out=place)[:, 0].clone()
        if x.dtype != wide:
            grad_x[:, at] = place
    return grad_x
