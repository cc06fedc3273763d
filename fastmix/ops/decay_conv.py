"""Exponential-decay convolution, the mixer of MetaformerGPT and of multi-head EMA layers."""

from typing import Any, Literal, overload

from torch import Tensor

from fastmix.checks import (
    Passed,
    check_flag,
    check_length,
    check_shape,
    check_tensor,
    is_like,
    match_parameter,
)
from fastmix.dtypes import wide
from fastmix.fallback import decay_conv as fallback
from fastmix.ops._carries import CARRY_EVERY, carry_count, needs_gradient
from fastmix.ops._register import Operator


def _fake(x: Tensor, decay: Tensor, gain: Tensor | None, initial_state: Tensor | None,
          carry_every: int) -> tuple[Tensor, ...]:
    b, n, h, d = x.shape
    carries = carry_count(n, carry_every)
    dtype = wide(x.dtype)
    return (x.new_empty(b, n, h, d), x.new_empty(b, h, d, dtype=dtype),
            x.new_empty(b, carries, h, d, dtype=dtype))


_operator = Operator(
    "decay_conv",
    "Tensor x, Tensor decay, Tensor? gain, Tensor? initial_state, int carry_every",
    outputs="out state carries",
    fallback=fallback, fake=_fake, batched={"x": 4, "initial_state": 3})
_passed = Passed()


@overload
def decay_conv(x: Tensor, decay: Tensor, gain: Tensor | None = None, *,
               initial_state: Tensor | None = None,
               return_state: Literal[False] = False) -> Tensor: ...


@overload
def decay_conv(x: Tensor, decay: Tensor, gain: Tensor | None = None, *,
               initial_state: Tensor | None = None,
               return_state: Literal[True]) -> tuple[Tensor, Tensor]: ...


@overload
def decay_conv(x: Tensor, decay: Tensor, gain: Tensor | None = None, *,
               initial_state: Tensor | None = None,
               return_state: bool = False) -> Tensor | tuple[Tensor, Tensor]: ...


def decay_conv(x: Tensor, decay: Tensor, gain: Tensor | None = None, *,
               initial_state: Tensor | None = None,
               return_state: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Smooths a sequence exponentially, with a decay that each head learns.

    y_t = decay_h · y_{t-1} + gain_h · x_t

    Linear in n, no FFT. Any real decay and gain are allowed.

    Args:
        x: (b, n, h, d), float64, float32, bfloat16 or float16, any strides. Time is axis 1,
            before the heads: (b, h, n, d) must be transposed.
        decay: (h,), the dtype of x, or float32 where x has 16 bits
        gain: (h,) likewise; 1 if None
        initial_state: y_{-1} (b, h, d), float32 (float64 for float64 x); 0 if None
        return_state: also return y_{n-1} (b, h, d) in the state's dtype

    Returns:
        (b, n, h, d) in the dtype of x, or (that, state) with return_state; sums are kept in
        float32 at least.

    Differentiable in every tensor, to any order. Raises TypeError and ValueError for arguments
    that do not fit.

    The multi-head exponential smoothing attention of ETSformer (arXiv:2202.01381), as in
    metaformer-gpt and gated-state-spaces-pytorch.

    >>> x = torch.tensor([8.0, 0.0, 4.0, 0.0]).view(1, 4, 1, 1)
    >>> decay = torch.tensor([0.5])
    >>> decay_conv(x, decay).flatten()
    tensor([8., 4., 6., 3.])

    A sequence in pieces, each entered from the state after the one before:

    >>> first, state = decay_conv(x[:, :2], decay, return_state=True)
    >>> decay_conv(x[:, 2:], decay, initial_state=state).flatten()
    tensor([6., 3.])
    """
    key = _passed.key(x, decay, gain, initial_state)
    if not _passed.has(key):
        decay, gain = _check(x, decay, gain, initial_state)
        _passed.add(key)
    check_flag("decay_conv", "return_state", return_state)
    carry_every = CARRY_EVERY if needs_gradient(x, decay, gain, initial_state) else 0
    out, state, _ = _operator(x, decay, gain, initial_state, carry_every)
    return (out, state) if return_state else out


def _check(x: Any, decay: Any, gain: Any, initial_state: Any) -> tuple[Tensor, Tensor | None]:
    """Checks the arguments and returns decay and gain, in the dtypes in which they are taken."""
    where = "decay_conv"
    check_tensor(where, "x", x)
    sizes = check_shape(where, "x", x, "b n h d")
    check_length(where, "x", sizes["n"])
    check_tensor(where, "decay", decay, like=("x", x))
    check_shape(where, "decay", decay, "h", sizes)
    decay = match_parameter(where, "decay", decay, ("x", x))
    if gain is not None and not is_like(gain, decay):
        check_tensor(where, "gain", gain, like=("x", x))
        check_shape(where, "gain", gain, "h", sizes)
        gain = match_parameter(where, "gain", gain, ("x", x))
    if initial_state is not None:
        check_tensor(where, "initial_state", initial_state, (wide(x.dtype),), like=("x", x))
        check_shape(where, "initial_state", initial_state, "b h d", sizes)
    return decay, gain
