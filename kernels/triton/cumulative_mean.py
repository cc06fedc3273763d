"""cumulative_mean on a GPU: sums over time, a block of channels per program.

    y_t = Σ_{s ≤ t} x_s / (t + 1),   dx_t = Σ_{s ≥ t} grad_s / (s + 1)

are one sum in two directions, divided after and before. Where there are enough channels to
fill the GPU a program walks along all of time: an element is read once and written once, 4
bytes in bfloat16. With fewer, time is cut into segments that `_ends` sums first: 6 bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmix._triton.layout import ceil_div, even, evens, flat, offset
from fastmix._triton.plans import launch
from fastmix._triton.scan import entering, load_rows, segment_place, segments, tile
from fastmix._triton.target import ANY, Row, Table
from fastmix.dtypes import wide

RUNTIME = ["n", "blocks", "count", "length", "x_b"]


@triton.jit
def _share(step, n, dtype: tl.constexpr, BACKWARD: tl.constexpr):
    """Returns 1 / (t + 1) at steps (RUNS,), as (RUNS, 1); it is 1 beyond the end."""
    count = n - step if BACKWARD else step + 1
    return (1 / tl.maximum(count, 1).to(dtype))[:, None]


@triton.jit(do_not_specialize=RUNTIME)
def _ends(x, ends, n, blocks, count, length, channels, x_b, x_n, x_h, x_d, EVEN: tl.constexpr,
          D: tl.constexpr, BACKWARD: tl.constexpr, RUNS: tl.constexpr, COLS: tl.constexpr,
          ROWS: tl.constexpr):
    """Computes the sum of each segment but the last, in ends (b, count, channels)."""
    dtype: tl.constexpr = ends.dtype.element_ty
    batch, segment, block = segment_place(blocks, count)
    channel = block * COLS + tl.arange(0, COLS)
    inside = (channel < channels)[None, :]
    if BACKWARD:
        x += (n - 1).to(tl.int64) * x_n
        x_n = -x_n
    run = length // RUNS
    step = segment * length + tl.arange(0, RUNS) * run
    pointers = (x + batch * even(x_b, EVEN[0]) + step.to(tl.int64)[:, None] * x_n
                + offset(channel, x_h, x_d, D)[None, :])
    sums = tl.zeros((RUNS, COLS), dtype)
    for _ in range(0, tl.where(segment < count - 1, run, 0), ROWS):
        rows = load_rows(pointers, x_n, (n - step)[:, None], inside, ROWS)
        for r in tl.static_range(ROWS):
            u = rows[r].to(dtype)
            sums += u * _share(step + r, n, dtype, True) if BACKWARD else u
        pointers += ROWS * tl.cast(x_n, tl.int64)
        step += ROWS
    tl.store(ends + (batch * count + segment) * channels + channel, tl.sum(sums, 0),
             mask=channel < channels)


@triton.jit(do_not_specialize=RUNTIME)
def _sums(x, ends, out, n, blocks, count, length, channels, x_b, x_n, x_h, x_d,
          EVEN: tl.constexpr, D: tl.constexpr, BACKWARD: tl.constexpr, RUNS: tl.constexpr,
          COLS: tl.constexpr, ROWS: tl.constexpr):
    """Writes the means in out, or with BACKWARD their gradient; step 0 then is the last in time."""
    dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    batch, segment, block = segment_place(blocks, count)
    channel = block * COLS + tl.arange(0, COLS)
    inside = (channel < channels)[None, :]
    out_n = tl.cast(channels, tl.int64)
    out += batch * n * channels
    if BACKWARD:
        x += (n - 1).to(tl.int64) * x_n
        out += (n - 1).to(tl.int64) * channels
        x_n, out_n = -x_n, -out_n

    total = tl.zeros((1, COLS), dtype)
    if ends is not None:
        ends += batch * count * channels + channel[None, :]
        for at in range(0, segment, 8):
            rows = load_rows(ends + at * channels, channels, segment - at, inside, 8)
            for r in tl.static_range(8):
                total += rows[r]

    step = segment * length + tl.arange(0, RUNS) * ROWS
    pointers = (x + batch * even(x_b, EVEN[0]) + step.to(tl.int64)[:, None] * x_n
                + offset(channel, x_h, x_d, D)[None, :])
    writing = out + step.to(tl.int64)[:, None] * out_n + channel[None, :]
    one = tl.full((RUNS, COLS), 1, dtype)
    next_rows = load_rows(pointers, x_n, (n - step)[:, None], inside, ROWS)
    for _ in range(0, min(length, n - segment * length), ROWS * RUNS):
        rows = next_rows
        pointers += ROWS * RUNS * tl.cast(x_n, tl.int64)
        next_rows = load_rows(pointers, x_n, (n - step - ROWS * RUNS)[:, None], inside, ROWS)
        sums = tl.zeros((RUNS, COLS), dtype)
        for r in tl.static_range(ROWS):
            u = rows[r].to(dtype)
            sums += u * _share(step + r, n, dtype, True) if BACKWARD else u
        sums, total = entering(one, sums, total)
        row = writing
        for r in tl.static_range(ROWS):
            u = rows[r].to(dtype)
            sums += u * _share(step + r, n, dtype, True) if BACKWARD else u
            y = sums if BACKWARD else sums * _share(step + r, n, dtype, False)
            tl.store(row, y.to(out.dtype.element_ty), mask=(r < n - step)[:, None] & inside)
            row += out_n
        writing += ROWS * RUNS * out_n
        step += ROWS * RUNS


LAUNCH = Table(
    Row("_sums _ends", ANY, ANY, ANY, dict(tile_bytes=128),
        "16 rows of 16 bits to a thread, 8 of float32: registers hold them beside the next tile's"),
)


def _run(x: Tensor, dtype: torch.dtype, backward: bool) -> Tensor:
    """Returns the means of x (b, n, …), or, if `backward`, their gradient, for which time runs from
    the end.
    """
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel() == 0:
        return out
    b, n = x.shape[:2]
    x = x.reshape(b, n, -1, x.shape[-1] if x.ndim > 2 else 1)
    channels, d = x[0, 0].numel(), x.shape[-1]
    sizes = tile(channels, b, x.dtype, **LAUNCH.choose("_sums", x.dtype))
    blocks = ceil_div(channels, sizes["COLS"])
    count, length = segments(n, b * blocks, sizes["RUNS"] * sizes["ROWS"], x.dtype)
    sizes |= dict(EVEN=evens(x), D=0 if flat(x) else d, BACKWARD=backward)
    grid, common = (b * blocks * count,), (n, blocks, count, length, channels, *x.stride())
    ends = None
    if count > 1:
        ends = x.new_empty(b, count, channels, dtype=wide(dtype))
        launch(_ends, grid, x, ends, *common, **sizes)
    launch(_sums, grid, x, ends, out, *common, **sizes)
    return out


def forward(x: Tensor) -> Tensor:
    """Returns the mean of the steps of x (b, n, …) so far, in the same shape and dtype."""
    return _run(x, x.dtype, False)


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """Returns the gradient of x, from that of the means."""
    return _run(grad, x.dtype, True)
