"""decay_conv on a GPU: y_t = decay · y_{t-1} + gain · x_t, a block of channels per program.

Where there are enough channels to fill the GPU a program walks along all of time: x is read
once and y written once, 4 bytes an element in bfloat16. With fewer, time is cut into
segments, `_ends` finds what each does to the state, and x is read twice: 6 bytes.

The gradient runs the other way. With p_t = decay · g_t, the part of g_{t-1} that comes from step t,

    g_t = grad_t + p_{t+1},   dx_t = gain · g_t,   dgain = Σ g_t x_t,

and Σ g_t y_{t-1}, the gradient of decay, is turned around so that no y is needed:

    ddecay = Σ gain · x_t q_t + initial_state · q_{-1},   q_t = g_{t+1} + decay · q_{t+1}.

Entered with p, m steps add m · decay^(m-1) · p to q. Backward reads grad and x and writes
dx, 6 bytes an element; with segments it reads grad twice, 8 bytes.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmix._triton.layout import ceil_div, even, evens, flat, offset, power_of_two, strides
from fastmix._triton.plans import launch
from fastmix._triton.scan import entering, load_rows, power, segment_place, segments, tile
from fastmix._triton.target import ANY, CUDA, Row, Table
from fastmix.dtypes import wide
from fastmix.ops._carries import carry_count

RUNTIME = ["n", "blocks", "count", "length", "x_b", "grad_b"]


@triton.jit
def _parameter(values, channel, d, channels, dtype: tl.constexpr):
    """Loads a head's parameter, of values (h,), for each channel: (1, COLS)."""
    return tl.load(values + channel // d, mask=channel < channels, other=0).to(dtype)[None, :]


@triton.jit
def _pointers(x, batch, step, channel, x_b, x_n, x_h, x_d, D: tl.constexpr):
    """Returns pointers (RUNS, COLS) to steps (RUNS,) and channels (COLS,)."""
    return (x + batch * x_b + step.to(tl.int64)[:, None] * x_n
            + offset(channel, x_h, x_d, D)[None, :])


@triton.jit(do_not_specialize=RUNTIME)
def _ends(x, decay, ends, n, blocks, count, length, d, channels, x_b, x_strides,
          EVEN: tl.constexpr, D: tl.constexpr, BACKWARD: tl.constexpr, RUNS: tl.constexpr,
          COLS: tl.constexpr, ROWS: tl.constexpr):
    """Computes the state after each segment if that before it is 0, without the gain, in ends
    (b, count, 1, h·d). BACKWARD starts at the last step and computes p and q, in ends
    (b, count, 2, h·d). The last segment, whose end is not needed, is not read.
    """
    dtype: tl.constexpr = ends.dtype.element_ty
    x_n, x_h, x_d = x_strides
    batch, segment, block = segment_place(blocks, count)
    channel = block * COLS + tl.arange(0, COLS)
    inside = (channel < channels)[None, :]
    decay = _parameter(decay, channel, d, channels, dtype)
    if BACKWARD:
        x += (n - 1).to(tl.int64) * x_n
        x_n = -x_n
    run = length // RUNS
    start = segment * length + tl.arange(0, RUNS) * run
    pointers = _pointers(x, batch, start, channel, even(x_b, EVEN[0]), x_n, x_h, x_d, D)
    p = tl.zeros((RUNS, COLS), dtype)
    q = tl.zeros((RUNS, COLS), dtype)
    for at in range(0, tl.where(segment < count - 1, run, 0), ROWS):
        rows = load_rows(pointers, x_n, (n - start - at)[:, None], inside, ROWS)
        for r in tl.static_range(ROWS):
            if BACKWARD:
                g = rows[r].to(dtype) + p
                p, q = decay * g, decay * q + g
            else:
                p = decay * p + rows[r].to(dtype)
        pointers += ROWS * tl.cast(x_n, tl.int64)
    none = tl.zeros((1, COLS), dtype)
    mixed = power(decay, run - 1, 31)
    factor = tl.broadcast_to(decay * mixed, p.shape)
    before, p = entering(factor, p, none)
    ends += (batch * count + segment) * (1 + BACKWARD) * channels + channel[None, :]
    tl.store(ends, p, mask=inside)
    if BACKWARD:
        _, q = entering(factor, q + run * mixed * before, none)
        tl.store(ends + channels, q, mask=inside)


@triton.jit(do_not_specialize=RUNTIME)
def _forward(x, decay, gain, initial, ends, out, state_out, carries, n, blocks, count, length,
             d, channels, x_b, x_strides, EVEN: tl.constexpr, EVERY: tl.constexpr,
             D: tl.constexpr, RUNS: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr):
    """Writes out (b, n, h·d); the last segment also writes state_out (b, h·d), and with EVERY > 0
    each writes its part of carries (b, ·, h·d). ends are `_ends` of all segments, if time is cut.
    """
    x_n, x_h, x_d = x_strides
    dtype: tl.constexpr = state_out.dtype.element_ty
    batch, segment, block = segment_place(blocks, count)
    channel = block * COLS + tl.arange(0, COLS)
    inside = (channel < channels)[None, :]
    decay = _parameter(decay, channel, d, channels, dtype)
    if gain is not None:
        gain = _parameter(gain, channel, d, channels, dtype)

    state = tl.zeros((1, COLS), dtype)
    if initial is not None:
        state = tl.load(initial + batch * channels + channel[None, :], mask=inside, other=0)
    if ends is not None:
        factor = power(decay, length, 31)
        ends += batch * count * channels + channel[None, :]
        for at in range(0, segment, 8):
            rows = load_rows(ends + at * channels, channels, segment - at, inside, 8)
            for r in tl.static_range(8):
                end = rows[r] if gain is None else gain * rows[r]
                state = tl.where(at + r < segment, factor * state + end, state)

    run = tl.arange(0, RUNS)
    step = segment * length + run * ROWS
    pointers = _pointers(x, batch, step, channel, even(x_b, EVEN[0]), x_n, x_h, x_d, D)
    writing = _pointers(out, batch, step, channel, n.to(tl.int64) * channels, channels, 0, 1, 0)
    state_out += batch * channels + channel[None, :]
    if EVERY > 0:
        carries += batch * ((n + EVERY - 1) // EVERY + 1) * channels + channel[None, :]
    tiled = tl.zeros((RUNS, COLS), dtype)
    by_run = tl.broadcast_to(power(decay, ROWS, 10), tiled.shape)
    by_tile = power(decay, ROWS * RUNS, 16)
    since = power(decay + tiled, (run * ROWS)[:, None], 16)  # the start of the tile

    next_rows = load_rows(pointers, x_n, (n - step)[:, None], inside, ROWS)
    rows, entered = next_rows, tiled
    for _ in range(0, min(length, n - segment * length), ROWS * RUNS):
        rows = next_rows
        pointers += ROWS * RUNS * tl.cast(x_n, tl.int64)
        next_rows = load_rows(pointers, x_n, (n - step - ROWS * RUNS)[:, None], inside, ROWS)
        y = tiled
        for r in tl.static_range(ROWS):
            y = decay * y + rows[r].to(dtype)
        if gain is not None:
            y *= gain
        entered, end = entering(by_run, y, tl.zeros((1, COLS), dtype))
        entered += since * state
        state = end + by_tile * state
        if EVERY > 0:
            now = step[:, None]
            tl.store(carries + (now // EVERY).to(tl.int64) * channels, entered,
                     mask=(now % EVERY == 0) & (now < n) & inside)
        y = entered
        row = writing
        for r in tl.static_range(ROWS):
            u = rows[r].to(dtype)
            y = decay * y + (u if gain is None else gain * u)
            tl.store(row, y.to(out.dtype.element_ty), mask=(r < n - step)[:, None] & inside)
            row += channels
        writing += ROWS * RUNS * tl.cast(channels, tl.int64)
        step += ROWS * RUNS

    # The last step is somewhere in the last tile.
    step -= ROWS * RUNS
    for r in tl.static_range(ROWS):
        u = rows[r].to(dtype)
        entered = decay * entered + (u if gain is None else gain * u)
        last = (step + r == n - 1)[:, None] & inside
        tl.store(state_out + 0 * step[:, None], entered, mask=last)
        if EVERY > 0:
            tl.store(carries + (n + EVERY - 1) // EVERY * tl.cast(channels, tl.int64)
                     + 0 * step[:, None], entered, mask=last)


@triton.jit
def _enter_segment(p, q, ends, decay, batch, segment, count, length, channel, channels, inside):
    """Returns p and q where a segment begins, from what the segments before it do."""
    factor = power(decay, length, 31)
    mixed = length * power(decay, length - 1, 31)
    ends += batch * count * 2 * channels + channel[None, :]
    for at in range(0, segment, 8):
        end_p = load_rows(ends + 2 * at * channels, 2 * channels, segment - at, inside, 8)
        end_q = load_rows(ends + (2 * at + 1) * channels, 2 * channels, segment - at, inside, 8)
        for r in tl.static_range(8):
            ours = at + r < segment
            q = tl.where(ours, factor * q + mixed * p + end_q[r], q)
            p = tl.where(ours, factor * p + end_p[r], p)
    return p, q


@triton.jit
def _run_adjoints(grad_rows, decay, zero, dtype: tl.constexpr, ROWS: tl.constexpr):
    """Returns p and q behind a run if those before it are `zero`."""
    p, q = zero, zero
    for r in tl.static_range(ROWS):
        g = grad_rows[r].to(dtype) + p
        p, q = decay * g, decay * q + g
    return p, q


@triton.jit
def _write_gradients(grad_x, grad_rows, rows, decay, gain, p, q, by_decay, by_gain, left, inside,
                     channels, ROWS: tl.constexpr):
    """Walks a run from the p and q before it; returns by_decay and by_gain, sums of x q and g x."""
    for r in tl.static_range(ROWS):
        u = rows[r].to(p.dtype)
        g = grad_rows[r].to(p.dtype) + p
        by_decay += u * q
        if gain is not None:
            by_gain += u * g
        tl.store(grad_x, (g if gain is None else gain * g).to(grad_x.dtype.element_ty),
                 mask=(r < left)[:, None] & inside)
        grad_x -= channels
        p, q = decay * g, decay * q + g
    return by_decay, by_gain


@triton.jit
def _store_initial_gradients(grad_initial, grad_rows, decay, p, q, batch, batches, step, n, channel,
                             channels, inside, ROWS: tl.constexpr):
    """Stores p and q after the step n - 1, which is in one of the runs that begin at `step`."""
    grad_initial += batch * channels + channel[None, :] + 0 * step[:, None]
    for r in tl.static_range(ROWS):
        g = grad_rows[r].to(p.dtype) + p
        p, q = decay * g, decay * q + g
        last = (step + r == n - 1)[:, None] & inside
        tl.store(grad_initial, p, mask=last)
        tl.store(grad_initial + batches * tl.cast(channels, tl.int64), q, mask=last)


@triton.jit(do_not_specialize=RUNTIME)
def _backward(grad, x, decay, gain, grad_state, ends, outputs, n, blocks, count, length, d,
              channels, grad_b, grad_strides, x_b, x_strides, EVEN: tl.constexpr,
              D: tl.constexpr, RUNS: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr):
    """Step 0 is the last in time. outputs: the gradient of x; sums (2, b, count, h·d) of x q and
    g x over the segment; and the last p and q (2, b, h·d), or None without an initial state.
    """
    grad_x, sums, grad_initial = outputs
    grad_n, grad_h, grad_d = grad_strides
    x_n, x_h, x_d = x_strides
    dtype: tl.constexpr = sums.dtype.element_ty
    batch, segment, block = segment_place(blocks, count)
    channel = block * COLS + tl.arange(0, COLS)
    inside = (channel < channels)[None, :]
    decay = _parameter(decay, channel, d, channels, dtype)
    if gain is not None:
        gain = _parameter(gain, channel, d, channels, dtype)

    p = tl.load(grad_state + batch * channels + channel[None, :], mask=inside, other=0)
    q = tl.zeros((1, COLS), dtype)
    if ends is not None:
        p, q = _enter_segment(p, q, ends, decay, batch, segment, count, length, channel, channels,
                              inside)

    backwards = (n - 1).to(tl.int64)
    grad += backwards * grad_n
    x += backwards * x_n
    grad_x += backwards * channels
    run = tl.arange(0, RUNS)
    step = segment * length + run * ROWS
    grad_b, x_b = even(grad_b, EVEN[0]), even(x_b, EVEN[1])
    grads = _pointers(grad, batch, step, channel, grad_b, -grad_n, grad_h, grad_d, D)
    inputs = _pointers(x, batch, step, channel, x_b, -x_n, x_h, x_d, D)
    writing = _pointers(grad_x, batch, step, channel, n.to(tl.int64) * channels, -channels, 0, 1, 0)
    tiled = tl.zeros((RUNS, COLS), dtype)
    none = tl.zeros((1, COLS), dtype)
    by_run = tl.broadcast_to(power(decay, ROWS, 10), tiled.shape)
    by_run_mixed = ROWS * power(decay, ROWS - 1, 10)
    by_tile = power(decay, ROWS * RUNS, 16)
    by_tile_mixed = ROWS * RUNS * power(decay, ROWS * RUNS - 1, 16)
    since = power(decay + tiled, (run * ROWS)[:, None], 16)
    since_mixed = (run * ROWS)[:, None] * power(
        decay + tiled, tl.maximum(run * ROWS - 1, 0)[:, None], 16)
    by_decay, by_gain = tiled, tiled

    next_grads = load_rows(grads, -grad_n, (n - step)[:, None], inside, ROWS)
    grad_rows, entered_p, entered_q = next_grads, tiled, tiled
    for _ in range(0, min(length, n - segment * length), ROWS * RUNS):
        grad_rows = next_grads
        rows = load_rows(inputs, -x_n, (n - step)[:, None], inside, ROWS)
        grads -= ROWS * RUNS * tl.cast(grad_n, tl.int64)
        inputs -= ROWS * RUNS * tl.cast(x_n, tl.int64)
        left = (n - step - ROWS * RUNS)[:, None]
        next_grads = load_rows(grads, -grad_n, left, inside, ROWS)
        run_p, run_q = _run_adjoints(grad_rows, decay, tiled, dtype, ROWS)
        entered_p, end_p = entering(by_run, run_p, none)
        entered_q, end_q = entering(by_run, run_q + by_run_mixed * entered_p, none)
        entered_p += since * p
        entered_q += since * q + since_mixed * p
        q = end_q + by_tile * q + by_tile_mixed * p
        p = end_p + by_tile * p
        by_decay, by_gain = _write_gradients(
            writing, grad_rows, rows, decay, gain, entered_p, entered_q, by_decay, by_gain,
            n - step, inside, channels, ROWS)
        writing -= ROWS * RUNS * tl.cast(channels, tl.int64)
        step += ROWS * RUNS

    batches = tl.num_programs(0) // (blocks * count)
    if grad_initial is not None:  # the first step in time is somewhere in the last tile
        _store_initial_gradients(grad_initial, grad_rows, decay, entered_p, entered_q, batch,
                                 batches, step - ROWS * RUNS, n, channel, channels, inside, ROWS)
    sums += (batch * count + segment) * channels + channel
    by_decay = tl.sum(by_decay, 0)[None, :]
    tl.store(sums[None, :], by_decay if gain is None else gain * by_decay, mask=inside)
    if gain is not None:
        tl.store((sums + batches * count * tl.cast(channels, tl.int64))[None, :],
                 tl.sum(by_gain, 0)[None, :], mask=inside)


@triton.jit
def _head_sum(x, y, rows, head, d, channels, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Sums x (rows, h·d), times y unless that is None, over the rows and a head's channels."""
    dtype: tl.constexpr = x.dtype.element_ty
    total = tl.zeros((ROWS, COLS), dtype)
    for first in range(0, rows, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        for column in range(0, d, COLS):
            channel = column + tl.arange(0, COLS)[None, :]
            inside = (row < rows) & (channel < d)
            at = row * channels + head * d + channel
            numbers = tl.load(x + at, mask=inside, other=0)
            if y is not None:
                numbers *= tl.load(y + at, mask=inside, other=0).to(dtype)
            total += numbers
    return tl.sum(total)


@triton.jit(do_not_specialize=["rows", "batches"])
def _parameter_gradients(sums, grad_initial, initial, grad_decay, grad_gain, rows, batches, d,
                         channels, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Writes a head's gradients of decay and gain, from the sums (2, rows, h·d), the initial state
    (b, h·d) and its q, the latter half of grad_initial (2, b, h·d), as `_backward` leaves them.
    """
    head = tl.program_id(0)
    by_decay = _head_sum(sums, None, rows, head, d, channels, ROWS, COLS)
    if initial is not None:
        by_decay += _head_sum(grad_initial + batches * tl.cast(channels, tl.int64), initial,
                              batches, head, d, channels, ROWS, COLS)
    tl.store(grad_decay + head, by_decay.to(grad_decay.dtype.element_ty))
    if grad_gain is not None:
        by_gain = _head_sum(sums + rows * tl.cast(channels, tl.int64), None, rows, head, d,
                            channels, ROWS, COLS)
        tl.store(grad_gain + head, by_gain.to(grad_gain.dtype.element_ty))


LAUNCH = Table(
    # tile_bytes: what a thread holds of a tensor's tile.
    Row("_forward", ANY, ANY, ANY, dict(tile_bytes=128),
        "as many rows as registers hold beside the next tile's"),
    Row("_forward", "sm100 sm120", "float16", ANY, dict(tile_bytes=64),
        "counted: spills with 16 rows to a thread"),
    Row("_backward", ANY, ANY, ANY, dict(tile_bytes=80), "grad and x, and the next tile's grad"),
    Row("_forward _backward", CUDA, "float32", "four-warps", dict(maxnreg=168),
        "about what three programs leave each other; counted: left to itself ptxas spills"),
    Row("_forward", "sm80", "float32", "four-warps", dict(maxnreg=176), "counted: spills in 168"),
    Row("_ends", CUDA, ANY, "backward", dict(maxnreg=64),
        "counted: ptxas aims at fewer and spills"),
    Row("_ends", CUDA, "float64", "backward", dict(maxnreg=96), "counted: spills in 64"),
    Row("_parameter_gradients", ANY, ANY, ANY, dict(numbers=1024, COLS=64, num_warps=4),
        "8 numbers to a thread, of at most 64 channels"),
    Row("_parameter_gradients", CUDA, ANY, ANY, dict(maxnreg=64),
        "counted: ptxas aims at 32 and spills 2 words"),
    Row("_parameter_gradients", CUDA, "float64", ANY, dict(maxnreg=128),
        "counted: 6 to 20 words spill in 64"),
)


def _plan(kernel: str, x: Tensor) -> tuple[tuple[int], tuple[int, ...], dict[str, Any],
                                           dict[str, Any]]:
    """Returns how x (b, n, h, d) is cut: the grid, arguments of every kernel, block sizes, and the
    limit of the kernel's registers.
    """
    b, n, h, d = x.shape
    tile_bytes = LAUNCH.choose(kernel, x.dtype)["tile_bytes"]
    sizes = tile(h * d, b, x.dtype, tile_bytes)
    blocks = ceil_div(h * d, sizes["COLS"])
    count, length = segments(n, b * blocks, sizes["RUNS"] * sizes["ROWS"], x.dtype)
    limit = LAUNCH.choose(kernel, x.dtype, *(("four-warps",) if sizes["num_warps"] == 4 else ()))
    del limit["tile_bytes"]
    return (b * blocks * count,), (n, blocks, count, length, d, h * d), sizes, limit


def forward(x: Tensor, decay: Tensor, gain: Tensor | None, initial_state: Tensor | None,
            carry_every: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y (b, n, h, d), the last state (b, h, d) and carries (b, count, h, d): the states
    before every `carry_every`-th step and the last; none if it is 0.
    """
    b, n, h, d = x.shape
    dtype = wide(x.dtype)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    state = x.new_empty(b, h, d, dtype=dtype)
    carries = x.new_empty(b, carry_count(n, carry_every), h, d, dtype=dtype)
    if x.numel() == 0:
        return out, state.zero_(), carries.zero_()
    grid, common, sizes, limit = _plan("_forward", x)
    sizes |= dict(EVEN=evens(x), D=0 if flat(x) else d)
    decay = decay.contiguous()
    ends = None
    count = common[2]
    if count > 1:
        ends = x.new_empty(b, count, 1, h * d, dtype=dtype)
        launch(_ends, grid, x, decay, ends, *common, *strides(x), BACKWARD=False, **sizes)
    launch(_forward, grid, x, decay, None if gain is None else gain.contiguous(),
           None if initial_state is None else initial_state.contiguous(), ends, out, state,
           carries if carry_every else None, *common, *strides(x), EVERY=carry_every, **sizes,
           **limit)
    return out, state, carries


def backward(grad: Tensor, grad_state: Tensor, carries: Tensor, x: Tensor, decay: Tensor,
             gain: Tensor | None, initial_state: Tensor | None,
             carry_every: int) -> tuple[Tensor | None, ...]:
    """Returns the gradients of x, decay, gain and initial_state, from those of y and the last
    state.
    """
    b, n, h, d = x.shape
    dtype = wide(x.dtype)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_initial = None if initial_state is None else torch.empty(
        2, b, h, d, dtype=dtype, device=x.device)
    if x.numel() == 0:
        return (grad_x, torch.zeros_like(decay), None if gain is None else torch.zeros_like(gain),
                None if grad_initial is None else grad_initial[0])
    grid, common, sizes, limit = _plan("_backward", x)
    sizes |= dict(EVEN=evens(grad, x), D=0 if flat(grad, x) else d)
    decays = decay.contiguous()
    ends = None
    count = common[2]
    if count > 1:
        ends = x.new_empty(b, count, 2, h * d, dtype=dtype)
        launch(_ends, grid, grad, decays, ends, *common, *strides(grad), BACKWARD=True,
               **sizes | dict(EVEN=evens(grad)), **LAUNCH.choose("_ends", x.dtype, "backward"))
    sums = x.new_empty(1 if gain is None else 2, b * count, h, d, dtype=dtype)
    launch(_backward, grid, grad, x, decays, None if gain is None else gain.contiguous(),
           grad_state.contiguous(), ends, (grad_x, sums, grad_initial), *common, *strides(grad, x),
           **sizes, **limit)
    grad_decay = decay.new_empty(h)
    grad_gain = None if gain is None else gain.new_empty(h)
    options = LAUNCH.choose("_parameter_gradients", dtype)
    cols = min(options.pop("COLS"), power_of_two(d))
    launch(
        _parameter_gradients, (h,), sums, grad_initial,
        None if initial_state is None else initial_state.contiguous(), grad_decay, grad_gain,
        b * count, b, d, h * d, COLS=cols, ROWS=options.pop("numbers") // cols, **options)
    return (grad_x, grad_decay, grad_gain,
            None if grad_initial is None else grad_initial[0])
