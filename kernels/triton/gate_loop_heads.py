"""gate_loop on a GPU for heads: matrix products over chunks of time.

With a chunk's entering state S, P_s = Π_{i ≤ s} a_i and W[s, r] = Π_{r < i ≤ s} a_i inside it:

    out = ((q kᵀ) ∘ Re W) v + Re P ∘ (q Re S) - Im P ∘ (q Im S)
    leaving state = P_last S + kᵀ (W[last] ∘ v)

A first kernel walks through time for the states between chunks; whatever else there is to do is
parallel over chunks. Gradients are the same the other way round: the adjoint states
G_t = q_t grad_tᵀ + conj(a_{t+1}) G_{t+1} are walked from the end, then every chunk is on its own.

W is a tree of products, in gate_tree.py; rows, states and products of matrices are in matrices.py.
"""

import torch
import triton
import triton.language as tl

from fastmix._triton.gate import activate_backward
from fastmix._triton.gate_tree import (
    block_sums, double, load_gates, load_logits, part_of, spread, times, tree)
from fastmix._triton.matrices import (
    dot, dot_sums, load_rows, load_state, load_strided_state, rounded, store_rows, store_state,
    sums_dot)
from fastmix._triton.scan import even, evens, strided
from fastmix._triton.target import arch, float32_precision, registers

# Gates are read one by one: to know what their strides are multiples of, which with few heads
# depends on n, would only make Triton compile twice.
RUNTIME = ["n", "heads", "chunks", "q_b", "k_b", "v_b", "grad_b", "g_b", "g_n", "g_h", "g_part"]


@triton.jit(do_not_specialize=RUNTIME)
def _walk_states(k, k_b, k_strides, v, v_b, v_strides, gates, g_b, g_n, g_h, g_part,
                 initial, initial_strides, states, last, n, heads, chunks,
                 EVEN: tl.constexpr, LOGITS: tl.constexpr, SUMS: tl.constexpr,
                 DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                 C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """states (b, chunks + 1, h, DK, DV): the state before every chunk and the last one."""
    k_strides = (even(k_b, EVEN[0]),) + k_strides
    v_strides = (even(v_b, EVEN[1]),) + v_strides
    gate_strides = g_b, g_n, g_h, g_part
    program = tl.program_id(0).to(tl.int64)
    column, row = program % tl.cdiv(DV, BV) * BV, program // tl.cdiv(DV, BV)
    row, head = row % tl.cdiv(DK, BK) * BK, row // tl.cdiv(DK, BK)
    b, h = head // heads, head % heads
    size: tl.constexpr = DK * DV * 2
    states += (b * (chunks + 1) * heads + h) * size
    if initial is not None:
        re, im = load_strided_state(initial, initial_strides, b, h, row, column, BK, BV, DK, DV)
    else:
        re, im = tl.zeros((BK, BV), SUMS), tl.zeros((BK, BV), SUMS)
    first = tl.full((), 0, tl.int64)
    store_state(states, re, im, row, column, BK, BV, DK, DV)
    for _ in range(chunks):
        keys = load_rows(k, k_strides, b, first, h, C, row, BK, n, DK)
        values = load_rows(v, v_strides, b, first, h, C, column, BV, n, DV).to(SUMS)
        a_re, a_im = load_gates(gates, gate_strides, b, first, h, C, n, LOGITS, SUMS)
        _, _, _, _, after_re, after_im, all_re, all_im = tree(a_re, a_im, a_re, a_im, C, LEVELS)
        re, im = times(re, im, all_re, all_im)
        keys = tl.trans(keys)
        re += dot_sums(keys, values * after_re[:, None], PRECISION, False)
        im += dot_sums(keys, values * after_im[:, None], PRECISION, False)
        first += C
        states += heads.to(tl.int64) * size
        store_state(states, re, im, row, column, BK, BV, DK, DV)
    store_state(last + head * size, re, im, row, column, BK, BV, DK, DV)


@triton.jit(do_not_specialize=RUNTIME)
def _outputs(q, q_b, q_strides, k, k_b, k_strides, v, v_b, v_strides, gates, g_b, g_n, g_h, g_part,
             states, out, n, heads, chunks, EVEN: tl.constexpr, LOGITS: tl.constexpr,
             SUMS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr,
             BV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    q_strides = (even(q_b, EVEN[0]),) + q_strides
    k_strides = (even(k_b, EVEN[1]),) + k_strides
    v_strides = (even(v_b, EVEN[2]),) + v_strides
    gate_strides = g_b, g_n, g_h, g_part
    program = tl.program_id(0).to(tl.int64)
    column, place = program % tl.cdiv(DV, BV) * BV, program // tl.cdiv(DV, BV)
    h, place = place % heads, place // heads
    chunk, b = place % chunks, place // chunks
    first = chunk * C
    states += ((b * (chunks + 1) + chunk) * heads + h) * (DK * DV * 2)
    scores = tl.zeros((C, C), SUMS)
    by_re, by_im = tl.zeros((C, BV), SUMS), tl.zeros((C, BV), SUMS)
    for row in range(0, DK, BK):
        queries = load_rows(q, q_strides, b, first, h, C, row, BK, n, DK)
        keys = load_rows(k, k_strides, b, first, h, C, row, BK, n, DK)
        re, im = load_state(states, row, column, BK, BV, DK, DV)
        scores += dot(queries, tl.trans(keys), PRECISION)
        by_re += dot_sums(queries, re, PRECISION, True)
        by_im += dot_sums(queries, im, PRECISION, True)
    a_re, a_im = load_gates(gates, gate_strides, b, first, h, C, n, LOGITS, SUMS)
    w_re, _, p_re, p_im, _, _, _, _ = tree(a_re, a_im, a_re, a_im, C, LEVELS)
    steps = tl.arange(0, C)
    scores *= tl.where(steps[:, None] == steps[None, :], 1.0, w_re)
    values = load_rows(v, v_strides, b, first, h, C, column, BV, n, DV)
    sums = p_re[:, None] * by_re - p_im[:, None] * by_im
    sums += sums_dot(rounded(scores, v), values, PRECISION)
    store_rows(out, sums, b, first, h, heads, C, column, BV, n, DV)


@triton.jit(do_not_specialize=RUNTIME)
def _walk_adjoints(q, q_b, q_strides, grad, grad_b, grad_strides, gates, g_b, g_n, g_h, g_part,
                   final, final_strides, adjoints, entry, n, heads, chunks,
                   EVEN: tl.constexpr, LOGITS: tl.constexpr, SUMS: tl.constexpr,
                   DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                   C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """adjoints (b, chunks, h, DK, DV): the gradient of the state after every chunk.

    entry, where it is asked for, is that of the initial state. Steps are taken from a chunk's
    last one on: what has faded most is added up first.
    """
    q_strides = (even(q_b, EVEN[0]),) + q_strides
    grad_strides = (even(grad_b, EVEN[1]),) + grad_strides
    gate_strides = g_b, g_n, g_h, g_part
    program = tl.program_id(0).to(tl.int64)
    column, row = program % tl.cdiv(DV, BV) * BV, program // tl.cdiv(DV, BV)
    row, head = row % tl.cdiv(DK, BK) * BK, row // tl.cdiv(DK, BK)
    b, h = head // heads, head % heads
    size: tl.constexpr = DK * DV * 2
    adjoints += ((b + 1) * chunks * heads + h) * size
    re, im = load_strided_state(final, final_strides, b, h, row, column, BK, BV, DK, DV)
    first = chunks.to(tl.int64) * C
    for _ in range(chunks):
        first -= C
        adjoints -= heads.to(tl.int64) * size
        store_state(adjoints, re, im, row, column, BK, BV, DK, DV)
        queries = load_rows(q, q_strides, b, first, h, C, row, BK, n, DK, True)
        grads = load_rows(grad, grad_strides, b, first, h, C, column, BV, n, DV, True).to(SUMS)
        a_re, a_im = load_gates(gates, gate_strides, b, first, h, C, n, LOGITS, SUMS, True)
        _, _, _, _, p_re, p_im, all_re, all_im = tree(a_re, a_im, a_re, a_im, C, LEVELS)
        p_re, p_im = times(p_re, p_im, a_re, a_im)
        re, im = times(re, im, all_re, -all_im)
        queries = tl.trans(queries)
        re += dot_sums(queries, grads * p_re[:, None], PRECISION, False)
        im -= dot_sums(queries, grads * p_im[:, None], PRECISION, False)
    if entry is not None:
        store_state(entry + head * size, re, im, row, column, BK, BV, DK, DV)


@triton.jit
def _scores(x, x_strides, y, y_strides, b, at, first, h, ROWS: tl.constexpr, C: tl.constexpr,
            BLOCK: tl.constexpr, n, WIDTH: tl.constexpr, SUMS: tl.constexpr,
            PRECISION: tl.constexpr):
    """x_s · y_r for ROWS steps s from `at` on and the chunk's steps r."""
    scores = tl.zeros((ROWS, C), SUMS)
    for channel in range(0, WIDTH, BLOCK):
        left = load_rows(x, x_strides, b, at, h, ROWS, channel, BLOCK, n, WIDTH)
        right = load_rows(y, y_strides, b, first, h, C, channel, BLOCK, n, WIDTH)
        scores += dot(left, tl.trans(right), PRECISION)
    return scores


@triton.jit(do_not_specialize=RUNTIME)
def _gradients(q, q_b, q_strides, k, k_b, k_strides, v, v_b, v_strides, grad, grad_b, grad_strides,
               gates, g_b, g_n, g_h, g_part, states, adjoints, grad_q, grad_k, grad_v, asked,
               n, heads, chunks, EVEN: tl.constexpr, LOGITS: tl.constexpr, SUMS: tl.constexpr,
               ROUNDED: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr,
               BV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """Gradients of q, k and v over a chunk.

    asked (b, chunks, h, 4, C): what its states ask of P and of W's last row. ROUNDED where
    bfloat16 is all the gates' gradients are good for.
    """
    q_strides = (even(q_b, EVEN[0]),) + q_strides
    k_strides = (even(k_b, EVEN[1]),) + k_strides
    v_strides = (even(v_b, EVEN[2]),) + v_strides
    grad_strides = (even(grad_b, EVEN[3]),) + grad_strides
    gate_strides = g_b, g_n, g_h, g_part
    program = tl.program_id(0).to(tl.int64)
    h, place = program % heads, program // heads
    chunk, b = place % chunks, place // chunks
    first = chunk * C
    states += ((b * (chunks + 1) + chunk) * heads + h) * (DK * DV * 2)
    adjoints += program * (DK * DV * 2)
    steps = tl.arange(0, C)
    a_re, a_im = load_gates(gates, gate_strides, b, first, h, C, n, LOGITS, SUMS)
    w_re, _, p_re, p_im, after_re, after_im, _, _ = tree(a_re, a_im, a_re, a_im, C, LEVELS)
    w_re = tl.where(steps[:, None] == steps[None, :], 1.0, w_re)

    weights = _scores(q, q_strides, k, k_strides, b, first, first, h, C, C, BK, n, DK, SUMS,
                      PRECISION)
    weights = rounded(tl.trans(weights * w_re), grad)
    for column in range(0, DV, BV):
        grads = load_rows(grad, grad_strides, b, first, h, C, column, BV, n, DV)
        dv = sums_dot(weights, grads, PRECISION)
        for row in range(0, DK, BK):
            keys = load_rows(k, k_strides, b, first, h, C, row, BK, n, DK)
            re, im = load_state(adjoints, row, column, BK, BV, DK, DV)
            dv += after_re[:, None] * dot_sums(keys, re, PRECISION, True)
            dv += after_im[:, None] * dot_sums(keys, im, PRECISION, True)
        store_rows(grad_v, dv, b, first, h, heads, C, column, BV, n, DV)

    weights = _scores(grad, grad_strides, v, v_strides, b, first, first, h, C, C, BV, n, DV, SUMS,
                      PRECISION)
    weights = rounded(weights * w_re, grad)
    dp_re, dp_im = tl.zeros((C,), SUMS), tl.zeros((C,), SUMS)
    dw_re, dw_im = tl.zeros((C,), SUMS), tl.zeros((C,), SUMS)
    all_re, all_im = tl.zeros((BK,), SUMS), tl.zeros((BK,), SUMS)
    for row in range(0, DK, BK):
        by_re, by_im = tl.zeros((C, BK), SUMS), tl.zeros((C, BK), SUMS)
        on_re, on_im = tl.zeros((C, BK), SUMS), tl.zeros((C, BK), SUMS)
        for column in range(0, DV, BV):
            values = load_rows(v, v_strides, b, first, h, C, column, BV, n, DV)
            grads = load_rows(grad, grad_strides, b, first, h, C, column, BV, n, DV)
            re, im = load_state(states, row, column, BK, BV, DK, DV)
            g_re, g_im = load_state(adjoints, row, column, BK, BV, DK, DV)
            all_re += tl.sum(g_re * re + g_im * im, 1)
            all_im += tl.sum(g_im * re - g_re * im, 1)
            by_re += dot_sums(grads, tl.trans(re), PRECISION, ROUNDED)
            by_im += dot_sums(grads, tl.trans(im), PRECISION, ROUNDED)
            on_re += dot_sums(values, tl.trans(g_re), PRECISION, ROUNDED)
            on_im += dot_sums(values, tl.trans(g_im), PRECISION, ROUNDED)
        queries = load_rows(q, q_strides, b, first, h, C, row, BK, n, DK)
        keys = load_rows(k, k_strides, b, first, h, C, row, BK, n, DK)
        dq = p_re[:, None] * by_re - p_im[:, None] * by_im + sums_dot(weights, keys, PRECISION)
        store_rows(grad_q, dq, b, first, h, heads, C, row, BK, n, DK)
        dk = after_re[:, None] * on_re + after_im[:, None] * on_im
        dk += sums_dot(tl.trans(weights), queries, PRECISION)
        store_rows(grad_k, dk, b, first, h, heads, C, row, BK, n, DK)
        dp_re += tl.sum(queries.to(SUMS) * by_re, 1)
        dp_im -= tl.sum(queries.to(SUMS) * by_im, 1)
        dw_re += tl.sum(keys.to(SUMS) * on_re, 1)
        dw_im += tl.sum(keys.to(SUMS) * on_im, 1)
    # The leaving state asks for all gates' product, which is P at the last step.
    dp_re += tl.where(steps == C - 1, tl.sum(all_re, 0), 0.0)
    dp_im += tl.where(steps == C - 1, tl.sum(all_im, 0), 0.0)
    asked += program * (4 * C) + steps
    tl.store(asked, dp_re)
    tl.store(asked + C, dp_im)
    tl.store(asked + 2 * C, dw_re)
    tl.store(asked + 3 * C, dw_im)


@triton.jit(do_not_specialize=RUNTIME)
def _gate_gradients(q, q_b, q_strides, k, k_b, k_strides, v, v_b, v_strides, grad, grad_b,
                    grad_strides, gates, g_b, g_n, g_h, g_part, asked, grad_gates, n, heads, chunks,
                    EVEN: tl.constexpr, LOGITS: tl.constexpr, SUMS: tl.constexpr, DK: tl.constexpr,
                    DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
                    ROWS: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """Gradients of the gates over a chunk: of its tree of products, whose gradients are known.

    W's is the product of both scores. At every level of the tree it splits into what is asked
    of the products after each step of a left half and of those up to each step of a right half.
    """
    q_strides = (even(q_b, EVEN[0]),) + q_strides
    k_strides = (even(k_b, EVEN[1]),) + k_strides
    v_strides = (even(v_b, EVEN[2]),) + v_strides
    grad_strides = (even(grad_b, EVEN[3]),) + grad_strides
    gate_strides = g_b, g_n, g_h, g_part
    program = tl.program_id(0).to(tl.int64)
    h, place = program % heads, program // heads
    chunk, b = place % chunks, place // chunks
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
    a_re, a_im = load_gates(gates, gate_strides, b, first, h, C, n, LOGITS, SUMS)
    before_re, before_im, all_re, all_im = a_re, a_im, a_re, a_im
    after_re, after_im = tl.full((C,), 1.0, SUMS), tl.zeros((C,), SUMS)
    nodes = ()
    for level in tl.static_range(LEVELS):
        nodes = nodes + ((before_re, before_im, after_re, after_im, all_re, all_im),)
        before_re, before_im, after_re, after_im, all_re, all_im = double(
            before_re, before_im, after_re, after_im, all_re, all_im, steps, 1 << level)

    # Its gradient, from the root down.
    asked += program * (4 * C) + steps
    before_re, before_im = tl.load(asked), tl.load(asked + C)
    after_re, after_im = tl.load(asked + 2 * C), tl.load(asked + 3 * C)
    all_re, all_im = tl.zeros((C,), SUMS), tl.zeros((C,), SUMS)
    for level in tl.static_range(LEVELS - 1, -1, -1):
        p_re, p_im, e_re, e_im, t_re, t_im = nodes[level]
        right = (steps & (1 << level)) != 0
        sibling = steps ^ (1 << level)
        t_re, t_im = tl.gather(t_re, sibling, 0), tl.gather(t_im, sibling, 0)
        re, im = times(tl.where(right, before_re, after_re), tl.where(right, before_im, after_im),
                       tl.where(right, p_re, e_re), -tl.where(right, p_im, e_im))
        all_re, all_im = times(all_re, all_im, t_re, -t_im)
        all_re += tl.gather(block_sums(re, C, 1 << level), sibling, 0)
        all_im += tl.gather(block_sums(im, C, 1 << level), sibling, 0)
        re, im = times(before_re, before_im, t_re, -t_im)
        before_re, before_im = tl.where(right, re, before_re), tl.where(right, im, before_im)
        re, im = times(after_re, after_im, t_re, -t_im)
        after_re, after_im = tl.where(right, after_re, re), tl.where(right, after_im, im)
        for part in tl.static_range(C // ROWS):
            rows = part * ROWS + tl.arange(0, ROWS)
            between = tl.where(((rows[:, None] ^ steps[None, :]) >> level) == 1, parts[part], 0.0)
            before_re += spread(tl.sum(between * e_re[None, :], 1), part, C)
            before_im -= spread(tl.sum(between * e_im[None, :], 1), part, C)
            after_re += tl.sum(between * part_of(p_re, part, ROWS)[:, None], 0)
            after_im -= tl.sum(between * part_of(p_im, part, ROWS)[:, None], 0)
    re, im = before_re + all_re, before_im + all_im
    if LOGITS:
        z_re, z_im, _ = load_logits(gates, gate_strides, b, first, h, C, n, SUMS)
        re, im = activate_backward(re, im, z_re, z_im)
    kind = grad_gates.dtype.element_ty
    grad_gates += ((b * n + first + steps) * heads + h) * 2
    tl.store(grad_gates, re.to(kind), mask=first + steps < n)
    tl.store(grad_gates + 1, im.to(kind), mask=first + steps < n)


# ---- launchers


def _precision(dtype):
    """How products with float32 operands are formed."""
    if dtype == torch.float64 or not arch():
        return "ieee"
    if dtype == torch.float32:
        return float32_precision()
    return "tf32x3"  # exact for the 16-bit side, as good as float32 for the other


def _lopsided(q, v):
    """Whether one of dk and dv takes many more blocks than the other: such loops spill sooner."""
    small, large = sorted((q.shape[-1], v.shape[-1]))
    return large > 2 * max(16, small)


def _chunk(q, v):
    """Steps per chunk: 64, fewer where products are not all for tensor cores of bfloat16, or
    those spread 64 steps over too few registers. States are out of float16's range."""
    if q.dtype == torch.float64 or q.dtype == torch.float16 and _lopsided(q, v):
        return 16
    roomy = arch() in (0, 90, 100, 101, 103) and not _lopsided(q, v)
    return 64 if q.dtype == torch.bfloat16 and roomy else 32


def _options(q, v, logits, width=32, **others):
    """What every kernel is compiled for; blocks of v are at most `width` wide."""
    dk, dv, c = q.shape[-1], v.shape[-1], _chunk(q, v)
    most, warps = c, 4 if arch() in (0, 90) else 8
    if _lopsided(q, v) and q.dtype != torch.float64:
        most, warps, others = 16, 8, registers(255) | others

    def block(size, largest):
        return min(max(16, triton.next_power_of_2(size)), largest)

    return dict(LOGITS=logits, SUMS=tl.float64 if q.dtype == torch.float64 else tl.float32,
                DK=dk, DV=dv, BK=block(dk, most), BV=block(dv, min(most, width)), C=c,
                LEVELS=c.bit_length() - 1, PRECISION=_precision(q.dtype),
                num_warps=warps, **others)


def _narrow(options, dtype, oldest):
    """With fewer rows of a state at once, where bfloat16 and all of them would spill."""
    narrow = dtype == torch.bfloat16 and oldest <= arch() < 100
    return dict(options, BK=min(options["BK"], options["C"] // 2 if narrow else 64))


def _real(x):
    """Complex x → (…, 2), a view."""
    return None if x is None else torch.view_as_real(x.resolve_conj())


def _state(x):
    """A complex state and its strides."""
    return (None, None) if x is None else (_real(x), _real(x).stride())


def _walk_grid(b, h, options):
    return (b * h * triton.cdiv(options["DK"], options["BK"])
            * triton.cdiv(options["DV"], options["BV"]),)


def _states(q, k, v, gates, logits, initial_state):
    """The state before every chunk and the last one, which also comes as a copy."""
    (b, n, h, dk), dv = q.shape, v.shape[-1]
    wide = torch.promote_types(q.dtype, torch.float32)
    chunks = triton.cdiv(n, _chunk(q, v))
    states = q.new_empty(b, chunks + 1, h, dk, dv, 2, dtype=wide)
    last = q.new_empty(b, h, dk, dv, 2, dtype=wide)
    if b:
        options = _options(q, v, logits)
        small = options["BK"] * options["BV"] == 256
        if q.dtype == torch.float64 or arch() < 90 and not small:
            options |= registers(255)
        _walk_states[_walk_grid(b, h, options)](
            *strided(k, v), gates, *gates.stride(), *_state(initial_state), states, last,
            n, h, chunks, EVEN=evens(k, v), **options)
    return states, last


def forward(q, k, v, gates, gate_logits, initial_state, carry_every):
    (b, n, h, dk), dv = q.shape, v.shape[-1]
    logits = gates is None
    gates = gate_logits if logits else _real(gates)
    states, last = _states(q, k, v, gates, logits, initial_state)
    chunks = states.shape[1] - 1
    out = q.new_empty(b, n, h, dv)
    if b:
        options = _options(q, v, logits, width=64)
        grid = (b * h * chunks * triton.cdiv(dv, options["BV"]),)
        _outputs[grid](*strided(q, k, v), gates, *gates.stride(), states, out, n, h, chunks,
                       EVEN=evens(q, k, v), num_stages=2, **_narrow(options, q.dtype, 90))
    apart = carry_every // _chunk(q, v)
    if not carry_every:
        states = states.new_empty(b, 0, h, dk, dv, 2)
    elif apart > 1:
        states = torch.cat([states[:, :chunks:apart], states[:, chunks:]], dim=1)
    return out, torch.view_as_complex(last), torch.view_as_complex(states)


def backward(grad, grad_state, carries, q, k, v, gates, gate_logits, initial_state, carry_every):
    (b, n, h, dk), dv = q.shape, v.shape[-1]
    logits = gates is None
    given = gate_logits if logits else gates
    grad_q, grad_k, grad_v = (q.new_empty(t.shape) for t in (q, k, v))
    grad_gates = given.new_empty(given.shape)
    grad_initial = None if initial_state is None else carries.new_empty(b, h, dk, dv)
    if b:
        gates = given if logits else _real(gates)
        if _chunk(q, v) == carry_every:
            states = _real(carries.contiguous())
        else:
            states, _ = _states(q, k, v, gates, logits, initial_state)
        chunks = states.shape[1] - 1
        adjoints = states.new_empty(b, chunks, h, dk, dv, 2)
        options = _options(q, v, logits)
        if q.dtype in (torch.float32, torch.float16) and arch():
            options["num_warps"] = 8  # in four it spills on CUDA 9
        _walk_adjoints[_walk_grid(b, h, options)](
            *strided(q, grad), gates, *gates.stride(), *_state(grad_state), adjoints,
            _real(grad_initial), n, h, chunks, EVEN=evens(q, grad), **options)
        asked = states.new_empty(b, chunks, h, 4, options["C"])
        rows, alike = strided(q, k, v, grad), evens(q, k, v, grad)
        options = _options(q, v, logits, num_stages=1)
        # A wave on AMD has as many registers in a program of four as there are in eight.
        options["num_warps"] = 8 if arch() else 4
        narrow = _narrow(options, q.dtype, 80)
        if q.dtype == torch.float32 and arch() == 90 and max(dk, dv) > 64:
            narrow |= registers(168)
        if q.dtype == torch.float16:
            narrow["BK"] = 16
        if q.dtype == torch.float64 and arch():
            narrow["num_stages"] = 2  # loaded to shared memory, past registers
        _gradients[(b * h * chunks,)](
            *rows, gates, *gates.stride(), states, adjoints, grad_q, grad_k, grad_v, asked,
            n, h, chunks, EVEN=alike, ROUNDED=logits and given.dtype == torch.bfloat16, **narrow)
        if q.dtype == torch.float64:
            older = 0 < arch() < 90
            options |= dict(num_warps=1) if older else dict(num_warps=4, num_stages=2)
        options["ROWS"] = min(options["C"], 32) if arch() else options["C"]
        _gate_gradients[(b * h * chunks,)](
            *rows, gates, *gates.stride(), asked, grad_gates if logits else _real(grad_gates),
            n, h, chunks, EVEN=alike, **options)
    return (grad_q, grad_k, grad_v, None if logits else grad_gates,
            grad_gates if logits else None, grad_initial)
