"""The spatial gating units from a state on, in plain differentiable torch.

A state keeps normed gates ("rows") in a ring: step t at t mod its size. Batch entries may be at
different steps, so that places are tensors, and nothing is read on the host. On CPUs, where
reading waits for nothing, a single step that all entries are at takes slices in their place.
"""

import torch
from torch import Tensor

from fastmix.dtypes import wide
from fastmix.fallback import _gating
from fastmix.fallback._segments import concatenated
from fastmix.fallback._values import all_finite, is_anything
from fastmix.states import steps_on_host


def normed_gate(x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None,
                eps: float) -> Tensor:
    """x (b, n, 2c) → rows (b, n, c) in the wide dtype."""
    return _normed(x.chunk(2, dim=-1)[1], norm_weight, norm_bias, eps)


def _normed(gate: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None,
            eps: float) -> Tensor:
    gate = _gating.cast_tensor(gate, wide(gate.dtype))
    if not torch.is_grad_enabled():
        return _gating.normalize(gate, norm_weight, norm_bias, eps)[0]
    return _gating.normalize_plain(gate, norm_weight, norm_bias, eps)[0]


def first_rows(x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
               size: int) -> Tensor:
    """The ring (b, size, c) after a sequence x (b, n, 2c) that began at step 0."""
    n = x.shape[1]
    rows = normed_gate(x[:, max(n - size, 0) :], norm_weight, norm_bias, eps)
    if n < size:
        return torch.nn.functional.pad(rows, (0, 0, 0, size - n))
    first = size - n % size
    return torch.cat([rows[:, first:], rows[:, :first]], dim=1)


def put(rows: Tensor, at: Tensor, new: Tensor, in_place: bool) -> Tensor:
    """rows (b, size, c) with `new` (b, n, c) at the places `at` (b, n)."""
    at = at[..., None].expand_as(new)
    return rows.scatter_(1, at, new) if in_place else rows.scatter(1, at, new)


def weighed(weights: Tensor, rows: Tensor) -> Tensor:
    """weights (h, b, n, k), rows (b, k, c) → (b, n, c), each head its channels."""
    heads = rows.chunk(weights.shape[0], dim=2)
    parts = [torch.bmm(of_head, part) for of_head, part in zip(weights, heads)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def finished(mixed: Tensor, bias: Tensor, x: Tensor, gate_residual: Tensor | None,
             activation: str) -> Tensor:
    """mixed (b, n, c) and bias (h, b, n) → what the unit returns."""
    c, h = mixed.shape[2], bias.shape[0]
    by_channel = bias.permute(1, 2, 0)
    mixed = mixed + (by_channel if h == 1 else by_channel.repeat_interleave(c // h, dim=2))
    return _gated(mixed, x.chunk(2, dim=-1)[0], gate_residual, activation)


def _gated(mixed: Tensor, res: Tensor, gate_residual: Tensor | None, activation: str) -> Tensor:
    """Finishes the output, in the dtype of x: `mixed` is wide and has its bias, `res` is of x."""
    if gate_residual is not None:
        mixed = mixed + gate_residual.to(mixed.dtype)
    out = _gating.finish(mixed, _gating.cast_tensor(res, mixed.dtype), activation)
    return _gating.cast_tensor(out, res.dtype)


def _places(weight: Tensor, t: int) -> tuple[list[tuple[int, int, int]], int, int]:
    """Of step t: what is multiplied, piece by piece (first column of the weight, first row that it
    weighs, how many); the weight's and bias's row; where in the ring its own gate goes."""
    w = weight.shape[1]
    if weight.shape[2] == w:  # causal_sgu's: one window
        return [(0, 0, t + 1)], t, t
    window, row = divmod(t, w)
    own = window % 2 * w  # where this window begins in the ring
    if own:  # behind the one before, as weight has them
        return [(0, 0, w + row + 1)], row, own + row
    return [(w, 0, row + 1), (0, w, w)][: 2 if window else 1], row, row


def step(rows: Tensor, x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor | None,
         norm_bias: Tensor | None, eps: float, gate_residual: Tensor | None, activation: str,
         t: int) -> Tensor:
    """Step t, x (b, 1, 2c), of either unit. Its own gate goes into `rows` (b, size, c)."""
    parts, row, at = _places(weight, t)
    res, gate = x.chunk(2, dim=-1)
    rows.narrow(1, at, 1).copy_(_normed(gate, norm_weight, norm_bias, eps))
    (b, size, c), h = rows.shape, weight.shape[0]
    weights, bias = (_gating.cast_tensor(t.narrow(1, row, 1), rows.dtype) for t in (weight, bias))
    cuts = [(weights.narrow(2, column, count), first, count) for column, first, count in parts]
    if b == 1:
        mixed, heads = bias.unsqueeze(2), rows.view(size, h, c // h).transpose(0, 1)
        for cut, first, count in cuts:
            mixed = torch.baddbmm(mixed, cut, heads.narrow(1, first, count))
        mixed = mixed.view(1, 1, c)
    else:
        mixed = bias.view(h).repeat_interleave(c // h)
        for cut, first, count in cuts:
            mixed = mixed + weighed(cut.unsqueeze(1).expand(h, b, 1, -1),
                                    rows.narrow(1, first, count))
    return _gated(mixed, res, gate_residual, activation)


def causal(x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor | None,
           norm_bias: Tensor | None, eps: float, gate_residual: Tensor | None, activation: str,
           rows: Tensor, count: Tensor, in_place: bool) -> tuple[Tensor, Tensor]:
    """x (b, n, 2c), the state's rows (b, s, c) and count (b,) → (b, n, c) and the rows after."""
    host = steps_on_host(count) if x.shape[1] == 1 else None
    if host and min(host) == max(host):
        rows = rows if in_place else rows.clone()
        return step(rows, x, weight, bias, norm_weight, norm_bias, eps, gate_residual, activation,
                    host[0]), rows
    n, dtype, steps = x.shape[1], rows.dtype, torch.arange(rows.shape[1], device=x.device)
    at = count[:, None] + steps[:n]
    rows = put(rows, at, normed_gate(x, norm_weight, norm_bias, eps), in_place)
    known, own_bias = steps <= at[..., None], bias[:, at].to(dtype)
    weights = torch.where(known, weight[:, at].to(dtype), 0)
    if all_finite(rows, weights, own_bias, x, gate_residual) and not is_anything(rows):
        mixed = weighed(weights, rows)
    else:  # later rows times zeros would be NaN, and so would zeros times a step's gradient
        mixed = concatenated([weighed(weights[:, :, i : i + 1],
                                      torch.where(known[:, i, :, None], rows, 0))
                              for i in range(n)])
    return finished(mixed, own_bias, x, gate_residual, activation), rows


def windowed(x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor | None,
             norm_bias: Tensor | None, eps: float, gate_residual: Tensor | None, activation: str,
             rows: Tensor, count: Tensor, in_place: bool) -> tuple[Tensor, Tensor]:
    """x (b, n, 2c), the state's rows (b, 2w, c) and count (b,) → (b, n, c) and the rows after."""
    n, w, dtype = x.shape[1], weight.shape[1], rows.dtype
    host = steps_on_host(count) if n == 1 else None
    if host and min(host) == max(host):
        rows = rows if in_place else rows.clone()
        return step(rows, x, weight, bias, norm_weight, norm_bias, eps, gate_residual, activation,
                    host[0]), rows
    # Whole windows have zeros in place of steps and of rows that are beyond.
    if n > 1 and not all_finite(rows, weight, bias, x, gate_residual, norm_weight, norm_bias):
        outs = []
        for i in range(n):
            residual = None if gate_residual is None else gate_residual[:, i : i + 1]
            out, rows = windowed(x[:, i : i + 1], weight, bias, norm_weight, norm_bias, eps,
                                 residual, activation, rows, count + i, in_place)
            outs.append(out)
        return torch.cat(outs, dim=1), rows
    normed = normed_gate(x, norm_weight, norm_bias, eps)
    steps = torch.arange(n, device=x.device)
    place = count % w
    kept = min(n, 2 * w)
    at = (count[:, None] + steps[n - kept :]) % (2 * w)
    after = put(rows, at, normed[:, n - kept :], in_place and n == 1)
    at_row = (place[:, None] + steps) % w
    if n == 1:
        mixed = _mixed_step(weight.to(dtype), after, count, place)
    else:
        mixed = _mixed_windows(weight.to(dtype), rows, normed, count, place)
        if in_place:
            after = rows.copy_(after)
    return finished(mixed, bias[:, at_row].to(dtype), x, gate_residual, activation), after


def _unrolled(count: Tensor, w: int) -> Tensor:
    """(b, 2w): where in the ring the steps of the window before and of the one under way are."""
    return (count[:, None] - count[:, None] % w - w
            + torch.arange(2 * w, device=count.device)) % (2 * w)


def _mixed_step(weight: Tensor, rows: Tensor, count: Tensor, place: Tensor) -> Tensor:
    """The mixture (b, 1, c) of the step at `count`, whose row is in the ring already."""
    w = weight.shape[1]
    column = _unrolled(count, w)  # its own inverse
    known = (column <= (w + place)[:, None]) & (column >= (w + place - count)[:, None])
    weights = weight.flatten(1)[:, place[:, None] * (2 * w) + column]
    weights = torch.where(known, weights, 0)[:, :, None]
    return weighed(weights, torch.where(known[..., None], rows, 0))


def _mixed_windows(weight: Tensor, rows: Tensor, normed: Tensor, count: Tensor,
                   place: Tensor) -> Tensor:
    """The mixtures (b, n, c) of n steps from `count` on, in whole windows.

    Every batch entry is laid out so that its windows begin at multiples of w: the one before,
    the one under way, and as many more as n steps may reach.
    """
    (b, n, c), (h, w, _) = normed.shape, weight.shape
    windows = (n + 2 * w - 2) // w
    index = torch.arange(2 * w, device=place.device)
    known = (index < (w + place)[:, None])[..., None]
    old = torch.where(known, rows.gather(1, _unrolled(count, w)[..., None].expand(b, 2 * w, c)), 0)
    laid = torch.cat([old, old.new_zeros(b, (windows - 1) * w, c)], dim=1)
    at = (place[:, None] + torch.arange(n, device=place.device))[..., None].expand(b, n, c)
    laid = laid.scatter(1, at + w, normed)
    # (h, w, windows, b, d)
    laid = laid.unflatten(2, (h, -1)).unflatten(1, (-1, w)).permute(3, 2, 1, 0, 4)
    before, within = weight.chunk(2, dim=-1)
    within, own = within.tril(), laid[:, :, 1:].flatten(2)
    mixed = torch.bmm(before, laid[:, :, :-1].flatten(2)) + concatenated(
        [torch.bmm(within[:, i:j, :j], own[:, :j]) for i, j in _gating.row_blocks(w, own)])
    mixed = mixed.unflatten(2, (windows, b, c // h)).permute(3, 2, 1, 0, 4).flatten(3).flatten(1, 2)
    return mixed.gather(1, at)
