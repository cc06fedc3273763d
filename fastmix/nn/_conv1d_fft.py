"""`conv1d_fft` of three published modules, on `ops.fft_conv`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmix import ops
from fastmix.checks import check_length, check_tensor


def time_axis(name: str, tensor: Tensor, dim_name: str, dim: int) -> int:
    """The axis `dim` of `tensor`, counted from the end."""
    check_tensor("conv1d_fft", name, tensor)
    if not -tensor.ndim <= dim < tensor.ndim:
        raise ValueError(
            f"conv1d_fft: {dim_name} must be an axis of {name}, got {dim_name}={dim} "
            f"and {name} of shape {tuple(tensor.shape)}")
    check_length("conv1d_fft", name, tensor.shape[dim])
    return dim % tensor.ndim - tensor.ndim


def axes_error(expected: str, x: Tensor, dim: int, weights: Tensor,
               weight_dim: int) -> ValueError:
    return ValueError(
        f"conv1d_fft: {expected}, got x of shape {tuple(x.shape)} with dim={dim} and weights of "
        f"shape {tuple(weights.shape)} with weight_dim={weight_dim}")


def fast_length(n: int) -> int:
    """The smallest length ≥ n without prime factors above 5, as scipy.fftpack chooses it."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1


def conv1d_fft(x: Tensor, weights: Tensor, dim: int = -2, weight_dim: int = -1) -> Tensor:
    """out_i = Σ_j weights_{n-1-i+j} · x_j, a convolution that ends with the last weight.

    With m = n weights it is causal; weights beyond n look ahead. With m < n the original's FFT
    wraps around after fast_length(n + m - 1) points, so that some of the first n - m outputs hold
    what belongs after the end of the sequence. This function reproduces that.

    x           (…, n, …), n at dim
    weights     (…, m, …), m at weight_dim ≥ dim. Gets weight_dim - dim trailing axes of
                size one, then broadcasts against x on all axes but time
    Both floating, on one device. Returns the broadcast shape, n at dim, in the promoted
    dtype. ValueError where the time axes do not meet or the others do not broadcast.
    """
    time = time_axis("x", x, "dim", dim)
    weight_time = time_axis("weights", weights, "weight_dim", weight_dim)
    check_tensor("conv1d_fft", "weights", weights, like=("x", x))
    channels = weight_dim - dim
    grows = weights.ndim + channels > x.ndim
    if channels < 0 or weight_time - channels != time or (dim >= 0 and grows):
        raise axes_error(
            "weight_dim must be at least dim, and meet it once weights has weight_dim - dim "
            "more axes (and then no more than x, if dim ≥ 0)", x, dim, weights, weight_dim)
    n, m = x.shape[time], weights.shape[weight_time]
    shape, weight_shape = list(x.shape), [*weights.shape, *(1,) * channels]
    shape[time] = weight_shape[time] = 1
    try:
        shape = list(torch.broadcast_shapes(shape, weight_shape))
    except RuntimeError:
        raise axes_error(
            f"weights, with {channels} more axes, must broadcast against x on all axes but time",
            x, dim, weights, weight_dim) from None
    shape[time] = n

    dtype = torch.promote_types(x.dtype, weights.dtype)
    x, kernel = x.to(dtype).expand(shape), weights.to(dtype).flip(weight_time)
    head_time = time
    if weight_time == -1:  # the kernel's other axes become heads: to the right of time
        head_time = time - (kernel.ndim - 1)
        x, kernel = x.movedim(time, head_time), kernel.movedim(-1, 0)

    # x (*lead, n, *heads, *tail), kernel (*kernel_lead, m, *kernel_heads)
    lead, rest = x.shape[:head_time], x.shape[x.ndim + head_time + 1:]
    heads, tail = rest[:len(rest) - channels], rest[len(rest) - channels:]
    kernel_lead = kernel.shape[:kernel.ndim - len(heads) - 1]
    if kernel_lead.numel() == 1:
        kernel = kernel.expand(*kernel_lead, m, *heads).reshape(m, heads.numel())
    else:
        kernel = kernel.expand(*lead, m, *heads).reshape(lead.numel(), m, heads.numel())
    x = x.reshape(lead.numel(), n, heads.numel(), tail.numel())

    if m == n:
        out = ops.fft_conv(x, kernel)
    else:
        circle = fast_length(n + m - 1)
        out = ops.fft_conv(F.pad(x, (0, 0, 0, 0, 0, circle - n)), kernel)
        out = out.roll(n - m, dims=1)[:, :n]
    return out.reshape(*lead, n, *heads, *tail).movedim(head_time, time)
