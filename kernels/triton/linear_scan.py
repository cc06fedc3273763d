"""linear_scan on a GPU: h_t = gates_t · h_{t-1} + inputs_t, a block of channels per program.

Where there are enough channels to fill the GPU a program walks along all of time and reads
and writes each element once: 6 bytes in bfloat16 with a gate for every channel. With fewer,
time is cut into segments, `_ends` finds what each does to a state, and gates and inputs are
read twice: 10 bytes.

Backward hands p_t = conj(gates_t) · g_t from step t to the one before it:

    g_t = grad_t + p_{t+1},   dinputs_t = g_t,   dgates_t = g_t · conj(h_{t-1}).

It walks from the last step to the first; the states of a tile are recomputed from the carry
it begins with. It reads gates, inputs and grad and writes two: 10 bytes; 14 with segments.

Numbers in registers are as in number.py. Steps beyond n have the gate 1 and the
input 0, and hand states on as they are.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmix._triton.layout import ceil_div, evens, flat, in_pairs, offset, power_of_two, two_axes
from fastmix._triton.number import conj, filled, plus, times
from fastmix._triton.plans import launch
from fastmix._triton.scan import ends_of, entering, segment_place, segments
from fastmix._triton.target import ANY, CUDA, Row, Table
from fastmix.dtypes import wide
from fastmix.ops._carries import CARRY_EVERY, carry_count

RUNTIME = ["n", "blocks", "count", "length", "carried", "g_b", "x_b", "grad_b"]


@triton.jit
def _load(pointers, mask, other, dtype: tl.constexpr, COMPLEX: tl.constexpr):
    """Loads a tile of numbers; complex ones are pairs in memory, from the pointers on."""
    if COMPLEX:
        part = tl.arange(0, 2)[None, None, :]
        both = tl.load(pointers[:, :, None] + part, mask=mask[:, :, None],
                       other=(other * (1 - part)).to(dtype))
        return tl.split(both)
    else:
        return (tl.load(pointers, mask=mask, other=other).to(dtype),)


@triton.jit
def _store(pointers, value, mask, COMPLEX: tl.constexpr):
    """Stores numbers, or their real parts where complex ones are the gradient of real ones."""
    if COMPLEX:
        tl.store(pointers[:, :, None] + tl.arange(0, 2)[None, None, :],
                 tl.join(value[0], value[1]), mask=mask[:, :, None])
    else:
        tl.store(pointers, value[0].to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _lagging(a1, ai1, x1, xi1, b1, bi1, y1, yi1, a2, ai2, x2, xi2, b2, bi2, y2, yi2):
    return (a1 * a2 - ai1 * ai2, a1 * ai2 + ai1 * a2,
            a2 * x1 - ai2 * xi1 + x2, a2 * xi1 + ai2 * x1 + xi2,
            a1 * b2 - ai1 * bi2, a1 * bi2 + ai1 * b2,
            b2 * x1 - bi2 * xi1 + y2, b2 * xi1 + bi2 * x1 + yi2)


@triton.jit
def _entering(a, x, state, REVERSE: tl.constexpr):
    """Is scan.entering of real or complex numbers; a may be real beside a complex x."""
    shape: tl.constexpr = x[0].shape
    if len(x) == 1:
        before, end = entering(tl.broadcast_to(a[0], shape), x[0], state[0], REVERSE)
        return (before,), (end,)
    else:
        run, first, last = ends_of(shape[0], REVERSE)
        entered = plus(times(a, state), x)
        none = tl.zeros(shape, x[0].dtype)
        factor_im = none
        if len(a) == 2:
            factor_im += a[1]
        _, _, re, im, _, _, before_re, before_im = tl.associative_scan(
            (a[0] + none, factor_im, tl.where(run == first, entered[0], x[0]),
             tl.where(run == first, entered[1], x[1]), none + 1, none, none, none),
            0, _lagging, REVERSE)
        end = (tl.sum(tl.where(run == last, re, 0), 0)[None, :],
               tl.sum(tl.where(run == last, im, 0), 0)[None, :])
        return (tl.where(run == first, state[0], before_re),
                tl.where(run == first, state[1], before_im)), end


@triton.jit
def _time(step, total, FLIPPED: tl.constexpr):
    return total - 1 - step if FLIPPED else step


@triton.jit
def _pointers(x, batch, time, x_b, x_n, channels, COMPLEX: tl.constexpr, EVEN: tl.constexpr):
    """Returns pointers (RUNS, COLS) to times (RUNS, 1), where channels (1, COLS) have their
    `offset`. EVEN is as in layout.even, which takes more registers.
    """
    at = tl.multiple_of(batch * x_b, 16) if EVEN else batch * x_b
    return x + (at + time.to(tl.int64) * x_n + channels) * (2 if COMPLEX else 1)


@triton.jit
def _load_rows(pointers, stride, time, n, inside, other, dtype: tl.constexpr,
               FLIPPED: tl.constexpr, COMPLEX: tl.constexpr, ROWS: tl.constexpr):
    """Loads ROWS numbers (RUNS, COLS), from the times (RUNS, 1) on, or backwards if FLIPPED."""
    stride = tl.cast(stride, tl.int64) * (2 if COMPLEX else 1)
    rows = ()
    for r in tl.static_range(ROWS):
        at = time - r if FLIPPED else time + r
        rows += (_load(pointers, (at < n) & inside, other, dtype, COMPLEX),)
        pointers += -stride if FLIPPED else stride
    return rows


@triton.jit
def _gate_channels(channel, block, channels, g_h, g_d, D: tl.constexpr, SHARED: tl.constexpr,
                   COLS: tl.constexpr):
    """Returns where the gates of channels (COLS,) are, (1, COLS), or (1, 1) where one holds for
    all, and which exist.
    """
    if SHARED:
        one = block * COLS + tl.arange(0, 1)
        return offset(one, g_h, g_d, D)[None, :], (one < channels)[None, :]
    else:
        return offset(channel, g_h, g_d, D)[None, :], (channel < channels)[None, :]


@triton.jit(do_not_specialize=RUNTIME)
def _ends(gates, x, ends, n, blocks, count, length, channels, g_b, g_n, g_h, g_d, x_b, x_n, x_h,
          x_d, EVEN: tl.constexpr, D: tl.constexpr, SHARED: tl.constexpr, GATES: tl.constexpr,
          INPUTS: tl.constexpr, STATES: tl.constexpr, FLIPPED: tl.constexpr,
          BACKWARD: tl.constexpr, RUNS: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr):
    """Computes what segments do to a state: ends (b, count, 2, channels) receive the factor and the
    sum. BACKWARD is for p, with grad as x, and FLIPPED then is p's direction. The last segment,
    whose ends nobody needs, is not read.
    """
    dtype: tl.constexpr = ends.dtype.element_ty
    batch, segment, block = segment_place(blocks, count)
    channel = block * COLS + tl.arange(0, COLS)
    inside = (channel < channels)[None, :]
    gate_channel, gate_inside = _gate_channels(channel, block, channels, g_h, g_d, D, SHARED, COLS)
    x_channel = offset(channel, x_h, x_d, D)[None, :]
    run = length // RUNS
    step = segment * length + tl.arange(0, RUNS)[:, None] * run
    factor = filled(1, gate_channel.shape, dtype, GATES)
    factor = plus(factor, filled(0, (RUNS, 1), dtype, GATES))
    total = filled(0, (RUNS, COLS), dtype, STATES)
    for _ in range(0, tl.where(segment < count - 1, run, 0), ROWS):
        time = _time(step, count * length, FLIPPED)
        a_rows = _load_rows(
            _pointers(gates, batch, time, g_b, g_n, gate_channel, GATES, EVEN[0]),
            g_n, time, n, gate_inside, 1.0, dtype, FLIPPED, GATES, ROWS)
        x_rows = _load_rows(
            _pointers(x, batch, time, x_b, x_n, x_channel, INPUTS, EVEN[1]),
            x_n, time, n, inside, 0, dtype, FLIPPED, INPUTS, ROWS)
        for r in tl.static_range(ROWS):
            if BACKWARD:
                a = conj(a_rows[r])
                total = times(a, plus(total, x_rows[r]))
            else:
                a = a_rows[r]
                total = plus(times(a, total), x_rows[r])
            factor = times(a, factor)
        step += ROWS
    _, total = _entering(factor, total, filled(0, (1, COLS), dtype, STATES), False)
    _, factor = _entering(factor, filled(0, (RUNS, COLS), dtype, STATES),
                          filled(1, (1, COLS), dtype, STATES), False)
    size: tl.constexpr = 2 if STATES else 1
    ends += ((batch * count + segment) * 2 * channels + channel[None, :]) * size
    _store(ends, factor, inside, STATES)
    _store(ends + channels * size, total, inside, STATES)


@triton.jit
def _enter_segment(ends, state, batch, segment, count, channels, channel, inside,
                   STATES: tl.constexpr):
    """Returns the state before a segment, from what the segments before it do."""
    dtype: tl.constexpr = ends.dtype.element_ty
    size: tl.constexpr = 2 if STATES else 1
    ends += (batch * count * 2 * channels + channel[None, :]) * size
    for at in range(0, segment, 4):
        for r in tl.static_range(4):
            ours = (at + r < segment) & inside
            here = ends + (at + r) * 2 * channels * size
            state = plus(times(_load(here, ours, 1.0, dtype, STATES), state),
                          _load(here + channels * size, ours, 0, dtype, STATES))
    return state


@triton.jit(do_not_specialize=RUNTIME)
def _forward(gates, x, initial, ends, out, carries, n, blocks, count, length, carried, channels,
             g_b, g_n, g_h, g_d, x_b, x_n, x_h, x_d, EVEN: tl.constexpr, D: tl.constexpr,
             SHARED: tl.constexpr, GATES: tl.constexpr, INPUTS: tl.constexpr,
             STATES: tl.constexpr, FLIPPED: tl.constexpr, EVERY: tl.constexpr,
             RUNS: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr):
    """Writes all states, out (b, n, channels), and with EVERY > 0 carries (b, carried, channels).
    ends are `_ends` of all segments, if time is cut.
    """
    dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    size: tl.constexpr = 2 if STATES else 1
    batch, segment, block = segment_place(blocks, count)
    channel = block * COLS + tl.arange(0, COLS)
    inside = (channel < channels)[None, :]
    gate_channel, gate_inside = _gate_channels(channel, block, channels, g_h, g_d, D, SHARED, COLS)
    x_channel = offset(channel, x_h, x_d, D)[None, :]
    wide = tl.cast(channels, tl.int64) * size
    carries += batch * carried * wide + channel[None, :] * size

    state = filled(0, (1, COLS), dtype, STATES)
    if initial is not None:
        state = _load(initial + (batch * channels + channel[None, :]) * size, inside, 0, dtype,
                      STATES)
    if ends is not None:
        state = _enter_segment(ends, state, batch, segment, count, channels, channel, inside,
                               STATES)

    step = segment * length + tl.arange(0, RUNS)[:, None] * ROWS
    time = _time(step, count * length, FLIPPED)
    next_a = _load_rows(
        _pointers(gates, batch, time, g_b, g_n, gate_channel, GATES, EVEN[0]),
        g_n, time, n, gate_inside, 1.0, dtype, FLIPPED, GATES, ROWS)
    next_x = _load_rows(
        _pointers(x, batch, time, x_b, x_n, x_channel, INPUTS, EVEN[1]),
        x_n, time, n, inside, 0, dtype, FLIPPED, INPUTS, ROWS)
    for _ in range(0, length, ROWS * RUNS):
        a_rows, x_rows, now = next_a, next_x, time
        step += ROWS * RUNS
        time = _time(step, count * length, FLIPPED)
        more = step < count * length
        next_a = _load_rows(
            _pointers(gates, batch, time, g_b, g_n, gate_channel, GATES, EVEN[0]),
            g_n, time, n, more & gate_inside, 1.0, dtype, FLIPPED, GATES, ROWS)
        next_x = _load_rows(
            _pointers(x, batch, time, x_b, x_n, x_channel, INPUTS, EVEN[1]),
            x_n, time, n, more & inside, 0, dtype, FLIPPED, INPUTS, ROWS)
        factor, h = a_rows[0], x_rows[0]
        for r in tl.static_range(1, ROWS):
            factor, h = times(a_rows[r], factor), plus(times(a_rows[r], h), x_rows[r])
        h = plus(h, filled(0, (RUNS, COLS), dtype, STATES))
        h, state = _entering(factor, h, state, False)
        if EVERY > 0:
            chunk = now // EVERY
            first = now % EVERY == (EVERY - 1 if FLIPPED else 0)
            _store(carries + chunk.to(tl.int64) * wide, h,
                   first & (chunk < carried - 1) & inside, STATES)
        row = out + (batch * n + now) * wide + channel[None, :] * size
        for r in tl.static_range(ROWS):
            h = plus(times(a_rows[r], h), x_rows[r])
            at = now - r if FLIPPED else now + r
            _store(row, h, (at < n) & inside, STATES)
            row += -wide if FLIPPED else wide
    if EVERY > 0 and segment == count - 1:
        _store(carries + (carried - 1).to(tl.int64) * wide, state, inside, STATES)


@triton.jit(do_not_specialize=RUNTIME)
def _backward(grad, carries, gates, x, ends, grad_gates, grad_x, grad_initial, n, blocks, count,
              length, carried, channels, grad_b, grad_n, grad_h, grad_d, g_b, g_n, g_h, g_d,
              x_b, x_n, x_h, x_d, EVEN: tl.constexpr, D: tl.constexpr, SHARED: tl.constexpr,
              GATES: tl.constexpr, INPUTS: tl.constexpr, STATES: tl.constexpr,
              FLIPPED: tl.constexpr, EVERY: tl.constexpr, RUNS: tl.constexpr, COLS: tl.constexpr,
              ROWS: tl.constexpr):
    """Steps are counted in p's direction; FLIPPED: from the last one. h is recomputed against it.

    grad_gates (b, n, channels) are (b, n, blocks) if SHARED: sums over a block of channels.
    """
    dtype: tl.constexpr = carries.dtype.element_ty
    size: tl.constexpr = 2 if STATES else 1
    batch, segment, block = segment_place(blocks, count)
    channel = block * COLS + tl.arange(0, COLS)
    inside = (channel < channels)[None, :]
    gate_channel, gate_inside = _gate_channels(channel, block, channels, g_h, g_d, D, SHARED, COLS)
    x_channel = offset(channel, x_h, x_d, D)[None, :]
    grad_channel = offset(channel, grad_h, grad_d, D)[None, :]
    carries += (batch * carried * channels + channel[None, :]) * size

    p = filled(0, (1, COLS), dtype, STATES)
    if ends is not None:
        p = _enter_segment(ends, p, batch, segment, count, channels, channel, inside, STATES)

    step = segment * length + tl.arange(0, RUNS)[:, None] * ROWS
    time = _time(step, count * length, FLIPPED)
    next_grads = _load_rows(
        _pointers(grad, batch, time, grad_b, grad_n, grad_channel, STATES, EVEN[2]),
        grad_n, time, n, inside, 0, dtype, FLIPPED, STATES, ROWS)
    for tile in range(0, length, ROWS * RUNS):
        grads, now = next_grads, time
        a_rows = _load_rows(
            _pointers(gates, batch, time, g_b, g_n, gate_channel, GATES, EVEN[0]),
            g_n, time, n, gate_inside, 1.0, dtype, FLIPPED, GATES, ROWS)
        x_rows = _load_rows(
            _pointers(x, batch, time, x_b, x_n, x_channel, INPUTS, EVEN[1]),
            x_n, time, n, inside, 0, dtype, FLIPPED, INPUTS, ROWS)
        step += ROWS * RUNS
        time = _time(step, count * length, FLIPPED)
        more = step < count * length
        next_grads = _load_rows(
            _pointers(grad, batch, time, grad_b, grad_n, grad_channel, STATES, EVEN[2]),
            grad_n, time, n, more & inside, 0, dtype, FLIPPED, STATES, ROWS)
        # The chunk that h enters the tile in; of a tile that begins beyond n, the last.
        enters = _time(segment * length + tile + ROWS * RUNS - 1, count * length, FLIPPED)
        chunk = tl.minimum(enters // EVERY, carried - 2).to(tl.int64)
        h = _load(carries + chunk * channels * size, inside, 0, dtype, STATES)

        none = filled(0, (RUNS, COLS), dtype, STATES)
        factor, run_h, run_p = a_rows[ROWS - 1], plus(x_rows[ROWS - 1], none), none
        for r in tl.static_range(1, ROWS):
            a = a_rows[ROWS - 1 - r]
            factor, run_h = times(a, factor), plus(times(a, run_h), x_rows[ROWS - 1 - r])
        for r in tl.static_range(ROWS):
            run_p = times(conj(a_rows[r]), plus(grads[r], run_p))
        h, _ = _entering(factor, run_h, h, True)
        run_p, p = _entering(conj(factor), run_p, p, False)

        before = (h,)  # the states before every step, those of the last row first
        for r in tl.static_range(1, ROWS):
            h = plus(times(a_rows[ROWS - r], h), x_rows[ROWS - r])
            before += (h,)
        at_x = (batch * n + now) * channels + channel[None, :]
        at_gate = (batch * n + now) * blocks + block if SHARED else at_x
        for r in tl.static_range(ROWS):
            at = now - r if FLIPPED else now + r
            g = plus(grads[r], run_p)
            run_p = times(conj(a_rows[r]), g)
            _store(grad_x + at_x * (2 if INPUTS else 1), g, (at < n) & inside, INPUTS)
            g = times(g, conj(before[ROWS - 1 - r]))
            if SHARED:
                g = _summed(g)
            _store(grad_gates + at_gate * (2 if GATES else 1), g, (at < n) & gate_inside, GATES)
            at_x += -channels if FLIPPED else channels
            by_gate = blocks if SHARED else channels
            at_gate += -by_gate if FLIPPED else by_gate
    if grad_initial is not None and segment == count - 1:
        _store(grad_initial + (batch * channels + channel[None, :]) * size, p, inside, STATES)


@triton.jit
def _summed(a):
    """Sums a number over the channels."""
    if len(a) == 1:
        return (tl.sum(a[0], 1)[:, None],)
    else:
        return tl.sum(a[0], 1)[:, None], tl.sum(a[1], 1)[:, None]


LAUNCH = Table(
    # warp_channels: channels to a warp, each of which a thread has RUNS · warp_channels / 32 of.
    Row(ANY, ANY, ANY, ANY, dict(RUNS=32, ROWS=8, COLS=32, warp_channels=4),
        "4 numbers a step to a thread: tiles of gates and inputs, and of the next, in registers"),
    Row(ANY, ANY, "complex64 complex128", ANY, dict(RUNS=16), "a number takes two registers"),
    Row("_backward", ANY, "complex64", ANY, dict(ROWS=4), "counted: 8 rows of states spill"),
    Row(ANY, ANY, "float64 complex128", ANY, dict(ROWS=4),
        "half as many numbers; 64 steps to a tile still, as far as carries lie apart"),
    Row(ANY, CUDA, "complex128", ANY, dict(warp_channels=2), "counted: 4 spill"),
    Row("_forward", CUDA, "float64", ANY, dict(maxnreg=255), "counted: spills with fewer"),
    Row("_backward", "sm80", "complex64", ANY, dict(maxnreg=168),
        "counted: ptxas aims at fewer and spills"),
)


def why_not(gates: Tensor, inputs: Tensor, *others: Any) -> str | None:
    """Why there are no kernels for these arguments, or None: they know two axes after n."""
    if two_axes([inputs], apart=0) is None:
        return (f"inputs (b, n, …) of {inputs.ndim} axes lie in memory as more than two axes "
                f"after n, with strides {tuple(inputs.stride())}; pass inputs.contiguous()")
    return None


def _heads_end(gates: Tensor) -> int:
    """Returns the first axis along which gates are shared."""
    return 2 + max((axis for axis, size in enumerate(gates.shape[2:], 1) if size > 1), default=0)


def _heads_and_channels(gates: Tensor, inputs: Tensor, grad: Tensor | None = None) -> tuple:
    """Views gates, inputs and grad as (b, n, heads, d), and tells whether all channels of a head
    share one gate. Inputs come as they are, or `why_not` refuses them; grad is copied where it
    lies in memory as other axes than inputs, then gates are, a gate for each channel.
    """
    grads = () if grad is None else (grad,)
    whole = gates.reshape(*gates.shape, *(1,) * (inputs.ndim - gates.ndim)).expand(inputs.shape)
    one_gate = gates.shape[2:].numel() != inputs.shape[2:].numel()
    apart = _heads_end(gates) if one_gate else 0
    views = two_axes([whole, inputs, *grads], apart)
    if views is None:
        grads = [g.contiguous() for g in grads]
        views = two_axes([whole, inputs, *grads], apart)
    if views is None:
        return *two_axes([whole.contiguous(), inputs, *grads], apart=0), False
    return *views, one_gate


def _cut(kernel: str, b: int, n: int, channels: int,
         dtype: torch.dtype) -> tuple[dict[str, Any], int, int, int]:
    """Returns LAUNCH's choices, with no more columns than channels need, the blocks of channels,
    and the segments of time and their length.
    """
    sizes = LAUNCH.choose(kernel, dtype)
    sizes["COLS"] = min(sizes["COLS"], power_of_two(channels))
    blocks = ceil_div(channels, sizes["COLS"])
    steps = max(sizes["RUNS"] * sizes["ROWS"], CARRY_EVERY)
    return sizes, blocks, *segments(n, b * blocks, steps, dtype)


def cut(direction: str, b: int, n: int, channels: int, dtype: torch.dtype) -> tuple[int, bool]:
    """Returns how many channels a program has, and whether it has only a segment of time."""
    sizes, _, count, _ = _cut(f"_{direction}", b, n, channels, dtype)
    return sizes["COLS"], count > 1


def shares(gates: Tensor, inputs: Tensor) -> int:
    """Returns how many channels share a gate."""
    return (1 if gates.shape[2:].numel() == inputs.shape[2:].numel()
            else inputs.shape[_heads_end(gates):].numel())


def _plan(kernel: str, gates: Tensor, inputs: Tensor, one_gate: bool) -> tuple[
        tuple[int], tuple[int, int, int, int], dict[str, Any], dict[str, Any]]:
    """Returns how gates and inputs (b, n, heads, d) are cut: the grid, arguments of every kernel,
    block sizes and flags, and the limit of the kernel's registers.
    """
    b, n, heads, d = inputs.shape
    complexes = gates.is_complex(), inputs.is_complex()
    sizes, blocks, count, length = _cut(kernel, b, n, heads * d,
                                        torch.promote_types(gates.dtype, inputs.dtype))
    limit = {name: sizes.pop(name) for name in ("maxnreg",) if name in sizes}
    warps = max(sizes["COLS"] // sizes.pop("warp_channels"), 1)
    return (b * blocks * count,), (n, blocks, count, length), sizes | dict(
        SHARED=one_gate and d % sizes["COLS"] == 0, GATES=complexes[0], INPUTS=complexes[1],
        STATES=any(complexes), num_warps=warps), limit


def _empty(shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def forward(gates: Tensor, inputs: Tensor, initial_state: Tensor | None, reverse: bool,
            carry_every: int) -> tuple[Tensor, Tensor]:
    """Returns all states (b, n, …) and carries (b, count, …): the states before every
    `carry_every`-th step, in the order of time, and the last; none if it is 0.
    """
    b, n, *rest = inputs.shape
    dtype = torch.promote_types(gates.dtype, inputs.dtype)
    count = carry_count(n, carry_every)
    out = _empty((b, n, *rest), dtype, inputs)
    carries = _empty((b, count, *rest), wide(dtype), inputs)
    if inputs.numel() == 0:
        return out, carries
    gates, inputs, one_gate = _heads_and_channels(gates, inputs)
    grid, cut, sizes, limit = _plan("_forward", gates, inputs, one_gate)
    channels, d = inputs[0, 0].numel(), inputs.shape[-1]
    sizes |= dict(EVEN=evens(gates, inputs), D=0 if flat(gates, inputs) else d, FLIPPED=reverse)
    strides = *gates.stride(), *inputs.stride()
    ends = None
    if cut[2] > 1:
        ends = in_pairs(_empty((b, cut[2], 2, channels), wide(dtype), inputs))
        launch(_ends, grid, in_pairs(gates), in_pairs(inputs), ends, *cut, channels, *strides,
               BACKWARD=False, **sizes)
    initial_state = None if initial_state is None else in_pairs(initial_state.contiguous())
    launch(_forward, grid, in_pairs(gates), in_pairs(inputs), initial_state, ends, in_pairs(out),
           in_pairs(carries), *cut, count, channels, *strides, EVERY=carry_every, **sizes, **limit)
    return out, carries


def backward(grad: Tensor, carries: Tensor, gates: Tensor, inputs: Tensor,
             initial_state: Tensor | None, reverse: bool,
             carry_every: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the gradients of gates, inputs and initial_state, from that of the states."""
    shapes, dtypes = (gates.shape, inputs.shape), (gates.dtype, inputs.dtype)
    b, n, *rest = inputs.shape
    grad_inputs = _empty(inputs.shape, inputs.dtype, inputs)
    grad_initial = None if initial_state is None else _empty((b, *rest), carries.dtype, inputs)
    state_dtype = carries.dtype if initial_state is None else initial_state.dtype
    if inputs.numel() == 0:
        return (torch.zeros_like(gates, memory_format=torch.contiguous_format), grad_inputs,
                None if grad_initial is None else grad_initial.to(state_dtype))
    gates, inputs, grad, one_gate = _heads_and_channels(gates, inputs, grad)
    grid, cut, sizes, limit = _plan("_backward", gates, inputs, one_gate)
    channels, d = inputs[0, 0].numel(), inputs.shape[-1]
    sizes |= dict(D=0 if flat(grad, gates, inputs) else d, FLIPPED=not reverse)
    ends = None
    if cut[2] > 1:
        ends = in_pairs(_empty((b, cut[2], 2, channels), carries.dtype, inputs))
        launch(_ends, grid, in_pairs(gates), in_pairs(grad), ends, *cut, channels, *gates.stride(),
               *grad.stride(), EVEN=evens(gates, grad), BACKWARD=True,
               **sizes | dict(INPUTS=sizes["STATES"]))
    parts = cut[1] if sizes["SHARED"] else channels
    direct = parts == shapes[0][2:].numel()
    number = carries.dtype if sizes["GATES"] else carries.real.dtype
    grad_gates = _empty((b, n, parts), dtypes[0] if direct else number, inputs)
    launch(_backward, grid, in_pairs(grad), in_pairs(carries), in_pairs(gates), in_pairs(inputs),
           ends, in_pairs(grad_gates), in_pairs(grad_inputs),
           None if grad_initial is None else in_pairs(grad_initial), *cut, carries.shape[1],
           channels, *grad.stride(), *gates.stride(), *inputs.stride(),
           EVEN=evens(gates, inputs, grad), EVERY=carry_every, **sizes, **limit)
    if not direct:
        grad_gates = grad_gates.view(b, n, shapes[0][2:].numel(), -1).sum(-1).to(dtypes[0])
    return (grad_gates.view(shapes[0]), grad_inputs,
            None if grad_initial is None else grad_initial.to(state_dtype))
