"""windowed_sgu on a GPU: banded products on tensor cores, the gate normalised on its way in.

out = activation(mixture + bias + gate_residual) · res. Rows' means and deviations come first, from
a kernel of their own: a head has only some of a row's channels, and programs of all heads would
read all weights for every window. The normed gate is never stored. The mixture has two schedules:
    walk   windows that fit into a tile: weights are read once, then a run of windows, each of
           whose gates is read once, for its own mixture and the next one's
    tiles  a block of a larger window's rows, in steps over the window before and its own;
           blocks above the diagonal are left out

Backward computes the mixture again and keeps its gradient, a slab of windows at once:
    dmixture = grad · res · activation'(mixture)             and dres
    dweight  = dmixture · normedᵀ, dbias its row sums        per group of windows, then summed
    dnormed  = weightᵀ · dmixture, walk or tiles             into the gate's half of dx
and the layer norm's gradient replaces dnormed row by row. Programs start at the end of the data,
which the pass before wrote last and is still in cache.

Half precision parameters beside x of the same dtype are multiplied as they are, in tensor
cores; wider parameters, and their gradients, in float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmix._triton.activation import OUTSIDE, activate
from fastmix._triton.layout import even, evens, power_of_two, strided
from fastmix._triton.plans import launch
from fastmix._triton.target import ANY, CUDA, INTERPRETED, Row, Table, float32_precision
from fastmix._triton.windows import load_affine, load_band, mix, normed, offsets, window_place
from fastmix.dtypes import wide

SCRATCH = 1 << 25  # bytes of the mixture's gradient at once
TYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16,
         torch.bfloat16: tl.bfloat16}
LARGEST_ROW = 1 << 16
RUNTIME = ["n", "rows", "windows", "sequence", "first", "after_rows", "origin", "out_origin",
           "runs", "length", "per_group", "items", "more", "groups", "norm_groups",
           "gate_b", "residual_b", "grad_b", "dmixed_b", "out_b"]


def why_not(x: Tensor, *others: Any) -> str | None:
    """Why there are no kernels for these arguments, or None: their layer norm holds a row whole."""
    if others and x.ndim == 3 and x.shape[-1] // 2 > LARGEST_ROW:
        return f"the gate has up to {LARGEST_ROW} channels, got {x.shape[-1] // 2}"
    return None


@triton.jit(do_not_specialize=RUNTIME)
def _statistics(gate, gate_b, strides, mean, inverse, rows, n, c, EVEN: tl.constexpr,
                EPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Computes the mean and the inverse deviation of rows of the gate (b, n, c)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (channel < c)[None, :]
    at = row // n * even(gate_b, EVEN[0]) + row % n * strides[0]
    at = at[:, None] + channel[None, :] * strides[1]
    x = tl.load(gate + at, mask=inside, other=0).to(mean.dtype.element_ty)
    average = tl.sum(x, axis=1) / c
    x = tl.where(inside, x - average[:, None], 0)
    variance = tl.sum(x * x, axis=1) / c
    tl.store(mean + row, average, mask=row < rows)
    tl.store(inverse + row, 1 / tl.sqrt(variance + EPS), mask=row < rows)


@triton.jit
def _finish(mixed, outside, strides, outputs, batch, t, stored, head, channel, n, origin,
            after_rows, HEADS: tl.constexpr, DIM: tl.constexpr, ACTIVATION: tl.constexpr):
    """Turns the mixture into `out`; with grad, writes the gradients of res, mixture and residual
    instead.
    """
    res, residual, grad = outside
    out, dmixed, dresidual = outputs
    c: tl.constexpr = HEADS * DIM
    dense = (n.to(tl.int64) * c, c, 1)
    stored = stored[:, None] & (channel < DIM)[None, :]
    if residual is not None:
        at = offsets(strides[1], batch, t, head, channel, DIM)
        mixed += tl.load(residual + at, mask=stored, other=0).to(mixed.dtype)
    value, slope = activate(mixed, ACTIVATION)
    if ACTIVATION != OUTSIDE:
        at = offsets(strides[0], batch, t, head, channel, DIM)
        factor = tl.load(res + at, mask=stored, other=0,
                         eviction_policy="evict_first").to(mixed.dtype)
    if grad is None:
        if ACTIVATION != OUTSIDE:
            value *= factor
        tl.store(out + offsets(dense, batch, t, head, channel, DIM), value.to(out.dtype.element_ty),
                 mask=stored, eviction_policy="evict_first")
    else:
        after = tl.load(grad + offsets(strides[2], batch, t, head, channel, DIM), mask=stored,
                        other=0, eviction_policy="evict_first").to(mixed.dtype)
        at = offsets((n.to(tl.int64) * (2 * c), 2 * c, 1), batch, t, head, channel, DIM)
        tl.store(out + at, (after * value).to(out.dtype.element_ty), mask=stored,
                 eviction_policy="evict_first")
        after *= factor * slope
        at = offsets((after_rows.to(tl.int64) * c, c, 1), batch, t - origin, head, channel, DIM)
        tl.store(dmixed + at, after.to(dmixed.dtype.element_ty), mask=stored)
        if dresidual is not None:
            tl.store(dresidual + offsets(dense, batch, t, head, channel, DIM),
                     after.to(dresidual.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=RUNTIME)
def _tiles(gate, gate_b, gate_strides, norm, weight, weight_strides, bias, bias_strides, outside,
           residual_b, grad_b, outside_strides, outputs, n, windows, sequence, first, after_rows,
           origin, EVEN: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
           WINDOW: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
           CHANNELS: tl.constexpr, STAGES: tl.constexpr,
           ROUNDED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
           ACTIVATION: tl.constexpr):
    """Computes rows of one window's mixture. Windows count from `first` of sequence `sequence`;
    row 0 of dmixed is row `origin` of all sequences concatenated.
    """
    gate_strides = (even(gate_b, EVEN[0]),) + gate_strides
    strides = (gate_strides, (even(residual_b, EVEN[1]),) + outside_strides[0],
               (even(grad_b, EVEN[2]),) + outside_strides[1])
    blocks: tl.constexpr = (WINDOW + ROWS - 1) // ROWS
    batch, window, head, row, channel = window_place(windows, HEADS, DIM, blocks, ROWS, CHANNELS)
    batch += sequence
    wide: tl.constexpr = norm[0].dtype.element_ty
    # Slopes of activations would enlarge a rounded mixture's error.
    exact: tl.constexpr = outside[2] is not None and ACTIVATION != "identity"
    affine = load_affine(norm, head, channel, DIM)
    i = row + tl.arange(0, ROWS)
    begin = (first + window) * WINDOW
    start = tl.where(begin == 0, 0, -WINDOW)
    end = tl.minimum(tl.minimum(row + ROWS, WINDOW), n - begin)
    mixed = tl.zeros([ROWS, CHANNELS], dtype=wide)
    for from_step in tl.range(start, end, STEPS, num_stages=STAGES):
        step = from_step + tl.arange(0, STEPS)
        band, below = load_band(weight, weight_strides, head, i, step, (i < WINDOW)[:, None],
                                WINDOW, False)
        band = tl.where(below, band.to(OPERAND), 0.0)
        x = normed(gate, gate_strides, norm, affine, batch, begin + step, begin + step < n, head,
                   channel, n, DIM)
        mixed = mix(band, x, mixed, ROUNDED, OPERAND, PRECISION, exact)
    r = i % WINDOW
    mixed += tl.load(bias + head * bias_strides[0] + r * bias_strides[1]).to(wide)[:, None]
    stored = (i < WINDOW) & (begin + i < n)
    _finish(mixed, outside, strides, outputs, batch, begin + i, stored, head, channel, n, origin,
            after_rows, HEADS, DIM, ACTIVATION)


@triton.jit(do_not_specialize=RUNTIME)
def _walk(gate, gate_b, gate_strides, norm, weight, weight_strides, bias, bias_strides, outside,
          residual_b, grad_b, outside_strides, outputs, n, windows, sequence, first, after_rows,
          origin, runs, length, EVEN: tl.constexpr,
          HEADS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr, PER: tl.constexpr,
          ROWS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
          ROUNDED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
          ACTIVATION: tl.constexpr):
    """Like _tiles, for windows of which PER fit into a tile. It walks through a run of tiles and
    reads weights once; a tile's gate also goes into `next_sum`, the next tile's mixture.
    """
    gate_strides = (even(gate_b, EVEN[0]),) + gate_strides
    strides = (gate_strides, (even(residual_b, EVEN[1]),) + outside_strides[0],
               (even(grad_b, EVEN[2]),) + outside_strides[1])
    batch, run, head, _, channel = window_place(runs, HEADS, DIM, 1, ROWS, CHANNELS)
    batch += sequence
    wide: tl.constexpr = norm[0].dtype.element_ty
    size: tl.constexpr = PER * WINDOW
    # Slopes of activations would enlarge a rounded mixture's error.
    exact: tl.constexpr = outside[2] is not None and ACTIVATION != "identity"
    affine = load_affine(norm, head, channel, DIM)
    i = tl.arange(0, ROWS)
    kept = i < size
    square = kept[:, None] & kept[None, :]
    own, _ = load_band(weight, weight_strides, head, i, i, square, WINDOW, True)
    before, _ = load_band(weight, weight_strides, head, i, i - size, square, WINDOW, False)
    own, before = own.to(OPERAND), before.to(OPERAND)
    r = i % WINDOW
    added = tl.load(bias + head * bias_strides[0] + r * bias_strides[1]).to(wide)
    tiles = (windows + PER - 1) // PER
    begin = run * length
    t = first * WINDOW + (begin - 1) * size + i
    x = normed(gate, gate_strides, norm, affine, batch, t, kept & (t >= 0), head, channel, n, DIM)
    x = tl.where((t >= 0)[:, None], x, 0)
    zeros = tl.zeros([ROWS, CHANNELS], dtype=wide)
    next_sum = mix(before, x, zeros, ROUNDED, OPERAND, PRECISION, exact)
    for tile in tl.range(begin, tl.minimum(begin + length, tiles), num_stages=STAGES):
        t = first * WINDOW + tile * size + i
        known = kept & (t < n)
        x = normed(gate, gate_strides, norm, affine, batch, t, known, head, channel, n, DIM)
        mixed = mix(own, x, next_sum, ROUNDED, OPERAND, PRECISION, exact)
        next_sum = mix(before, x, zeros, ROUNDED, OPERAND, PRECISION, exact)
        stored = known & (t < (first + windows) * WINDOW)
        _finish(mixed + added[:, None], outside, strides, outputs, batch, t, stored, head, channel,
                n, origin, after_rows, HEADS, DIM, ACTIVATION)


@triton.jit(do_not_specialize=RUNTIME)
def _weight_backward(gate, gate_b, gate_strides, norm, dmixed, dmixed_b, dmixed_strides, dweight,
                     dbias, n, windows, sequence, first, per_group, items, origin, more,
                     EVEN: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
                     WINDOW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                     CHANNELS: tl.constexpr, STAGES: tl.constexpr, ROUNDED: tl.constexpr,
                     OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Computes a group of windows' part of dweight (groups, h, w, 2w) and dbias (groups, h, w), or,
    with `more`, adds it to what is there. Windows are counted through the batch.
    """
    gate_strides = (even(gate_b, EVEN[0]),) + gate_strides
    dmixed_strides = (even(dmixed_b, EVEN[1]),) + dmixed_strides
    index = tl.program_id(0)
    wide: tl.constexpr = norm[0].dtype.element_ty
    across: tl.constexpr = (2 * WINDOW + COLUMNS - 1) // COLUMNS
    down: tl.constexpr = (WINDOW + ROWS - 1) // ROWS
    parts: tl.constexpr = (DIM + CHANNELS - 1) // CHANNELS
    column = index % across * COLUMNS
    index = index // across
    row = index % down * ROWS
    index = index // down
    head = index % HEADS
    group = index // HEADS
    r = row + tl.arange(0, ROWS)
    j = column + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS, ROWS], dtype=wide)
    sums = tl.zeros([ROWS], dtype=wide)
    begin = group * per_group
    end = tl.minimum(begin + per_group, items)
    above = column > row + ROWS - 1 + WINDOW  # the diagonal
    if above:
        end = begin
    for item in tl.range(begin * parts, end * parts, num_stages=STAGES):
        window = first + item // parts % windows
        batch = sequence + item // parts // windows
        channel = item % parts * CHANNELS + tl.arange(0, CHANNELS)
        t = window * WINDOW + r
        at = offsets(dmixed_strides, batch, t - origin, head, channel, DIM)
        after = tl.load(dmixed + at, other=0,
                        mask=((r < WINDOW) & (t < n))[:, None] & (channel < DIM)[None, :])
        t = (window - 1) * WINDOW + j
        known = (t >= 0) & (t < n) & (j < 2 * WINDOW)
        x = normed(gate, gate_strides, norm, load_affine(norm, head, channel, DIM), batch, t, known,
                   head, channel, n, DIM)
        if norm[3] is not None:
            x = tl.where(known[:, None], x, 0)
        total = tl.dot(x.to(ROUNDED).to(OPERAND), tl.trans(after.to(OPERAND)), total,
                       input_precision=PRECISION, out_dtype=wide)
        sums += tl.sum(after.to(wide), axis=1)
    rows = (group * HEADS + head).to(tl.int64) * WINDOW + r
    at = rows[:, None] * (2 * WINDOW) + j[None, :]
    used = (r < WINDOW)[:, None] & (j < 2 * WINDOW)[None, :]
    total = tl.where(j[None, :] <= (r + WINDOW)[:, None], tl.trans(total), 0)
    total += tl.load(dweight + at, mask=used & (more != 0), other=0)
    tl.store(dweight + at, total, mask=used)
    if column == 0:
        sums += tl.load(dbias + rows, mask=(r < WINDOW) & (more != 0), other=0)
        tl.store(dbias + rows, sums, mask=r < WINDOW)


@triton.jit(do_not_specialize=RUNTIME)
def _tiles_backward(weight, weight_strides, dmixed, dmixed_b, dmixed_strides, out, out_b,
                    out_strides, n, windows, sequence, first, origin, out_origin,
                    EVEN: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
                    WINDOW: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
                    CHANNELS: tl.constexpr, STAGES: tl.constexpr, OPERAND: tl.constexpr,
                    PRECISION: tl.constexpr):
    """Computes dnormed from the mixture's gradient in its own window and the one after it."""
    blocks: tl.constexpr = (WINDOW + ROWS - 1) // ROWS
    dmixed_strides = (even(dmixed_b, EVEN[0]),) + dmixed_strides
    out_strides = (even(out_b, EVEN[1]),) + out_strides
    batch, window, head, row, channel = window_place(windows, HEADS, DIM, blocks, ROWS, CHANNELS)
    batch += sequence
    wide: tl.constexpr = tl.float64 if OPERAND == tl.float64 else tl.float32
    i = row + tl.arange(0, ROWS)
    begin = (first + window) * WINDOW
    end = tl.minimum(2 * WINDOW, n - begin)
    dnormed = tl.zeros([ROWS, CHANNELS], dtype=wide)
    for from_step in tl.range(row, end, STEPS, num_stages=STAGES):
        step = from_step + tl.arange(0, STEPS)
        band, below = load_band(weight, weight_strides, head, step, i,
                                (step < end)[:, None] & (i < WINDOW)[None, :], WINDOW, False)
        band = tl.where(below, band.to(OPERAND), 0.0)
        at = offsets(dmixed_strides, batch, begin + step - origin, head, channel, DIM)
        after = tl.load(dmixed + at, mask=(step < end)[:, None] & (channel < DIM)[None, :],
                        other=0).to(OPERAND)
        dnormed = tl.dot(tl.trans(band), after, dnormed, input_precision=PRECISION,
                         out_dtype=wide)
    stored = (i < WINDOW) & (begin + i < n)
    _store_dnormed(dnormed, out, out_strides, batch, begin + i - out_origin, stored, head,
                   channel, DIM)


@triton.jit
def _store_dnormed(dnormed, out, strides, batch, t, stored, head, channel, DIM: tl.constexpr):
    tl.store(out + offsets(strides, batch, t, head, channel, DIM), dnormed.to(out.dtype.element_ty),
             mask=stored[:, None] & (channel < DIM)[None, :])


@triton.jit(do_not_specialize=RUNTIME)
def _walk_backward(weight, weight_strides, dmixed, dmixed_b, dmixed_strides, out, out_b,
                   out_strides, n, windows, sequence, first, origin, out_origin, runs, length,
                   EVEN: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr,
                   PER: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
                   STAGES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Like _tiles_backward, for windows that fit into a tile. It walks from the run's last tile to
    its first and passes each tile's part, `next_sum`, to the tile before.
    """
    dmixed_strides = (even(dmixed_b, EVEN[0]),) + dmixed_strides
    out_strides = (even(out_b, EVEN[1]),) + out_strides
    batch, run, head, _, channel = window_place(runs, HEADS, DIM, 1, ROWS, CHANNELS)
    batch += sequence
    wide: tl.constexpr = tl.float64 if OPERAND == tl.float64 else tl.float32
    size: tl.constexpr = PER * WINDOW
    i = tl.arange(0, ROWS)
    kept = i < size
    square = kept[:, None] & kept[None, :]
    own, _ = load_band(weight, weight_strides, head, i, i, square, WINDOW, True)
    before, _ = load_band(weight, weight_strides, head, i, i - size, square, WINDOW, False)
    own, before = tl.trans(own.to(OPERAND)), tl.trans(before.to(OPERAND))
    tiles = (windows + PER - 1) // PER
    begin = run * length
    last = tl.minimum(begin + length, tiles) - 1
    known_end = tl.minimum(n, (first + windows + 1) * WINDOW)
    next_sum = tl.zeros([ROWS, CHANNELS], dtype=wide)
    for back in tl.range(-1, last - begin + 1, num_stages=STAGES):
        t = first * WINDOW + (last - back) * size + i
        at = offsets(dmixed_strides, batch, t - origin, head, channel, DIM)
        after = tl.load(dmixed + at, other=0, mask=(
            kept & (t < known_end))[:, None] & (channel < DIM)[None, :]).to(OPERAND)
        dnormed = tl.dot(own, after, next_sum, input_precision=PRECISION, out_dtype=wide)
        next_sum = tl.dot(before, after, tl.zeros([ROWS, CHANNELS], dtype=wide),
                          input_precision=PRECISION, out_dtype=wide)
        stored = kept & (t < n) & (t < (first + windows) * WINDOW) & (back >= 0)
        _store_dnormed(dnormed, out, out_strides, batch, t - out_origin, stored, head, channel,
                       DIM)


@triton.jit(do_not_specialize=RUNTIME)
def _norm_backward(gate, gate_b, strides, norm, dnormed, dnormed_t, dx, dnorm, first, rows, origin,
                   n, c, per_group, more, EVEN: tl.constexpr,
                   ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr):
    """Turns dnormed into dgate, in dx, for rows from `first` on, and computes a group of rows' part
    of dnorm (groups, 2, c), or, with `more`, adds it to what is there. dnormed starts at row
    `origin`, and may be the same memory as dgate.
    """
    mean, inverse, scale, _ = norm
    group = tl.num_programs(0) - 1 - tl.program_id(0)
    wide: tl.constexpr = mean.dtype.element_ty
    channel = tl.arange(0, COLUMNS)
    inside = channel < c
    if scale is not None:
        scale = tl.load(scale + channel, mask=inside, other=0).to(wide)
    if dnorm is not None:
        by_scale = tl.zeros([ROWS, COLUMNS], dtype=wide)
        by_shift = tl.zeros([ROWS, COLUMNS], dtype=wide)
    begin = first + group.to(tl.int64) * per_group
    end = tl.minimum(begin + per_group, first.to(tl.int64) + rows)
    for start in tl.range(begin, end, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        known = row < end
        used = known[:, None] & inside[None, :]
        at = (row // n * even(gate_b, EVEN[0]) + row % n * strides[0])[:, None]
        at += channel[None, :] * strides[1]
        x = tl.load(gate + at, mask=used, other=0).to(wide)
        grad = tl.load(dnormed + (row - origin)[:, None] * dnormed_t + channel[None, :],
                       mask=used, other=0).to(wide)
        deviation = tl.load(inverse + row, mask=known, other=0)[:, None]
        x = tl.where(used, (x - tl.load(mean + row, mask=known, other=0)[:, None]) * deviation, 0)
        if dnorm is not None:
            by_scale += grad * x
            by_shift += grad
        if scale is not None:
            grad *= scale[None, :]
        grad_mean = tl.sum(grad, axis=1) / c
        grad_x_mean = tl.sum(grad * x, axis=1) / c
        grad = deviation * (grad - grad_mean[:, None] - x * grad_x_mean[:, None])
        tl.store(dx + row[:, None] * (2 * c) + (c + channel)[None, :],
                 grad.to(dx.dtype.element_ty), mask=used)
    if dnorm is not None:
        at = dnorm + group.to(tl.int64) * (2 * c) + channel
        known = inside & (more != 0)
        tl.store(at, tl.load(at, mask=known, other=0) + tl.sum(by_scale, axis=0), mask=inside)
        tl.store(at + c, tl.load(at + c, mask=known, other=0) + tl.sum(by_shift, axis=0),
                 mask=inside)


@triton.jit
def _add_part(parts, out, block, groups, stride, size, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Writes a block of the sum of parts (groups, size), added up in a fixed order."""
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([GROUPS, BLOCK], dtype=parts.dtype.element_ty)
    for start in range(0, groups, GROUPS):
        group = (start + tl.arange(0, GROUPS)).to(tl.int64)
        total += tl.load(parts + group[:, None] * stride + i[None, :], other=0,
                         mask=(group < groups)[:, None] & (i < size)[None, :])
    tl.store(out + i, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=i < size)


@triton.jit(do_not_specialize=RUNTIME)
def _add_groups(by_weight, by_norm, groups, norm_groups, GROUPS: tl.constexpr,
                BLOCK: tl.constexpr):
    """by_weight and by_norm: tuples of (parts, their sum, the parts' stride and size), those whose
    parts are of `groups` and of `norm_groups`. Each takes some of the programs, in this order.
    """
    block = tl.program_id(0)
    for i in tl.static_range(len(by_weight)):
        parts, out, stride, size = by_weight[i]
        count = tl.cdiv(size, BLOCK)
        if (block >= 0) & (block < count):
            _add_part(parts, out, block, groups, stride, size, GROUPS, BLOCK)
        block -= count
    for i in tl.static_range(len(by_norm)):
        parts, out, stride, size = by_norm[i]
        count = tl.cdiv(size, BLOCK)
        if (block >= 0) & (block < count):
            _add_part(parts, out, block, norm_groups, stride, size, GROUPS, BLOCK)
        block -= count


# Kernels multiply operands of x's dtype, or of float32 beside wider parameters: LAUNCH's dtypes.
MIXING = "_walk _walk_backward _tiles _tiles_backward _weight_backward"
LAUNCH = Table(
    # Windows of up to walked_window steps are walked. A tile is up to `rows` of a window by up to
    # `channels`; `steps` of the window are multiplied at once.
    Row(MIXING, ANY, "bfloat16 float16", ANY, dict(rows=128, steps=64, walked_window=64),
        "the weights of 64 rows and three tiles of the gate: 99 KB of shared memory"),
    Row(MIXING, "sm90 sm100 interpreter", "bfloat16 float16", ANY, dict(walked_window=128),
        "the weights of 128 rows fit into shared memory, where tensor cores read them"),
    Row("_walk _walk_backward", ANY, "bfloat16 float16", ANY, dict(channels=32),
        "two programs to a multiprocessor, beside weights in shared memory"),
    Row("_tiles _tiles_backward", ANY, "bfloat16 float16", ANY, dict(channels=32),
        "sums of 128 rows by 64 channels leave no registers for fragments of weights"),
    Row("_tiles _tiles_backward", "sm90 sm100 interpreter", "bfloat16 float16", ANY,
        dict(channels=64), "weights stay in shared memory: registers are for sums"),
    Row(MIXING, ANY, "bfloat16 float16", ANY, dict(STAGES=3),
        "two tiles under way beside the one multiplied"),
    Row(MIXING, "amd interpreter", "bfloat16 float16", ANY, dict(STAGES=2),
        "64 KB of shared memory on AMD"),
    Row("_tiles _tiles_backward", "amd", "bfloat16 float16", ANY, dict(steps=32),
        "counted: 64 spill with Triton 3.6"),
    Row(MIXING, ANY, "float32", ANY, dict(rows=64, steps=16, walked_window=32, STAGES=2),
        "operands take twice the registers and shared memory"),
    Row("_walk _walk_backward", ANY, "float32", ANY, dict(channels=32), "as in 16 bits"),
    Row("_tiles _tiles_backward", ANY, "float32", ANY, dict(channels=64),
        "8 warps for 64 rows by 64 channels"),
    Row(MIXING, ANY, "float64", ANY, dict(rows=32, steps=16, walked_window=32, STAGES=1),
        "four times; loads are not pipelined"),
    Row("_walk _walk_backward", ANY, "float64", ANY, dict(channels=16), "four times"),
    Row("_tiles _tiles_backward", ANY, "float64", ANY, dict(channels=32), "four times"),
    Row("_walk_backward", CUDA, "float64", ANY, dict(maxnreg=128),
        "counted: ptxas aims at fewer and spills"),
    Row("_tiles_backward", CUDA, "bfloat16 float16 float64", ANY, dict(maxnreg=128),
        "counted: ptxas aims at fewer and spills"),
    Row("_tiles _weight_backward", CUDA, "float32", ANY, dict(maxnreg=128),
        "counted: ptxas aims at fewer and spills"),
    Row(MIXING, ANY, ANY, ANY, dict(full_tile=4096, programs=512),
        "8 warps from so many numbers of a tile of sums on, 16 to a thread, and 4 below; programs "
        "to share out windows to: about four to a multiprocessor"),
    Row("_walk", "sm90", "bfloat16 float16", "backward", dict(STAGES=2),
        "counted: 122 KB of shared memory with three, in two a second program fits"),
    Row("_weight_backward", ANY, ANY, ANY, dict(per_multiprocessor=2),
        "each with sums of its own, of which few leave little to add up"),
    Row("_statistics", ANY, ANY, ANY, dict(tile_bytes=8192, warp_bytes=2048),
        "16-byte loads, four to a thread, where a row is not longer"),
    Row("_norm_backward", ANY, ANY, ANY,
        dict(tile_bytes=4096, warp_bytes=2048, STAGES=3, programs=1024),
        "half as many rows: it holds two of them, and two sums, to a channel"),
    Row("_add_groups", ANY, ANY, ANY, dict(GROUPS=32, block_bytes=512),
        "a warp's worth of parts at once, in wide loads"),
    Row("_add_groups", CUDA, "float64", ANY, dict(maxnreg=128),
        "counted: ptxas aims at fewer and spills"),
)


class _Plan:
    """What both directions need: sizes, tiles and types, and the statistics of the gate's rows."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor | None,
                 norm_bias: Tensor | None, eps: float) -> None:
        b, n, self.c = x.shape[0], x.shape[1], x.shape[2] // 2
        h, self.w = bias.shape
        d = self.c // h
        self.windows = -(-n // self.w)
        self.wide = wide(x.dtype)
        alike = all(p is None or p.dtype == x.dtype for p in (weight, bias, norm_weight, norm_bias))
        self.operand = x.dtype if alike else self.wide
        self.walks = self.w <= LAUNCH.choose("_walk", self.operand)["walked_window"]
        self.shape = dict(HEADS=h, DIM=d, WINDOW=self.w)
        self.types = dict(
            OPERAND=TYPES[self.wide if INTERPRETED else self.operand],
            PRECISION=float32_precision())
        self.rounded = dict(ROUNDED=TYPES[self.operand])
        self.gate = strided(x[..., self.c :])
        mean, inverse = (x.new_empty(b, n, dtype=self.wide) for _ in range(2))
        options = self.row_options("_statistics")
        launch(
            _statistics, (-(-b * n // options["ROWS"]),),
            *self.gate, mean, inverse, b * n, n, self.c, EVEN=evens(x), EPS=eps, **options)
        self.norm = mean, inverse, _dense(norm_weight), _dense(norm_bias)

    def row_options(self, kernel: str) -> dict[str, Any]:
        """The options of a kernel that holds rows whole; `programs` is there if LAUNCH has it."""
        options = LAUNCH.choose(kernel, self.wide)
        columns, size = _power(self.c), self.wide.itemsize
        return options | dict(
            COLUMNS=columns, ROWS=max(1, options.pop("tile_bytes") // size // columns),
            num_warps=max(4, min(32, columns * size // options.pop("warp_bytes"))))

    def _choices(self, kernel: str, *classes: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """What LAUNCH has for the kernel: sizes by name, and options."""
        options = LAUNCH.choose(kernel, self.operand, *classes)
        return {name: options.pop(name, None) for name in (
            "rows", "steps", "channels", "walked_window", "full_tile", "programs",
            "per_multiprocessor")}, options

    def launch(self, tiles: Any, walk: Any, classes: Sequence[str], sequences: int, windows: int,
               *args: Any, **types: Any) -> None:
        """Launches one of a pair of kernels, for `windows` of some sequences. classes: LAUNCH's."""
        sizes, options = self._choices((walk if self.walks else tiles).__name__, *classes)
        options |= dict(self.shape, **self.types, **types)
        rows, channels = sizes["rows"], min(sizes["channels"], _power(self.shape["DIM"]))
        parts = self.shape["HEADS"] * -(-self.shape["DIM"] // channels)
        if self.walks:
            rows = min(rows, max(rows // 2, _power(self.w)))
            per = rows // self.w
            count = -(-windows // per)
            length = max(1, count * sequences * parts // sizes["programs"])
            runs = -(-count // length)
            launch(
                walk, (sequences * runs * parts,),
                *args, runs, length, PER=per, ROWS=rows, CHANNELS=channels,
                num_warps=max(4, rows // 16), **options)
        else:
            # Blocks of 128 rows, unless the last one would be half empty.
            rows = rows if rows < 128 or -(-self.w // 64) % 2 == 0 else 64
            blocks = -(-self.w // rows)
            launch(
                tiles, (sequences * windows * blocks * parts,),
                *args, ROWS=rows, STEPS=sizes["steps"], CHANNELS=channels,
                num_warps=8 if rows * channels >= sizes["full_tile"] else 4, **options)

    def weight_tiles(self) -> tuple[int, int, int, dict[str, Any]]:
        """Returns how many tiles dweight has, how many programs there are to be for a
        multiprocessor and in all, and the options of its kernel.
        """
        sizes, options = self._choices("_weight_backward")
        rows = min(sizes["rows"], _power(self.w))
        columns = min(sizes["rows"], _power(2 * self.w))
        count = self.shape["HEADS"] * -(-self.w // rows) * -(-2 * self.w // columns)
        return count, sizes["per_multiprocessor"], sizes["programs"], dict(
            self.shape, ROWS=rows, COLUMNS=columns,
            CHANNELS=min(sizes["steps"], _power(self.shape["DIM"])),
            num_warps=8 if rows * columns >= sizes["full_tile"] else 4, **self.rounded,
            **self.types, **options)


def _multiprocessors(x: Tensor) -> int:
    if not x.is_cuda:
        return 132  # as many as an H200 has
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def _power(size: int) -> int:
    """Returns the power of two that a tile needs for `size`."""
    return max(16, power_of_two(size))


def _dense(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def _beside(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Returns the batch strides, then the other strides, of tensors that may be None."""
    laid_out = [(None, 0, (0, 0)) if t is None else strided(t) for t in tensors]
    return *(b for _, b, _ in laid_out), tuple(others for _, _, others in laid_out)


def forward(x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor | None,
            norm_bias: Tensor | None, eps: float, gate_residual: Tensor | None,
            activation: str) -> Tensor:
    """Runs windowed_sgu on x (b, n, 2c), weight (h, w, 2w), bias (h, w) and gate_residual
    (b, n, c); returns (b, n, c).
    """
    b, n, c = x.shape[0], x.shape[1], x.shape[2] // 2
    out = torch.empty(b, n, c, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    plan = _Plan(x, weight, bias, norm_weight, norm_bias, eps)
    plan.launch(_tiles, _walk, (), b, plan.windows, *plan.gate, plan.norm, weight, weight.stride(),
                bias, bias.stride(), (x, gate_residual, None), *_beside(gate_residual, None),
                (out, None, None), n, plan.windows, 0, 0, n, 0,
                EVEN=evens(x, gate_residual, None), ACTIVATION=activation, **plan.rounded)
    return out


def backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor | None,
             norm_bias: Tensor | None, eps: float, gate_residual: Tensor | None,
             activation: str) -> tuple[Tensor | None, ...]:
    """Returns dx, dweight, dbias, dnorm_weight, dnorm_bias and dgate_residual, from grad
    (b, n, c).
    """
    b, n, c = grad.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dresidual = None if gate_residual is None else torch.empty(
        grad.shape, dtype=x.dtype, device=x.device)
    if dx.numel() == 0:
        return (dx, *(None if p is None else torch.zeros(p.shape, dtype=p.dtype, device=p.device)
                      for p in (weight, bias, norm_weight, norm_bias)), dresidual)
    plan = _Plan(x, weight, bias, norm_weight, norm_bias, eps)
    scale, shift = plan.norm[2:]
    if activation == OUTSIDE.value:
        dx[..., :c] = 0
        dmixed = grad
        if dresidual is not None:
            dresidual.copy_(grad)
    else:
        dmixed = dresidual if plan.operand == x.dtype else None
    slabs = _slabs(b, n, c, plan, whole=dmixed is not None)
    lo, hi, first, end = slabs[0]
    own: dict[str, Any] = dict(dtype=plan.operand, device=x.device)
    if dmixed is None:
        scratch = torch.empty(hi - lo, min(n, (end - first + 1) * plan.w), c, **own)
    # Parameters wider than x want gradients from a dnormed that is not rounded.
    mixed_types = plan.operand != x.dtype
    if mixed_types:
        dnormed = torch.empty(hi - lo, min(n, (end - first) * plan.w), c, **own)
    weight_tiles, per_multiprocessor, programs, weight_options = plan.weight_tiles()
    groups = max(1, min(_multiprocessors(x) * per_multiprocessor, programs) // weight_tiles)
    groups = min(groups, b * plan.windows)
    dweight = torch.empty(groups, *weight.shape, dtype=plan.wide, device=x.device)
    dbias = torch.empty(groups, *bias.shape, dtype=plan.wide, device=x.device)
    norm_options, rows = plan.row_options("_norm_backward"), (hi - lo) * min(
        n, (end - first) * plan.w)
    share = max(norm_options["ROWS"], -(-rows // norm_options.pop("programs")))
    dnorm = None if scale is None and shift is None else torch.empty(
        -(-rows // share), 2, c, dtype=plan.wide, device=x.device)
    for lo, hi, first, end in slabs:
        more = int(lo > 0 or first > 0)
        after, origin = dmixed, 0
        if dmixed is None:
            after, origin = scratch, lo * scratch.shape[1] + first * plan.w
        if activation != OUTSIDE.value:
            # One window more: its mixture has gates of this slab in it.
            windows = min(end + 1, plan.windows) - first
            plan.launch(
                _tiles, _walk, ("backward",), hi - lo, windows, *plan.gate, plan.norm, weight,
                weight.stride(), bias, bias.stride(), (x, gate_residual, grad),
                *_beside(gate_residual, grad),
                (dx, after, None if dmixed is dresidual else dresidual), n, windows, lo, first,
                after.shape[1], origin, EVEN=evens(x, gate_residual, grad),
                ACTIVATION=activation, **plan.rounded)
        items = (hi - lo) * (end - first)
        launch(
            _weight_backward, (groups * weight_tiles,),
            *plan.gate, plan.norm, *strided(after), dweight, dbias, n, end - first, lo, first,
            -(-items // groups), items, origin, more, EVEN=evens(x, after), **weight_options)
        out, out_origin = dx[..., c:], 0
        if mixed_types:
            out, out_origin = dnormed, lo * dnormed.shape[1] + first * plan.w
        plan.launch(_tiles_backward, _walk_backward, (), hi - lo, end - first, weight,
                    weight.stride(), *strided(after), *strided(out), n, end - first, lo, first,
                    origin, out_origin, EVEN=evens(after, out))
        row = lo * n + first * plan.w
        rows = (hi - lo) * n if hi - lo > 1 else min(end * plan.w, n) - first * plan.w
        launch(
            _norm_backward, (-(-rows // share),),
            *plan.gate, plan.norm, out, out.stride(1), dx, dnorm, row, rows,
            row if mixed_types else 0, n, c, share, more, EVEN=evens(x), **norm_options)
    return dx, *_sums((dweight, dbias), (weight, bias), dnorm, (norm_weight, norm_bias)), dresidual


def _slabs(b: int, n: int, c: int, plan: _Plan,
           whole: bool) -> list[tuple[int, int, int, int]]:
    """Returns slabs that fit into the scratch, each as (first sequence, end, first window, end);
    the first is the largest.
    """
    steps = SCRATCH // (c * plan.operand.itemsize)
    if whole or steps >= n:
        size = b if whole else steps // n
        return [(i, min(i + size, b), 0, plan.windows) for i in range(0, b, size)]
    size = max(1, steps // plan.w - 1)
    return [(i, i + 1, first, min(first + size, plan.windows))
            for i in range(b) for first in range(0, plan.windows, size)]


def _sums(parts: Sequence[Tensor], parameters: Sequence[Tensor], norm_parts: Tensor | None,
          norm_parameters: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of all parameters, which may be None: sums of the parts (groups, …), and of
    norm_parts (groups, 2, c), in the parameters' dtypes.
    """
    grads = [None if p is None else torch.empty(p.shape, dtype=p.dtype, device=p.device)
             for p in (*parameters, *norm_parameters)]

    def described(parts: Sequence[Tensor],
                  grads: Sequence[Tensor | None]) -> tuple[tuple[Tensor, Tensor, int, int], ...]:
        return tuple((part, grad, part.stride(0), grad.numel())
                     for part, grad in zip(parts, grads) if grad is not None)

    options = LAUNCH.choose("_add_groups", parts[0].dtype)
    block = options.pop("block_bytes") // parts[0].element_size()
    by_weight = described(parts, grads[:2])
    by_norm = () if norm_parts is None else described(norm_parts.unbind(1), grads[2:])
    launch(
        _add_groups, (sum(-(-size // block) for *_, size in (*by_weight, *by_norm)),),
        by_weight, by_norm, parts[0].shape[0], 0 if norm_parts is None else norm_parts.shape[0],
        BLOCK=block, **options)
    return grads
