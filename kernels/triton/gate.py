"""The gate of the gate loop in registers: a = σ(|z|) · z / |z|, ½ at z = 0, and its gradient."""

import triton
import triton.language as tl


@triton.jit
def _polar(re, im):
    """Returns |z|, z's unit vector, and where z is 0 (there |z| = 1, and the unit vector is 0).

    z is scaled by a power of two where its square would overflow or vanish. |z| is at least
    the smallest normal number: gradients are divided by it.
    """
    wide: tl.constexpr = re.dtype == tl.float64
    far: tl.constexpr = 2.0 ** (500 if wide else 60)
    step: tl.constexpr = 2.0 ** (600 if wide else 100)
    largest = tl.maximum(tl.abs(re), tl.abs(im))
    at_zero = largest == 0
    scale = tl.where(largest > far, 1 / step, tl.where(largest < 1 / far, step, 1.0))
    unscale = tl.where(largest > far, step, tl.where(largest < 1 / far, 1 / step, 1.0))
    re, im = re * scale, im * scale
    square = tl.where(at_zero, 1.0, re * re + im * im)
    inverse = tl.rsqrt(square)
    size = tl.maximum(square * inverse * unscale, 2.0 ** (-1022 if wide else -126))
    return size, re * inverse, im * inverse, at_zero


@triton.jit
def activate(re, im):
    """Turns logits into the gate's real and imaginary part."""
    size, re, im, at_zero = _polar(re, im)
    sigmoid = 1 / (1 + tl.exp(-size))
    return tl.where(at_zero, 0.5, re * sigmoid), im * sigmoid


@triton.jit
def activate_backward(grad_re, grad_im, re, im):
    """Turns the gate's gradient and the logits into the logits' gradient, which is 0 at z = 0."""
    size, re, im, at_zero = _polar(re, im)
    sigmoid = 1 / (1 + tl.exp(-size))
    along = (re * grad_re + im * grad_im) * (sigmoid * (1 - sigmoid))
    across = (re * grad_im - im * grad_re) * (sigmoid / size)
    return re * along - im * across, im * along + re * across
