"""Twin of gated_state_spaces_pytorch.gss: diagonal state spaces in a gated block."""

from typing import Any

import torch
from torch import Tensor, nn

from fastmix import _torch_private, ops
from fastmix.checks import wide
from fastmix.nn._checks import check_sequence, check_sizes, embed_tokens
from fastmix.nn._loss import token_loss
from fastmix.ops._register import no_autocast

__all__ = ["DSS", "GSS", "GatedStateSpacesLM"]

BLOCK = 512  # steps of the kernel that share their powers


def _exponential(re: Tensor, im: Tensor) -> Tensor:
    """exp(re + i · im): its real and imaginary part, stacked in front."""
    size = re.exp()
    return torch.stack((size * im.cos(), size * im.sin()))


def _times(x: Tensor, y: Tensor) -> Tensor:
    """The product of two complex numbers in real and imaginary part."""
    return torch.stack((x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]))


def _is_readable(x: Tensor) -> bool:
    """Whether to look at values is possible, and costs no wait."""
    return type(x) is Tensor and x.device.type == "cpu" and not (
        torch.compiler.is_compiling() or torch.jit.is_tracing()
        or _torch_private.transforms_active())


def _kernel(re: Tensor, im: Tensor, c: Tensor, n: int) -> Tensor:
    """K_lh = Re Σ_k c_hk (exp(λ_k) - 1) / λ_k · exp(λ_k l), for all l < n and some beyond.

    λ = re + i · im (N,), c (2, h, N), real and imaginary part → (m, h), m ≥ n.
    With l = i · BLOCK + j, exp(λ l) = exp(λ · i · BLOCK) · exp(λ j). The first factor goes to c
    and a real product with the second, (N, BLOCK), gives all steps of a block: never are all
    powers of all λ there at once, (N, n). A λ whose powers have become 0 is left out.
    """
    if torch.compiler.is_compiling():  # one program for any n: none for n ≤ BLOCK, or one block
        blocks, block = n // BLOCK + 2, BLOCK
    else:
        blocks = -(-n // BLOCK)
        block = -(-n // blocks)
    e = _exponential(re, im)
    e = torch.stack((e[0] - 1, e[1]))
    c = _times(c, _times(e, torch.stack((re, -im))) / (re.square() + im.square())).mT  # (2, N, h)
    powers = _exponential(*(t[:, None] * torch.arange(block, device=t.device) for t in (re, im)))
    starts = _exponential(
        *(t[:, None] * (block * torch.arange(blocks, device=t.device)) for t in (re, im)))

    if _is_readable(re):
        rows = []
        for i in range(blocks):
            left = starts[:, :, i].any(dim=0)
            if not left.all():  # powers that are 0 stay so
                left = left.nonzero().flatten()
                c, powers, starts = c[:, left], powers[:, left], starts[:, left]
            in_block = _times(c, starts[:, :, i, None])
            rows.append(torch.cat((powers[0], powers[1])).T
                        @ torch.cat((in_block[0], -in_block[1])))
        return torch.cat(rows)
    in_blocks = _times(c[:, :, None], starts[..., None])  # (2, N, blocks, h)
    in_blocks = torch.cat((in_blocks[0], -in_blocks[1])).transpose(1, 2)
    # A dynamic number of blocks can be split off at the end only.
    kernel = torch.cat((powers[0], powers[1])).T @ in_blocks.flatten(1)
    return kernel.unflatten(1, (c.shape[2], -1)).permute(2, 0, 1).flatten(0, 1)


def convolve(dss: Any, x: Tensor, n: int) -> Tensor:
    """The convolution of a DSS, ours or the published one, with x (b, n, dim)."""
    u = dss.norm(x)
    # In float32 at least, autocast or not: rounded rates of decay forget at other times.
    with no_autocast([x]):
        dtype = wide(dss.C_real.dtype)
        im = dss.Lambda_imag.to(dtype)
        kernel = _kernel(
            -dss.Lambda_real.to(dtype).exp(), im.exp() if dss.dss_kernel_lambda_imag_exp else im,
            torch.stack((dss.C_real, dss.C_imag)).to(dtype), n)
    return ops.fft_conv(u.unsqueeze(-1), kernel, dss.param_D.unsqueeze(-1)).squeeze(-1)


class DSS(nn.Module):
    """A diagonal state space per channel, as one long convolution, plus a learned skip.

    The kernel of a channel is the real part of a sum of kernel_N complex exponentials, whose
    rates λ = -exp(Lambda_real) + i · exp(Lambda_imag) all channels share (+ i · Lambda_imag
    unless `dss_kernel_lambda_imag_exp`). It runs over the layer-normed input u; returns it plus
    param_D · u. x (b, n, dim) → (b, n, dim). Diagonal State Spaces, arXiv:2203.14343.
    """

    def __init__(
        self, *, dim: int, kernel_N: int = 512, dss_kernel_lambda_imag_exp: bool = True
    ) -> None:
        super().__init__()
        check_sizes("DSS", dim=dim, kernel_N=kernel_N)
        self.dim = dim
        self.norm = nn.LayerNorm(dim)
        self.Lambda_real = nn.Parameter(torch.randn(kernel_N))
        self.Lambda_imag = nn.Parameter(torch.randn(kernel_N))
        self.C_real = nn.Parameter(torch.randn(dim, kernel_N))
        self.C_imag = nn.Parameter(torch.randn(dim, kernel_N))
        self.param_D = nn.Parameter(torch.randn(dim))
        self.dss_kernel_lambda_imag_exp = dss_kernel_lambda_imag_exp

    def forward(self, x: Tensor) -> Tensor:
        n = check_sequence("DSS", x, self.dim)
        return convolve(self, x, n)


class GSS(nn.Module):
    """A gated block around DSS, with its residual: x (b, n, dim) → (b, n, dim).

    The state space runs dss_kernel_H wide with dss_kernel_N exponentials, the gate
    int(dim_expansion_factor · dim) wide; reverse_seq runs it from the end. Gated State Spaces,
    arXiv:2206.13947.
    """

    def __init__(
        self, *, dim: int, dim_expansion_factor: float = 4, dss_kernel_N: int = 512,
        dss_kernel_H: int = 256, reverse_seq: bool = False,
        dss_kernel_lambda_imag_exp: bool = True
    ) -> None:
        super().__init__()
        check_sizes("GSS", dss_kernel_N=dss_kernel_N, dss_kernel_H=dss_kernel_H)
        dim_hidden = int(dim_expansion_factor * dim)
        self.dim = dim
        self.reverse_seq = reverse_seq
        self.norm = nn.LayerNorm(dim)
        self.to_u = nn.Sequential(nn.Linear(dim, dim_hidden, bias=False), nn.GELU())
        self.to_v = nn.Sequential(nn.Linear(dim, dss_kernel_H, bias=False), nn.GELU())
        self.dss = DSS(dim=dss_kernel_H, kernel_N=dss_kernel_N,
                       dss_kernel_lambda_imag_exp=dss_kernel_lambda_imag_exp)
        self.to_gate = nn.Linear(dss_kernel_H, dim_hidden, bias=False)
        self.to_out = nn.Linear(dim_hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        check_sequence("GSS", x, self.dim)
        if self.reverse_seq:
            x = x.flip(1)
        normed = self.norm(x)
        gate = self.to_gate(self.dss(self.to_v(normed)))
        out = self.to_out(gate * self.to_u(normed)) + x
        return out.flip(1) if self.reverse_seq else out


class GatedStateSpacesLM(nn.Module):
    """A language model of `depth` GSS blocks.

    x (b, n) token ids, int64 or int32 → logits (b, n, num_tokens), or with labels (b, n),
    int64, their mean cross entropy. Any n ≥ 1.
    """

    def __init__(
        self, *, num_tokens: int, dim: int, depth: int, dim_expansion_factor: float = 4,
        dss_kernel_N: int = 512, dss_kernel_H: int = 256,
        dss_kernel_lambda_imag_exp: bool = True
    ) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.layers = nn.ModuleList(
            GSS(dim=dim, dss_kernel_H=dss_kernel_H, dss_kernel_N=dss_kernel_N,
                dim_expansion_factor=dim_expansion_factor,
                dss_kernel_lambda_imag_exp=dss_kernel_lambda_imag_exp)
            for _ in range(depth))
        self.to_logits = nn.Linear(dim, num_tokens, bias=False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        where = "GatedStateSpacesLM"
        x = embed_tokens(where, self.token_emb, x)
        for layer in self.layers:
            x = layer(x)
        logits = self.to_logits(x)
        return logits if labels is None else token_loss(where, logits, labels)
