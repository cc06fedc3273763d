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

from fastmix.fallback import _gating
from fastmix.fallback._scan import joined, room

SLAB = 3 << 17  # numbers in a slab of the gate, or as many as the weight has
BLOCK = 64  # the fewest rows of a block of the triangle


def forward(x, weight, bias, norm_weight, norm_bias, eps, gate_residual, activation):
    """x (b, n, 2c), weight (h, w, 2w), bias (h, w), gate_residual (b, n, c) → (b, n, c)."""
    c, (h, w) = x.shape[2] // 2, bias.shape
    dtype = _gating.compute_dtype(x)
    parameters = _parameters(weight, bias, dtype)
    out = room(x[..., :c], weight, bias, norm_weight, norm_bias, gate_residual)
    pieces = []
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
            for i, j in _gating.row_blocks(r, BLOCK):
                mixed = _mix(parameters, previous, own, residual, i, j, res.shape[2:])
                block = _gating.finish(mixed, res[:, i:j], activation)
                if out is None:
                    blocks.append(block)
                else:
                    _windows(out[batch, start:stop], h, r)[:, i:j] = block
            if out is None:
                pieces.append(_rows(joined(blocks)).to(x.dtype))
    if out is not None:
        return out
    return torch.cat([joined(pieces[i : i + len(slabs)])
                      for i in range(0, len(pieces), len(slabs))])


def backward(grad, x, weight, bias, norm_weight, norm_bias, eps, gate_residual, activation):
    """grad (b, n, c) → dx, dweight, dbias, dnorm_weight, dnorm_bias, dgate_residual.

    From the last slab to the first, because a gate also feeds the next window: the
    gradient of a slab's first mixture is handed on as `later`.
    """
    c, (h, w) = grad.shape[2], bias.shape
    dtype = _gating.compute_dtype(x)
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
            normed, *statistics = _gating.normalize(gate, norm_weight, norm_bias, eps)
            previous, own = _matrices(normed, h, w, start)
            del normed
            asked = _windows(grad[batch, start:stop].to(dtype), h, r)
            res = _windows(x[batch, start:stop, :c].to(dtype), h, r)
            residual = None if gate_residual is None else _windows(
                gate_residual[batch, start:stop].to(dtype), h, r)
            dres = _windows(dx[batch, start:stop, :c], h, r)
            count, columns = asked.shape[2], asked.shape[3:]
            dmixed = gate.new_empty(h, r, count + (later is not None), *columns)
            for i, j in _gating.row_blocks(r, BLOCK):
                mixed = None if activation == "none" else _mix(
                    parameters, previous, own, residual, i, j, res.shape[2:])
                _gating.finish_backward(asked[:, i:j], mixed, res[:, i:j], activation,
                                        dmixed[:, i:j, :count], dres[:, i:j])
            del mixed, residual
            if gate_residual is not None:
                _windows(dresidual[batch, start:stop], h, r).copy_(dmixed[:, :, :count])
            if later is not None:
                dmixed[:, : later.shape[1], count] = later
                dmixed[:, later.shape[1] :, count] = 0
            later = dmixed[:, :, 0].clone()
            following, dmixed = dmixed[:, :, 1:].flatten(2), dmixed[:, :, :count].flatten(2)
            dbias[:, :r] += dmixed.sum(dim=-1)
            if previous is not None:
                dbefore[:, :r].baddbmm_(dmixed, previous.mT)
            for i, j in _gating.row_blocks(r, BLOCK):
                dwithin[:, i:j, :j].baddbmm_(dmixed[:, i:j], own[:, :j].mT)
            del previous, own
            dnormed = torch.zeros_like(dmixed)
            if following.shape[2]:
                dnormed[..., : following.shape[2]].baddbmm_(before.mT, following)
            for i, j in _gating.row_blocks(r, BLOCK):
                dnormed[:, i:j].baddbmm_(within[:, i:r, i:j].mT, dmixed[:, i:])
            del dmixed, following
            dnormed = _rows(dnormed.unflatten(2, (count, *columns)))
            dx[batch, start:stop, c:], *parts = _gating.normalize_backward(
                dnormed, *(t[:, start - stop :] for t in (gate, *statistics)),
                norm_weight, norm_bias)
            del gate, dnormed
            for total, part in zip(dnorm, parts):
                if total is not None:
                    total += part
    dwithin.tril_()
    return (dx, dweight.to(weight.dtype), dbias.to(bias.dtype),
            _gating.cast_like(dnorm[0], norm_weight), _gating.cast_like(dnorm[1], norm_bias),
            dresidual)


def _parameters(weight, bias, dtype):
    """→ weights (h, w, w) of the window before and, masked, of a row's own; the bias."""
    before, within = weight.to(dtype).chunk(2, dim=-1)
    return before, within.tril(), bias.to(dtype)


def _slabs(x, h, w):
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


def _windows(rows, h, r):
    """(b, count · r, c) → (h, r, count, b, d), a view."""
    return rows.unflatten(2, (h, -1)).unflatten(1, (-1, r)).permute(3, 2, 1, 0, 4)


def _rows(windows):
    """(h, r, count, b, d) → (b, count · r, c)."""
    return windows.permute(3, 2, 1, 0, 4).flatten(3).flatten(1, 2)


def _matrices(gate, h, w, start):
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


def _mix(parameters, previous, own, residual, i, j, columns):
    """→ rows i to j of what a slab mixes and the residual adds, windows (h, j - i, *columns)."""
    before, within, bias = parameters
    mixed = torch.baddbmm(bias[:, i:j, None], within[:, i:j, :j], own[:, :j])
    if previous is not None:
        mixed.baddbmm_(before[:, i:j], previous)
    mixed = mixed.unflatten(2, columns)
    return mixed if residual is None else mixed + residual[:, i:j]
