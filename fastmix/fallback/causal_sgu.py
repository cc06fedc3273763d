"""causal_sgu in plain torch: row blocks of the lower triangle, without a masked copy.

A block of rows is one product with everything before it and one with the triangle on
the diagonal.
"""

import torch

from fastmix.fallback import _gating

BLOCK = 512


def forward(x, weight, bias, norm_weight, norm_bias, eps, gate_residual, activation):
    """x (b, n, 2c), weight (h, s, s), bias (h, s), gate_residual (b, n, c) → (b, n, c)."""
    n, c = x.shape[1], x.shape[2] // 2
    dtype = _gating.compute_dtype(x)
    gate = _gating.normalize(x[..., c:].to(dtype), norm_weight, norm_bias, eps)[0]
    columns = _columns(gate, weight.shape[0])
    pieces = []
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        mixed = _mix(columns, weight, bias, gate, start, stop)
        if gate_residual is not None:
            mixed = mixed + gate_residual[:, start:stop].to(dtype)
        out = _gating.finish(mixed, x[:, start:stop, :c].to(dtype), activation)
        pieces.append(out.to(x.dtype))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def backward(grad, x, weight, bias, norm_weight, norm_bias, eps, gate_residual, activation):
    """grad (b, n, c) → dx, dweight, dbias, dnorm_weight, dnorm_bias, dgate_residual."""
    b, n, c = grad.shape
    h = weight.shape[0]
    dtype = _gating.compute_dtype(x)
    gate = x[..., c:].to(dtype)
    normed, *statistics = _gating.normalize(gate, norm_weight, norm_bias, eps)
    columns = _columns(normed, h)
    dcolumns = torch.zeros_like(columns)
    dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    dweight, dbias = torch.zeros_like(weight), torch.zeros_like(bias)
    dresidual = None if gate_residual is None else torch.empty_like(gate_residual)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        dmixed = grad[:, start:stop].to(dtype)
        if activation != "none":
            mixed = _mix(columns, weight, bias, gate, start, stop)
            if gate_residual is not None:
                mixed = mixed + gate_residual[:, start:stop].to(dtype)
            res = x[:, start:stop, :c].to(dtype)
            dmixed, dx[:, start:stop, :c] = _gating.finish_backward(
                dmixed, mixed, res, activation)
        if gate_residual is not None:
            dresidual[:, start:stop] = dmixed
        block = _columns(dmixed, h)
        before, triangle = _block(weight, start, stop, dtype)
        dcolumns[:, start:stop].baddbmm_(triangle.mT, block)
        dcolumns[:, :start].baddbmm_(before.mT, block)
        dweight[:, start:stop, start:stop] = block.bmm(columns[:, start:stop].mT).tril()
        dweight[:, start:stop, :start] = block.bmm(columns[:, :start].mT)
        dbias[:, start:stop] = block.sum(dim=-1)
    dnormed = _rows(dcolumns, gate)
    dx[..., c:], dnorm_weight, dnorm_bias = _gating.normalize_backward(
        dnormed, gate, *statistics, norm_weight, norm_bias)
    return (dx, dweight, dbias, _gating.cast_like(dnorm_weight, norm_weight),
            _gating.cast_like(dnorm_bias, norm_bias), dresidual)


def _columns(rows, h):
    """(b, n, c) → (h, n, b · d)."""
    return rows.unflatten(2, (h, -1)).permute(2, 1, 0, 3).flatten(2)


def _rows(columns, like):
    """(h, n, b · d) → (b, n, c), with b and c of `like`."""
    h, b, c = columns.shape[0], like.shape[0], like.shape[2]
    return columns.unflatten(2, (b, c // h)).permute(2, 1, 0, 3).flatten(2).contiguous()


def _block(weight, start, stop, dtype):
    """Rows start … stop of the weight: what lies before the diagonal block, and its triangle."""
    rows = weight[:, start:stop]
    return rows[..., :start].to(dtype), rows[..., start:stop].to(dtype).tril()


def _mix(columns, weight, bias, like, start, stop):
    before, triangle = _block(weight, start, stop, columns.dtype)
    mixed = torch.baddbmm(bias[:, start:stop, None].to(columns.dtype),
                          triangle, columns[:, start:stop])
    if start:
        mixed = torch.baddbmm(mixed, before, columns[:, :start])
    return _rows(mixed, like)
