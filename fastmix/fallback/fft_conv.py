"""fft_conv in plain torch: a Toeplitz product for short inputs, FFTs in slabs otherwise.

The spectral path walks over slabs of a few megabytes (some batch entries, heads and
channels), so that spectrum, product and inverse stay in cache. The kernel is real, so
two channels share one complex transform and come out as its real and imaginary part;
an odd number of channels per head takes real transforms instead.
"""

import torch
import torch.nn.functional as F

SLAB = 1 << 20  # real numbers of a padded slab
TOEPLITZ = 128  # the longest input for which n² products beat the FFT


def forward(x, kernel, skip):
    """x (b, n, h, d), kernel (b, m, h) or (m, h), skip (h, d) or None → y (b, n, h, d)."""
    if x.numel() == 0:
        return (x * kernel.sum() if skip is None else x * kernel.sum() * skip).contiguous()
    kernel = kernel[..., : x.shape[1], :]
    convolve = _toeplitz_forward if _is_short(x) else _spectral_forward
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


def backward(grad, x, kernel, skip):
    """grad, x (b, n, h, d) → dx, dkernel and dskip, like x, kernel and skip."""
    if x.numel() == 0:
        return (torch.zeros_like(x), torch.zeros_like(kernel),
                None if skip is None else torch.zeros_like(skip))
    used = kernel[..., : x.shape[1], :]
    differentiate = _toeplitz_backward if _is_short(x) else _spectral_backward
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dkernel = torch.zeros(kernel.shape, dtype=_compute_dtype(x), device=x.device)
    dskip = None if skip is None else torch.zeros_like(skip, dtype=_compute_dtype(x))
    batches, channels = _slabs(x, used)
    for batch in batches:
        for heads, width in channels:
            slab, k = _cut(x, used, batch, heads, width)
            slab_grad, _ = _cut(grad, used, batch, heads, width)
            dslab, dk = differentiate(slab_grad, slab, k)
            if skip is not None:
                dslab.addcmul_(slab_grad, skip[heads, width].to(slab.dtype))
                dskip[heads, width] += (slab_grad * slab).sum(dim=(0, 1))
            dx[batch, :, heads, width] = dslab
            if kernel.ndim == 2:
                dkernel[: used.shape[-2], heads] += dk.sum(dim=0)
            else:
                dkernel[batch, : used.shape[-2], heads] += dk
    return dx, dkernel.to(kernel.dtype), None if skip is None else dskip.to(skip.dtype)


def _is_short(x):
    return x.shape[1] <= min(4 * x.shape[3], TOEPLITZ)


def _compute_dtype(x):
    return torch.promote_types(x.dtype, torch.float32)


def _fft_length(n):
    """The smallest 2^a · (1, 3, 5, 9 or 15) that is at least n."""
    return min(odd << max(0, (-(-n // odd) - 1).bit_length()) for odd in (1, 3, 5, 9, 15))


def _slabs(x, kernel):
    """Batch slices, and (heads, channels of a head) slices, of about SLAB numbers each."""
    b, n, h, d = x.shape
    rows = max(32, SLAB // _fft_length(n + kernel.shape[-2])) // 2 * 2
    d_step = min(d, rows)
    h_step = min(h, max(1, rows // d))
    b_step = max(1, rows // (h * d))
    channels = [(slice(i, i + h_step), slice(j, j + d_step))
                for i in range(0, h, h_step) for j in range(0, d, d_step)]
    return [slice(i, i + b_step) for i in range(0, b, b_step)], channels


def _cut(x, kernel, batch, heads, width):
    """One slab of x (b, n, h, d) and its kernels (b or 1, m, h) in the dtype to compute in."""
    dtype = _compute_dtype(x)
    kernel = kernel[None] if kernel.ndim == 2 else kernel[batch]
    return x[batch, :, heads, width].to(dtype), kernel[..., heads].to(dtype)


def _transform(x, length):
    """x (b, n, h, d) → its spectrum (b, h, channels, frequencies)."""
    if x.shape[-1] % 2:
        return torch.fft.rfft(x.contiguous().permute(0, 2, 3, 1), n=length)
    # A pair must begin at an even offset.
    x = x.clone(memory_format=torch.contiguous_format) if x.storage_offset() % 2 else x.contiguous()
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.fft.fft(pairs.permute(0, 2, 3, 1), n=length)


def _kernel_spectrum(kernel, length, real):
    """kernel (b, m, h) → (b, h, 1, frequencies)."""
    transform = torch.fft.rfft if real else torch.fft.fft
    return transform(kernel.transpose(1, 2).unsqueeze(2), n=length)


def _inverse(spectrum, length, n, real):
    """(b, h, channels, frequencies) → (b, n, h, d), contiguous: undoes `_transform`."""
    if real:
        return torch.fft.irfft(spectrum, n=length)[..., :n].permute(0, 3, 1, 2).contiguous()
    pairs = torch.fft.ifft(spectrum)[..., :n].permute(0, 3, 1, 2).contiguous()
    return torch.view_as_real(pairs).flatten(-2)


def _spectral_forward(x, kernel):
    """x (b, n, h, d), kernel (b or 1, m, h) → y (b, n, h, d)."""
    n, real = x.shape[1], x.shape[3] % 2 == 1
    length = _fft_length(n + kernel.shape[1] - 1)
    spectrum = _transform(x, length) * _kernel_spectrum(kernel, length, real)
    return _inverse(spectrum, length, n, real)


def _spectral_backward(grad, x, kernel):
    """grad, x (b, n, h, d), kernel (b or 1, m, h) → dx (b, n, h, d), dkernel (b, m, h)."""
    n, m, real = x.shape[1], kernel.shape[1], x.shape[3] % 2 == 1
    length = _fft_length(n + m - 1)
    grad = _transform(grad, length)
    lags = _transform(x, length).conj_physical_().mul_(grad).sum(dim=2)
    dkernel = torch.fft.irfft(lags, n=length) if real else torch.fft.ifft(lags).real
    grad.mul_(_kernel_spectrum(kernel, length, real).conj_physical_())
    dx = _inverse(grad, length, n, real)
    return dx, dkernel[..., :m].transpose(1, 2)


def _toeplitz(kernel, n):
    """kernel (b, m, h) → (b, h, n, n), row t and column s hold kernel_{t-s}."""
    lags = F.pad(kernel.transpose(1, 2), (n - 1, n - kernel.shape[1]))
    return lags.unfold(-1, n, 1).flip(-1)


def _toeplitz_forward(x, kernel, transposed=False):
    """x (b, n, h, d), kernel (b or 1, m, h) → y (b, n, h, d)."""
    matrix = _toeplitz(kernel, x.shape[1])
    layout = "bhst,bshd->bthd" if transposed else "bhts,bshd->bthd"
    return torch.einsum(layout, matrix, x).contiguous()


def _toeplitz_backward(grad, x, kernel):
    """grad, x (b, n, h, d), kernel (b or 1, m, h) → dx (b, n, h, d), dkernel (b, m, h)."""
    n, m = x.shape[1], kernel.shape[1]
    products = torch.einsum("bthd,bshd->bhts", grad, x.flip(1))
    # rows of 2n read as rows of 2n - 1: each row moves one further, diagonals become columns
    shifted = F.pad(products, (0, n)).flatten(2)[..., : n * (2 * n - 1)]
    dkernel = shifted.unflatten(-1, (n, 2 * n - 1)).sum(dim=2)[..., n - 1 : n - 1 + m]
    return _toeplitz_forward(grad, kernel, transposed=True), dkernel.transpose(1, 2)
