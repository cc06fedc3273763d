"""fft_conv in pieces: the same outputs in O(log² n) time a step, however the steps arrive.

A state begins an *epoch* after P steps. What those add to the next E outputs is known from one
transform: the `tail`. Steps of the epoch gather in blocks of 64, 128, … steps, which merge as the
digits of a binary counter carry. A block that ends at step T of the epoch and has m steps adds to
the outputs of the m steps from T on: its product with the first 2m lags is computed once, and kept
as `ahead` with what all steps before the block add to the same outputs. So the last block has all
that a step needs but the products of the block under way. When the epoch ends the next one begins.

If lag l arrives with step l, new lags meet the first steps too, just as new steps meet the first
lags. No new lag meets a new step, as E ≤ P: both together would be 2P steps.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmix.fallback import _fft_conv_step as fallback
from fastmix.ops._register import may_step, step_operator
from fastmix.states import FFTConvBlock, FFTConvState

BLOCK = 64  # steps up to which products are cheaper than transforms
Convolve = Callable[[Tensor, Tensor], Tensor]

_step = step_operator(
    "fft_conv_step", "Tensor x, Tensor kernel, Tensor? skip, Tensor steps, Tensor ahead, "
    "Tensor? lags, Tensor? first, Tensor? first_lags", fallback.step, outputs=3)


def first(convolve: Convolve, x: Tensor, kernel: Tensor,
          revealed: bool) -> tuple[Tensor, FFTConvState]:
    """x (b, n, h, d) from a sequence's beginning, kernel → outputs and the state after them."""
    none = x[:, :0]
    state = FFTConvState(none, kernel[:, :0] if revealed else None, none, ())
    return _begin_epoch(convolve, x, kernel, state)


def step(key: tuple | None, x: Tensor, kernel: Tensor, skip: Tensor | None, revealed: bool,
         state: Any) -> tuple[Tensor, FFTConvState] | None:
    """x (b, n, h, d) after the steps of a state, if it is one step, neither begins nor ends a block
    and `may_step`; None for all else. Whether the state fits x is left to the operator.

    `key` is the `Passed.key` of the tensors but the state's.
    """
    if x.shape[1] > 1 or not x.is_cpu or type(state) is not FFTConvState or not state.blocks or (
            revealed != (state.kernel is not None)):
        return None
    blocks = state.blocks
    steps, lags, none = blocks[-1]
    ahead = blocks[-2].ahead if len(blocks) > 1 else state.tail
    of_lags = (lags, state.x, state.kernel) if revealed else ()
    tensors = (steps, ahead, *of_lags)
    if {*map(type, tensors)} != {Tensor} or not may_step(key, x, kernel, skip, *tensors):
        return None
    after = steps.shape[1] + 1
    if after % BLOCK < 2 or after >= ahead.shape[1]:
        return None
    out, steps, lags = _step(x, kernel, skip, steps, ahead, *(of_lags or (None, None, None)))
    block = FFTConvBlock(steps, lags if revealed else None, none)
    return out, FFTConvState(state.x, state.kernel, state.tail, (*blocks[:-1], block))


def advance(convolve: Convolve, x: Tensor, kernel: Tensor,
            state: FFTConvState) -> tuple[Tensor, FFTConvState]:
    """x (b, n, h, d) after the steps of a state, kernel (b, n, h) of these steps or all of it,
    which may be narrower than x.
    """
    n, done = x.shape[1], _steps(state.blocks)
    if done + n >= state.tail.shape[1] or 8 * n >= state.x.shape[1] + done + n:
        return _begin_epoch(convolve, x, kernel, state)
    outputs, start = [], 0
    while start < n:
        stop = min(n, start + BLOCK - (done + start) % BLOCK)
        revealed = state.kernel is not None
        y, state = _within_block(convolve, x[:, start:stop],
                                 kernel[:, start:stop] if revealed else kernel, state)
        outputs.append(y)
        start = stop
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0], state


def _steps(blocks: tuple[FFTConvBlock, ...]) -> int:
    return sum(block.x.shape[1] for block in blocks)


def _begin_epoch(convolve: Convolve, x: Tensor, kernel: Tensor,
                 state: FFTConvState) -> tuple[Tensor, FFTConvState]:
    all_x = _joined(state.x, *(block.x for block in state.blocks), x)
    before, total = all_x.shape[1] - x.shape[1], all_x.shape[1]
    if state.kernel is None:
        all_kernel, kept = kernel, min(total, max(1, kernel.shape[-2] - 1))
        length = max(BLOCK, kept // 4)
    else:
        all_kernel = _joined(state.kernel, *(block.kernel for block in state.blocks), kernel)
        kept = total
        length = max(min(BLOCK, kept), kept // 4)
    y = convolve(_padded(all_x, length), all_kernel.to(all_x.dtype))
    # Copies: a view would keep all of y alive.
    state = FFTConvState(all_x[:, total - kept :].clone() if kept < total else all_x,
                         None if state.kernel is None else all_kernel, y[:, total:].clone(), ())
    return y[:, before:total], state


def _within_block(convolve: Convolve, x: Tensor, kernel: Tensor,
                  state: FFTConvState) -> tuple[Tensor, FFTConvState]:
    """Steps none of which is in another block than the first."""
    revealed, done, n = state.kernel is not None, _steps(state.blocks), x.shape[1]
    blocks, known = list(state.blocks), done % BLOCK
    none = x.narrow(1, 0, 0)
    under_way = blocks.pop() if known else FFTConvBlock(
        none, kernel.narrow(1, 0, 0) if revealed else None, none)
    ahead = blocks[-1].ahead if blocks else state.tail
    lags = under_way.kernel
    if n == 1:
        first = state.x if revealed else None
        y, x, of_block = fallback.step(x, kernel, None, under_way.x, ahead, lags, first,
                                       state.kernel)
        lags = of_block if revealed else None
    else:
        x = _joined(under_way.x, x)
        lags = _joined(lags, kernel) if revealed else None
        y = ahead.narrow(1, known, n) + convolve(x, fallback.lags_of(
            kernel if state.kernel is None else state.kernel, x))[:, -n:]
        if lags is not None:
            y = y + convolve(state.x.narrow(1, 0, x.shape[1]), lags)[:, -n:]
    new = FFTConvBlock(x, lags, none)
    if (done + n) % BLOCK == 0:
        while blocks and blocks[-1].x.shape[1] == new.x.shape[1]:
            last = blocks.pop()
            new = FFTConvBlock(_joined(last.x, new.x),
                               _joined(last.kernel, new.kernel) if revealed else None, none)
        new = new._replace(ahead=_ahead(convolve, new, blocks[-1].ahead if blocks else state.tail,
                                        state, kernel))
    return y, state._replace(blocks=(*blocks, new))


def _ahead(convolve: Convolve, block: FFTConvBlock, before: Tensor, state: FFTConvState,
           kernel: Tensor) -> Tensor:
    """What all steps up to the end of a block add to the outputs of as many steps after it, or to
    those that are left of the epoch; the steps before the block add `before` from its begin on."""
    m = block.x.shape[1]
    before = before[:, m : 2 * m]
    count = before.shape[1]
    lags = kernel if state.kernel is None else state.kernel
    ahead = before + convolve(
        _padded(block.x, count), lags[..., : m + count, :].to(block.x.dtype))[:, m:]
    if block.kernel is not None:
        begin = state.x[:, : m + count]
        ahead = ahead + convolve(_padded(begin, m + count - begin.shape[1]), block.kernel)[:, m:]
    return ahead


def _joined(*parts: Tensor | None) -> Tensor:
    """The parts one behind the other: always a copy, as a state's memory is its own."""
    return torch.cat([part for part in parts if part is not None and part.shape[1]], 1)


def _padded(x: Tensor, steps: int) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 0, steps))
