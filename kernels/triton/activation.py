"""Activations in registers: their value and slope."""

import triton
import triton.language as tl

from fastmix import activations

OUTSIDE = tl.constexpr(activations.OUTSIDE)


@triton.jit
def _tanh(x):
    e = tl.exp(-2 * tl.abs(x))
    size = (1 - e) / (1 + e)
    y = tl.where(x < 0, -size, size)
    if x.dtype == tl.float32:  # 1 - e has too few digits close to 0
        s = x * x
        series = x + x * s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (
            62 / 2835 - s * (1382 / 155925)))))
        y = tl.where(s < 0.1, series, y)
    return y


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Returns the activation's value and slope at x."""
    if ACTIVATION == "tanh":
        value = _tanh(x)
        slope = 1 - value * value
    elif ACTIVATION == "sigmoid":
        value = 1 / (1 + tl.exp(-x))
        slope = value * (1 - value)
    elif ACTIVATION == "gelu":
        part = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        value = x * part
        slope = part + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "silu":
        part = 1 / (1 + tl.exp(-x))
        value = x * part
        slope = part * (1 + x * (1 - part))
    else:
        value = x
        slope = tl.full(x.shape, 1, x.dtype)
    return value, slope
