"""What gate_loop's kernels for heads multiply: rows of data, states, and their products.

A chunk's rows are (C, BLOCK) of a tensor (b, n, h, width); a state is (BK, BV) numbers, as in
number.py. Data are in the dtype of q, k and v, sums in float32 or float64.
"""

import triton
import triton.language as tl

from fastmix._triton import target

# The interpreter has no products of bfloat16.
INTERPRETED = tl.constexpr(target.INTERPRETED)


# ---- products of matrices


@triton.jit
def dot(x, y, PRECISION: tl.constexpr):
    if INTERPRETED and x.dtype == tl.bfloat16:
        x, y = x.to(tl.float32), y.to(tl.float32)
    if x.dtype == tl.float64:
        return tl.dot(x, y, out_dtype=tl.float64)
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def _thirds(x):
    """Splits float32 into a sum of three bfloat16."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def dot_sums(x, y, PRECISION: tl.constexpr, ROUNDED: tl.constexpr):
    """Multiplies data x by sums y in y's accuracy; ROUNDED rounds y to bfloat16 first."""
    if x.dtype == tl.bfloat16:
        if ROUNDED:
            return dot(x, y.to(tl.bfloat16), PRECISION)
        high, middle, low = _thirds(y)
        return dot(x, low, PRECISION) + dot(x, middle, PRECISION) + dot(x, high, PRECISION)
    return dot(x.to(y.dtype), y, PRECISION)


@triton.jit
def add_dots(sums, x, y, PRECISION: tl.constexpr, ROUNDED: tl.constexpr,
             TRANSPOSED: tl.constexpr = False):
    """Adds to `sums` the product of data x and numbers y, or yᵀ if TRANSPOSED."""
    re = tl.trans(y[0]) if TRANSPOSED else y[0]
    re = sums[0] + dot_sums(x, re, PRECISION, ROUNDED)
    if len(sums) == 1:
        return (re,)
    else:
        im = tl.trans(y[1]) if TRANSPOSED else y[1]
        return re, sums[1] + dot_sums(x, im, PRECISION, ROUNDED)


@triton.jit
def rounded(x, data):
    """Returns x as an operand beside `data`: in bfloat16 where that points to bfloat16."""
    return x.to(tl.bfloat16) if data.dtype.element_ty == tl.bfloat16 else x


@triton.jit
def sums_dot(x, y, PRECISION: tl.constexpr):
    """Multiplies x, as `rounded` returns it, by data y."""
    return dot(x, y.to(x.dtype), PRECISION)


# ---- loads and stores


@triton.jit
def chunk_steps(first, C: tl.constexpr, BACK: tl.constexpr):
    """Returns a chunk's steps, with BACK from the last one to the first."""
    steps = tl.arange(0, C)
    return first + (C - 1 - steps if BACK else steps)


@triton.jit
def _rows(x, strides, b, first, h, C: tl.constexpr, at, BLOCK: tl.constexpr, n, WIDTH,
          BACK: tl.constexpr = False):
    """Returns pointers to a chunk's steps and to BLOCK channels, from `at` on, of x (b, n, h,
    WIDTH), and which of them exist.
    """
    steps = chunk_steps(first, C, BACK)
    channels = at + tl.arange(0, BLOCK).to(tl.int64)
    x += b * strides[0] + h * strides[2]
    return (x + steps[:, None] * strides[1] + channels[None, :] * strides[3],
            (steps < n)[:, None] & (channels < WIDTH)[None, :])


@triton.jit
def load_rows(x, strides, b, first, h, C: tl.constexpr, at, BLOCK: tl.constexpr, n, WIDTH,
              BACK: tl.constexpr = False):
    pointers, inside = _rows(x, strides, b, first, h, C, at, BLOCK, n, WIDTH, BACK)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_rows(x, values, b, first, h, heads, C: tl.constexpr, at, BLOCK: tl.constexpr, n,
               WIDTH):
    """Stores values in a contiguous x (b, n, h, WIDTH)."""
    strides = (n.to(tl.int64) * heads * WIDTH, heads.to(tl.int64) * WIDTH, WIDTH, 1)
    pointers, inside = _rows(x, strides, b, first, h, C, at, BLOCK, n, WIDTH)
    tl.store(pointers, values.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _block(state, row, column, BK: tl.constexpr, BV: tl.constexpr, DK: tl.constexpr,
           DV: tl.constexpr, PARTS: tl.constexpr):
    """Returns pointers (BK, PARTS BV) into a contiguous state (DK, DV), and which exist."""
    rows, columns = row + tl.arange(0, BK), PARTS * column + tl.arange(0, PARTS * BV)
    return (state + rows[:, None] * (PARTS * DV) + columns[None, :],
            (rows < DK)[:, None] & (columns < PARTS * DV)[None, :])


@triton.jit
def load_state(state, row, column, BK: tl.constexpr, BV: tl.constexpr, DK: tl.constexpr,
               DV: tl.constexpr, REAL: tl.constexpr):
    pointers, inside = _block(state, row, column, BK, BV, DK, DV, 1 if REAL else 2)
    numbers = tl.load(pointers, mask=inside, other=0.0)
    if REAL:
        return (numbers,)
    else:
        return tl.split(tl.reshape(numbers, (BK, BV, 2)))


@triton.jit
def store_state(state, numbers, row, column, BK: tl.constexpr, BV: tl.constexpr,
                DK: tl.constexpr, DV: tl.constexpr):
    pointers, inside = _block(state, row, column, BK, BV, DK, DV, len(numbers))
    if len(numbers) == 1:
        tl.store(pointers, numbers[0], mask=inside)
    else:
        tl.store(pointers, tl.reshape(tl.join(numbers[0], numbers[1]), (BK, 2 * BV)), mask=inside)


@triton.jit
def load_strided_state(state, strides, b, h, row, column, BK: tl.constexpr, BV: tl.constexpr,
                       DK: tl.constexpr, DV: tl.constexpr, REAL: tl.constexpr):
    """Loads a block of a state (b, h, DK, DV, parts) of any strides."""
    rows = row + tl.arange(0, BK).to(tl.int64)
    columns = column + tl.arange(0, BV).to(tl.int64)
    inside = (rows < DK)[:, None] & (columns < DV)[None, :]
    state += b * strides[0] + h * strides[1]
    state += rows[:, None] * strides[2] + columns[None, :] * strides[3]
    re = tl.load(state, mask=inside, other=0.0)
    if REAL:
        return (re,)
    else:
        return re, tl.load(state + strides[4], mask=inside, other=0.0)
