"""A step of a convolution from a state on, in plain differentiable torch."""

import torch
from torch import Tensor

from fastmix.dtypes import wide


def step(x: Tensor, kernel: Tensor, skip: Tensor | None, steps: Tensor, ahead: Tensor,
         lags: Tensor | None, first: Tensor | None, first_lags: Tensor | None,
         ) -> tuple[Tensor, Tensor, Tensor]:
    """x (b, 1, h, d) behind the `steps` (b, r, h, d) of its block, for which the steps before add
    `ahead` (b, more than r, h, d) → the output, and the steps with x.

    kernel (…, m, h) is all of it, or the lag of x. Then there are the block's `lags` (b, r, h),
    which come back with that of x, and the first steps of all with theirs.
    """
    (b, r, h, d), dtype = steps.shape, wide(x.dtype)
    _check(steps, x.shape[0], x.shape[2:], dtype)
    _check(ahead, b, (h, d), dtype)
    inputs = x.to(dtype)
    steps = torch.cat((steps, inputs), 1)
    pairs = [(steps, kernel)]
    if lags is not None and first is not None and first_lags is not None:
        for t, axes in ((lags, (h,)), (first, (h, d)), (first_lags, (h,))):
            _check(t, b, axes, dtype)
        lags = torch.cat((lags, kernel.to(dtype)), 1)
        pairs = [(steps, first_lags), (first.narrow(1, 0, r + 1), lags)]
    out = ahead.narrow(1, r, 1) + _newest(pairs)
    if skip is not None:
        out = torch.addcmul(out, skip.to(dtype), inputs)
    return out.to(x.dtype), steps, x.new_empty(0) if lags is None else lags


def _check(t: Tensor, b: int, axes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuses what torch would broadcast or promote."""
    if t.dtype != dtype or t.shape[:1] + t.shape[2:] != (b, *axes):
        raise RuntimeError(f"fft_conv_step: the state's tensors must have shape (b, …) = ({b}, …, "
                           f"{axes}) of {dtype}, got {tuple(t.shape)} of {t.dtype}")


def lags_of(kernel: Tensor, x: Tensor) -> Tensor:
    """The lags that the steps of x have, in its dtype."""
    return kernel.narrow(-2, 0, min(x.shape[1], kernel.shape[-2])).to(x.dtype)


def _newest(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of the last steps (b, 1, h, d) of some x (b, r, h, d), each convolved with a
    kernel (…, m, h)."""
    products = None
    for x, kernel in pairs:
        lags = lags_of(kernel, x).flip(-2).unsqueeze(-1)
        m = lags.shape[-3]
        x = x.narrow(1, x.shape[1] - m, m)
        products = lags * x if products is None else torch.addcmul(products, lags, x)
    assert products is not None  # there is a pair
    return products.sum(1, keepdim=True)
