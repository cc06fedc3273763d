"""fft_conv in pieces: the same outputs in O(log² n) time a step, however the steps arrive.

A state begins an *epoch* after P steps. What those add to the next E outputs is known from one
transform: the `tail`. Steps of the epoch gather in blocks of 64, 128, … steps, which merge as the
digits of a binary counter carry. A block that ends at step T of the epoch and has m steps adds to
the outputs of the m steps from T on: its product with the first 2m lags is computed once, `ahead`.
Steps of the block under way are multiplied directly. When the epoch ends the next one begins.

If lag l arrives with step l, new lags meet the first steps too, just as new steps meet the first
lags. No new lag meets a new step, as E ≤ P: both together would be 2P steps.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmix.states import FFTConvBlock, FFTConvState

BLOCK = 64  # steps up to which products are cheaper than transforms
Convolve = Callable[[Tensor, Tensor], Tensor]


def first(convolve: Convolve, x: Tensor, kernel: Tensor,
          revealed: bool) -> tuple[Tensor, FFTConvState]:
    """x (b, n, h, d) from a sequence's beginning, kernel → outputs and the state after them."""
    none = x[:, :0]
    state = FFTConvState(none, kernel[:, :0] if revealed else None, none, ())
    return _begin_epoch(convolve, x, kernel, state)


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
    blocks = list(state.blocks)
    under_way = [blocks.pop()] if done % BLOCK else []
    x = _joined(*(block.x for block in under_way), x)
    if revealed:
        kernel = _joined(*(block.kernel for block in under_way), kernel)
    stop = done + n
    y, end = state.tail[:, done:stop], 0
    for block in blocks:
        end += block.x.shape[1]
        y = y + block.ahead[:, done - end : stop - end]
    y = y + _newest(convolve, x, kernel if state.kernel is None else state.kernel, n)
    if revealed:
        y = y + _newest(convolve, state.x[:, : x.shape[1]], kernel, n)
    new = FFTConvBlock(x, kernel if revealed else None, x[:, :0])
    if stop % BLOCK == 0:
        while blocks and blocks[-1].x.shape[1] == new.x.shape[1]:
            last = blocks.pop()
            new = FFTConvBlock(_joined(last.x, new.x),
                               _joined(last.kernel, new.kernel) if revealed else None, new.ahead)
        new = new._replace(ahead=_ahead(convolve, new, state, kernel))
    return y, state._replace(blocks=(*blocks, new))


def _ahead(convolve: Convolve, block: FFTConvBlock, state: FFTConvState,
           kernel: Tensor) -> Tensor:
    """The part that a block adds to the outputs of as many steps after it."""
    m = block.x.shape[1]
    lags = kernel if state.kernel is None else state.kernel
    ahead = convolve(_padded(block.x, m), lags[..., : 2 * m, :].to(block.x.dtype))[:, m:]
    if block.kernel is not None:
        begin = state.x[:, : 2 * m]
        ahead = ahead + convolve(_padded(begin, 2 * m - begin.shape[1]), block.kernel)[:, m:]
    return ahead.clone()


def _newest(convolve: Convolve, x: Tensor, kernel: Tensor, n: int) -> Tensor:
    """The last n steps of x (b, r, h, d) convolved with kernel (…, m, h)."""
    r = x.shape[1]
    kernel = kernel[..., :r, :].to(x.dtype)
    if n > 1:
        return convolve(x, kernel)[:, r - n :]
    kernel = kernel.flip(-2).unsqueeze(-1)
    return (kernel * x[:, r - kernel.shape[-3] :]).sum(1, keepdim=True)


def _joined(*parts: Tensor | None) -> Tensor:
    """The parts one behind the other: always a copy, as a state's memory is its own."""
    return torch.cat([part for part in parts if part is not None and part.shape[1]], 1)


def _padded(x: Tensor, steps: int) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 0, steps))
