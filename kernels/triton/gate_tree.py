"""Products of a chunk's gates, for gate_loop's kernels for heads.

W[s, r] = Π_{r < i ≤ s} a_i is a tree of products: the chunk is halved again and again, and from a
step r in a left half to a step s in its right half the gates multiply to (all after r in the left
half) times (all up to s in the right half). Nothing is divided, so a gate of 0 is exact.
"""

import triton
import triton.language as tl

from fastmix._triton.gate import activate
from fastmix._triton.matrices import chunk_steps
from fastmix._triton.number import filled, select, times


@triton.jit
def load_logits(gates, strides, b, first, h, C: tl.constexpr, n, REAL: tl.constexpr,
                SUMS: tl.constexpr, BACK: tl.constexpr = False):
    """Loads a chunk's gates or logits from (b, n, h, parts), and the mask of steps below n."""
    steps = chunk_steps(first, C, BACK)
    gates += b * strides[0] + h * strides[2] + steps * strides[1]
    re = tl.load(gates, mask=steps < n, other=0.0).to(SUMS)
    if REAL:
        return (re,), steps < n
    else:
        return (re, tl.load(gates + strides[3], mask=steps < n, other=0.0).to(SUMS)), steps < n


@triton.jit
def load_gates(gates, strides, b, first, h, C: tl.constexpr, n, LOGITS: tl.constexpr,
               REAL: tl.constexpr, SUMS: tl.constexpr, BACK: tl.constexpr = False):
    """Loads the gates of a chunk's steps; they are 1 beyond the last step."""
    a, inside = load_logits(gates, strides, b, first, h, C, n, REAL, SUMS, BACK)
    if LOGITS:
        a = activate(a[0], a[1])
    if REAL:
        return (tl.where(inside, a[0], 1.0),)
    else:
        return tl.where(inside, a[0], 1.0), tl.where(inside, a[1], 0.0)


@triton.jit
def gather(a, at):
    if len(a) == 1:
        return (tl.gather(a[0], at, 0),)
    else:
        return tl.gather(a[0], at, 0), tl.gather(a[1], at, 0)


@triton.jit
def double(before, after, all, steps, SIZE: tl.constexpr):
    """Turns products over blocks of SIZE into products over blocks of 2 SIZE: those up to each step
    of its block, those after it, and those of all of the block.
    """
    other = gather(all, steps ^ SIZE)
    right = (steps & SIZE) != 0
    before = select(right, times(before, other), before)
    after = select(right, after, times(after, other))
    return before, after, times(all, other)


@triton.jit
def block_sums(x, C: tl.constexpr, SIZE: tl.constexpr):
    """Returns at each step the sum of x (C,) over its block of SIZE."""
    x = tl.reshape(x, (C // SIZE, SIZE))
    return tl.reshape(tl.broadcast_to(tl.sum(x, 1)[:, None], x.shape), (C,))


@triton.jit
def part_of(x, part: tl.constexpr, ROWS: tl.constexpr):
    """Returns the part's ROWS of x (C,)."""
    if x.shape[0] == ROWS:
        return x
    else:
        return tl.gather(x, part * ROWS + tl.arange(0, ROWS), 0)


@triton.jit
def spread(x, part: tl.constexpr, C: tl.constexpr):
    """Places x (ROWS,) in its part of (C,), with 0 elsewhere."""
    ROWS: tl.constexpr = x.shape[0]
    if C == ROWS:
        return x
    else:
        steps = tl.arange(0, C)
        return tl.where(steps // ROWS == part, tl.gather(x, steps % ROWS, 0), 0.0)


@triton.jit
def _column(a):
    if len(a) == 1:
        return (a[0][:, None],)
    else:
        return a[0][:, None], a[1][:, None]


@triton.jit
def _row(a):
    if len(a) == 1:
        return (a[0][None, :],)
    else:
        return a[0][None, :], a[1][None, :]


@triton.jit
def tree(a, C: tl.constexpr, LEVELS: tl.constexpr):
    """Returns Re W[s, r] for r < s, else 0; Π_{i ≤ s} a_i; Π_{i > r} a_i; and Π a_i."""
    dtype: tl.constexpr = a[0].dtype
    steps = tl.arange(0, C)
    apart = steps[:, None] ^ steps[None, :]
    before, all = a, a
    after = filled(1.0, (C,), dtype, len(a) == 2)
    weights = tl.zeros((C, C), dtype)
    for level in tl.static_range(LEVELS):
        product = times(_column(before), _row(after))
        weights = tl.where(apart >= 1 << level, product[0], weights)
        before, after, all = double(before, after, all, steps, 1 << level)
    lower = steps[:, None] > steps[None, :]
    first = steps == 0
    weights = tl.where(lower, weights, 0.0)
    total = (tl.sum(tl.where(first, all[0], 0.0), 0),)
    if len(a) == 2:
        total = total[0], tl.sum(tl.where(first, all[1], 0.0), 0)
    return weights, before, after, total
