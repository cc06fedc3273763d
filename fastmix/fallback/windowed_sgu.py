"""windowed_sgu in plain torch: batched matmuls over slabs of windows.

A slab's windows, after the one before them, are the columns of a matrix. Without the last
they are what the slab mixes of previous windows, without the first what it mixes of its own:
two views, no doubled gate. The sequence's first window, which has none before it, and a last
one that n leaves short are slabs of their own. Slabs of a megabyte or two stay in cache from
the layer norm to the product, and are all that is held beside inputs and results.

Layouts: rows (b, steps, c), windows (h, r, count, b, d) of r steps each, r = w but for a short
one, and matrices (h, r, count · b · d).
"""

import torch
from torch import Tensor

from fastmix.activations import OUTSIDE
from fastmix.dtypes import wide
from fastmix.fallback import _gating
from fastmix.fallback._segments import concatenated, output_buffer

SLAB = 3 << 17  # numbers in a slab of the gate, or as many as the weight has


def forward(x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor | None,
            norm_bias: Tensor | None, eps: float, gate_residual: Tensor | None,
            activation: str) -> Tensor:
    """x (b, n, 2c), weight (h, w, 2w), bias (h, w), gate_residual (b, n, c) → (b, n, c)."""
    c, (h, w) = x.shape[2] // 2, bias.shape
    dtype = wide(x.dtype)
    parameters = _parameters(weight, bias, dtype)
    out = output_buffer(x[..., :c], weight, bias, norm_weight, norm_bias, gate_residual)
    narrow, pieces = x.dtype, []
    if out is None:  # what slabs share is converted once: its gradient is summed before rounding
        x = x.to(dtype)
        norm_weight, norm_bias = (_gating.cast(t, dtype) for t in (norm_weight, norm_bias))
    sequences, slabs = _slabs(x, h, w)
    for batch in sequences:
        for start, stop, r in slabs:
            gate = x[batch, max(start - w, 0) : stop, c:].to(dtype)
            gate = _gating.normalize(gate, norm_weight, norm_bias, eps)[0]
            previous, own = _matrices(gate, h, w, start)
            res = _windows(x[batch, start:stop, :c].to(dtype), h, r)
            residual = None if gate_residual is None else _windows(
                gate_residual[batch, start:stop].to(dtype), h, r)
            blocks = []
            for i, j in _gating.row_blocks(r, own, res, residual, weight, bias):
                mixed = _mix(parameters, previous, own, residual, i, j, res.shape[2:])
                block = _gating.finish(mixed, res[:, i:j], activation)
                if out is None:
                    blocks.append(block)
                else:
                    _windows(out[batch, start:stop], h, r)[:, i:j] = block
            if out is None:
                pieces.append(_rows(concatenated(blocks)).to(narrow))
    if out is not None:
        return out
    return torch.cat([concatenated(pieces[i : i + len(slabs)])
                      for i in range(0, len(pieces), len(slabs))])


def backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor | None,
             norm_bias: Tensor | None, eps: float, gate_residual: Tensor | None,
             activation: str) -> tuple[Tensor | None, ...]:
    """grad (b, n, c) → dx, dweight, dbias, dnorm_weight, dnorm_bias, dgate_residual.

    From the last slab to the first, because a gate also feeds the next window: the
    gradient of a slab's first mixture is handed on as `later`.
    """
    c, (h, w) = grad.shape[2], bias.shape
    dtype = wide(x.dtype)
    parameters = before, within, _ = _parameters(weight, bias, dtype)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dresidual = None if gate_residual is None else torch.empty(
        grad.shape, dtype=gate_residual.dtype, device=x.device)
    dweight = torch.zeros(weight.shape, dtype=dtype, device=x.device)
    dbefore, dwithin = dweight.chunk(2, dim=-1)
    dbias = torch.zeros(bias.shape, dtype=dtype, device=x.device)
    dnorm = [None if t is None else torch.zeros(c, dtype=dtype, device=x.device)
             for t in (norm_weight, norm_bias)]
    sequences, slabs = _slabs(x, h, w)
    for batch in sequences:
        later = None
        for start, stop, r in reversed(slabs):
            gate = x[batch, max(start - w, 0) : stop, c:].to(dtype).contiguous()
            normed, mean, _ = _gating.normalize(gate, norm_weight, norm_bias, eps)
            previous, own = _matrices(normed, h, w, start)
            del normed
            grad_windows = _windows(grad[batch, start:stop].to(dtype), h, r)
            res = _windows(x[batch, start:stop, :c].to(dtype), h, r)
            residual = None if gate_residual is None else _windows(
                gate_residual[batch, start:stop].to(dtype), h, r)
            dres = _windows(dx[batch, start:stop, :c], h, r)
            count, columns = grad_windows.shape[2], grad_windows.shape[3:]
            dmixed = gate.new_empty(h, r, count + (later is not None), *columns)
            blocks = _gating.row_blocks(r, own)
            for i, j in blocks:
                mixed = None if activation == OUTSIDE else _mix(
                    parameters, previous, own, residual, i, j, res.shape[2:])
                _gating.finish_backward(grad_windows[:, i:j], mixed, res[:, i:j], activation,
                                        dmixed[:, i:j, :count], dres[:, i:j])
            del mixed, residual
            if dresidual is not None:
                _windows(dresidual[batch, start:stop], h, r).copy_(dmixed[:, :, :count])
            if later is not None:
                dmixed[:, : later.shape[1], count] = later
                dmixed[:, later.shape[1] :, count] = 0
            rows = r if later is None else later.shape[1]
            later = dmixed[:, :, 0].clone()
            following, dmixed = dmixed[:, :, 1:].flatten(2), dmixed[:, :, :count].flatten(2)
            dbias[:, :r] += dmixed.sum(dim=-1)
            if previous is not None:
                dbefore[:, :r].baddbmm_(dmixed, previous.mT)
            for i, j in blocks:
                dwithin[:, i:j, :j].baddbmm_(dmixed[:, i:j], own[:, :j].mT)
            del previous, own
            dnormed = torch.zeros_like(dmixed)
            _add_following(dnormed, before, following, rows, columns.numel())
            for i, j in _gating.row_blocks(r, dmixed):
                dnormed[:, i:j].baddbmm_(within[:, i:r, i:j].mT, dmixed[:, i:])
            del dmixed, following
            dnormed = _rows(dnormed.unflatten(2, (count, *columns)))
            dx[batch, start:stop, c:], *parts = _gating.normalize_backward(
                dnormed, gate[:, start - stop :], mean[:, start - stop :], norm_weight, norm_bias,
                eps)
            del gate, dnormed
            for total, part in zip(dnorm, parts):
                if total is not None:
                    total += part
    dwithin.tril_()
    return (dx, dweight.to(weight.dtype), dbias.to(bias.dtype),
            _gating.cast_like(dnorm[0], norm_weight), _gating.cast_like(dnorm[1], norm_bias),
            dresidual)


def _add_following(dnormed: Tensor, before: Tensor, following: Tensor, rows: int,
                   per_window: int) -> None:
    """Adds to the gradient of windows that of those after them, of which the last has `rows` rows:
    behind them are zeros, which NaN and infinity in the weight must not meet."""
    end = following.shape[2]
    if rows < following.shape[1]:
        end -= per_window
        dnormed[..., end : end + per_window].baddbmm_(
            before[:, :rows].mT, following[:, :rows, end:])
    if end:
        dnormed[..., :end].baddbmm_(before.mT, following[..., :end])


def _parameters(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """→ weights (h, w, w) of the window before and, masked, of a row's own; the bias."""
    before, within = weight.to(dtype).chunk(2, dim=-1)
    return before, within.tril(), bias.to(dtype)


def _slabs(x: Tensor, h: int, w: int) -> tuple[list[slice], list[tuple[int, int, int]]]:
    """→ slices of the batch; for each of them, in order, (first step, end, steps of a window)."""
    b, n, c = x.shape[0], x.shape[1], x.shape[2] // 2
    size = max(SLAB, h * w * w)
    few, steps = max(1, size // (n * c)), max(1, size // (w * c)) * w
    whole = n - n % w
    slabs = [(0, min(w, n), min(w, n))]
    slabs += [(t, min(t + steps, whole), w) for t in range(w, whole, steps)]
    if n > w and whole < n:
        slabs.append((whole, n, n - whole))
    return [slice(i, i + few) for i in range(0, max(b, 1), few)], slabs


def _windows(rows: Tensor, h: int, r: int) -> Tensor:
    """(b, count · r, c) → (h, r, count, b, d), a view."""
    return rows.unflatten(2, (h, -1)).unflatten(1, (-1, r)).permute(3, 2, 1, 0, 4)


def _rows(windows: Tensor) -> Tensor:
    """(h, r, count, b, d) → (b, count · r, c)."""
    return windows.permute(3, 2, 1, 0, 4).flatten(3).flatten(1, 2)


def _matrices(gate: Tensor, h: int, w: int, start: int) -> tuple[Tensor | None, Tensor]:
    """gate (b, steps, c) of a slab, and of the window before it unless start is 0 → what the
    slab mixes of previous windows, None if start is 0, and of its own.
    """
    if start == 0:
        return None, _windows(gate, h, gate.shape[1]).flatten(2)
    if gate.shape[1] % w:
        own = gate[:, w:]
        return _windows(gate[:, :w], h, w).flatten(2), _windows(own, h, own.shape[1]).flatten(2)
    windows = _windows(gate, h, w).contiguous()
    return windows[:, :, :-1].flatten(2), windows[:, :, 1:].flatten(2)


def _mix(parameters: tuple[Tensor, Tensor, Tensor], previous: Tensor | None, own: Tensor,
         residual: Tensor | None, i: int, j: int, columns: torch.Size) -> Tensor:
    """→ rows i to j of what a slab mixes and the residual adds, windows (h, j - i, *columns)."""
    before, within, bias = parameters
    mixed = torch.baddbmm(bias[:, i:j, None], within[:, i:j, :j], own[:, :j])
    if previous is not None:
        mixed.baddbmm_(before[:, i:j], previous)
    mixed = mixed.unflatten(2, columns)
    return mixed if residual is None else mixed + residual[:, i:j]
