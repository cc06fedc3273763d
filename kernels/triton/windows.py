"""What windowed_sgu's kernels mix: tiles of the normed gate, by tiles of the weights' band.

A tile of the gate is (steps, CHANNELS) of a head, whose width is DIM.
"""

import triton
import triton.language as tl


@triton.jit
def window_place(runs, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCKS: tl.constexpr,
                 ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Returns the program's batch, run, head, first row of the run's windows, and channels.

    The last tiles come first. Heads are next to each other: whole rows of x are read at once.
    """
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    parts: tl.constexpr = (DIM + CHANNELS - 1) // CHANNELS
    channel = index % parts * CHANNELS + tl.arange(0, CHANNELS)
    index = index // parts
    head = index % HEADS
    index = index // HEADS
    row = index % BLOCKS * ROWS
    index = index // BLOCKS
    return index // runs, index % runs, head, row, channel


@triton.jit
def offsets(strides, batch, t, head, channel, DIM: tl.constexpr):
    """Returns offsets (steps, channels) into (b, n, c)."""
    return (batch.to(tl.int64) * strides[0] + t.to(tl.int64)[:, None] * strides[1]
            + (head * DIM + channel).to(tl.int64)[None, :] * strides[2])


@triton.jit
def load_affine(norm, head, channel, DIM: tl.constexpr):
    """Loads scale and shift of a head's channels, where norm = (mean, inverse, scale, shift) has
    them; they are None where it does not.
    """
    scale, shift = norm[2], norm[3]
    at = head * DIM + channel
    if scale is not None:
        scale = tl.load(scale + at, mask=channel < DIM, other=0).to(norm[0].dtype.element_ty)
    if shift is not None:
        shift = tl.load(shift + at, mask=channel < DIM, other=0).to(norm[0].dtype.element_ty)
    return scale, shift


@triton.jit
def normed(gate, strides, norm, affine, batch, t, known, head, channel, n, DIM: tl.constexpr):
    """Loads the normed gate (steps, channels); masked steps hold an arbitrary finite value."""
    x = tl.load(gate + offsets(strides, batch, t, head, channel, DIM), other=0,
                mask=known[:, None] & (channel < DIM)[None, :]).to(norm[0].dtype.element_ty)
    row = batch.to(tl.int64) * n + t
    x -= tl.load(norm[0] + row, mask=known, other=0)[:, None]
    x *= tl.load(norm[1] + row, mask=known, other=0)[:, None]
    if affine[0] is not None:
        x *= affine[0][None, :]
    if affine[1] is not None:
        x += affine[1][None, :]
    return x


@triton.jit
def load_band(weight, strides, head, row, step, used, WINDOW: tl.constexpr, MASKED: tl.constexpr):
    """Loads the weights (rows, steps) by which `row` mixes `step`, both counted from the window's
    start, and returns where they apply. A mask along the diagonal makes loads narrow, so that
    loads beside the diagonal are masked by it only with MASKED.
    """
    behind = row // WINDOW * WINDOW
    r = row % WINDOW
    j = (step + WINDOW)[None, :] - behind[:, None]
    below = j <= (r + WINDOW)[:, None]
    at = (head.to(tl.int64) * strides[0] + r.to(tl.int64)[:, None] * strides[1]
          + j.to(tl.int64) * strides[2])
    used = used & (j >= 0) & (below if MASKED else j < 2 * WINDOW)
    return tl.load(weight + at, mask=used, other=0), below


@triton.jit
def mix(band, x, mixed, ROUNDED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
        EXACT: tl.constexpr):
    """Adds band · x to `mixed`; with EXACT also what rounding x leaves out."""
    rounded = x.to(ROUNDED)
    mixed = tl.dot(band, rounded.to(OPERAND), mixed, input_precision=PRECISION,
                   out_dtype=mixed.dtype)
    if EXACT and ROUNDED != x.dtype:
        rest = (x - rounded.to(x.dtype)).to(ROUNDED)
        mixed = tl.dot(band, rest.to(OPERAND), mixed, input_precision=PRECISION,
                       out_dtype=mixed.dtype)
    return mixed
