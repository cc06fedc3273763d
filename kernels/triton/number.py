"""Real and complex numbers in registers: a tuple of their parts, (re,) or (re, im).

One formula serves both; where one number has an imaginary part, the result has.
"""

import triton
import triton.language as tl


@triton.jit
def plus(a, b):
    if len(a) == 1 and len(b) == 1:
        return (a[0] + b[0],)
    elif len(a) == 1:
        return a[0] + b[0], b[1]
    elif len(b) == 1:
        return a[0] + b[0], a[1]
    else:
        return a[0] + b[0], a[1] + b[1]


@triton.jit
def times(a, b):
    if len(a) == 1 and len(b) == 1:
        return (a[0] * b[0],)
    elif len(a) == 1:
        return a[0] * b[0], a[0] * b[1]
    elif len(b) == 1:
        return a[0] * b[0], a[1] * b[0]
    else:
        return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


@triton.jit
def conj(a):
    if len(a) == 1:
        return a
    else:
        return a[0], -a[1]


@triton.jit
def select(mask, a, b):
    """Returns a where mask is true, else b, which may be two Python numbers."""
    if len(a) == 1:
        return (tl.where(mask, a[0], b[0]),)
    else:
        return tl.where(mask, a[0], b[0]), tl.where(mask, a[1], b[1])


@triton.jit
def filled(value, shape: tl.constexpr, dtype: tl.constexpr, COMPLEX: tl.constexpr):
    if COMPLEX:
        return tl.full(shape, value, dtype), tl.zeros(shape, dtype)
    else:
        return (tl.full(shape, value, dtype),)
