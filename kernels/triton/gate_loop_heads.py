"""gate_loop on a GPU for heads: matrix products over chunks of time.

With a chunk's entering state S, P_s = Π_{i ≤ s} a_i and W[s, r] = Π_{r < i ≤ s} a_i inside it:

    out = ((q kᵀ) ∘ Re W) v + Re P ∘ (q Re S) - Im P ∘ (q Im S)
    leaving state = P_last S + kᵀ (W[last] ∘ v)

Where gates are real, so are states and W, and every imaginary part is left out.

A first kernel walks through time for the states between chunks; whatever else there is to do is
parallel over chunks. Gradients are the same the other way round: the adjoint states
G_t = q_t grad_tᵀ + conj(a_{t+1}) G_{t+1} are walked from the end, then every chunk is on its own.

W is a tree of products, in gate_tree.py; rows, states and products of matrices are in matrices.py.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmix._triton import target
from fastmix._triton.gate import activate_backward
from fastmix._triton.gate_tree import (
    block_sums,
    double,
    gather,
    load_gates,
    load_logits,
    part_of,
    spread,
    tree,
)
from fastmix._triton.layout import as_parts, ceil_div, even, evens, power_of_two, strided
from fastmix._triton.matrices import (
    add_dots,
    dot,
    dot_sums,
    load_rows,
    load_state,
    load_strided_state,
    rounded,
    store_rows,
    store_state,
    sums_dot,
)
from fastmix._triton.number import filled, plus, select, times
from fastmix._triton.plans import launch
from fastmix._triton.target import ANY, CUDA, Row, Table, arch, float32_precision
from fastmix.dtypes import wide, wide_complex

# Gates are read one by one: knowing what their strides are multiples of, which with few heads
# depends on n, would only make Triton compile twice.
RUNTIME = ["n", "heads", "chunks", "q_b", "k_b", "v_b", "grad_b", "g_b", "g_n", "g_h", "g_part"]


@triton.jit(do_not_specialize=RUNTIME)
def _walk_states(k, k_b, k_strides, v, v_b, v_strides, gates, g_b, g_n, g_h, g_part,
                 initial, initial_strides, states, last, n, heads, chunks,
                 EVEN: tl.constexpr, LOGITS: tl.constexpr, REAL: tl.constexpr, SUMS: tl.constexpr,
                 DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                 C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """states (b, chunks + 1, h, DK, DV) receive the state before every chunk and the last one."""
    k_strides = (even(k_b, EVEN[0]),) + k_strides
    v_strides = (even(v_b, EVEN[1]),) + v_strides
    gate_strides = g_b, g_n, g_h, g_part
    program = tl.program_id(0).to(tl.int64)
    column, row = program % tl.cdiv(DV, BV) * BV, program // tl.cdiv(DV, BV)
    row, head = row % tl.cdiv(DK, BK) * BK, row // tl.cdiv(DK, BK)
    b, h = head // heads, head % heads
    size: tl.constexpr = DK * DV * (1 if REAL else 2)
    states += (b * (chunks + 1) * heads + h) * size
    if initial is not None:
        state = load_strided_state(initial, initial_strides, b, h, row, column, BK, BV, DK, DV,
                                   REAL)
    else:
        state = filled(0, (BK, BV), SUMS, not REAL)
    first = tl.full((), 0, tl.int64)
    store_state(states, state, row, column, BK, BV, DK, DV)
    for _ in range(chunks):
        keys = load_rows(k, k_strides, b, first, h, C, row, BK, n, DK)
        values = load_rows(v, v_strides, b, first, h, C, column, BV, n, DV).to(SUMS)
        a = load_gates(gates, gate_strides, b, first, h, C, n, LOGITS, REAL, SUMS)
        _, _, after, all = tree(a, C, LEVELS)
        state = times(state, all)
        keys = tl.trans(keys)
        re = state[0] + dot_sums(keys, values * after[0][:, None], PRECISION, False)
        if REAL:
            state = (re,)
        else:
            im = dot_sums(keys, values * after[1][:, None], PRECISION, False)
            state = re, state[1] + im
        first += C
        states += heads.to(tl.int64) * size
        store_state(states, state, row, column, BK, BV, DK, DV)
    store_state(last + head * size, state, row, column, BK, BV, DK, DV)


@triton.jit
def _real_of_product(a, x):
    """Computes Re (a · x) of numbers a (C,) and x (C, BLOCK)."""
    if len(a) == 1:
        return a[0][:, None] * x[0]
    else:
        return a[0][:, None] * x[0] - a[1][:, None] * x[1]


@triton.jit(do_not_specialize=RUNTIME)
def _outputs(q, q_b, q_strides, k, k_b, k_strides, v, v_b, v_strides, gates, g_b, g_n, g_h, g_part,
             states, out, n, heads, chunks, EVEN: tl.constexpr, LOGITS: tl.constexpr,
             REAL: tl.constexpr, SUMS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
             BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
             PRECISION: tl.constexpr):
    """Computes a chunk and BV columns of out (b, n, h, DV), from the state before the chunk, which
    `_walk_states` wrote.
    """
    q_strides = (even(q_b, EVEN[0]),) + q_strides
    k_strides = (even(k_b, EVEN[1]),) + k_strides
    v_strides = (even(v_b, EVEN[2]),) + v_strides
    gate_strides = g_b, g_n, g_h, g_part
    program = tl.program_id(0).to(tl.int64)
    column, index = program % tl.cdiv(DV, BV) * BV, program // tl.cdiv(DV, BV)
    h, index = index % heads, index // heads
    chunk, b = index % chunks, index // chunks
    first = chunk * C
    states += ((b * (chunks + 1) + chunk) * heads + h) * (DK * DV * (1 if REAL else 2))
    scores = tl.zeros((C, C), SUMS)
    from_state = filled(0, (C, BV), SUMS, not REAL)
    for row in range(0, DK, BK):
        queries = load_rows(q, q_strides, b, first, h, C, row, BK, n, DK)
        keys = load_rows(k, k_strides, b, first, h, C, row, BK, n, DK)
        state = load_state(states, row, column, BK, BV, DK, DV, REAL)
        scores += dot(queries, tl.trans(keys), PRECISION)
        from_state = add_dots(from_state, queries, state, PRECISION, True)
    a = load_gates(gates, gate_strides, b, first, h, C, n, LOGITS, REAL, SUMS)
    w, p, _, _ = tree(a, C, LEVELS)
    steps = tl.arange(0, C)
    scores *= tl.where(steps[:, None] == steps[None, :], 1.0, w)
    values = load_rows(v, v_strides, b, first, h, C, column, BV, n, DV)
    sums = _real_of_product(p, from_state)
    sums += sums_dot(rounded(scores, v), values, PRECISION)
    store_rows(out, sums, b, first, h, heads, C, column, BV, n, DV)


@triton.jit(do_not_specialize=RUNTIME)
def _walk_adjoints(q, q_b, q_strides, grad, grad_b, grad_strides, gates, g_b, g_n, g_h, g_part,
                   final, final_strides, adjoints, entry, n, heads, chunks,
                   EVEN: tl.constexpr, LOGITS: tl.constexpr, REAL: tl.constexpr, SUMS: tl.constexpr,
                   DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                   C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """adjoints (b, chunks, h, DK, DV) receive the gradient of the state after every chunk.

    `entry`, if given, receives the initial state's gradient. Steps are loaded last to first, so
    that the most decayed terms are summed first.
    """
    q_strides = (even(q_b, EVEN[0]),) + q_strides
    grad_strides = (even(grad_b, EVEN[1]),) + grad_strides
    gate_strides = g_b, g_n, g_h, g_part
    program = tl.program_id(0).to(tl.int64)
    column, row = program % tl.cdiv(DV, BV) * BV, program // tl.cdiv(DV, BV)
    row, head = row % tl.cdiv(DK, BK) * BK, row // tl.cdiv(DK, BK)
    b, h = head // heads, head % heads
    size: tl.constexpr = DK * DV * (1 if REAL else 2)
    adjoints += ((b + 1) * chunks * heads + h) * size
    adjoint = load_strided_state(final, final_strides, b, h, row, column, BK, BV, DK, DV, REAL)
    first = chunks.to(tl.int64) * C
    for _ in range(chunks):
        first -= C
        adjoints -= heads.to(tl.int64) * size
        store_state(adjoints, adjoint, row, column, BK, BV, DK, DV)
        queries = load_rows(q, q_strides, b, first, h, C, row, BK, n, DK, True)
        grads = load_rows(grad, grad_strides, b, first, h, C, column, BV, n, DV, True).to(SUMS)
        a = load_gates(gates, gate_strides, b, first, h, C, n, LOGITS, REAL, SUMS, True)
        _, _, p, all = tree(a, C, LEVELS)
        p = times(p, a)
        if not REAL:
            all = all[0], -all[1]
        adjoint = times(adjoint, all)
        queries = tl.trans(queries)
        re = adjoint[0] + dot_sums(queries, grads * p[0][:, None], PRECISION, False)
        if REAL:
            adjoint = (re,)
        else:
            im = dot_sums(queries, grads * p[1][:, None], PRECISION, False)
            adjoint = re, adjoint[1] - im
    if entry is not None:
        store_state(entry + head * size, adjoint, row, column, BK, BV, DK, DV)


@triton.jit
def _scores(x, x_strides, y, y_strides, b, at, first, h, ROWS: tl.constexpr, C: tl.constexpr,
            BLOCK: tl.constexpr, n, WIDTH: tl.constexpr, SUMS: tl.constexpr,
            PRECISION: tl.constexpr):
    """Computes x_s · y_r of ROWS steps s, from `at` on, with all steps r of the chunk."""
    scores = tl.zeros((ROWS, C), SUMS)
    for channel in range(0, WIDTH, BLOCK):
        left = load_rows(x, x_strides, b, at, h, ROWS, channel, BLOCK, n, WIDTH)
        right = load_rows(y, y_strides, b, first, h, C, channel, BLOCK, n, WIDTH)
        scores += dot(left, tl.trans(right), PRECISION)
    return scores


@triton.jit
def _add_products(sums, x, y):
    """Adds to `sums` the rows' sums of x · conj(y)."""
    if len(x) == 1:
        return (sums[0] + tl.sum(x[0] * y[0], 1),)
    else:
        return (sums[0] + tl.sum(x[0] * y[0] + x[1] * y[1], 1),
                sums[1] + tl.sum(x[1] * y[0] - x[0] * y[1], 1))


@triton.jit(do_not_specialize=RUNTIME)
def _gradients(q, q_b, q_strides, k, k_b, k_strides, v, v_b, v_strides, grad, grad_b, grad_strides,
               gates, g_b, g_n, g_h, g_part, states, adjoints, grad_q, grad_k, grad_v, tree_grads,
               n, heads, chunks, EVEN: tl.constexpr, LOGITS: tl.constexpr, REAL: tl.constexpr,
               SUMS: tl.constexpr, ROUNDED: tl.constexpr, UNTURNED: tl.constexpr,
               DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
               C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """Computes the gradients of q, k and v over a chunk.

    tree_grads (b, chunks, h, 2 parts, C) are the gradients of P and of W's last row, as far as they
    come from states. ROUNDED is for gates whose gradients are rounded to bfloat16 anyway. UNTURNED
    multiplies scores' operands again, the other way round, where it would transpose the scores.
    """
    q_strides = (even(q_b, EVEN[0]),) + q_strides
    k_strides = (even(k_b, EVEN[1]),) + k_strides
    v_strides = (even(v_b, EVEN[2]),) + v_strides
    grad_strides = (even(grad_b, EVEN[3]),) + grad_strides
    gate_strides = g_b, g_n, g_h, g_part
    program = tl.program_id(0).to(tl.int64)
    h, index = program % heads, program // heads
    chunk, b = index % chunks, index // chunks
    first = chunk * C
    states += ((b * (chunks + 1) + chunk) * heads + h) * (DK * DV * (1 if REAL else 2))
    adjoints += program * (DK * DV * (1 if REAL else 2))
    steps = tl.arange(0, C)
    a = load_gates(gates, gate_strides, b, first, h, C, n, LOGITS, REAL, SUMS)
    w, p, after, _ = tree(a, C, LEVELS)
    w = tl.where(steps[:, None] == steps[None, :], 1.0, w)

    if UNTURNED:
        weights = _scores(k, k_strides, q, q_strides, b, first, first, h, C, C, BK, n, DK, SUMS,
                          PRECISION)
        weights = rounded(weights * tl.trans(w), grad)
    else:
        weights = _scores(q, q_strides, k, k_strides, b, first, first, h, C, C, BK, n, DK, SUMS,
                          PRECISION)
        weights = rounded(tl.trans(weights * w), grad)
    for column in range(0, DV, BV):
        grads = load_rows(grad, grad_strides, b, first, h, C, column, BV, n, DV)
        dv = sums_dot(weights, grads, PRECISION)
        for row in range(0, DK, BK):
            keys = load_rows(k, k_strides, b, first, h, C, row, BK, n, DK)
            adjoint = load_state(adjoints, row, column, BK, BV, DK, DV, REAL)
            for part in tl.static_range(len(after)):
                dv += after[part][:, None] * dot_sums(keys, adjoint[part], PRECISION, True)
        store_rows(grad_v, dv, b, first, h, heads, C, column, BV, n, DV)

    weights = _scores(grad, grad_strides, v, v_strides, b, first, first, h, C, C, BV, n, DV, SUMS,
                      PRECISION)
    weights = rounded(weights * w, grad)
    if UNTURNED:
        turned = _scores(v, v_strides, grad, grad_strides, b, first, first, h, C, C, BV, n, DV,
                         SUMS, PRECISION)
        turned = rounded(turned * tl.trans(w), grad)
    dp = filled(0, (C,), SUMS, not REAL)
    dw = filled(0, (C,), SUMS, not REAL)
    all = filled(0, (BK,), SUMS, not REAL)
    for row in range(0, DK, BK):
        from_state = filled(0, (C, BK), SUMS, not REAL)
        from_adjoint = filled(0, (C, BK), SUMS, not REAL)
        for column in range(0, DV, BV):
            values = load_rows(v, v_strides, b, first, h, C, column, BV, n, DV)
            grads = load_rows(grad, grad_strides, b, first, h, C, column, BV, n, DV)
            state = load_state(states, row, column, BK, BV, DK, DV, REAL)
            adjoint = load_state(adjoints, row, column, BK, BV, DK, DV, REAL)
            all = _add_products(all, adjoint, state)
            from_state = add_dots(from_state, grads, state, PRECISION, ROUNDED, True)
            from_adjoint = add_dots(from_adjoint, values, adjoint, PRECISION, ROUNDED, True)
        queries = load_rows(q, q_strides, b, first, h, C, row, BK, n, DK)
        keys = load_rows(k, k_strides, b, first, h, C, row, BK, n, DK)
        dq = _real_of_product(p, from_state) + sums_dot(weights, keys, PRECISION)
        store_rows(grad_q, dq, b, first, h, heads, C, row, BK, n, DK)
        dk = after[0][:, None] * from_adjoint[0]
        if not REAL:
            dk += after[1][:, None] * from_adjoint[1]
        dk += sums_dot(turned if UNTURNED else tl.trans(weights), queries, PRECISION)
        store_rows(grad_k, dk, b, first, h, heads, C, row, BK, n, DK)
        dp_re = dp[0] + tl.sum(queries.to(SUMS) * from_state[0], 1)
        dp = (dp_re,) if REAL else (dp_re, dp[1] - tl.sum(queries.to(SUMS) * from_state[1], 1))
        dw_re = dw[0] + tl.sum(keys.to(SUMS) * from_adjoint[0], 1)
        dw = (dw_re,) if REAL else (dw_re, dw[1] + tl.sum(keys.to(SUMS) * from_adjoint[1], 1))
    # The state after the chunk has the factor of all gates, which is P at the last step.
    dp_re = dp[0] + tl.where(steps == C - 1, tl.sum(all[0], 0), 0.0)
    if REAL:
        sums = dp_re, dw[0]
    else:
        dp_im = dp[1] + tl.where(steps == C - 1, tl.sum(all[1], 0), 0.0)
        sums = dp_re, dp_im, dw[0], dw[1]
    tree_grads += program * (len(sums) * C) + steps
    for i in tl.static_range(len(sums)):
        tl.store(tree_grads + i * C, sums[i])


@triton.jit
def _add_block_sums(all, x, at, C: tl.constexpr, SIZE: tl.constexpr):
    """Adds to `all` the sum of x over the block of SIZE steps that holds step `at`."""
    re = all[0] + tl.gather(block_sums(x[0], C, SIZE), at, 0)
    if len(all) == 1:
        return (re,)
    else:
        return re, all[1] + tl.gather(block_sums(x[1], C, SIZE), at, 0)


@triton.jit(do_not_specialize=RUNTIME)
def _gate_gradients(q, q_b, q_strides, k, k_b, k_strides, v, v_b, v_strides, grad, grad_b,
                    grad_strides, gates, g_b, g_n, g_h, g_part, tree_grads, grad_gates,
                    n, heads, chunks, EVEN: tl.constexpr, LOGITS: tl.constexpr,
                    REAL: tl.constexpr, SUMS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
                    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
                    LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """Computes the gradients of the gates over a chunk from those of its tree of products.

    W's gradient is the product of both scores. At every level of the tree it splits into the
    gradients of the products after each step of a left half and of those up to each step of a right
    half.
    """
    q_strides = (even(q_b, EVEN[0]),) + q_strides
    k_strides = (even(k_b, EVEN[1]),) + k_strides
    v_strides = (even(v_b, EVEN[2]),) + v_strides
    grad_strides = (even(grad_b, EVEN[3]),) + grad_strides
    gate_strides = g_b, g_n, g_h, g_part
    program = tl.program_id(0).to(tl.int64)
    h, index = program % heads, program // heads
    chunk, b = index % chunks, index // chunks
    first = chunk * C
    steps = tl.arange(0, C)
    # The weights are in parts of 32 rows: whole, their layout has vectors of most of a row's
    # columns in every thread.
    parts = ()
    for part in tl.static_range(C // ROWS):
        at = first + part * ROWS
        rows = part * ROWS + tl.arange(0, ROWS)
        weights = _scores(q, q_strides, k, k_strides, b, at, first, h, ROWS, C, BK, n, DK, SUMS,
                          PRECISION)
        weights *= _scores(grad, grad_strides, v, v_strides, b, at, first, h, ROWS, C, BV, n, DV,
                           SUMS, PRECISION)
        parts = parts + (tl.where(rows[:, None] > steps[None, :], weights, 0.0),)

    # The tree, from the leaves up: products up to each step, after it, and of its whole block.
    a = load_gates(gates, gate_strides, b, first, h, C, n, LOGITS, REAL, SUMS)
    before, all = a, a
    if REAL:
        after = (tl.full((C,), 1.0, SUMS),)
    else:
        after = tl.full((C,), 1.0, SUMS), tl.zeros((C,), SUMS)
    nodes = ()
    for level in tl.static_range(LEVELS):
        nodes = nodes + ((before, after, all),)
        before, after, all = double(before, after, all, steps, 1 << level)

    # Its gradient, from the root down.
    tree_grads += program * ((2 if REAL else 4) * C) + steps
    if REAL:
        before, after = (tl.load(tree_grads),), (tl.load(tree_grads + C),)
    else:
        before = tl.load(tree_grads), tl.load(tree_grads + C)
        after = tl.load(tree_grads + 2 * C), tl.load(tree_grads + 3 * C)
    all = filled(0, (C,), SUMS, not REAL)
    for level in tl.static_range(LEVELS - 1, -1, -1):
        # Products up to each step, after it, and of its whole block.
        p, e, t = nodes[level]
        right = (steps & (1 << level)) != 0
        sibling = steps ^ (1 << level)
        t = gather(t, sibling)
        outer, inner = select(right, before, after), select(right, p, e)
        if not REAL:
            inner = inner[0], -inner[1]
        outer = times(outer, inner)
        if not REAL:
            t = t[0], -t[1]
        all = _add_block_sums(times(all, t), outer, sibling, C, 1 << level)
        before = select(right, times(before, t), before)
        after = select(right, after, times(after, t))
        for part in tl.static_range(C // ROWS):
            rows = part * ROWS + tl.arange(0, ROWS)
            between = tl.where(((rows[:, None] ^ steps[None, :]) >> level) == 1, parts[part], 0.0)
            before_re = before[0] + spread(tl.sum(between * e[0][None, :], 1), part, C)
            if REAL:
                before = (before_re,)
            else:
                before = before_re, before[1] - spread(
                    tl.sum(between * e[1][None, :], 1), part, C)
            after_re = after[0] + tl.sum(between * part_of(p[0], part, ROWS)[:, None], 0)
            if REAL:
                after = (after_re,)
            else:
                after = after_re, after[1] - tl.sum(
                    between * part_of(p[1], part, ROWS)[:, None], 0)
    grads = plus(before, all)
    if LOGITS:
        z, _ = load_logits(gates, gate_strides, b, first, h, C, n, REAL, SUMS)
        grads = activate_backward(grads[0], grads[1], z[0], z[1])
    grad_gates += ((b * n + first + steps) * heads + h) * len(grads)
    for part in tl.static_range(len(grads)):
        tl.store(grad_gates + part, grads[part].to(grad_gates.dtype.element_ty),
                 mask=first + steps < n)


# ---- launchers

LAUNCH = Table(
    # C steps to a chunk; states in blocks of at most BK by BV.
    Row(ANY, ANY, ANY, ANY, dict(C=32, BK=32, BV=32, num_warps=8),
        "64 steps of products that are not all bfloat16's take too many registers"),
    Row(ANY, "sm90 sm100 amd interpreter", "bfloat16", "small even", dict(C=64, BK=64),
        "64 steps fill the tensor cores' tiles"),
    Row(ANY, "sm90 amd interpreter", ANY, ANY, dict(num_warps=4),
        "a warpgroup, which wgmma multiplies with; a wave on AMD has the registers of two warps"),
    Row(ANY, ANY, "float64", ANY, dict(C=16, BK=16, BV=16), "twice the registers to a number"),
    Row(ANY, ANY, "float16", "lopsided", dict(C=16),
        "states are out of float16's range, so products are float32's; counted: 32 steps spill"),
    Row("_walk_states", CUDA, "float64", ANY, dict(maxnreg=255), "counted: spills with fewer"),
    Row("_walk_states", "sm80", "bfloat16 float16 float32", "even", dict(maxnreg=255),
        "counted: spills with fewer, but for blocks of 16 by 16"),
    Row("_outputs", ANY, ANY, ANY, dict(num_stages=2), "more do not fit into shared memory"),
    Row("_outputs", "sm90 sm100 amd interpreter", "bfloat16", "even", dict(BV=64),
        "scores are computed again for every block of v: half as often"),
    Row("_outputs _gradients", "sm90", "bfloat16", "small even", dict(BK=32),
        "counted: 64 rows of a state spill"),
    Row("_gradients", "sm80", "bfloat16", "small even", dict(BK=16),
        "counted: 32 rows of a state spill"),
    Row("_walk_states", "sm100", "bfloat16", "real", dict(maxnreg=128),
        "counted: ptxas aims at 64 and spills, with Triton 3.6"),
    Row("_gradients", "sm100", "bfloat16", "real", dict(BK=32),
        "counted: 64 rows of a state spill, with Triton 3.6"),
    Row("_gradients", "sm80 sm90", "float32", "real", dict(maxnreg=128),
        "counted: ptxas aims at 80 and spills"),
    # One of dk and dv takes many more blocks than the other: such loops spill sooner.
    Row(ANY, ANY, "bfloat16 float16 float32", "lopsided", dict(BK=16, BV=16, num_warps=8),
        "counted: larger blocks spill"),
    Row(ANY, CUDA, "bfloat16 float16 float32", "lopsided", dict(maxnreg=255),
        "counted: spills with fewer"),
    Row("_walk_adjoints", CUDA, "float16 float32", ANY, dict(num_warps=8),
        "counted: spills in four on sm90"),
    Row("_gradients _gate_gradients", ANY, ANY, ANY, dict(num_stages=1, num_warps=4),
        "a wave on AMD has as many registers in a program of four as there are in eight"),
    Row("_gradients _gate_gradients", CUDA, ANY, ANY, dict(num_warps=8),
        "counted: most spill in four"),
    Row("_gate_gradients", "sm90", "bfloat16", "even", dict(num_warps=4),
        "counted: heads of 64 do not spill in four, and two programs fit on a multiprocessor"),
    Row("_gate_gradients", "sm90", "bfloat16", "wide", dict(num_warps=8),
        "as above; four were not counted"),
    # In 128 registers _gradients of bfloat16 would fit twice on an sm90 too, but spills: 29 to 40
    # words where logits are float32 (Triton 3.6, 3.7), 20 where they are bfloat16 (3.9).
    Row("_gradients", "sm90", "float32", "wide", dict(maxnreg=168),
        "counted: ptxas aims at fewer and spills"),
    Row("_gradients", ANY, "float16", ANY, dict(BK=16), "counted: 32 rows of a state spill"),
    Row("_gradients", CUDA, "float64", ANY, dict(num_stages=2),
        "loaded to shared memory, past registers"),
    Row("_gate_gradients", ANY, "float64", ANY, dict(num_warps=4, num_stages=2),
        "loaded to shared memory, past registers"),
    Row("_gate_gradients", "sm80", "float64", ANY, dict(num_warps=1, num_stages=1),
        "counted: spills in more"),
    Row("_gate_gradients", ANY, ANY, ANY, dict(ROWS=64), "all of a chunk's rows at once"),
    Row("_gate_gradients", CUDA, ANY, ANY, dict(ROWS=32),
        "of 64, a thread holds most of a row's columns, and spills"),
)


def _precision(dtype: torch.dtype) -> str:
    """Returns how products with float32 operands are formed."""
    if dtype == torch.float64 or not arch():
        return "ieee"
    if dtype == torch.float32:
        return float32_precision()
    return "tf32x3"  # exact for the 16-bit side, as good as float32 for the other


def _shapes(dk: int, dv: int, real: bool) -> tuple[str, ...]:
    """Returns LAUNCH's classes of head dims, one of small, even and lopsided, and wide too; and
    real for such gates.
    """
    small, large = sorted((dk, dv))
    kind = "lopsided" if large > 2 * max(16, small) else "small" if large <= 16 else "even"
    return kind, *(("wide",) if large > 64 else ()), *(("real",) if real else ())


def _options(kernel: str, q: Tensor, v: Tensor, logits: bool, real: bool) -> dict[str, Any]:
    """Returns what a kernel is compiled for, and its number of warps, stages and registers."""
    return _options_for(LAUNCH, target.family(), kernel, q.dtype, q.shape[-1], v.shape[-1], logits,
                        real, _precision(q.dtype))


def _breaks_transposed() -> bool:
    """Whether Triton makes wrong code of a product whose transpose is multiplied again: 3.4 to
    3.7.0 did, of tiles of 64 on Hopper.
    """
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return arch() == 90 and (version < (3, 7) or triton.__version__.startswith("3.7.0"))


@functools.cache
def _options_for(table: Table, family: str, kernel: str, dtype: torch.dtype, dk: int, dv: int,
                 logits: bool, real: bool, precision: str) -> dict[str, Any]:
    options = table.choose(kernel, dtype, *_shapes(dk, dv, real))

    def block(size: int, largest: int) -> int:
        return min(max(16, power_of_two(size)), largest)

    options |= dict(BK=block(dk, options["BK"]), BV=block(dv, options["BV"]))
    if "ROWS" in options:
        options["ROWS"] = min(options["ROWS"], options["C"])
    if kernel == "_gradients":
        options["UNTURNED"] = options["C"] == 64 and _breaks_transposed()
    return options | dict(
        LOGITS=logits, REAL=real, SUMS=tl.float64 if dtype == torch.float64 else tl.float32,
        DK=dk, DV=dv, LEVELS=options["C"].bit_length() - 1, PRECISION=precision)


def _chunk(q: Tensor, v: Tensor) -> int:
    """Returns the steps of a chunk, of all kernels alike."""
    return _options("_walk_states", q, v, False, False)["C"]


def _gate_parts(x: Tensor) -> Tensor:
    """Views gates (b, n, h), or logits of complex ones, as (b, n, h, parts)."""
    return as_parts(x) if x.ndim == 3 else x


def _state_parts(x: Tensor | None) -> tuple[Tensor | None, tuple[int, ...] | None]:
    """Returns the parts of a state, and their strides; None and None without a state."""
    return (None, None) if x is None else (as_parts(x), as_parts(x).stride())


def _walk_grid(b: int, h: int, options: dict[str, Any]) -> tuple[int]:
    """A program for each block of each head's state."""
    return (b * h * ceil_div(options["DK"], options["BK"])
            * ceil_div(options["DV"], options["BV"]),)


def _states(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, logits: bool,
            initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the state before every chunk and the last one, and a copy of the last."""
    (b, n, h, dk), dv = q.shape, v.shape[-1]
    real = gates.shape[-1] == 1
    dtype = (wide if real else wide_complex)(q.dtype)
    chunks = ceil_div(n, _chunk(q, v))
    states = q.new_empty(b, chunks + 1, h, dk, dv, dtype=dtype)
    last = q.new_empty(b, h, dk, dv, dtype=dtype)
    if b:
        options = _options("_walk_states", q, v, logits, real)
        launch(
            _walk_states, _walk_grid(b, h, options),
            *strided(k, v), gates, *gates.stride(), *_state_parts(initial_state), as_parts(states),
            as_parts(last), n, h, chunks, EVEN=evens(k, v), **options)
    return states, last


def forward(q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None, gate_logits: Tensor | None,
            initial_state: Tensor | None, carry_every: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out (b, n, h, dv), the last state (b, h, dk, dv) and carries (b, count, h, dk, dv):
    the states before every `carry_every`-th step and the last; none if it is 0.
    """
    (b, n, h, dk), dv = q.shape, v.shape[-1]
    logits = gates is None
    given: Any = gate_logits if logits else gates
    gates = _gate_parts(given)
    states, last = _states(q, k, v, gates, logits, initial_state)
    chunks = states.shape[1] - 1
    out = q.new_empty(b, n, h, dv)
    if b:
        options = _options("_outputs", q, v, logits, gates.shape[-1] == 1)
        grid = (b * h * chunks * ceil_div(dv, options["BV"]),)
        launch(
            _outputs, grid,
            *strided(q, k, v), gates, *gates.stride(), as_parts(states), out, n, h, chunks,
            EVEN=evens(q, k, v), **options)
    apart = carry_every // _chunk(q, v)
    if not carry_every:
        states = states.new_empty(b, 0, h, dk, dv)
    elif apart > 1:
        states = torch.cat([states[:, :chunks:apart], states[:, chunks:]], dim=1)
    return out, last, states


def backward(grad: Tensor, grad_state: Tensor, carries: Tensor, q: Tensor, k: Tensor, v: Tensor,
             gates: Tensor | None, gate_logits: Tensor | None, initial_state: Tensor | None,
             carry_every: int) -> tuple[Tensor | None, ...]:
    """Returns the gradients of forward's tensors, from those of its first two results and from its
    carries.
    """
    (b, n, h, dk), dv = q.shape, v.shape[-1]
    logits = gates is None
    gate_tensor: Any = gate_logits if logits else gates
    grad_q, grad_k, grad_v = (q.new_empty(t.shape) for t in (q, k, v))
    grad_gates = gate_tensor.new_empty(gate_tensor.shape)
    grad_initial = None if initial_state is None else carries.new_empty(b, h, dk, dv)
    if b:
        x = _gate_parts(gate_tensor)
        real = x.shape[-1] == 1
        if _chunk(q, v) == carry_every:
            states = carries.contiguous()
        else:
            states, _ = _states(q, k, v, x, logits, initial_state)
        chunks = states.shape[1] - 1
        adjoints = states.new_empty(b, chunks, h, dk, dv)
        options = _options("_walk_adjoints", q, v, logits, real)
        launch(
            _walk_adjoints, _walk_grid(b, h, options),
            *strided(q, grad), x, *x.stride(), *_state_parts(grad_state), as_parts(adjoints),
            None if grad_initial is None else as_parts(grad_initial), n, h, chunks,
            EVEN=evens(q, grad), **options)
        # The gradients of P and of W's last row, as far as they come from states.
        tree_grads = as_parts(states).new_empty(b, chunks, h, 2 * x.shape[-1], options["C"])
        grid, rows, evenness = (b * h * chunks,), strided(q, k, v, grad), evens(q, k, v, grad)
        launch(
            _gradients, grid,
            *rows, x, *x.stride(), as_parts(states), as_parts(adjoints), grad_q, grad_k, grad_v,
            tree_grads, n, h, chunks, EVEN=evenness, ROUNDED=gate_tensor.dtype == torch.bfloat16,
            **_options("_gradients", q, v, logits, real))
        launch(
            _gate_gradients, grid,
            *rows, x, *x.stride(), tree_grads, _gate_parts(grad_gates), n, h, chunks,
            EVEN=evenness, **_options("_gate_gradients", q, v, logits, real))
    return (grad_q, grad_k, grad_v, None if logits else grad_gates,
            grad_gates if logits else None, grad_initial)
