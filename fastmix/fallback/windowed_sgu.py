"""windowed_sgu in plain torch: batched matmuls over slabs of windows.

A slab of the normed gate is laid out with its windows as columns. Without the last
window it is what a slab mixes of previous windows, without the first what it mixes of
their own: two views, no doubled gate. Slabs of a megabyte or two stay in cache from the
layer norm to the product, and are all that is held beside inputs and results.

Layouts: rows (b, steps, c), windows (h, w, b, count, d).
"""

import torch
import torch.nn.functional as F

from fastmix.fallback import _gating
from fastmix.fallback._scan import room

SLAB = 3 << 17  # numbers in a slab of the gate, or as many as the weight has
BLOCK = 64  # the fewest rows of a block of the triangle


def forward(x, weight, bias, norm_weight, norm_bias, eps, gate_residual, activation):
    """x (b, n, 2c), weight (h, w, 2w), bias (h, w), gate_residual (b, n, c) → (b, n, c)."""
    b, n, c = x.shape[0], x.shape[1], x.shape[2] // 2
    dtype = _gating.compute_dtype(x)
    matrices, bias = _parameters(weight, bias, n, dtype)
    h, w = bias.shape
    whole = room(x[..., :c], weight, bias, norm_weight, norm_bias, gate_residual)
    pieces = []
    for batch, start, stop in _slabs(b, n, c, matrices[0]):
        before = min(start, (len(matrices) - 1) * w)
        gate = x[batch, start - before : stop, c:].to(dtype)
        gate = _gating.normalize(gate, norm_weight, norm_bias, eps)[0]
        mixed = _mix(_gate_windows(gate, before, matrices), matrices, bias)
        if gate_residual is not None:
            mixed = mixed + _windows(gate_residual[batch, start:stop].to(dtype), h, w)
        res = _windows(x[batch, start:stop, :c].to(dtype), h, w)
        out = _gating.finish(mixed, res, activation)
        if whole is None:
            pieces.append(out.to(x.dtype).permute(2, 3, 1, 0, 4).flatten(0, 1))
        else:
            _put(out, whole[batch, start:stop])
    if whole is not None:
        return whole
    out = torch.cat(pieces).unflatten(0, (b, -(-n // w)))
    return out.flatten(3).flatten(1, 2)[:, :n].contiguous()


def backward(grad, x, weight, bias, norm_weight, norm_bias, eps, gate_residual, activation):
    """grad (b, n, c) → dx, dweight, dbias, dnorm_weight, dnorm_bias, dgate_residual.

    From the last slab to the first, because a gate also feeds the next window: the
    gradient of a slab's first mixture is handed on as `later`.
    """
    b, n, c = grad.shape
    dtype = _gating.compute_dtype(x)
    matrices, used_bias = _parameters(weight, bias, n, dtype)
    h, w = used_bias.shape
    back = len(matrices) - 1
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dresidual = None if gate_residual is None else torch.empty(
        grad.shape, dtype=gate_residual.dtype, device=x.device)
    dweight = torch.zeros(weight.shape, dtype=dtype, device=x.device)
    dbias = torch.zeros(bias.shape, dtype=dtype, device=x.device)
    dnorm = [None if t is None else torch.zeros(c, dtype=dtype, device=x.device)
             for t in (norm_weight, norm_bias)]
    for batch, start, stop in reversed(_slabs(b, n, c, matrices[0])):
        before, length = min(start, back * w), stop - start
        gate = x[batch, start - before : stop, c:].to(dtype)
        normed, *statistics = _gating.normalize(gate, norm_weight, norm_bias, eps)
        windows = _gate_windows(normed, before, matrices)
        del gate, normed
        dmixed = _windows(grad[batch, start:stop].to(dtype), h, w)
        if activation == "none":
            dx[batch, start:stop, :c] = 0
        else:
            mixed = _mix(windows, matrices, used_bias)
            if gate_residual is not None:
                mixed += _windows(gate_residual[batch, start:stop].to(dtype), h, w)
            res = _windows(x[batch, start:stop, :c].to(dtype), h, w)
            dmixed, dres = _gating.finish_backward(dmixed, mixed, res, activation)
            _put(dres, dx[batch, start:stop, :c])
            del mixed, res, dres
        if gate_residual is not None:
            _put(dmixed, dresidual[batch, start:stop])
        if stop == n:
            later = torch.zeros_like(dmixed[..., :back, :])
        columns = dmixed.shape[2:]
        dmixed = torch.cat([dmixed, later], dim=3)
        later = dmixed[..., :back, :].clone()
        grads = _runs(dmixed, matrices)
        runs, dmatrices = _runs(windows, matrices), _parts(dweight, n)
        if back:
            dmatrices[0] += torch.bmm(grads[0], runs[0].mT)
            dnormed = torch.bmm(matrices[0].mT, grads[1])
        else:
            dnormed = torch.zeros_like(grads[0])
        for i, j in _gating.row_blocks(w, BLOCK):
            dmatrices[-1][:, i:j, :j] += torch.bmm(grads[0][:, i:j], runs[-1][:, :j].mT)
            dnormed[:, i:j].baddbmm_(matrices[-1][:, i:, i:j].mT, grads[0][:, i:])
        dbias[:, :w] += grads[0].sum(dim=-1)
        del windows, runs, dmixed, grads
        dnormed = _rows(dnormed.unflatten(2, columns))[:, :length]
        dx[batch, start:stop, c:], *parts = _gating.normalize_backward(
            dnormed, x[batch, start:stop, c:].to(dtype), *(s[:, before:] for s in statistics),
            norm_weight, norm_bias)
        del dnormed
        for total, part in zip(dnorm, parts):
            if total is not None:
                total += part
    _parts(dweight, n)[-1].tril_()
    return (dx, dweight.to(weight.dtype), dbias.to(bias.dtype),
            _gating.cast_like(dnorm[0], norm_weight), _gating.cast_like(dnorm[1], norm_bias),
            dresidual)


def _parts(weight, n):
    """weight (h, w, 2w) → what it mixes of the previous and of the own window, (h, w, w) each.

    Of a window that n steps do not exceed only the first n rows of the latter, (h, n, n).
    """
    w = weight.shape[1]
    return [weight[..., :w], weight[..., w:]] if n > w else [weight[:, :n, w : w + n]]


def _parameters(weight, bias, n, dtype):
    """→ the parts of the weight, masked, and the bias they go with."""
    *previous, own = (part.to(dtype) for part in _parts(weight, n))
    return [*previous, own.tril()], bias[:, :n].to(dtype)


def _slabs(b, n, c, matrix):
    """(batch slice, first step, end): some whole sequences, or some windows of one."""
    w = matrix.shape[1]
    size = max(SLAB, matrix.numel())
    sequences, steps = max(1, size // (n * c)), max(1, size // (w * c)) * w
    return [(slice(i, i + sequences), t, min(t + steps, n))
            for i in range(0, max(b, 1), sequences) for t in range(0, n, steps)]


def _windows(rows, h, w):
    """(b, steps, c) → (h, w, b, count, d), the last window filled up with zeros."""
    missing = -rows.shape[1] % w
    rows = F.pad(rows, (0, 0, 0, missing)) if missing else rows
    return rows.unflatten(2, (h, -1)).unflatten(1, (-1, w)).permute(3, 2, 0, 1, 4)


def _rows(windows):
    """(h, w, b, count, d) → (b, count · w, c)."""
    return windows.permute(2, 3, 1, 0, 4).flatten(3).flatten(1, 2)


def _put(windows, rows):
    """Writes windows (h, w, b, count, d), without what fills up the last, to rows (b, steps, c)."""
    h, w = windows.shape[:2]
    whole = rows.shape[1] // w
    _windows(rows[:, : whole * w], h, w).copy_(windows[..., :whole, :])
    rest = rows[:, whole * w :].unflatten(2, (h, -1)).permute(2, 1, 0, 3)
    rest.copy_(windows[:, : rest.shape[1], :, -1])


def _gate_windows(gate, before, matrices):
    """gate (b, before + steps, c) → its windows, after one of zeros for a first window."""
    h, w, _ = matrices[0].shape
    missing = (len(matrices) - 1) * w - before
    gate = F.pad(gate, (0, 0, missing, 0)) if missing else gate
    return _windows(gate, h, w).contiguous()


def _runs(windows, matrices):
    """windows → (h, w, columns): of two matrices all but the last window, all but the first."""
    count = windows.shape[3] - len(matrices) + 1
    return [windows[..., i : i + count, :].flatten(2) for i in range(len(matrices))]


def _mix(windows, matrices, bias):
    """→ (h, w, b, count, d), without the gate's first window if there are two matrices."""
    runs = _runs(windows, matrices)
    mixed = bias[..., None]
    if len(matrices) == 2:
        mixed = torch.baddbmm(mixed, matrices[0], runs[0])
    mixed = torch.cat([torch.baddbmm(mixed[:, i:j], matrices[-1][:, i:j, :j], runs[-1][:, :j])
                       for i, j in _gating.row_blocks(bias.shape[1], BLOCK)], dim=1)
    _, _, b, count, d = windows.shape
    return mixed.unflatten(2, (b, count - len(matrices) + 1, d))
