"""The gate of the gate loop in registers: a = σ(|z|) · z / |z|, ½ at z = 0, and its gradient."""

import triton
import triton.language as tl


@triton.jit
def _polar(re, im):
    """z → |z|, its unit vector, and where it is 0 (there |z| = 1, the unit vector 0).

    The larger part is divided out first: no square overflows or vanishes.
    """
    largest = tl.maximum(tl.abs(re), tl.abs(im))
    at_zero = largest == 0
    largest = tl.where(at_zero, 1.0, largest)
    re, im = re / largest, im / largest
    size = tl.where(at_zero, 1.0, tl.sqrt(re * re + im * im))
    return largest * size, re / size, im / size, at_zero


@triton.jit
def activate(re, im):
    """Logits → the gate's real and imaginary part."""
    size, re, im, at_zero = _polar(re, im)
    sigmoid = 1 / (1 + tl.exp(-size))
    return tl.where(at_zero, 0.5, re * sigmoid), im * sigmoid


@triton.jit
def activate_backward(grad_re, grad_im, re, im):
    """The gate's gradient and the logits → the logits' gradient; 0 at z = 0."""
    size, re, im, at_zero = _polar(re, im)
    sigmoid = 1 / (1 + tl.exp(-size))
    along = (re * grad_re + im * grad_im) * (sigmoid * (1 - sigmoid))
    across = (re * grad_im - im * grad_re) * (sigmoid / size)
    return re * along - im * across, im * along + re * across
