"""fft_conv in plain torch: a Toeplitz product for short inputs, FFTs in slabs otherwise.

The spectral path walks over slabs of a few megabytes (some batch entries, heads and
channels), so that spectrum, product and inverse stay in cache. The kernel is real, so
two channels share one complex transform and come out as its real and imaginary part;
an odd number of channels per head takes real transforms instead.

A transform carries rounding of its largest number, NaN and infinity to every output. On CPUs,
inputs whose magnitudes grow much along the steps, leave float32's middle range or are not
finite are cut into segments, so that nothing reaches an output before its step. Whether that
is needed depends on values, which devices that must not be waited for do not show.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmix import _torch_private
from fastmix.dtypes import wide
from fastmix.fallback._values import is_anything, is_readable

SLAB = 1 << 20  # real numbers of a padded slab
TOEPLITZ = 128  # the longest input for which n² products beat the FFT
PARTS = 32  # of the steps, whose magnitudes are compared
EARLY = 16  # outputs at the beginning that are products of matrices, and no part of transforms


def forward(x: Tensor, kernel: Tensor, skip: Tensor | None) -> Tensor:
    """x (b, n, h, d), kernel (b, m, h) or (m, h), skip (h, d) or None → y (b, n, h, d)."""
    if x.numel() == 0:
        return (x * kernel.sum() if skip is None else x * kernel.sum() * skip).contiguous()
    kernel = kernel[..., : x.shape[1], :]
    convolve = _differentiable if torch.is_grad_enabled() else _convolve
    batches, channels = _slabs(x, kernel)
    rows = []
    for batch in batches:
        pieces = []
        for at in channels:
            slab, k = _cut(x, kernel, batch, *at)
            y = convolve(slab, k)
            y = y if skip is None else torch.addcmul(y, slab, skip[at].to(slab.dtype))
            pieces.append(y.to(x.dtype).flatten(2))
        rows.append(pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1))
    y = rows[0] if len(rows) == 1 else torch.cat(rows)
    return y.unflatten(-1, x.shape[2:])


def decomposed(x: Tensor, kernel: Tensor, skip: Tensor | None) -> Tensor:
    """`forward` without complex numbers as inputs of transforms, which other runtimes do not have:
    every channel is a head of its own, and shares no transform.
    """
    if _is_short(x):
        return forward(x, kernel, skip)
    kernel = kernel.repeat_interleave(x.shape[3], dim=-1)
    y = forward(x.flatten(2).unsqueeze(-1), kernel, None if skip is None else skip.reshape(-1, 1))
    return y.reshape(x.shape)


def backward(grad: Tensor, x: Tensor, kernel: Tensor,
             skip: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """grad, x (b, n, h, d) → dx, dkernel and dskip, like x, kernel and skip."""
    if x.numel() == 0:
        return (torch.zeros_like(x), torch.zeros_like(kernel),
                None if skip is None else torch.zeros_like(skip))
    used = kernel[..., : x.shape[1], :]
    differentiate = _toeplitz_backward if _is_short(x) else _long_backward
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dkernel = torch.zeros(kernel.shape, dtype=wide(x.dtype), device=x.device)
    dskip = None if skip is None else torch.zeros_like(skip, dtype=wide(x.dtype))
    batches, channels = _slabs(x, used)
    for batch in batches:
        for heads, width in channels:
            slab, k = _cut(x, used, batch, heads, width)
            slab_grad, _ = _cut(grad, used, batch, heads, width)
            fit = _fit(slab, k, slab_grad.flip(1))
            dslab, dk = (differentiate if fit else _backward_by_segments)(slab_grad, slab, k)
            if skip is not None and dskip is not None:
                dslab.addcmul_(slab_grad, skip[heads, width].to(slab.dtype))
                dskip[heads, width] += (slab_grad * slab).sum(dim=(0, 1))
            dx[batch, :, heads, width] = dslab
            if kernel.ndim == 2:
                dkernel[: used.shape[-2], heads] += dk.sum(dim=0)
            else:
                dkernel[batch, : used.shape[-2], heads] += dk
    if skip is not None and dskip is not None:
        dskip = dskip.to(skip.dtype)
    return dx, dkernel.to(kernel.dtype), dskip


def _differentiable(x: Tensor, kernel: Tensor) -> Tensor:
    """`_convolve`, whose derivatives keep NaN, infinity and rounding from steps as it does."""
    if torch.compiler.is_compiling() or _torch_private.legacy_vmap_active():
        return _convolve(x, kernel)
    if is_anything(x) or is_anything(kernel) or not _fit(x, kernel):
        return _Convolution.apply(x, kernel)
    return _convolve(x, kernel)


class _Convolution(torch.autograd.Function):
    """A convolution whose derivatives of every order are convolutions again.

    Each of them looks at its own values, which are there even under vmap, as the mapped axis is
    folded into the batch. Operations that treat NaN and large numbers have derivatives too, but
    those multiply NaN by the zeros that keep it from steps.
    """

    @staticmethod
    def forward(x: Tensor, kernel: Tensor) -> Tensor:
        return _convolve(x, kernel)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, kernel = ctx.saved_tensors
        grad = grad.flip(1)
        lags = _gradient_of_lags(_differentiable, grad, x, kernel.shape[1])
        return _differentiable(grad, kernel).flip(1), lags.sum_to_size(kernel.shape)

    @staticmethod
    def jvp(ctx: Any, of_x: Tensor | None, of_kernel: Tensor | None) -> Any:
        x, kernel = ctx.saved_tensors
        parts = [] if of_x is None else [_differentiable(of_x, kernel)]
        parts += [] if of_kernel is None else [_differentiable(x, of_kernel)]
        return sum(parts)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, kernel: Tensor) -> tuple[Tensor, int]:
        x, kernel = (t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
                     for t, dim in zip((x, kernel), in_dims))
        kernel = kernel.expand(-1, x.shape[1], -1, -1)
        y = _differentiable(x.flatten(0, 1), kernel.flatten(0, 1))
        return y.unflatten(0, x.shape[:2]), 0


def _gradient_of_lags(convolve: Callable[[Tensor, Tensor], Tensor], reversed_grad: Tensor,
                      x: Tensor, m: int) -> Tensor:
    """reversed_grad, x (b, n, h, d) → (b, m, h): Σ_t grad_t · x_{t-j} over steps and channels. As
    x's channels are the kernels here, this is a convolution as well, whose time runs backward."""
    lags = convolve(reversed_grad.flatten(2).unsqueeze(-1), x.flatten(2)).flip(1)
    return lags.reshape(x.shape)[:, :m].sum(-1)


def _convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """x (b, n, h, d), kernel (b or 1, m, h) → y (b, n, h, d), by what suits length and values."""
    if not _fit(x, kernel):
        return _by_segments(x, kernel)
    return (_toeplitz_forward if _is_short(x) else _long_forward)(x, kernel)


def _is_short(x: Tensor) -> bool:
    return x.shape[1] <= min(4 * x.shape[3], TOEPLITZ)


def _fft_length(n: int) -> int:
    """The smallest 2^a · (1, 3, 5, 9 or 15) that is at least n."""
    return min(odd << max(0, (-(-n // odd) - 1).bit_length()) for odd in (1, 3, 5, 9, 15))


def _slabs(x: Tensor, kernel: Tensor) -> tuple[list[slice], list[tuple[slice, slice]]]:
    """Batch slices, and (heads, channels of a head) slices, of about SLAB numbers each."""
    b, n, h, d = x.shape
    rows = max(32, SLAB // _fft_length(n + kernel.shape[-2])) // 2 * 2
    d_step = min(d, rows)
    h_step = min(h, max(1, rows // d))
    b_step = max(1, rows // (h * d))
    channels = [(slice(i, i + h_step), slice(j, j + d_step))
                for i in range(0, h, h_step) for j in range(0, d, d_step)]
    return [slice(i, i + b_step) for i in range(0, b, b_step)], channels


def _cut(x: Tensor, kernel: Tensor, batch: slice, heads: slice,
         width: slice) -> tuple[Tensor, Tensor]:
    """One slab of x (b, n, h, d) and its kernels (b or 1, m, h) in the dtype to compute in."""
    dtype = wide(x.dtype)
    kernel = kernel[None] if kernel.ndim == 2 else kernel[batch]
    return x[batch, :, heads, width].to(dtype), kernel[..., heads].to(dtype)


def _transform(x: Tensor, length: int) -> Tensor:
    """x (b, n, h, d) → its spectrum (b, h, channels, frequencies)."""
    if x.shape[-1] % 2:
        return torch.fft.rfft(x.contiguous().permute(0, 2, 3, 1), n=length)
    # A pair must begin at an even offset.
    x = x.clone(memory_format=torch.contiguous_format) if x.storage_offset() % 2 else x.contiguous()
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.fft.fft(pairs.permute(0, 2, 3, 1), n=length)


def _kernel_spectrum(kernel: Tensor, length: int, real: bool) -> Tensor:
    """kernel (b, m, h) → (b, h, 1, frequencies)."""
    transform = torch.fft.rfft if real else torch.fft.fft
    return transform(kernel.transpose(1, 2).unsqueeze(2), n=length)


def _inverse(spectrum: Tensor, length: int, n: int, real: bool) -> Tensor:
    """(b, h, channels, frequencies) → (b, n, h, d), contiguous: undoes `_transform`."""
    if real:
        return torch.fft.irfft(spectrum, n=length)[..., :n].permute(0, 3, 1, 2).contiguous()
    pairs = torch.fft.ifft(spectrum)[..., :n].permute(0, 3, 1, 2).contiguous()
    return torch.view_as_real(pairs).flatten(-2)


def _spectral_forward(x: Tensor, kernel: Tensor) -> Tensor:
    """x (b, n, h, d), kernel (b or 1, m, h) → y (b, n, h, d)."""
    n, real = x.shape[1], x.shape[3] % 2 == 1
    length = _fft_length(n + kernel.shape[1] - 1)
    spectrum = _transform(x, length) * _kernel_spectrum(kernel, length, real)
    return _inverse(spectrum, length, n, real)


def _spectral_backward(grad: Tensor, x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """grad, x (b, n, h, d), kernel (b or 1, m, h) → dx (b, n, h, d), dkernel (b, m, h)."""
    n, m, real = x.shape[1], kernel.shape[1], x.shape[3] % 2 == 1
    length = _fft_length(n + m - 1)
    grad = _transform(grad, length)
    lags = _transform(x, length).conj_physical_().mul_(grad).sum(dim=2)
    dkernel = torch.fft.irfft(lags, n=length) if real else torch.fft.ifft(lags).real
    grad.mul_(_kernel_spectrum(kernel, length, real).conj_physical_())
    dx = _inverse(grad, length, n, real)
    return dx, dkernel[..., :m].transpose(1, 2)


def _long_forward(x: Tensor, kernel: Tensor) -> Tensor:
    """x (b, n, h, d), kernel (b or 1, m, h) → y (b, n, h, d), of which the first steps do not feel
    the rounding of later ones."""
    y = _spectral_forward(x, kernel)
    if is_readable(x) and is_readable(kernel):
        y[:, :EARLY] = _toeplitz_forward(x[:, :EARLY], kernel[:, :EARLY])
    return y


def _long_backward(grad: Tensor, x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """grad, x (b, n, h, d), kernel (b or 1, m, h) → dx (b, n, h, d), dkernel (b, m, h)."""
    n, m = x.shape[1], kernel.shape[1]
    dx, dkernel = _spectral_backward(grad, x, kernel)
    if is_readable(grad) and is_readable(x) and is_readable(kernel):
        last = grad[:, -EARLY:].flip(1)
        dx[:, -EARLY:] = _toeplitz_forward(last, kernel[:, :EARLY]).flip(1)
        lags = _gradient_of_lags(_toeplitz_forward, last, x[:, :EARLY], EARLY)
        early = max(0, m - n + lags.shape[1])
        dkernel[:, m - early :] = lags[:, :early]
    return dx, dkernel


def _fit(x: Tensor, *tensors: Tensor) -> bool:
    """Whether one product can take all of them, or values of one, and so its segments, cannot be
    read."""
    fits = _is_finite if _is_short(x) else _fits
    return not all(map(is_readable, (x, *tensors))) or all(map(fits, (x, *tensors)))


def _is_finite(x: Tensor) -> bool:
    """Whether products of matrices can take x: they multiply NaN by zeros."""
    return bool(x.detach().isfinite().all())


def _fits(x: Tensor) -> bool:
    """Whether transforms over axis 1 can take x: magnitudes are of a size whose products stay
    in range, and none is far above all before it, or above all of the channel that shares its
    transform."""
    x, n = x.detach(), x.shape[1]
    parts = min(n, PARTS)
    steps = n // parts
    whole = x[:, : parts * steps].unflatten(1, (parts, steps))
    sizes = torch.linalg.vector_norm(whole, math.inf, dim=2)
    if n > parts * steps:
        rest = torch.linalg.vector_norm(x[:, parts * steps :], math.inf, dim=1, keepdim=True)
        sizes = torch.cat([sizes, rest], 1)
    largest = sizes.amax(1, keepdim=True)
    least, most, growth = _range(x.dtype)
    in_range = (largest == 0) | (largest >= least) & (largest <= most)
    growing = largest > sizes.cummax(1).values * growth
    # The first steps of x and kernel make EARLY outputs that no transform rounds.
    first = x[:, : max(steps, EARLY // 2)].abs().cummax(1).values[:, EARLY // 2 - 1 :]
    enough = torch.where(first[:, :1] > 0, growth * 4, growth * 512)
    growing_early = (first > 0) & (first * enough < largest)
    least_of_head = largest.where(largest > 0, most).amin(-1, keepdim=True)
    uneven = largest > least_of_head * (growth * 512)
    return bool(in_range.all()) and not bool(
        growing.any() | growing_early.any() | (uneven.any() if x.ndim == 4 else False))


def _range(dtype: torch.dtype) -> tuple[float, float, float]:
    """The least and the largest magnitude of what fits, and the factor it may grow by."""
    return (2.0**-60, 2.0**50, 32.0) if dtype == torch.float32 else (2.0**-508, 2.0**498, 2.0**20)


def _segments(x: Tensor) -> list[tuple[Tensor, Tensor, int]]:
    """x (b, n, …) → segments in the sense of _by_segments: each like x and zero elsewhere,
    divided by a power of two; its first step (b, …); the power's exponent."""
    growth = int(math.log2(_range(x.dtype)[2]))
    finite = x.detach().isfinite()
    largest = x.detach().abs().where(finite, 0).cummax(1).values
    level = torch.frexp(largest).exponent.div(growth, rounding_mode="floor")
    level = level.where(largest > 0, -(1 << 20))
    segments = []
    for number in level[largest > 0].unique().tolist():
        part = x.where((level == number) & finite, 0)
        exponent = (number + 1) * growth
        segments.append((_times_power(part, -exponent), (level < number).sum(1), exponent))
    return segments


def _times_power(x: Tensor, exponent: int) -> Tensor:
    """x · 2^exponent; the power itself may be out of range."""
    return x * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)


def _by_segments(x: Tensor, kernel: Tensor) -> Tensor:
    """x (b, n, h, d), kernel (b or 1, m, h) → y (b, n, h, d), whatever the magnitudes.

    A segment begins where the largest magnitude so far has grown by a few powers of two. Its
    product with another counts from the sum of their first steps on, so it rounds relative to
    numbers that were there by then. NaN and infinity make NaN as far as they reach.
    """
    n, m = x.shape[1], kernel.shape[1]
    step = torch.arange(n, device=x.device)[:, None, None]
    y = torch.zeros_like(x)
    for part, first, exponent in _segments(x):
        for other, first_lag, power in _segments(kernel):
            product = _times_power(_spectral_forward(part, other), exponent + power)
            y = y + product.where(step >= (first + first_lag.unsqueeze(-1)).unsqueeze(1), 0)
    reach = (step + m).where(~x.detach().isfinite(), 0).cummax(1).values > step
    lags = F.pad(~kernel.detach().isfinite(), (0, 0, 0, n - m)).cummax(1).values
    return y * torch.ones_like(x).where(~(reach | lags.unsqueeze(-1)), math.nan)


def _backward_by_segments(grad: Tensor, x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """grad, x (b, n, h, d), kernel (b or 1, m, h) → dx (b, n, h, d), dkernel (b, m, h)."""
    grad = grad.flip(1)
    return (_by_segments(grad, kernel).flip(1),
            _gradient_of_lags(_by_segments, grad, x, kernel.shape[1]))


def _toeplitz(kernel: Tensor, n: int) -> Tensor:
    """kernel (b, m, h) → (b, h, n, n), row t and column s hold kernel_{t-s}."""
    lags = F.pad(kernel.transpose(1, 2), (n - 1, n - kernel.shape[1]))
    return lags.unfold(-1, n, 1).flip(-1)


def _toeplitz_forward(x: Tensor, kernel: Tensor, transposed: bool = False) -> Tensor:
    """x (b, n, h, d), kernel (b or 1, m, h) → y (b, n, h, d)."""
    matrix = _toeplitz(kernel, x.shape[1])
    layout = "bhst,bshd->bthd" if transposed else "bhts,bshd->bthd"
    return torch.einsum(layout, matrix, x).contiguous()


def _toeplitz_backward(grad: Tensor, x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """grad, x (b, n, h, d), kernel (b or 1, m, h) → dx (b, n, h, d), dkernel (b, m, h)."""
    n, m = x.shape[1], kernel.shape[1]
    products = torch.einsum("bthd,bshd->bhts", grad, x.flip(1))
    # rows of 2n read as rows of 2n - 1: each row moves one further, diagonals become columns
    shifted = F.pad(products, (0, n)).flatten(2)[..., : n * (2 * n - 1)]
    dkernel = shifted.unflatten(-1, (n, 2 * n - 1)).sum(dim=2)[..., n - 1 : n - 1 + m]
    return _toeplitz_forward(grad, kernel, transposed=True), dkernel.transpose(1, 2)
