"""Twin of gated_state_spaces_pytorch.mhesa: exponential smoothing heads in a gated block."""

import torch
import torch.nn.functional as F
from torch import nn

from fastmix import ops
from fastmix.checks import (
    check_divides, check_length, check_shape, check_tensor, check_tokens)
from fastmix.nn._checks import check_sequence, check_sizes

__all__ = ["conv1d_fft", "MHESA", "GatedMHESA", "GatedExponentialSmoothingLM"]


def token_loss(where, logits, labels):
    """Mean cross entropy of logits (b, n, num_tokens) at labels (b, n), int64, b ≥ 1."""
    check_tensor(where, "labels", labels, (torch.int64,), like=("x", logits))
    b, n, _ = logits.shape
    check_shape(where, "labels", labels, "b n", {"b": b, "n": n})
    if b < 1:
        raise ValueError(
            f"{where}: labels must hold at least 1 sequence, got shape {tuple(labels.shape)}")
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def time_axis(name, tensor, dim_name, dim):
    """The axis `dim` of `tensor`, counted from the end."""
    check_tensor("conv1d_fft", name, tensor)
    if not -tensor.ndim <= dim < tensor.ndim:
        raise ValueError(
            f"conv1d_fft: {dim_name} must be an axis of {name}, got {dim_name}={dim} "
            f"and {name} of shape {tuple(tensor.shape)}")
    check_length("conv1d_fft", name, tensor.shape[dim])
    return dim % tensor.ndim - tensor.ndim


def axes_error(expected, x, dim, weights, weight_dim):
    return ValueError(
        f"conv1d_fft: {expected}, got x of shape {tuple(x.shape)} with dim={dim} and weights of "
        f"shape {tuple(weights.shape)} with weight_dim={weight_dim}")


def fast_length(n):
    """The smallest length ≥ n without prime factors above 5, as scipy.fftpack chooses it."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1


def conv1d_fft(x, weights, dim=-2, weight_dim=-1):
    """out_i = Σ_j weights_{n-1-i+j} · x_j, a convolution that ends with the last weight.

    With m = n weights it is causal; weights beyond n look ahead. With m < n the original's
    FFT comes full circle, after fast_length(n + m - 1) points: some of the first n - m
    outputs then hold what belongs behind the end of the sequence, and so they do here.

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


class MHESA(nn.Module):
    """Exponential smoothing along time, one decay per head, plus a learned skip.

    y_t = (1 - α_h) δ_h y_{t-1} + α_h u_t of the layer-normed input u, α = σ(alphas) and
    δ = σ(dampen_factors); returns y + param_D · u. reverse_seq runs it from the end.
    x (b, n, dim) → (b, n, dim). ValueError unless heads divides dim. ETSformer,
    arXiv:2202.01381.
    """

    def __init__(self, *, dim, heads, reverse_seq=False):
        super().__init__()
        check_sizes("MHESA", dim=dim)
        check_divides("MHESA", "heads", heads, "dim", dim)
        self.heads = heads
        self.reverse_seq = reverse_seq
        self.norm = nn.LayerNorm(dim)
        self.alphas = nn.Parameter(torch.randn(heads))
        self.dampen_factors = nn.Parameter(torch.randn(heads))
        self.param_D = nn.Parameter(torch.randn(dim))

    def forward(self, x):
        check_sequence(self, x, self.norm.normalized_shape[0])
        u = self.norm(x.flip(1) if self.reverse_seq else x)
        alpha = self.alphas.sigmoid()
        decay = (1 - alpha) * self.dampen_factors.sigmoid()
        smooth = ops.decay_conv(u.unflatten(-1, (self.heads, -1)), decay, alpha).flatten(-2)
        out = torch.addcmul(smooth, u, self.param_D)
        return out.flip(1) if self.reverse_seq else out


class GatedMHESA(nn.Module):
    """A gated block around MHESA, with its residual: x (b, n, dim) → (b, n, dim).

    The smoothing runs dim_mhesa wide, the gate int(dim_expansion_factor · dim) wide.
    ValueError unless heads divides dim_mhesa. Gated State Spaces, arXiv:2206.13947, with
    smoothing in the place of the state space.
    """

    def __init__(self, *, dim, heads=8, dim_mhesa=512, dim_expansion_factor=4):
        super().__init__()
        check_sizes("GatedMHESA", dim_mhesa=dim_mhesa)
        check_divides("GatedMHESA", "heads", heads, "dim_mhesa", dim_mhesa)
        dim_hidden = int(dim_expansion_factor * dim)
        self.norm = nn.LayerNorm(dim)
        self.to_u = nn.Sequential(nn.Linear(dim, dim_hidden, bias=False), nn.GELU())
        self.to_v = nn.Sequential(nn.Linear(dim, dim_mhesa, bias=False), nn.GELU())
        self.mhesa = MHESA(dim=dim_mhesa, heads=heads)
        self.to_gate = nn.Linear(dim_mhesa, dim_hidden, bias=False)
        self.to_out = nn.Linear(dim_hidden, dim)

    def forward(self, x):
        check_sequence(self, x, self.norm.normalized_shape[0])
        normed = self.norm(x)
        gate = self.to_gate(self.mhesa(self.to_v(normed)))
        return self.to_out(gate * self.to_u(normed)) + x


class GatedExponentialSmoothingLM(nn.Module):
    """A language model of `depth` GatedMHESA blocks.

    x (b, n) token ids, int64 or int32 → logits (b, n, num_tokens), or with labels (b, n),
    int64, their mean cross entropy. Any n ≥ 1.
    """

    def __init__(
        self, *, num_tokens, dim, depth, heads=8, dim_mhesa=512, dim_expansion_factor=4
    ):
        super().__init__()
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.layers = nn.ModuleList(
            GatedMHESA(dim=dim, heads=heads, dim_mhesa=dim_mhesa,
                       dim_expansion_factor=dim_expansion_factor)
            for _ in range(depth))
        self.to_logits = nn.Linear(dim, num_tokens, bias=False)

    def forward(self, x, labels=None):
        where = "GatedExponentialSmoothingLM"
        check_tokens(where, "x", x, self.token_emb)
        x = self.token_emb(x)
        for layer in self.layers:
            x = layer(x)
        logits = self.to_logits(x)
        return logits if labels is None else token_loss(where, logits, labels)
