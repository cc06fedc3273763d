"""gate_loop with head dim 1: a scan per channel, S_t = a_t S_{t-1} + k_t v_t.

Gates, maps and states are numbers as in number.py: complex, or REAL.

A tile is 8 rows of 8 steps of time by C channels, one thread to a row of two channels and
the rows of a channel in one warp. A thread walks its row from 0, for the row's affine map
S → A S + B; a scan of the rows' maps gives the state that enters each; then the thread walks
again, from that state, and writes. Backward goes from the last tile to the first. With
w = q · grad, the adjoint of the state before step t is H_t = conj(a_t) (w_t + H_{t+1}): a row's
map of H has the factor conj(A). States are computed again from the carry before the tile.

Where channels are too few for the device, time is cut into chunks: `_totals` finds each
chunk's map, `_enter` what enters each chunk, and the same kernels run with a program per chunk.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmix._triton.gate import _polar, activate
from fastmix._triton.layout import as_parts, ceil_div, even, evens, power_of_two, strides
from fastmix._triton.number import conj, filled, plus, times
from fastmix._triton.plans import launch
from fastmix._triton.scan import lagging
from fastmix._triton.target import ANY, CUDA, Row, Table
from fastmix.dtypes import wide, wide_complex
from fastmix.ops import _carries

CARRY_EVERY = tl.constexpr(_carries.CARRY_EVERY)
# Triton specialises kernels for what tuples hold: these are arguments of their own.
RUNTIME = ["n", "blocks", "chunks", "length", "carry_count", "q_b", "k_b", "v_b", "g_b", "d_b",
           "x_b", "y_b", "e_b", "a_b", "c_b", "s_b"]


@triton.jit
def _far(stride):
    return tl.cast(stride, tl.int64)


@triton.jit
def _left(end, time, most: tl.constexpr):
    """Steps from `time` on, in 32 bits."""
    return tl.minimum(end - time, most).to(tl.int32)


@triton.jit
def _fetch(at, stride, inside, left, STEPS: tl.constexpr):
    """Loads the rows' steps, (ROWS, C) each, as they lie in memory; 0 where there is none."""
    steps = ()
    for j in tl.static_range(STEPS):
        steps = steps + (tl.load(at, inside & (j < left), other=0),)
        at += stride
    return steps


@triton.jit
def _fetch_numbers(at, part, stride, inside, left, REAL: tl.constexpr, PACKED: tl.constexpr,
                   STEPS: tl.constexpr):
    """Loads STEPS numbers: real ones, packed complex ones, or (PACKED None) all real parts, then
    all imaginary parts.
    """
    steps = _fetch(at, stride, inside, left, STEPS)
    if PACKED is None and not REAL:
        steps = steps + _fetch(at + part, stride, inside, left, STEPS)
    return steps


@triton.jit
def _wide(x):
    return x.to(tl.float32) if x.dtype.primitive_bitwidth < 32 else x


@triton.jit
def _number(steps, j: tl.constexpr, REAL: tl.constexpr, PACKED: tl.constexpr,
            STEPS: tl.constexpr):
    both = steps[j]
    if REAL:
        return (_wide(both),)
    elif PACKED is None:
        return _wide(both), _wide(steps[STEPS + j])
    elif PACKED == tl.bfloat16:
        return ((both << 16).to(tl.float32, bitcast=True),
                (both & -65536).to(tl.float32, bitcast=True))
    elif PACKED == tl.float16:
        return (both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),
                (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32))
    else:
        return (both.to(tl.int32).to(tl.float32, bitcast=True),
                (both >> 32).to(tl.int32).to(tl.float32, bitcast=True))


@triton.jit
def _store_number(at, part, x, mask, PACKED: tl.constexpr):
    if PACKED is None:
        tl.store(at, x[0].to(at.dtype.element_ty), mask)
        if len(x) == 2:
            tl.store(at + part, x[1].to(at.dtype.element_ty), mask)
    else:
        re, im = x
        if PACKED == tl.float32:
            re = re.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
            im = im.to(tl.int32, bitcast=True).to(tl.int64) << 32
        else:
            re = re.to(PACKED).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            im = im.to(PACKED).to(tl.int16, bitcast=True).to(tl.int32) << 16
        tl.store(at, re | im, mask)


@triton.jit
def _after(a, b, c, d):
    """S → a S + b, then S → c S + d: one map, S → c a S + (c b + d)."""
    a = times(c, a)
    return a, plus(times(c, b), d)


@triton.jit
def _after_complex(a_re, a_im, b_re, b_im, c_re, c_im, d_re, d_im):
    a, b = _after((a_re, a_im), (b_re, b_im), (c_re, c_im), (d_re, d_im))
    return a[0], a[1], b[0], b[1]


@triton.jit
def _after_real(a, b, c, d):
    a, b = _after((a,), (b,), (c,), (d,))
    return a[0], b[0]


@triton.jit
def _size(re, im):
    """|z|, and infinity where z is 0: there the slopes below are 0."""
    size, _, _, at_zero = _polar(re, im)
    return tl.where(at_zero, float("inf"), size)


@triton.jit
def _slopes(size):
    """The logits' gradient is a · along · (a · grad) + i a · across · (a × grad)."""
    along = tl.exp(-size)
    return along, (1 + along) / size


@triton.jit
def _after_and_before(a_re, a_im, b_re, b_im, e_re, e_im, f_re, f_im,
                      c_re, c_im, d_re, d_im, g_re, g_im, h_re, h_im):
    """Composes two maps, of all rows and of all but the last, so that one scan also gives the
    exclusive result.
    """
    e, f = _after((a_re, a_im), (b_re, b_im), (g_re, g_im), (h_re, h_im))
    a, b = _after((a_re, a_im), (b_re, b_im), (c_re, c_im), (d_re, d_im))
    return a[0], a[1], b[0], b[1], e[0], e[1], f[0], f[1]


@triton.jit
def _scan_rows(a, b, state, first, last, REVERSE: tl.constexpr):
    """Returns what enters each row and what leaves the last, from the rows' maps and what enters
    the first.
    """
    entered = times(a, state)
    re = tl.where(first, entered[0] + b[0], b[0])
    if len(a) == 1:
        one = tl.full(re.shape, 1.0, re.dtype)
        _, re, _, entry = tl.associative_scan(
            (a[0], re, one, tl.where(first, state[0], 0.0)), 1, lagging, reverse=REVERSE)
        return (entry,), (tl.sum(tl.where(last, re, 0.0), 1, keep_dims=True),)
    else:
        im = tl.where(first, entered[1] + b[1], b[1])
        one, zero = tl.full(re.shape, 1.0, re.dtype), tl.zeros_like(re)
        _, _, re, im, _, _, entry_re, entry_im = tl.associative_scan(
            (a[0], a[1], re, im, one, zero,
             tl.where(first, state[0], 0.0), tl.where(first, state[1], 0.0)),
            1, _after_and_before, reverse=REVERSE)
        leaving_re = tl.sum(tl.where(last, re, 0.0), 1, keep_dims=True)
        leaving_im = tl.sum(tl.where(last, im, 0.0), 1, keep_dims=True)
        return (entry_re, entry_im), (leaving_re, leaving_im)


@triton.jit
def _gate(z, mask, ACTIVATE: tl.constexpr):
    """Returns the gate, which is 1 where mask is false."""
    if ACTIVATE:
        z = activate(z[0], z[1])
    if len(z) == 1:
        return (tl.where(mask, z[0], 1.0),)
    else:
        return tl.where(mask, z[0], 1.0), tl.where(mask, z[1], 0.0)


@triton.jit
def _chunk_place(blocks, chunks):
    """Returns the program's block of channels, its chunk and its batch, both in 64 bits."""
    program = tl.program_id(0)
    i = program // blocks
    return program % blocks, (i % chunks).to(tl.int64), (i // chunks).to(tl.int64)


@triton.jit
def _axes(block, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Returns the rows and channels of a tile (C / WIDTH, ROWS, WIDTH)."""
    channel = (tl.arange(0, C // WIDTH) * WIDTH)[:, None, None] + tl.arange(0, WIDTH)[None, None]
    row = tl.arange(0, ROWS)[None, :, None]
    return row.to(tl.int64), block * C + channel.to(tl.int64)


@triton.jit
def _start(x, x_b, x_n, x_h, batch, time, channel, EVEN: tl.constexpr):
    """Returns pointers to the rows' first steps in x (b, n, h, …)."""
    return x + (batch * even(x_b, EVEN) + time * x_n + channel * x_h)


@triton.jit
def _gates_and_map(ks, vs, zs, inside, left, ACTIVATE: tl.constexpr, REAL: tl.constexpr,
                   PACKED: tl.constexpr, STEPS: tl.constexpr):
    """Returns a row's gates, the sizes of their logits where there are any, what its steps add to
    the state, and the row's map of the state.
    """
    gates, sizes, added = (), (), ()
    for j in tl.static_range(STEPS):
        mask = inside & (j < left)
        z = _number(zs, j, REAL, PACKED, STEPS)
        a = _gate(z, mask, ACTIVATE)
        gates = gates + (a,)
        if ACTIVATE:
            sizes = sizes + (_size(z[0], z[1]),)
        kv = _wide(ks[j]) * _wide(vs[j])
        added = added + (kv,)
        if j == 0:
            factor, total = a, ((kv,) if REAL else (kv, tl.zeros_like(kv)))
        else:
            factor, total = _after(factor, total, a, (kv,) if REAL else (kv, 0.0))
    return gates, sizes, added, factor, total


@triton.jit
def _adjoint_sum(qs, grads, gates, REAL: tl.constexpr, STEPS: tl.constexpr):
    """Computes the constant part of a row's map of the adjoint: what it passes on when it receives
    0.
    """
    none = tl.zeros_like(gates[0][0])
    total = (none,) if REAL else (none, none)
    for j in tl.static_range(STEPS - 1, -1, -1):
        total = plus(total, (_wide(qs[j]) * _wide(grads[j]),))
        total = times(conj(gates[j]), total)
    return total


@triton.jit
def _write_outputs(out, h, qs, gates, added, state, inside, left, STEPS: tl.constexpr):
    """Walks a row from the state that enters it; returns `out` behind the row."""
    for j in tl.static_range(STEPS):
        mask = inside & (j < left)
        state = plus(times(gates[j], state), (added[j],))
        result = _wide(qs[j]) * state[0]
        tl.store(out, result.to(out.dtype.element_ty), mask)
        out += h
    return out


@triton.jit(do_not_specialize=RUNTIME)
def _forward(inputs, entries, outputs, n, h, blocks, chunks, length, carry_count,
             q_b, q_strides, k_b, k_strides, v_b, v_strides, g_b, g_strides, e_b, e_strides,
             EVEN: tl.constexpr, ACTIVATE: tl.constexpr, REAL: tl.constexpr,
             PACKED: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
             ROWS: tl.constexpr, STEPS: tl.constexpr, FAR: tl.constexpr):
    """inputs: q, k, v and gates. outputs: out, the last state, and the carries or None."""
    q, k, v, gates = inputs
    out, last, carries = outputs
    q_n, q_h = q_strides
    k_n, k_h = k_strides
    v_n, v_h = v_strides
    g_n, g_h, g_part = g_strides
    if FAR:
        q_n, k_n, v_n, g_n = _far(q_n), _far(k_n), _far(v_n), _far(g_n)
    block, chunk, batch = _chunk_place(blocks, chunks)
    row, channel = _axes(block, C, WIDTH, ROWS)
    begin = chunk * length
    inside = channel < h
    first, final = row == 0, row == ROWS - 1
    time = begin + row * STEPS
    q = _start(q, q_b, q_n, q_h, batch, time, channel, EVEN[0])
    k = _start(k, k_b, k_n, k_h, batch, time, channel, EVEN[1])
    v = _start(v, v_b, v_n, v_h, batch, time, channel, EVEN[2])
    gates = _start(gates, g_b, g_n, g_h, batch, time, channel, EVEN[3])
    out += (batch * n + time) * h + channel
    parts: tl.constexpr = 1 if REAL else 2
    if carries is not None:
        carry = carries + parts * ((batch * carry_count + time // CARRY_EVERY) * h + channel)

    state = filled(0, (C // WIDTH, 1, WIDTH), WIDE, not REAL)
    if entries is not None:
        at = entries + batch * e_b + chunk * e_strides[0] + channel * e_strides[1]
        re = state[0] + tl.load(at, inside, other=0)
        if REAL:
            state = (re,)
        else:
            state = re, state[1] + tl.load(at + e_strides[2], inside, other=0)

    end = tl.minimum(n, begin + length)
    left = _left(end, time, ROWS * STEPS)
    next_gates = _fetch_numbers(gates, g_part, g_n, inside, left, REAL, PACKED, STEPS)
    for _ in tl.range(0, length, ROWS * STEPS, num_stages=1):
        # The gates alone come a tile ahead: the rest is waited for while they are activated.
        zs = next_gates
        qs = _fetch(q, q_n, inside, left, STEPS)
        ks = _fetch(k, k_n, inside, left, STEPS)
        vs = _fetch(v, v_n, inside, left, STEPS)
        q += ROWS * STEPS * q_n
        k += ROWS * STEPS * k_n
        v += ROWS * STEPS * v_n
        gates += ROWS * STEPS * g_n
        later = _left(end, time + ROWS * STEPS, ROWS * STEPS)
        next_gates = _fetch_numbers(gates, g_part, g_n, inside, later, REAL, PACKED, STEPS)

        a, _, added, factor, total = _gates_and_map(
            ks, vs, zs, inside, left, ACTIVATE, REAL, PACKED, STEPS)
        entry, state = _scan_rows(factor, total, state, first, final, False)

        if carries is not None:
            _store_number(carry, 1, entry, inside & first & (left > 0), None)
            carry += parts * h
        # Always: a branch keeps the compiler from mixing walk and scan, with which Triton 3.6
        # spilled. Counted with 3.7.1, in bfloat16: 148 registers, 162 without the branch (sm80);
        # on sm90, where nothing spills either way, 188, and 154 without.
        if n > 0:
            out = _write_outputs(out, h, qs, a, added, entry, inside, left, STEPS)
        out += (ROWS - 1) * STEPS * h
        time += ROWS * STEPS
        left = later

    if chunk == chunks - 1:
        _store_number(last + parts * (batch * h + channel), 1, state, inside, None)
        if carries is not None:
            at = carries + parts * ((batch * carry_count + carry_count - 1) * h + channel)
            _store_number(at, 1, state, inside, None)


@triton.jit
def _write_grad_q(grad_q, h, ks, vs, grads, gates, state, inside, left, STEPS: tl.constexpr):
    """Walks a row from the state that enters it; returns `grad_q` behind the row, and the states
    that its steps begin with.
    """
    states = ()
    for j in tl.static_range(STEPS):
        states = states + (state,)
        state = plus(times(gates[j], state), (_wide(ks[j]) * _wide(vs[j]),))
        result = (state[0] * _wide(grads[j])).to(grad_q.dtype.element_ty)
        tl.store(grad_q, result, inside & (j < left))
        grad_q += h
    return grad_q, states


@triton.jit
def _write_other_gradients(outputs, h, gates_h, rows, gates, sizes, states, adjoint, inside, left,
                           ACTIVATE: tl.constexpr, PACKED_OUT: tl.constexpr, STEPS: tl.constexpr):
    """Walks a row back from the adjoint of its last state; returns the outputs (grad_k, grad_v,
    grad_gates) in front of the row. rows: q, k, v and grad. sizes are those of the logits.
    """
    grad_k, grad_v, grad_gates = outputs
    qs, ks, vs, grads = rows
    for j in tl.static_range(STEPS - 1, -1, -1):
        mask = inside & (j < left)
        adjoint = plus(adjoint, (_wide(qs[j]) * _wide(grads[j]),))
        tl.store(grad_k, (adjoint[0] * _wide(vs[j])).to(grad_k.dtype.element_ty), mask)
        tl.store(grad_v, (adjoint[0] * _wide(ks[j])).to(grad_v.dtype.element_ty), mask)
        da = times(adjoint, conj(states[j]))
        if ACTIVATE:
            along, across = _slopes(sizes[j])
            turned = times(conj(gates[j]), da)
            da = times(gates[j], (turned[0] * along, turned[1] * across))
        _store_number(grad_gates, 1, da, mask, PACKED_OUT)
        adjoint = times(conj(gates[j]), adjoint)
        grad_k -= h
        grad_v -= h
        grad_gates -= gates_h
    return grad_k, grad_v, grad_gates


@triton.jit
def _outputs_of_last_tile(grad_q, grad_k, grad_v, grad_gates, batch, n, h, time, channel,
                          STEPS: tl.constexpr, OUT_PARTS: tl.constexpr):
    """Returns pointers to each row's first step in grad_q and last step in the others, and
    grad_gates' stride.
    """
    offset = (batch * n + time) * h + channel
    grad_q += offset
    offset += (STEPS - 1) * h
    grad_k += offset
    grad_v += offset
    grad_gates += offset * OUT_PARTS
    return grad_q, grad_k, grad_v, grad_gates, h * OUT_PARTS


@triton.jit
def _tile_before(pointers, strides):
    moved = ()
    for i in tl.static_range(len(pointers)):
        moved = moved + (pointers[i] - CARRY_EVERY * strides[i],)
    return moved


@triton.jit(do_not_specialize=RUNTIME)
def _backward(inputs, adjoints, outputs, n, h, blocks, chunks, length, carry_count,
              d_b, d_strides, q_b, q_strides, k_b, k_strides, v_b, v_strides, g_b, g_strides,
              a_b, a_strides, c_b, c_strides, EVEN: tl.constexpr, ACTIVATE: tl.constexpr,
              REAL: tl.constexpr, PACKED: tl.constexpr, PACKED_OUT: tl.constexpr,
              WIDE: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
              STEPS: tl.constexpr, STAGES: tl.constexpr, FAR: tl.constexpr):
    """inputs: grad, q, k, v, gates and carries. outputs: the gradients of q, k, v and gates, and
    that of the initial state, or None. adjoints (b, chunks, h, parts) are those of the chunks' last
    states.
    """
    grad, q, k, v, gates, carries = inputs
    grad_q, grad_k, grad_v, grad_gates, grad_initial = outputs
    d_n, d_h = d_strides
    q_n, q_h = q_strides
    k_n, k_h = k_strides
    v_n, v_h = v_strides
    g_n, g_h, g_part = g_strides
    if FAR:
        d_n, q_n, k_n, v_n, g_n = _far(d_n), _far(q_n), _far(k_n), _far(v_n), _far(g_n)
    tl.static_assert(ROWS * STEPS == CARRY_EVERY)
    block, chunk, batch = _chunk_place(blocks, chunks)
    row, channel = _axes(block, C, WIDTH, ROWS)
    begin = chunk * length
    end = tl.minimum(begin + length, n)
    tiles = tl.cdiv(end - begin, ROWS * STEPS)
    inside = channel < h
    first, final = row == 0, row == ROWS - 1
    # From the last tile down.
    tile = begin // CARRY_EVERY + tiles - 1
    time = tile * CARRY_EVERY + row * STEPS
    q = _start(q, q_b, q_n, q_h, batch, time, channel, EVEN[0])
    k = _start(k, k_b, k_n, k_h, batch, time, channel, EVEN[1])
    v = _start(v, v_b, v_n, v_h, batch, time, channel, EVEN[2])
    gates = _start(gates, g_b, g_n, g_h, batch, time, channel, EVEN[3])
    grad = _start(grad, d_b, d_n, d_h, batch, time, channel, EVEN[4])
    carries += batch * c_b + tile * c_strides[0] + channel * c_strides[1]
    out_parts: tl.constexpr = 2 if PACKED_OUT is None and not REAL else 1
    grad_q, grad_k, grad_v, grad_gates, gates_h = _outputs_of_last_tile(
        grad_q, grad_k, grad_v, grad_gates, batch, n, h, time, channel, STEPS, out_parts)

    # The adjoint of the tile's last state.
    at = adjoints + batch * a_b + chunk * a_strides[0] + channel * a_strides[1]
    adjoint = (tl.load(at, inside, other=0),)
    if not REAL:
        adjoint = adjoint[0], tl.load(at + a_strides[2], inside, other=0)

    for _ in tl.range(0, tiles, num_stages=STAGES):
        left = _left(n, time, ROWS * STEPS)
        qs = _fetch(q, q_n, inside, left, STEPS)
        ks = _fetch(k, k_n, inside, left, STEPS)
        vs = _fetch(v, v_n, inside, left, STEPS)
        grads = _fetch(grad, d_n, inside, left, STEPS)
        zs = _fetch_numbers(gates, g_part, g_n, inside, left, REAL, PACKED, STEPS)
        entry = (tl.load(carries, inside, other=0),)
        if not REAL:
            entry = entry[0], tl.load(carries + c_strides[2], inside, other=0)
        a, sizes, _, factor, total = _gates_and_map(
            ks, vs, zs, inside, left, ACTIVATE, REAL, PACKED, STEPS)
        handed = _adjoint_sum(qs, grads, a, REAL, STEPS)
        # The adjoints of the rows' last states, and the states that enter the rows.
        back = factor if REAL else (factor[0], -factor[1])
        last_adjoints, adjoint = _scan_rows(back, handed, adjoint, final, first, True)
        entries, _ = _scan_rows(factor, total, entry, first, final, False)

        # Always: a branch keeps the compiler from mixing walks and scans. Counted (sm80 and sm90,
        # complex gates): without it 14 to 36 words spill, even in 255 registers.
        if n > 0:
            grad_q, states = _write_grad_q(
                grad_q, h, ks, vs, grads, a, entries, inside, left, STEPS)
            grad_q -= (CARRY_EVERY + STEPS) * h
            grad_k, grad_v, grad_gates = _write_other_gradients(
                (grad_k, grad_v, grad_gates), h, gates_h, (qs, ks, vs, grads), a, sizes, states,
                last_adjoints, inside, left, ACTIVATE, PACKED_OUT, STEPS)

        grad, q, k, v, gates = _tile_before((grad, q, k, v, gates), (d_n, q_n, k_n, v_n, g_n))
        carries -= c_strides[0]
        grad_k -= (CARRY_EVERY - STEPS) * h
        grad_v -= (CARRY_EVERY - STEPS) * h
        grad_gates -= (CARRY_EVERY - STEPS) * gates_h
        time -= CARRY_EVERY

    if grad_initial is not None:
        if chunk == 0:
            at = grad_initial + len(adjoint) * (batch * h + channel)
            _store_number(at, 1, adjoint, inside, None)


@triton.jit(do_not_specialize=RUNTIME)
def _totals(x, y, gates, totals, n, h, blocks, chunks, length,
            x_b, x_strides, y_b, y_strides, g_b, g_strides, EVEN: tl.constexpr,
            REVERSE: tl.constexpr, ACTIVATE: tl.constexpr, REAL: tl.constexpr,
            PACKED: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
            ROWS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr):
    """Computes each chunk's map of S, from x · y = k · v; with REVERSE of the adjoint, from
    q · grad. The chunk whose map nobody needs is not read. A row is length / ROWS steps long here.
    """
    x_n, x_h = x_strides
    y_n, y_h = y_strides
    g_n, g_h, g_part = g_strides
    block, chunk, batch = _chunk_place(blocks, chunks)
    row, channel = _axes(block, C, WIDTH, ROWS)
    inside = channel < h
    steps = length // ROWS
    time = chunk * length + row * steps
    if REVERSE:
        time += steps - STEPS
    x = _start(x, x_b, x_n, x_h, batch, time, channel, EVEN[0])
    y = _start(y, y_b, y_n, y_h, batch, time, channel, EVEN[1])
    gates = _start(gates, g_b, g_n, g_h, batch, time, channel, EVEN[2])
    one = tl.full((C // WIDTH, ROWS, WIDTH), 1.0, WIDE)
    if REAL:
        factor, total = (one,), (tl.zeros_like(one),)
    else:
        factor = one, tl.zeros_like(one)
        total = tl.zeros_like(one), tl.zeros_like(one)
    ahead: tl.constexpr = -STEPS if REVERSE else STEPS
    needed = chunk > 0 if REVERSE else chunk < chunks - 1
    for _ in tl.range(0, tl.where(needed, steps, 0), STEPS, num_stages=STAGES):
        left = _left(n, time, STEPS)
        xs = _fetch(x, x_n, inside, left, STEPS)
        ys = _fetch(y, y_n, inside, left, STEPS)
        zs = _fetch_numbers(gates, g_part, g_n, inside, left, REAL, PACKED, STEPS)
        for j in tl.static_range(STEPS - 1 if REVERSE else 0, -1 if REVERSE else STEPS,
                                 -1 if REVERSE else 1):
            a = _gate(_number(zs, j, REAL, PACKED, STEPS), inside & (j < left), ACTIVATE)
            xy = _wide(xs[j]) * _wide(ys[j])
            if REVERSE:
                total = plus(total, (xy,))
                if REAL:
                    factor, total = _after(factor, total, a, (0.0,))
                else:
                    factor, total = _after(factor, total, (a[0], -a[1]), (0.0, 0.0))
            else:
                factor, total = _after(factor, total, a, (xy,) if REAL else (xy, 0.0))
        x += ahead * _far(x_n)
        y += ahead * _far(y_n)
        gates += ahead * _far(g_n)
        time += ahead
    if REAL:
        numbers = tl.associative_scan((factor[0], total[0]), 1, _after_real, reverse=REVERSE)
    else:
        numbers = tl.associative_scan((factor[0], factor[1], total[0], total[1]), 1,
                                      _after_complex, reverse=REVERSE)
    at = totals + len(numbers) * (((batch * chunks + chunk) * h) + channel) + row * 0
    mask = inside & (row == (0 if REVERSE else ROWS - 1))
    for i in tl.static_range(len(numbers)):
        tl.store(at + i, numbers[i], mask)


@triton.jit(do_not_specialize=RUNTIME)
def _enter(totals, state, entries, h, blocks, chunks, s_b, s_h, s_part,
           REVERSE: tl.constexpr, REAL: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr):
    """Computes what enters each chunk, from `state` on."""
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * C + tl.arange(0, C).to(tl.int64)
    inside = channel < h
    entry = filled(0, (C,), WIDE, not REAL)
    if state is not None:
        state += batch * s_b + channel * s_h
        re = entry[0] + tl.load(state, inside, other=0)
        if REAL:
            entry = (re,)
        else:
            entry = re, entry[1] + tl.load(state + s_part, inside, other=0)
    for i in tl.range(0, chunks, num_stages=4):
        at = (batch * chunks + (chunks - 1 - i if REVERSE else i)) * h + channel
        if REAL:
            tl.store(entries + at, entry[0], inside)
            a, b = (tl.load(totals + 2 * at, inside),), (tl.load(totals + 2 * at + 1, inside),)
        else:
            tl.store(entries + 2 * at, entry[0], inside)
            tl.store(entries + 2 * at + 1, entry[1], inside)
            a = tl.load(totals + 4 * at, inside), tl.load(totals + 4 * at + 1, inside)
            b = tl.load(totals + 4 * at + 2, inside), tl.load(totals + 4 * at + 3, inside)
        entry = plus(times(a, entry), b)


# ---- launchers

LAUNCH = Table(
    Row(ANY, ANY, ANY, "many-channels", dict(C=16, WIDTH=8, ROWS=8, STEPS=8, num_warps=2),
        "32 bytes of a row in 16 bits; 16 elements to a thread: 64 steps, as carries lie apart"),
    Row(ANY, ANY, "float64", "many-channels", dict(num_warps=4),
        "8 elements to a thread: they take twice the registers"),
    Row(ANY, ANY, ANY, "few-channels", dict(ROWS=8, STEPS=8, num_warps=1),
        "up to 4 channels, 4 elements to a thread at most: the rows of a channel in one warp"),
    Row("_backward _totals", ANY, ANY, ANY, dict(STAGES=1), "loads are not pipelined"),
    Row("_totals", "sm80 sm90 sm100", "bfloat16 float16", "many-channels", dict(STAGES=2),
        "a tile's loads are under way while the one before is worked on: modelled, twice as fast; "
        "counted: with three stages ptxas spills 12 words even in 128 registers (sm90, 3.7.1)"),
    Row("_backward", "sm90", "bfloat16 float16", "many-channels", dict(STAGES=2),
        "as in _totals: modelled, 1.5 times as fast"),
    Row("_totals", CUDA, "float64", ANY, dict(maxnreg=168),
        "counted: 12 to 26 words spill in 96"),
    Row("_enter", ANY, ANY, ANY, dict(num_warps=1), "a program walks through the chunks"),
    Row("chunks", ANY, ANY, ANY, dict(enough=256, wanted=512, unit=512),
        "fewer than two programs to a multiprocessor, and time is cut into chunks, for about four; "
        "their steps are a multiple of the unit, eight tiles"),
)
FEW_CHANNELS = 4


def _tile(kernel: str, h: int, dtype: torch.dtype) -> dict[str, Any]:
    """Returns C and the rest of a kernel's tile, and its other choices."""
    if h > FEW_CHANNELS:
        return LAUNCH.choose(kernel, dtype, "many-channels")
    channels = power_of_two(h)
    return dict(C=channels, WIDTH=channels) | LAUNCH.choose(kernel, dtype, "few-channels")


def _chunks(programs: int, n: int, dtype: torch.dtype) -> tuple[int, int]:
    """Returns the steps of a chunk, and how many chunks there are: one where programs fill the GPU.
    """
    cut = LAUNCH.choose("chunks", dtype)
    length = cut["unit"] * ceil_div(n, cut["unit"] * ceil_div(cut["wanted"], programs))
    if programs >= cut["enough"] or n <= length:
        return n, 1
    return length, ceil_div(n, length)


def _gate_view(x: Tensor) -> tuple[Tensor, Any]:
    """Views gates (b, n, h), or logits of complex ones, as (b, n, h, parts), or packed in integers
    where two parts lie side by side. Also returns which numbers are packed, or None.
    """
    x = as_parts(x) if x.ndim == 3 else x
    number = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
              torch.float32: tl.float32}.get(x.dtype)
    even = x.storage_offset() % 2 == 0 and all(s % 2 == 0 for s in x.stride()[:3])
    if number is None or x.shape[3] == 1 or x.stride(3) != 1 or not even:
        return x, None
    return x.view(torch.int32 if x.element_size() == 2 else torch.int64), number


def _overflows_int32(*tensors: Tensor) -> bool:
    """Whether the offsets of a tile's steps need more than 32 bits."""
    return max(t.stride(1) for t in tensors) * CARRY_EVERY.value >= 1 << 31


def _wide_dtype(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def forward(q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None, gate_logits: Tensor | None,
            initial_state: Tensor | None, carry_every: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out (b, n, h, 1), the last state (b, h, 1, 1) and carries (b, count, h, 1, 1): the
    states before every `carry_every`-th step and the last; none if it is 0.
    """
    b, n, h, _ = q.shape
    real = gates is not None and not gates.is_complex()
    state_dtype = (wide if real else wide_complex)(q.dtype)
    out = q.new_empty(b, n, h, 1)
    last = q.new_empty(b, h, 1, 1, dtype=state_dtype)
    count = _carries.carry_count(n, carry_every)
    carries = q.new_empty(b, count, h, 1, 1, dtype=state_dtype)
    if b == 0:
        return out, last, carries
    given: Any = gate_logits if gates is None else gates
    x, packed = _gate_view(given)
    flags = dict(ACTIVATE=gates is None, REAL=real, PACKED=packed, WIDE=_wide_dtype(q.dtype))
    tile = _tile("_forward", h, q.dtype)
    blocks = ceil_div(h, tile["C"])
    length, chunks = _chunks(b * blocks, n, q.dtype)
    cut = blocks, chunks, length
    entries = None if initial_state is None else as_parts(initial_state)[:, None, :, 0, 0]
    if chunks > 1:
        entries = _entries(k, v, x, entries, cut, False, flags)
    launch(
        _forward, (b * chunks * blocks,),
        (q, k, v, x), entries,
        (out, as_parts(last), as_parts(carries) if carry_every else None),
        n, h, *cut, count, *_row_strides(q, k, v), *strides(x),
        *((0, (0, 0, 0)) if entries is None else strides(entries)),
        **flags, **tile, EVEN=evens(q, k, v, x), FAR=_overflows_int32(q, k, v, x))
    return out, last, carries


def _row_strides(*tensors: Tensor) -> list[Any]:
    """Returns `strides` of tensors (b, n, h, 1), without the last."""
    return [part for t in tensors for part in (t.stride(0), t.stride()[1:3])]


def _entries(x: Tensor, y: Tensor, gates: Tensor, state: Tensor | None, cut: tuple[int, int, int],
             reverse: bool, flags: dict[str, Any]) -> Tensor:
    """Returns what enters each chunk, (b, chunks, h, parts). state: (b, 1, h, parts) or None."""
    b, n, h, _ = x.shape
    blocks, chunks, _ = cut
    parts = 1 if flags["REAL"] else 2
    tile = _tile("_totals", h, x.dtype)
    totals = x.new_empty(b, chunks, h, 2 * parts, dtype=wide(x.dtype))
    entries = x.new_empty(b, chunks, h, parts, dtype=wide(x.dtype))
    launch(
        _totals, (b * chunks * blocks,),
        x, y, gates, totals, n, h, *cut, *_row_strides(x, y), *strides(gates),
        EVEN=evens(x, y, gates), REVERSE=reverse, **flags, **tile)
    launch(
        _enter, (b * blocks,),
        totals, state, entries, h, blocks, chunks,
        *((0, 0, 0) if state is None else (state.stride(0), state.stride(2), state.stride(3))),
        REVERSE=reverse, REAL=flags["REAL"], WIDE=flags["WIDE"], C=tile["C"],
        **LAUNCH.choose("_enter", x.dtype))
    return entries


def backward(grad: Tensor, grad_state: Tensor, carries: Tensor, q: Tensor, k: Tensor, v: Tensor,
             gates: Tensor | None, gate_logits: Tensor | None, initial_state: Tensor | None,
             carry_every: int) -> tuple[Tensor | None, ...]:
    """Returns the gradients of forward's tensors, from those of its first two results and from its
    carries.
    """
    b, n, h, _ = q.shape
    grad_q, grad_k, grad_v = (q.new_empty(b, n, h, 1) for _ in range(3))
    given: Any = gate_logits if gates is None else gates
    grad_gates = torch.empty_like(given, memory_format=torch.contiguous_format)
    grad_initial = None if initial_state is None else torch.empty_like(
        initial_state, memory_format=torch.contiguous_format)
    if b > 0:
        x, packed = _gate_view(given)
        written, packed_out = _gate_view(grad_gates)
        flags = dict(ACTIVATE=gates is None, REAL=not carries.is_complex(), PACKED=packed,
                     WIDE=_wide_dtype(q.dtype))
        tile = _tile("_backward", h, q.dtype)
        blocks = ceil_div(h, tile["C"])
        length, chunks = _chunks(b * blocks, n, q.dtype)
        cut = blocks, chunks, length
        adjoints = as_parts(grad_state)[:, None, :, 0, 0]
        if chunks > 1:
            adjoints = _entries(q, grad, x, adjoints, cut, True, flags)
        entries = as_parts(carries)[:, :, :, 0, 0]
        launch(
            _backward, (b * chunks * blocks,),
            (grad, q, k, v, x, entries), adjoints,
            (grad_q, grad_k, grad_v, written,
             None if grad_initial is None else as_parts(grad_initial)),
            n, h, *cut, carries.shape[1],
            *_row_strides(grad, q, k, v), *strides(x, adjoints, entries),
            **flags, **tile, PACKED_OUT=packed_out, EVEN=evens(q, k, v, x, grad),
            FAR=_overflows_int32(grad, q, k, v, x))
    return (grad_q, grad_k, grad_v, None if gates is None else grad_gates,
            None if gate_logits is None else grad_gates, grad_initial)
