"""windowed_sgu in plain torch: one batched matmul per slab of windows.

The gates of windows i-1 and i are consecutive rows, so an overlapping view hands the
matmul its doubled windows. Slabs of a few megabytes keep everything between the layer
norm and the product in cache.
"""

import torch
import torch.nn.functional as F

from fastmix.fallback import _gating

SLAB = 1 << 19  # numbers in a slab of the gate, or as many as the weight has


def forward(x, weight, bias, norm_weight, norm_bias, eps, gate_residual, activation):
    """x (b, n, 2c), weight (h, w, 2w), bias (h, w), gate_residual (b, n, c) → (b, n, c)."""
    b, n, c = x.shape[0], x.shape[1], x.shape[2] // 2
    dtype = _gating.compute_dtype(x)
    weight, bias = _parameters(weight, bias, n, dtype)
    pieces = []
    for batch, start, stop in _slabs(b, n, c, weight):
        gate = x[batch, max(start - weight.shape[1], 0) : stop, c:].to(dtype)
        gate = _gating.normalize(gate, norm_weight, norm_bias, eps)[0]
        mixed = _mix(_columns(gate, stop - start, weight), weight, bias, gate, stop - start)
        if gate_residual is not None:
            mixed = mixed + gate_residual[batch, start:stop].to(dtype)
        out = _gating.finish(mixed, x[batch, start:stop, :c].to(dtype), activation)
        pieces.append(out.to(x.dtype).flatten(0, 1))
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return out.unflatten(0, (b, n))


def backward(grad, x, weight, bias, norm_weight, norm_bias, eps, gate_residual, activation):
    """grad (b, n, c) → dx, dweight, dbias, dnorm_weight, dnorm_bias, dgate_residual.

    From the last slab to the first, because a window's gate also feeds the next window:
    the gradient of the first window's mixture is handed on as `later`.
    """
    b, n, c = grad.shape
    dtype = _gating.compute_dtype(x)
    full_weight, full_bias = weight, bias
    weight, bias = _parameters(weight, bias, n, dtype)
    h, w, span = weight.shape
    back = span - w
    transposed = weight.unflatten(2, (-1, w)).flip(2).permute(0, 3, 2, 1).flatten(2)
    dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    dresidual = None if gate_residual is None else torch.empty_like(gate_residual)
    dweight, dbias = torch.zeros_like(weight), torch.zeros_like(bias)
    dnorm = [None if t is None else torch.zeros(c, dtype=dtype, device=x.device)
             for t in (norm_weight, norm_bias)]
    for batch, start, stop in reversed(_slabs(b, n, c, weight)):
        length, before = stop - start, min(start, back)
        gate = x[batch, start - before : stop, c:].to(dtype)
        normed, *statistics = _gating.normalize(gate, norm_weight, norm_bias, eps)
        columns = _columns(normed, length, weight)
        dmixed = grad[batch, start:stop].to(dtype)
        if activation != "none":
            mixed = _mix(columns, weight, bias, gate, length)
            if gate_residual is not None:
                mixed += gate_residual[batch, start:stop].to(dtype)
            res = x[batch, start:stop, :c].to(dtype)
            dmixed, dx[batch, start:stop, :c] = _gating.finish_backward(
                dmixed, mixed, res, activation)
        if gate_residual is not None:
            dresidual[batch, start:stop] = dmixed
        if stop == n:
            later = dmixed.new_zeros(gate.shape[0], back, c)
        dmixed = torch.cat([F.pad(dmixed, (0, 0, 0, -length % w)), later], dim=1)
        later = dmixed[:, :back]
        dcolumns = _columns(dmixed, dmixed.shape[1] - back, weight)
        dweight.baddbmm_(dcolumns[:, :w], columns.mT)
        dbias += dcolumns[:, :w].sum(dim=-1)
        dnormed = _rows(torch.bmm(transposed, dcolumns), gate, length)
        dx[batch, start:stop, c:], *parts = _gating.normalize_backward(
            dnormed, gate[:, before:], *(s[:, before:] for s in statistics),
            norm_weight, norm_bias)
        for total, part in zip(dnorm, parts):
            if total is not None:
                total += part
    full = full_weight.shape[1]
    dweight = F.pad(dweight.tril(back), (full - back, full - w, 0, full - w))
    dbias = F.pad(dbias, (0, full - w))
    return (dx, dweight.to(full_weight.dtype), dbias.to(full_bias.dtype),
            _gating.cast_like(dnorm[0], norm_weight), _gating.cast_like(dnorm[1], norm_bias),
            dresidual)


def _parameters(weight, bias, n, dtype):
    """weight and bias, masked. Of a first window that is all there is, (h, n, n) and (h, n)."""
    w = weight.shape[1]
    if n <= w:
        return weight[:, :n, w : w + n].to(dtype).tril(), bias[:, :n].to(dtype)
    return weight.to(dtype).tril(w), bias.to(dtype)


def _slabs(b, n, c, weight):
    """(batch slice, first time step, end): whole sequences, or some windows of one."""
    w = weight.shape[1]
    size = max(SLAB, weight.numel())
    sequences, steps = max(1, size // (n * c)), max(1, size // (w * c)) * w
    return [(slice(i, i + sequences), t, min(t + steps, n))
            for i in range(0, max(b, 1), sequences) for t in range(0, n, steps)]


def _columns(rows, length, weight):
    """rows (b, previous window + length, c) → (h, 2w, b · windows · d).

    Rows that are missing in the previous or in the last window are zeros.
    """
    h, w, span = weight.shape
    missing, ragged = span - w + length - rows.shape[1], -length % w
    if missing or ragged:
        rows = F.pad(rows, (0, 0, missing, ragged))
    windows = rows.unfold(1, span, w).unflatten(2, (h, -1))
    return windows.permute(2, 4, 0, 1, 3).flatten(2)


def _rows(columns, like, length):
    """(h, w, b · windows · d) → (b, length, c), with b and c of `like`."""
    h, w, _ = columns.shape
    b, _, c = like.shape
    windows = columns.unflatten(2, (b, -(-length // w), c // h))
    return windows.permute(2, 3, 1, 0, 4).flatten(3).flatten(1, 2).contiguous()[:, :length]


def _mix(columns, weight, bias, like, length):
    return _rows(torch.baddbmm(bias[..., None], weight, columns), like, length)
