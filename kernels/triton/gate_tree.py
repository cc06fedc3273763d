"""Products of a chunk's gates, for gate_loop's kernels for heads.

W[s, r] = Π_{r < i ≤ s} a_i is a tree of products: the chunk is halved again and again, and from a
step r in a left half to a step s in its right half the gates multiply to (all after r in the left
half) times (all up to s in the right half). Nothing is divided, so a gate of 0 is exact.
"""

import triton
import triton.language as tl

from fastmix._triton.gate import activate
from fastmix._triton.matrices import chunk_steps


@triton.jit
def times(a_re, a_im, b_re, b_im):
    return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re


@triton.jit
def load_logits(gates, strides, b, first, h, C: tl.constexpr, n, SUMS: tl.constexpr,
                BACK: tl.constexpr = False):
    """What stands in (b, n, h, 2) for the steps of a chunk, and which steps there are."""
    steps = chunk_steps(first, C, BACK)
    gates += b * strides[0] + h * strides[2] + steps * strides[1]
    return (tl.load(gates, mask=steps < n, other=0.0).to(SUMS),
            tl.load(gates + strides[3], mask=steps < n, other=0.0).to(SUMS), steps < n)


@triton.jit
def load_gates(gates, strides, b, first, h, C: tl.constexpr, n, LOGITS: tl.constexpr,
               SUMS: tl.constexpr, BACK: tl.constexpr = False):
    """a for the steps of a chunk, 1 after the last."""
    re, im, inside = load_logits(gates, strides, b, first, h, C, n, SUMS, BACK)
    if LOGITS:
        re, im = activate(re, im)
    return tl.where(inside, re, 1.0), tl.where(inside, im, 0.0)


@triton.jit
def double(before_re, before_im, after_re, after_im, all_re, all_im, steps, SIZE: tl.constexpr):
    """Products before and after each step within its block of SIZE, and of all of it: of 2 SIZE."""
    other_re = tl.gather(all_re, steps ^ SIZE, 0)
    other_im = tl.gather(all_im, steps ^ SIZE, 0)
    right = (steps & SIZE) != 0
    re, im = times(before_re, before_im, other_re, other_im)
    before_re, before_im = tl.where(right, re, before_re), tl.where(right, im, before_im)
    re, im = times(after_re, after_im, other_re, other_im)
    after_re, after_im = tl.where(right, after_re, re), tl.where(right, after_im, im)
    all_re, all_im = times(all_re, all_im, other_re, other_im)
    return before_re, before_im, after_re, after_im, all_re, all_im


@triton.jit
def block_sums(x, C: tl.constexpr, SIZE: tl.constexpr):
    """At each step the sum of x (C,) over its block of SIZE."""
    x = tl.reshape(x, (C // SIZE, SIZE))
    return tl.reshape(tl.broadcast_to(tl.sum(x, 1)[:, None], x.shape), (C,))


@triton.jit
def part_of(x, part: tl.constexpr, ROWS: tl.constexpr):
    """The part's ROWS of x (C,)."""
    if x.shape[0] == ROWS:
        return x
    else:
        return tl.gather(x, part * ROWS + tl.arange(0, ROWS), 0)


@triton.jit
def spread(x, part: tl.constexpr, C: tl.constexpr):
    """x (ROWS,) in its part of (C,), 0 elsewhere."""
    ROWS: tl.constexpr = x.shape[0]
    if C == ROWS:
        return x
    else:
        steps = tl.arange(0, C)
        return tl.where(steps // ROWS == part, tl.gather(x, steps % ROWS, 0), 0.0)


@triton.jit
def tree(start_re, start_im, a_re, a_im, C: tl.constexpr, LEVELS: tl.constexpr):
    """W[s, r] = start_s Π_{r < i < s} a_i for r < s, else 0; start_s Π_{i < s} a_i;
    Π_{i > r} a_i; and Π a_i."""
    steps = tl.arange(0, C)
    apart = steps[:, None] ^ steps[None, :]
    before_re, before_im = start_re, start_im
    after_re, after_im = tl.full((C,), 1.0, a_re.dtype), tl.zeros((C,), a_re.dtype)
    all_re, all_im = a_re, a_im
    w_re, w_im = tl.zeros((C, C), a_re.dtype), tl.zeros((C, C), a_re.dtype)
    for level in tl.static_range(LEVELS):
        re, im = times(before_re[:, None], before_im[:, None],
                       after_re[None, :], after_im[None, :])
        w_re = tl.where(apart >= 1 << level, re, w_re)
        w_im = tl.where(apart >= 1 << level, im, w_im)
        before_re, before_im, after_re, after_im, all_re, all_im = double(
            before_re, before_im, after_re, after_im, all_re, all_im, steps, 1 << level)
    lower = steps[:, None] > steps[None, :]
    first = steps == 0
    return (tl.where(lower, w_re, 0.0), tl.where(lower, w_im, 0.0),
            before_re, before_im, after_re, after_im,
            tl.sum(tl.where(first, all_re, 0.0), 0), tl.sum(tl.where(first, all_im, 0.0), 0))
