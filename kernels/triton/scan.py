"""What the kernels that walk along time share.

A program holds a tile of time: RUNS runs of ROWS steps each, COLS channels. A thread walks
the ROWS steps of its runs in registers; what a run does to the state it is entered with is
h → a·h + x, and `entering` finds the states from those maps.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from fastmix._triton.layout import ceil_div, power_of_two
from fastmix._triton.target import ANY, Row, Table

LAUNCH = Table(
    # A tile is for decay_conv and cumulative_mean: `numbers` of a step to a thread, which holds as
    # many rows of them as their own tables say. `enough` channels of all sequences fill the GPU.
    Row("tile", ANY, ANY, ANY, dict(RUNS=32, COLS=32, numbers=4, enough=32768),
        "threads lie along time too: the fewer channels to a program, the more programs. Channels "
        "are enough for two programs of 128 on every multiprocessor"),
    Row("tile", ANY, ANY, "many-channels", dict(RUNS=4, COLS=128),
        "a warp reads whole rows of 128 channels, and warps lie along time"),
    Row("segments", ANY, ANY, ANY, dict(enough=96, wanted=256, most=64),
        "with a program on three multiprocessors of four, cutting would cost more than it gains: "
        "each segment is read once more. Else two on each; segments are entered one by one"),
)


def tile(channels: int, batch: int, dtype: torch.dtype, tile_bytes: int) -> dict[str, Any]:
    """Returns block sizes, of threads that hold `tile_bytes` of a tensor's tile each."""
    sizes = LAUNCH.choose("tile", dtype)
    if batch * channels >= sizes["enough"]:
        sizes = LAUNCH.choose("tile", dtype, "many-channels")
    else:
        sizes["COLS"] = min(sizes["COLS"], power_of_two(channels))
    numbers = sizes.pop("numbers")
    del sizes["enough"]
    return sizes | dict(ROWS=tile_bytes // (numbers * dtype.itemsize),
                        num_warps=max(sizes["RUNS"] * sizes["COLS"] // (32 * numbers), 1))


def segments(n: int, programs: int, steps: int, dtype: torch.dtype) -> tuple[int, int]:
    """Returns how many segments time is cut into, and how long they are: a multiple of `steps`.

    One where the programs fill the GPU. Else every segment is read once more, for what it
    does to the state it is entered with.
    """
    cut = LAUNCH.choose("segments", dtype)
    wanted = 1 if programs >= cut["enough"] else min(cut["most"],
                                                      cut["wanted"] // max(programs, 1))
    length = steps * ceil_div(n, steps * wanted)
    return ceil_div(n, length), length


@triton.jit
def segment_place(blocks, segments):
    """Returns the program's batch, its piece of time and its block of channels."""
    program = tl.program_id(0)
    return (program // (blocks * segments)).to(tl.int64), program // blocks % segments, \
        program % blocks


@triton.jit
def load_rows(pointers, stride, left, inside, ROWS: tl.constexpr):
    """Loads ROWS tiles (RUNS, COLS), one per step of a run; 0 where a run has fewer steps left."""
    rows = ()
    for r in tl.static_range(ROWS):
        rows += (tl.load(pointers, mask=(r < left) & inside, other=0),)
        pointers += stride
    return rows


@triton.jit
def power(a, exponent, BITS: tl.constexpr):
    """Computes a ** exponent in float64: the error of a factor used all along the way adds up."""
    result, square = tl.full(a.shape, 1, tl.float64), a.to(tl.float64)
    for bit in tl.static_range(BITS):
        result = tl.where((exponent >> bit) % 2 == 1, result * square, result)
        square *= square
    return result.to(a.dtype)


@triton.jit
def lagging(a1, x1, b1, y1, a2, x2, b2, y2):
    """Composes maps: (a, x) is all of them one after the other, (b, y) all but the last."""
    return a1 * a2, a2 * x1 + x2, a1 * b2, b2 * x1 + y2


@triton.jit
def entering(a, x, state, REVERSE: tl.constexpr = False):
    """Returns the state before every run (RUNS, COLS) and after all of them (1, COLS).

    Run s turns h into a · h + x (RUNS, COLS); state is what the first is entered with.
    """
    run, first, last = ends_of(x.shape[0], REVERSE)
    x = tl.where(run == first, a * state + x, x)
    _, after, _, before = tl.associative_scan(
        (a, x, tl.full(x.shape, 1, x.dtype), tl.zeros(x.shape, x.dtype)), 0, lagging, REVERSE)
    end = tl.sum(tl.where(run == last, after, 0), 0)[None, :]
    return tl.where(run == first, state, before), end


@triton.jit
def ends_of(runs: tl.constexpr, REVERSE: tl.constexpr):
    """Returns the runs (RUNS, 1), which of them is first and which is last."""
    run = tl.arange(0, runs)[:, None]
    if REVERSE:
        return run, runs - 1, 0
    return run, 0, runs - 1
