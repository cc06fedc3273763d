"""causal_sgu in plain torch: row blocks of the lower triangle, no masked copy of the weight.

A block of rows is a product with all steps before it and one with its own triangle.
Layouts: rows (b, n, c), columns (h, n, b, d) or (h, n, b · d).
"""

import torch
from torch import Tensor

from fastmix.activations import OUTSIDE
from fastmix.dtypes import wide
from fastmix.fallback import _gating

SLAB = 1 << 18  # numbers of the gate that backward takes at a time, but a whole head at least


def forward(x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor | None,
            norm_bias: Tensor | None, eps: float, gate_residual: Tensor | None,
            activation: str) -> Tensor:
    """x (b, n, 2c), weight (h, s, s), bias (h, s), gate_residual (b, n, c) → (b, n, c)."""
    c = x.shape[2] // 2
    dtype = wide(x.dtype)
    gate = _gating.normalize(x[..., c:].to(dtype), norm_weight, norm_bias, eps)[0]
    columns = _columns(gate, weight.shape[0])
    mixed = _mix(columns.flatten(2), weight, bias, x, gate_residual)
    mixed = mixed.unflatten(2, columns.shape[2:])
    mixed = mixed.permute(2, 1, 0, 3).flatten(2).contiguous()
    if gate_residual is not None:
        mixed = mixed + gate_residual.to(dtype)
    return _gating.finish(mixed, x[..., :c].to(dtype), activation).to(x.dtype)


def backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor | None,
             norm_bias: Tensor | None, eps: float, gate_residual: Tensor | None,
             activation: str) -> tuple[Tensor | None, ...]:
    """grad (b, n, c) → dx, dweight, dbias, dnorm_weight, dnorm_bias, dgate_residual.

    A few heads at a time, then a few steps. In between, the gradient of the normed gate lies
    where that of the gate will: hardly more is held than what is returned.
    """
    b, n, c = grad.shape
    h = weight.shape[0]
    dtype = wide(x.dtype)
    gate = x[..., c:].to(dtype)
    few = max(1, SLAB // max(1, b * n * (c // h)))
    affine = (norm_weight, norm_bias) if few >= h else (None, None)
    normed_gate, mean, inverse_deviation = _gating.normalize(gate, *affine, eps)
    whole = normed_gate if few >= h else None
    del normed_gate
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dnormed = dx[..., c:] if x.dtype == dtype else torch.empty_like(gate)
    dresidual = None if gate_residual is None else torch.empty(
        grad.shape, dtype=gate_residual.dtype, device=x.device)
    dweight, dbias = torch.zeros_like(weight), torch.zeros_like(bias)
    for at in [slice(i, i + few) for i in range(0, h, few)]:
        def of(rows: Tensor, at: slice = at) -> Tensor:
            return _columns(rows, h)[at]

        if whole is not None:
            normed = of(whole)
        else:
            normed = of(gate) - of(mean.expand_as(gate))
            normed *= of(inverse_deviation.expand_as(gate))
            if norm_weight is not None:
                normed *= of(norm_weight.to(dtype).expand_as(gate))
            if norm_bias is not None:
                normed += of(norm_bias.to(dtype).expand_as(gate))
        columns, mixed = normed.flatten(2), None
        if activation != OUTSIDE:
            mixed = _mix(columns, weight[at], bias[at]).unflatten(2, (b, c // h))
            if gate_residual is not None:
                mixed += of(gate_residual.to(dtype))
        dmixed = torch.empty_like(normed, memory_format=torch.contiguous_format)
        _gating.finish_backward(of(grad.to(dtype)), mixed, of(x[..., :c].to(dtype)), activation,
                                dmixed, of(dx[..., :c]))
        del mixed
        if dresidual is not None:
            of(dresidual).copy_(dmixed)
        dmixed = dmixed.flatten(2)
        dbias[at, :n] = dmixed.sum(dim=-1)
        for i, j in _gating.row_blocks(n, dmixed):
            part = torch.bmm(_triangle(weight[at], i, j, dtype).mT, dmixed[:, i:j])
            if j < n:
                part.baddbmm_(weight[at, j:n, i:j].to(dtype).mT, dmixed[:, j:])
            of(dnormed)[:, i:j].copy_(part.unflatten(2, (b, c // h)))
            dweight[at, i:j, :j] = torch.bmm(dmixed[:, i:j], columns[:, :j].mT)
            dweight[at, i:j, i:j].tril_()
    dnorm = [None if t is None else torch.zeros(c, dtype=dtype, device=x.device)
             for t in (norm_weight, norm_bias)]
    few = max(1, SLAB // max(1, b * c))
    for at in [slice(i, i + few) for i in range(0, n, few)]:
        dx[:, at, c:], *parts = _gating.normalize_backward(
            dnormed[:, at], gate[:, at], mean[:, at], norm_weight, norm_bias, eps)
        for total, part in zip(dnorm, parts):
            if total is not None:
                total += part
    return (dx, dweight, dbias, _gating.cast_like(dnorm[0], norm_weight),
            _gating.cast_like(dnorm[1], norm_bias), dresidual)


def _columns(rows: Tensor, h: int) -> Tensor:
    """(b, n, c) → (h, n, b, d), a view."""
    return rows.unflatten(2, (h, -1)).permute(2, 1, 0, 3)


def _triangle(weight: Tensor, i: int, j: int, dtype: torch.dtype) -> Tensor:
    return weight[:, i:j, i:j].to(dtype).tril()


def _mix(columns: Tensor, weight: Tensor, bias: Tensor, *others: Tensor | None) -> Tensor:
    """columns (h, n, b · d) → (h, n, b · d), which the `others` are added to or multiplied by."""
    dtype = columns.dtype
    blocks = []
    for i, j in _gating.row_blocks(columns.shape[1], columns, weight, bias, *others):
        mixed = torch.baddbmm(bias[:, i:j, None].to(dtype), _triangle(weight, i, j, dtype),
                              columns[:, i:j])
        if i > 0:
            mixed = torch.baddbmm(mixed, weight[:, i:j, :i].to(dtype), columns[:, :i])
        blocks.append(mixed)
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
