"""Exponential-decay convolution, the mixer of MetaformerGPT and of multi-head EMA layers."""

from fastmix.checks import check_length, check_shape, check_tensor, match_parameter, wide
from fastmix.fallback import decay_conv as fallback
from fastmix.ops._register import CARRY_EVERY, Operator, carry_count, needs_gradient


def _fake(x, decay, gain, initial_state, carry_every):
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


def decay_conv(x, decay, gain=None, *, initial_state=None, return_state=False):
    """y_t = decay_h · y_{t-1} + gain_h · x_t

    Linear in n, no FFT. `decay` and `gain` are learnable; any real value is allowed.

    Args:
        x: (b, n, h, d), real, any strides
        decay: (h,), the dtype of x or float32
        gain: (h,) likewise; 1 if None
        initial_state: y_{-1} (b, h, d), float32 (float64 for float64 x); 0 if None
        return_state: also return y_{n-1} (b, h, d) in the state's dtype

    Returns:
        (b, n, h, d) in the dtype of x, or (that, state).

    Differentiable in every tensor, to any order. Raises TypeError and ValueError for
    arguments that do not fit.

    The multi-head exponential smoothing attention of ETSformer (arXiv:2202.01381), as in
    metaformer-gpt and gated-state-spaces-pytorch.
    """
    where = "decay_conv"
    check_tensor(where, "x", x)
    sizes = check_shape(where, "x", x, "b n h d")
    check_length(where, "x", sizes["n"])
    check_tensor(where, "decay", decay, like=("x", x))
    check_shape(where, "decay", decay, "h", sizes)
    decay = match_parameter(where, "decay", decay, ("x", x))
    if gain is not None:
        check_tensor(where, "gain", gain, like=("x", x))
        check_shape(where, "gain", gain, "h", sizes)
        gain = match_parameter(where, "gain", gain, ("x", x))
    if initial_state is not None:
        check_tensor(where, "initial_state", initial_state, (wide(x.dtype),), like=("x", x))
        check_shape(where, "initial_state", initial_state, "b h d", sizes)
    carry_every = CARRY_EVERY if needs_gradient(x, decay, gain, initial_state) else 0
    out, state, _ = _operator(x, decay, gain, initial_state, carry_every)
    return (out, state) if return_state else out
