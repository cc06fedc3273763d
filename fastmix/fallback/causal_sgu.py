"""causal_sgu in plain torch: row blocks of the lower triangle, no masked copy of the weight.

A block of rows is a product with all steps before it and one with its own triangle.
Layouts: rows (b, n, c), columns (h, n, b · d).
"""

import torch

from fastmix.fallback import _gating

BLOCK = 128  # the fewest rows of a block of the triangle


def forward(x, weight, bias, norm_weight, norm_bias, eps, gate_residual, activation):
    """x (b, n, 2c), weight (h, s, s), bias (h, s), gate_residual (b, n, c) → (b, n, c)."""
    c = x.shape[2] // 2
    dtype = _gating.compute_dtype(x)
    gate = _gating.normalize(x[..., c:].to(dtype), norm_weight, norm_bias, eps)[0]
    mixed = _rows(_mix(_columns(gate, weight.shape[0]), weight, bias), gate)
    if gate_residual is not None:
        mixed = mixed + gate_residual.to(dtype)
    return _gating.finish(mixed, x[..., :c].to(dtype), activation).to(x.dtype)


def backward(grad, x, weight, bias, norm_weight, norm_bias, eps, gate_residual, activation):
    """grad (b, n, c) → dx, dweight, dbias, dnorm_weight, dnorm_bias, dgate_residual."""
    n, c = grad.shape[1:]
    dtype = _gating.compute_dtype(x)
    gate = x[..., c:].to(dtype).contiguous()
    normed, *statistics = _gating.normalize(gate, norm_weight, norm_bias, eps)
    columns = _columns(normed, weight.shape[0])
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dmixed = grad.to(dtype)
    if activation == "none":
        dx[..., :c] = 0
    else:
        mixed = _rows(_mix(columns, weight, bias), gate)
        if gate_residual is not None:
            mixed += gate_residual.to(dtype)
        dmixed, dx[..., :c] = _gating.finish_backward(
            dmixed, mixed, x[..., :c].to(dtype), activation)
        del mixed
    dresidual = None if gate_residual is None else dmixed.to(gate_residual.dtype).contiguous()
    dmixed = _columns(dmixed, weight.shape[0])
    dweight, dbias = torch.zeros_like(weight), torch.zeros_like(bias)
    dbias[:, :n] = dmixed.sum(dim=-1)
    parts = []
    for i, j in _gating.row_blocks(n, BLOCK):
        part = torch.bmm(_triangle(weight, i, j, dtype).mT, dmixed[:, i:j])
        if j < n:
            part.baddbmm_(weight[:, j:n, i:j].to(dtype).mT, dmixed[:, j:])
        parts.append(part)
        dweight[:, i:j, :j] = torch.bmm(dmixed[:, i:j], columns[:, :j].mT)
        dweight[:, i:j, i:j].tril_()
    dnormed = _rows(torch.cat(parts, dim=1), gate)
    dx[..., c:], dnorm_weight, dnorm_bias = _gating.normalize_backward(
        dnormed, gate, *statistics, norm_weight, norm_bias)
    return (dx, dweight, dbias, _gating.cast_like(dnorm_weight, norm_weight),
            _gating.cast_like(dnorm_bias, norm_bias), dresidual)


def _columns(rows, h):
    """(b, n, c) → (h, n, b · d)."""
    return rows.unflatten(2, (h, -1)).permute(2, 1, 0, 3).flatten(2)


def _rows(columns, like):
    """(h, n, b · d) → (b, n, c), contiguous, with b and c of `like`."""
    windows = columns.unflatten(2, (like.shape[0], like.shape[2] // columns.shape[0]))
    return windows.permute(2, 1, 0, 3).flatten(2).contiguous()


def _triangle(weight, i, j, dtype):
    return weight[:, i:j, i:j].to(dtype).tril()


def _mix(columns, weight, bias):
    """columns (h, n, b · d) → (h, n, b · d)."""
    dtype = columns.dtype
    blocks = []
    for i, j in _gating.row_blocks(columns.shape[1], BLOCK):
        mixed = torch.baddbmm(bias[:, i:j, None].to(dtype), _triangle(weight, i, j, dtype),
                              columns[:, i:j])
        if i > 0:
            mixed = torch.baddbmm(mixed, weight[:, i:j, :i].to(dtype), columns[:, :i])
        blocks.append(mixed)
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
