"""Long causal convolution, with a kernel per sample and head if wanted."""

import torch

from fastmix.checks import (check_length, check_shape, check_tensor, match_dtypes,
                            match_parameter)
from fastmix.fallback import fft_conv as fallback
from fastmix.ops._register import Operator

_operator = Operator(
    "fft_conv", "Tensor x, Tensor kernel, Tensor? skip", outputs="out",
    fallback=fallback, fake=lambda x, kernel, skip: x.new_empty(x.shape),
    batched={"x": 4, "kernel": 3})


def fft_conv(x, kernel, skip=None):
    """y_t = Σ_{j ≤ t} kernel_j · x_{t-j} + skip · x_t

    One kernel per head, shared by the head's channels; one skip per channel, a weight of the
    input itself. O(n log n) time, linear memory.

    Args:
        x: (b, n, h, d), real, any strides
        kernel: (b, m, h), one per sample, or (m, h) for all; any m ≥ 1, lags from n on have
            no effect. The dtype of x or float32.
        skip: (h, d), the dtype of x or float32; nothing is added if None

    Returns:
        (b, n, h, d) in the dtype of x; transforms run in float32 (float64 for float64).

    Differentiable in all, to any order. Raises TypeError and ValueError for arguments
    that do not fit.

    The data-dependent long convolution of gated-state-spaces-pytorch (GatedDsConv); with a
    shared kernel, the long convolution of S4, Hyena and their kin. The skip is their D.
    """
    where = "fft_conv"
    check_tensor(where, "x", x)
    sizes = check_shape(where, "x", x, "b n h d")
    check_length(where, "x", sizes["n"])
    check_tensor(where, "kernel", kernel, like=("x", x))
    if torch.is_autocast_enabled(x.device.type):
        x, kernel = match_dtypes(where, x=x, kernel=kernel)
    kernel = match_parameter(where, "kernel", kernel, ("x", x))
    layout = "m h" if kernel.ndim == 2 else "b m h"
    check_length(where, "kernel", check_shape(where, "kernel", kernel, layout, sizes)["m"])
    if skip is not None:
        check_tensor(where, "skip", skip, like=("x", x))
        check_shape(where, "skip", skip, "h d", sizes)
        skip = match_parameter(where, "skip", skip, ("x", x))
    return _operator(x, kernel, skip)
