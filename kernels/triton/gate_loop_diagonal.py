"""gate_loop with head dim 1: a complex scan per channel, S_t = a_t S_{t-1} + k_t v_t.

A tile is 8 rows of 8 steps of time by C channels, one thread to a row of two channels and
the rows of a channel in one warp. A thread walks its row from 0, for the row's affine map
S → A S + B; a scan of the rows' maps gives the state that enters each; then the thread walks
again, from that state, and writes. Backward goes from the last tile to the first. With
w = q · grad, H_t = conj(a_t) (w_t + H_{t+1}) is what step t asks of the state before it: the
row's map of H has the factor conj(A). States come out of the carry in front of the tile.

Where channels are too few for the device, time is cut into chunks: `_totals` finds each
chunk's map, `_enter` what enters each chunk, and the same kernels run with a program per chunk.
"""

import torch
import triton
import triton.language as tl

from fastmix._triton.gate import _polar, activate
from fastmix._triton.scan import even, evens
from fastmix._triton.target import registers

CARRY_EVERY = tl.constexpr(64)
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
    """The rows' steps, (ROWS, C) each, as they lie in memory; 0 where there is none."""
    steps = ()
    for j in tl.static_range(STEPS):
        steps = steps + (tl.load(at, inside & (j < left), other=0),)
        at += stride
    return steps


@triton.jit
def _fetch_pairs(at, part, stride, inside, left, PACKED: tl.constexpr, STEPS: tl.constexpr):
    """Real and imaginary parts packed in one integer; or all real parts, then the others."""
    steps = _fetch(at, stride, inside, left, STEPS)
    if PACKED is None:
        steps = steps + _fetch(at + part, stride, inside, left, STEPS)
    return steps


@triton.jit
def _wide(x):
    return x.to(tl.float32) if x.dtype.primitive_bitwidth < 32 else x


@triton.jit
def _pair(steps, j: tl.constexpr, PACKED: tl.constexpr, STEPS: tl.constexpr):
    both = steps[j]
    if PACKED is None:
        re, im = _wide(both), _wide(steps[STEPS + j])
    elif PACKED == tl.bfloat16:
        re = (both << 16).to(tl.float32, bitcast=True)
        im = (both & -65536).to(tl.float32, bitcast=True)
    elif PACKED == tl.float16:
        re = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        im = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        re = both.to(tl.int32).to(tl.float32, bitcast=True)
        im = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return re, im


@triton.jit
def _store_pair(at, part, re, im, mask, PACKED: tl.constexpr):
    if PACKED is None:
        tl.store(at, re.to(at.dtype.element_ty), mask)
        tl.store(at + part, im.to(at.dtype.element_ty), mask)
    else:
        if PACKED == tl.float32:
            re = re.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
            im = im.to(tl.int32, bitcast=True).to(tl.int64) << 32
        else:
            re = re.to(PACKED).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            im = im.to(PACKED).to(tl.int16, bitcast=True).to(tl.int32) << 16
        tl.store(at, re | im, mask)


@triton.jit
def _times(a_re, a_im, b_re, b_im):
    return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re


@triton.jit
def _after(a_re, a_im, b_re, b_im, c_re, c_im, d_re, d_im):
    """S → a S + b, then S → c S + d: one map, S → c a S + (c b + d)."""
    a_re, a_im = _times(c_re, c_im, a_re, a_im)
    b_re, b_im = _times(c_re, c_im, b_re, b_im)
    return a_re, a_im, b_re + d_re, b_im + d_im


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
    """Maps, each beside that of all its rows but the last: what a scan makes exclusive."""
    e_re, e_im, f_re, f_im = _after(a_re, a_im, b_re, b_im, g_re, g_im, h_re, h_im)
    a_re, a_im, b_re, b_im = _after(a_re, a_im, b_re, b_im, c_re, c_im, d_re, d_im)
    return a_re, a_im, b_re, b_im, e_re, e_im, f_re, f_im


@triton.jit
def _scan_rows(a_re, a_im, b_re, b_im, state_re, state_im, first, last, REVERSE: tl.constexpr):
    """The rows' maps and what enters the first → what enters each, and what leaves the last."""
    re, im = _times(a_re, a_im, state_re, state_im)
    b_re, b_im = tl.where(first, re + b_re, b_re), tl.where(first, im + b_im, b_im)
    one, zero = tl.full(a_re.shape, 1.0, a_re.dtype), tl.zeros_like(a_re)
    _, _, b_re, b_im, _, _, e_re, e_im = tl.associative_scan(
        (a_re, a_im, b_re, b_im, one, zero,
         tl.where(first, state_re, 0.0), tl.where(first, state_im, 0.0)),
        1, _after_and_before, reverse=REVERSE)
    leaving_re = tl.sum(tl.where(last, b_re, 0.0), 1, keep_dims=True)
    leaving_im = tl.sum(tl.where(last, b_im, 0.0), 1, keep_dims=True)
    return e_re, e_im, leaving_re, leaving_im


@triton.jit
def _gate(re, im, mask, ACTIVATE: tl.constexpr):
    """The gate; 1 where masked."""
    if ACTIVATE:
        re, im = activate(re, im)
    return tl.where(mask, re, 1.0), tl.where(mask, im, 0.0)


@triton.jit
def _place(blocks, chunks):
    """The program's block of channels, chunk and batch, and the latter two as in 64 bits."""
    program = tl.program_id(0)
    i = program // blocks
    return program % blocks, (i % chunks).to(tl.int64), (i // chunks).to(tl.int64)


@triton.jit
def _axes(block, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Rows and channels of a tile (C / WIDTH, ROWS, WIDTH)."""
    channel = (tl.arange(0, C // WIDTH) * WIDTH)[:, None, None] + tl.arange(0, WIDTH)[None, None]
    row = tl.arange(0, ROWS)[None, :, None]
    return row.to(tl.int64), block * C + channel.to(tl.int64)


@triton.jit(do_not_specialize=RUNTIME)
def _forward(q, k, v, gates, entries, out, last, carries,
             n, h, blocks, chunks, length, carry_count,
             q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, g_b, g_n, g_h, g_part,
             e_b, e_chunk, e_h, e_part, EVEN: tl.constexpr,
             ACTIVATE: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr,
             C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
             FAR: tl.constexpr):
    if FAR:
        q_n, k_n, v_n, g_n = _far(q_n), _far(k_n), _far(v_n), _far(g_n)
    block, chunk, batch = _place(blocks, chunks)
    row, channel = _axes(block, C, WIDTH, ROWS)
    begin = chunk * length
    inside = channel < h
    first, final = row == 0, row == ROWS - 1
    time = begin + row * STEPS
    q += batch * even(q_b, EVEN[0]) + time * q_n + channel * q_h
    k += batch * even(k_b, EVEN[1]) + time * k_n + channel * k_h
    v += batch * even(v_b, EVEN[2]) + time * v_n + channel * v_h
    gates += batch * even(g_b, EVEN[3]) + time * g_n + channel * g_h
    out += (batch * n + time) * h + channel
    if carries is not None:
        carry = carries + 2 * ((batch * carry_count + time // CARRY_EVERY) * h + channel)

    state_re = tl.zeros((C // WIDTH, 1, WIDTH), WIDE)
    state_im = tl.zeros((C // WIDTH, 1, WIDTH), WIDE)
    if entries is not None:
        at = entries + batch * e_b + chunk * e_chunk + channel * e_h
        state_re += tl.load(at, inside, other=0)
        state_im += tl.load(at + e_part, inside, other=0)

    end = tl.minimum(n, begin + length)
    left = _left(end, time, ROWS * STEPS)
    next_gates = _fetch_pairs(gates, g_part, g_n, inside, left, PACKED, STEPS)
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
        next_gates = _fetch_pairs(gates, g_part, g_n, inside, later, PACKED, STEPS)

        a_re, a_im, u = (), (), ()
        for j in tl.static_range(STEPS):
            mask = inside & (j < left)
            re, im = _pair(zs, j, PACKED, STEPS)
            re, im = _gate(re, im, mask, ACTIVATE)
            kv = _wide(ks[j]) * _wide(vs[j])
            a_re, a_im, u = a_re + (re,), a_im + (im,), u + (kv,)
            if j == 0:
                all_re, all_im, b_re, b_im = re, im, kv, tl.zeros_like(kv)
            else:
                all_re, all_im, b_re, b_im = _after(all_re, all_im, b_re, b_im, re, im, kv, 0.0)
        re, im, state_re, state_im = _scan_rows(all_re, all_im, b_re, b_im, state_re, state_im,
                                                first, final, False)

        if carries is not None:
            kept = inside & first & (left > 0)
            tl.store(carry, re, kept)
            tl.store(carry + 1, im, kept)
            carry += 2 * h
        if n > 0:  # always: a branch keeps the compiler from mixing walk and scan, and spilling
            for j in tl.static_range(STEPS):
                mask = inside & (j < left)
                re, im = _times(a_re[j], a_im[j], re, im)
                re += u[j]
                result = _wide(qs[j]) * re
                tl.store(out, result.to(out.dtype.element_ty), mask)
                out += h

        out += (ROWS - 1) * STEPS * h
        time += ROWS * STEPS
        left = later

    if chunk == chunks - 1:
        at = last + 2 * (batch * h + channel)
        tl.store(at, state_re, inside)
        tl.store(at + 1, state_im, inside)
        if carries is not None:
            at = carries + 2 * ((batch * carry_count + carry_count - 1) * h + channel)
            tl.store(at, state_re, inside)
            tl.store(at + 1, state_im, inside)


@triton.jit(do_not_specialize=RUNTIME)
def _backward(grad, q, k, v, gates, carries, asked, grad_q, grad_k, grad_v, grad_gates, grad_entry,
              n, h, blocks, chunks, length, carry_count,
              d_b, d_n, d_h, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, g_b, g_n, g_h, g_part,
              a_b, a_chunk, a_h, a_part, c_b, c_n, c_h, c_part, EVEN: tl.constexpr,
              ACTIVATE: tl.constexpr, PACKED: tl.constexpr, PACKED_OUT: tl.constexpr,
              WIDE: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
              STEPS: tl.constexpr, FAR: tl.constexpr):
    if FAR:
        d_n, q_n, k_n, v_n, g_n = _far(d_n), _far(q_n), _far(k_n), _far(v_n), _far(g_n)
    tl.static_assert(ROWS * STEPS == CARRY_EVERY)
    block, chunk, batch = _place(blocks, chunks)
    row, channel = _axes(block, C, WIDTH, ROWS)
    begin = chunk * length
    end = tl.minimum(begin + length, n)
    tiles = tl.cdiv(end - begin, ROWS * STEPS)
    inside = channel < h
    first, final = row == 0, row == ROWS - 1
    # From the last tile down.
    tile = begin // CARRY_EVERY + tiles - 1
    time = tile * CARRY_EVERY + row * STEPS
    q += batch * even(q_b, EVEN[0]) + time * q_n + channel * q_h
    k += batch * even(k_b, EVEN[1]) + time * k_n + channel * k_h
    v += batch * even(v_b, EVEN[2]) + time * v_n + channel * v_h
    gates += batch * even(g_b, EVEN[3]) + time * g_n + channel * g_h
    grad += batch * even(d_b, EVEN[4]) + time * d_n + channel * d_h
    carries += batch * c_b + tile * c_n + channel * c_h
    to = (batch * n + time) * h + channel
    grad_q += to
    to += (STEPS - 1) * h
    grad_k += to
    grad_v += to
    grad_gates += to * (2 if PACKED_OUT is None else 1)
    gates_h = h * (2 if PACKED_OUT is None else 1)

    # What later tiles ask of the tile's last state.
    at = asked + batch * a_b + chunk * a_chunk + channel * a_h
    h_re, h_im = tl.load(at, inside, other=0), tl.load(at + a_part, inside, other=0)

    for _ in tl.range(0, tiles, num_stages=1):
        left = _left(n, time, ROWS * STEPS)
        qs = _fetch(q, q_n, inside, left, STEPS)
        ks = _fetch(k, k_n, inside, left, STEPS)
        vs = _fetch(v, v_n, inside, left, STEPS)
        gs = _fetch(grad, d_n, inside, left, STEPS)
        zs = _fetch_pairs(gates, g_part, g_n, inside, left, PACKED, STEPS)
        entry_re = tl.load(carries, inside, other=0)
        entry_im = tl.load(carries + c_part, inside, other=0)

        a_re, a_im, sizes = (), (), ()
        for j in tl.static_range(STEPS):
            mask = inside & (j < left)
            z_re, z_im = _pair(zs, j, PACKED, STEPS)
            re, im = _gate(z_re, z_im, mask, ACTIVATE)
            a_re, a_im = a_re + (re,), a_im + (im,)
            if ACTIVATE:
                sizes = sizes + (_size(z_re, z_im),)
            u = _wide(ks[j]) * _wide(vs[j])
            if j == 0:
                all_re, all_im, b_re, b_im = re, im, u, tl.zeros_like(u)
            else:
                all_re, all_im, b_re, b_im = _after(all_re, all_im, b_re, b_im, re, im, u, 0.0)
        d_re, d_im = tl.zeros_like(b_re), tl.zeros_like(b_re)
        for j in tl.static_range(STEPS - 1, -1, -1):
            d_re += _wide(qs[j]) * _wide(gs[j])
            d_re, d_im = _times(a_re[j], -a_im[j], d_re, d_im)

        # What is asked of the rows' last states.
        re, im, h_re, h_im = _scan_rows(all_re, -all_im, d_re, d_im, h_re, h_im,
                                        final, first, True)
        # The states that enter the rows.
        s_re, s_im, _, _ = _scan_rows(all_re, all_im, b_re, b_im, entry_re, entry_im,
                                      first, final, False)

        if n > 0:  # always: a branch keeps the compiler from mixing walks and scans, and spilling
            states_re, states_im = (), ()
            for j in tl.static_range(STEPS):
                states_re, states_im = states_re + (s_re,), states_im + (s_im,)
                s_re, s_im = _times(a_re[j], a_im[j], s_re, s_im)
                s_re += _wide(ks[j]) * _wide(vs[j])
                result = (s_re * _wide(gs[j])).to(grad_q.dtype.element_ty)
                tl.store(grad_q, result, inside & (j < left))
                grad_q += h
            grad_q -= (CARRY_EVERY + STEPS) * h
            for j in tl.static_range(STEPS - 1, -1, -1):
                mask = inside & (j < left)
                re += _wide(qs[j]) * _wide(gs[j])
                tl.store(grad_k, (re * _wide(vs[j])).to(grad_k.dtype.element_ty), mask)
                tl.store(grad_v, (re * _wide(ks[j])).to(grad_v.dtype.element_ty), mask)
                da_re, da_im = _times(re, im, states_re[j], -states_im[j])
                if ACTIVATE:
                    along, across = _slopes(sizes[j])
                    x, y = _times(a_re[j], -a_im[j], da_re, da_im)
                    da_re, da_im = _times(a_re[j], a_im[j], x * along, y * across)
                _store_pair(grad_gates, 1, da_re, da_im, mask, PACKED_OUT)
                re, im = _times(a_re[j], -a_im[j], re, im)
                grad_k -= h
                grad_v -= h
                grad_gates -= gates_h

        grad -= CARRY_EVERY * d_n
        q -= CARRY_EVERY * q_n
        k -= CARRY_EVERY * k_n
        v -= CARRY_EVERY * v_n
        gates -= CARRY_EVERY * g_n
        carries -= c_n
        grad_k -= (CARRY_EVERY - STEPS) * h
        grad_v -= (CARRY_EVERY - STEPS) * h
        grad_gates -= (CARRY_EVERY - STEPS) * gates_h
        time -= CARRY_EVERY

    if grad_entry is not None:
        if chunk == 0:
            at = grad_entry + 2 * (batch * h + channel)
            tl.store(at, h_re, inside)
            tl.store(at + 1, h_im, inside)


@triton.jit(do_not_specialize=RUNTIME)
def _totals(x, y, gates, totals, n, h, blocks, chunks, length,
            x_b, x_n, x_h, y_b, y_n, y_h, g_b, g_n, g_h, g_part, EVEN: tl.constexpr,
            REVERSE: tl.constexpr, ACTIVATE: tl.constexpr, PACKED: tl.constexpr,
            WIDE: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
            STEPS: tl.constexpr):
    """Each chunk's map of S, whose inputs are x · y = k · v; or, reversed, of H: q · grad. Nothing
    is read of the chunk whose map nobody needs. A row is length / ROWS steps long here.
    """
    block, chunk, batch = _place(blocks, chunks)
    row, channel = _axes(block, C, WIDTH, ROWS)
    inside = channel < h
    time = chunk * length + row * (length // ROWS)
    if REVERSE:
        time += length // ROWS - 1
    x += batch * even(x_b, EVEN[0]) + time * x_n + channel * x_h
    y += batch * even(y_b, EVEN[1]) + time * y_n + channel * y_h
    gates += batch * even(g_b, EVEN[2]) + time * g_n + channel * g_h
    a_re = tl.full((C // WIDTH, ROWS, WIDTH), 1.0, WIDE)
    a_im, b_re, b_im = tl.zeros_like(a_re), tl.zeros_like(a_re), tl.zeros_like(a_re)
    forward: tl.constexpr = -1 if REVERSE else 1
    needed = chunk > 0 if REVERSE else chunk < chunks - 1
    for _ in tl.range(0, tl.where(needed, length // ROWS, 0), STEPS, num_stages=1):
        left = _left(n, time, STEPS)
        for j in tl.static_range(STEPS):
            mask = inside & (forward * j < left)
            z = _fetch_pairs(gates, g_part, g_n, mask, 1, PACKED, 1)
            re, im = _pair(z, 0, PACKED, 1)
            re, im = _gate(re, im, mask, ACTIVATE)
            xy = _wide(tl.load(x, mask, other=0)) * _wide(tl.load(y, mask, other=0))
            if REVERSE:
                a_re, a_im, b_re, b_im = _after(a_re, a_im, b_re + xy, b_im, re, -im, 0.0, 0.0)
            else:
                a_re, a_im, b_re, b_im = _after(a_re, a_im, b_re, b_im, re, im, xy, 0.0)
            x += forward * x_n
            y += forward * y_n
            gates += forward * g_n
        time += forward * STEPS
    a_re, a_im, b_re, b_im = tl.associative_scan((a_re, a_im, b_re, b_im), 1, _after,
                                                 reverse=REVERSE)
    at = totals + 4 * (((batch * chunks + chunk) * h) + channel) + row * 0
    mask = inside & (row == (0 if REVERSE else ROWS - 1))
    tl.store(at, a_re, mask)
    tl.store(at + 1, a_im, mask)
    tl.store(at + 2, b_re, mask)
    tl.store(at + 3, b_im, mask)


@triton.jit(do_not_specialize=RUNTIME)
def _enter(totals, state, entries, h, blocks, chunks, s_b, s_h, s_part,
           REVERSE: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr):
    """What enters each chunk, from `state` on."""
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * C + tl.arange(0, C).to(tl.int64)
    inside = channel < h
    re, im = tl.zeros((C,), WIDE), tl.zeros((C,), WIDE)
    if state is not None:
        state += batch * s_b + channel * s_h
        re += tl.load(state, inside, other=0)
        im += tl.load(state + s_part, inside, other=0)
    for i in tl.range(0, chunks, num_stages=4):
        at = (batch * chunks + (chunks - 1 - i if REVERSE else i)) * h + channel
        tl.store(entries + 2 * at, re, inside)
        tl.store(entries + 2 * at + 1, im, inside)
        a_re, a_im = tl.load(totals + 4 * at, inside), tl.load(totals + 4 * at + 1, inside)
        b_re, b_im = tl.load(totals + 4 * at + 2, inside), tl.load(totals + 4 * at + 3, inside)
        re, im = _times(a_re, a_im, re, im)
        re, im = re + b_re, im + b_im


# ---- launching

def _tile(h, dtype):
    """C and the rest of a tile: 32 bytes of a row in 16 bits, 16 elements to a thread, or 8."""
    if h > 4:
        return dict(C=16, WIDTH=8, ROWS=8, STEPS=8, num_warps=4 if dtype == torch.float64 else 2)
    c = triton.next_power_of_2(h)
    return dict(C=c, WIDTH=c, ROWS=8, STEPS=8, num_warps=1)


def _chunks(programs, n):
    """Steps per chunk, and chunks: four programs to a multiprocessor, or all of time in one."""
    length = 512 * triton.cdiv(n, 512 * triton.cdiv(512, programs))
    return (n, 1) if programs >= 256 or n <= length else (length, triton.cdiv(n, length))


def _gate_views(gates, gate_logits):
    """Real (b, n, h, 2), or packed in integers where the parts lie side by side; which."""
    x = torch.view_as_real(gates) if gate_logits is None else gate_logits
    number = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
              torch.float32: tl.float32}.get(x.dtype)
    even = x.storage_offset() % 2 == 0 and all(s % 2 == 0 for s in x.stride()[:3])
    if number is None or x.stride(3) != 1 or not even:
        return x, None
    return x.view(torch.int32 if x.element_size() == 2 else torch.int64), number


def _leaves_32_bits(*tensors):
    """Whether a tile of time does."""
    return max(t.stride(1) for t in tensors) * CARRY_EVERY.value >= 1 << 31


def _wide_dtype(dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


def forward(q, k, v, gates, gate_logits, initial_state, carry_every):
    b, n, h, _ = q.shape
    complex_dtype = torch.complex128 if q.dtype == torch.float64 else torch.complex64
    out = q.new_empty(b, n, h, 1)
    last = q.new_empty(b, h, 1, 1, dtype=complex_dtype)
    count = triton.cdiv(n, carry_every) + 1 if carry_every else 0
    carries = q.new_empty(b, count, h, 1, 1, dtype=complex_dtype)
    if b == 0:
        return out, last, carries
    x, packed = _gate_views(gates, gate_logits)
    flags = dict(ACTIVATE=gates is None, PACKED=packed, WIDE=_wide_dtype(q.dtype),
                 **_tile(h, q.dtype))
    blocks = triton.cdiv(h, flags["C"])
    length, chunks = _chunks(b * blocks, n)
    entries = None if initial_state is None else torch.view_as_real(initial_state)[:, None, :, 0, 0]
    if chunks > 1:
        entries = _entries(k, v, x, entries, length, chunks, blocks, False, flags)
    _forward[(b * chunks * blocks,)](
        q, k, v, x, entries, out, torch.view_as_real(last),
        torch.view_as_real(carries) if carry_every else None,
        n, h, blocks, chunks, length, count,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *x.stride(),
        *((0, 0, 0, 0) if entries is None else entries.stride()),
        **flags, EVEN=evens(q, k, v, x), FAR=_leaves_32_bits(q, k, v, x))
    return out, last, carries


def _entries(x, y, gates, state, length, chunks, blocks, reverse, flags):
    """(b, chunks, h, 2): what enters each chunk. state: (b, 1, h, 2) or None."""
    b, n, h, _ = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    totals = x.new_empty(b, chunks, h, 4, dtype=wide)
    entries = x.new_empty(b, chunks, h, 2, dtype=wide)
    _totals[(b * chunks * blocks,)](
        x, y, gates, totals, n, h, blocks, chunks, length,
        *x.stride()[:3], *y.stride()[:3], *gates.stride(),
        EVEN=evens(x, y, gates), REVERSE=reverse, **flags,
        **(registers(96) if wide == torch.float64 else {}))
    _enter[(b * blocks,)](
        totals, state, entries, h, blocks, chunks,
        *((0, 0, 0) if state is None else (state.stride(0), state.stride(2), state.stride(3))),
        REVERSE=reverse, WIDE=flags["WIDE"], C=flags["C"], num_warps=1)
    return entries


def backward(grad, grad_state, carries, q, k, v, gates, gate_logits, initial_state, carry_every):
    b, n, h, _ = q.shape
    grad_q, grad_k, grad_v = (q.new_empty(b, n, h, 1) for _ in range(3))
    given = gate_logits if gates is None else gates
    grad_gates = torch.empty_like(given, memory_format=torch.contiguous_format)
    grad_entry = None if initial_state is None else torch.empty_like(
        initial_state, memory_format=torch.contiguous_format)
    if b > 0:
        x, packed = _gate_views(gates, gate_logits)
        to, packed_out = _gate_views(*((grad_gates, None) if gate_logits is None
                                       else (None, grad_gates)))
        flags = dict(ACTIVATE=gates is None, PACKED=packed, WIDE=_wide_dtype(q.dtype),
                     **_tile(h, q.dtype))
        blocks = triton.cdiv(h, flags["C"])
        length, chunks = _chunks(b * blocks, n)
        asked = torch.view_as_real(grad_state)[:, None, :, 0, 0]
        if chunks > 1:
            asked = _entries(q, grad, x, asked, length, chunks, blocks, True, flags)
        c = torch.view_as_real(carries)[:, :, :, 0, 0]
        _backward[(b * chunks * blocks,)](
            grad, q, k, v, x, c, asked, grad_q, grad_k, grad_v, to,
            None if grad_entry is None else torch.view_as_real(grad_entry),
            n, h, blocks, chunks, length, carries.shape[1],
            *grad.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *x.stride(),
            *asked.stride(), *c.stride(),
            **flags, PACKED_OUT=packed_out, EVEN=evens(q, k, v, x, grad),
            FAR=_leaves_32_bits(grad, q, k, v, x))
    return (grad_q, grad_k, grad_v, None if gates is None else grad_gates,
            None if gate_logits is None else grad_gates, grad_entry)
