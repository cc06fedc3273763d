"""Twin of gated_state_spaces_pytorch.gss: diagonal state spaces in a gated block."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmix import _torch_private, ops
from fastmix._complex import times
from fastmix.checks import check_shape, check_tensor
from fastmix.dtypes import wide, wide_complex
from fastmix.nn._cache import Cache
from fastmix.nn._checks import check_sequence, check_sizes
from fastmix.nn._gated import run_gated
from fastmix.nn._language_model import run
from fastmix.ops._dss_step import dss_step
from fastmix.ops._register import no_autocast
from fastmix.states import may_write

__all__ = ["DSS", "GSS", "GatedStateSpacesLM"]

BLOCK = 512  # steps that share their powers


def _exponential(re: Tensor, im: Tensor) -> Tensor:
    """exp(re + i · im): its real and imaginary part, stacked in front.

    0 where it is so small that products with it would be subnormal, which take a processor some
    hundred times as long.
    """
    limits = torch.finfo(re.dtype)
    size = F.threshold(re, math.log(limits.tiny / limits.eps), -math.inf).exp()
    return torch.stack((size * im.cos(), size * im.sin()))


def _is_plain(x: Tensor) -> bool:
    """Whether operations on x are run one by one, and seen by autograd alone."""
    return type(x) is Tensor and not (
        torch.compiler.is_compiling() or torch.jit.is_tracing()
        or _torch_private.transforms_active() or _torch_private.forward_mode_active())


def _gains(re: Tensor, im: Tensor, c: Tensor) -> Tensor:
    """c_hk (exp(λ_k) - 1) / λ_k of λ = re + i · im (N,) and c (2, h, N): (2, N, h)."""
    e = _exponential(re, im)
    e = torch.stack((e[0] - 1, e[1]))
    return times(c, times(e, torch.stack((re, -im))) / (re.square() + im.square())).mT


def _kernel(re: Tensor, im: Tensor, c: Tensor, n: int) -> Tensor:
    """K_lh = Re Σ_k c_kh · exp(λ_k l), for all l < n and some beyond.

    λ = re + i · im (N,), gains c (2, N, h), real and imaginary part → (m, h), m ≥ n.
    With l = i · BLOCK + j, exp(λ l) = exp(λ · i · BLOCK) · exp(λ j). The first factor goes to c
    and a real product with the second, (N, BLOCK), gives all steps of a block: never are all
    powers of all λ there at once, (N, n). A λ whose powers have become 0 is left out.
    """
    if torch.compiler.is_compiling():  # one program for any n: none for n ≤ BLOCK, or one block
        blocks, block = n // BLOCK + 2, BLOCK
    else:
        blocks = -(-n // BLOCK)
        block = -(-n // blocks)
    c = c.transpose(0, 1)
    in_turns = blocks > 1 and _is_plain(re)
    if in_turns and re.device.type == "cpu":  # elsewhere to look would be to wait
        slowest_first = re.argsort(descending=True)
        re, im, c = (t.index_select(0, slowest_first) for t in (re, im, c))
    steps = torch.arange(block, device=re.device)
    powers = _exponential(re[:, None] * steps, im[:, None] * steps).transpose(0, 1)
    steps = block * torch.arange(blocks, device=re.device)
    starts = _exponential(re[:, None] * steps, im[:, None] * steps).transpose(0, 1)

    if in_turns:
        left = [len(re)] * blocks
        if re.device.type == "cpu":  # powers that are 0 stay so
            left = starts.any(dim=1).sum(dim=0).tolist()
        return _InTurns.apply(powers.contiguous(), starts, c, left)
    in_blocks = _from(c[..., None], starts[:, :, None])  # (N, 2, h, blocks)
    # A dynamic number of blocks can be split off at the end only.
    kernel = powers.flatten(0, 1).T @ in_blocks.flatten(0, 1).flatten(1)
    return kernel.unflatten(1, (c.shape[2], -1)).permute(2, 0, 1).flatten(0, 1)


def _from(c: Tensor, start: Tensor) -> Tensor:
    """c (N, 2, …) · start (N, 2, …), complex, as its real and minus its imaginary part: whose
    product with the powers' parts has the real part of the sum over N."""
    real = torch.addcmul(c[:, 0] * start[:, 0], c[:, 1], start[:, 1], value=-1)
    return torch.stack((real, torch.addcmul(c[:, 0] * -start[:, 1], c[:, 1], -start[:, 0])), 1)


class _InTurns(torch.autograd.Function):
    """One block after the other, of the first left[i] of N numbers, to (blocks · block, h).

    powers (N, 2, block), starts (N, 2, blocks), c (N, 2, h). Autograd would keep what each block
    is made from, as much as the powers of all steps; backward makes it again instead.
    """

    @staticmethod
    def forward(
        ctx: Any, powers: Tensor, starts: Tensor, c: Tensor, left: list[int]
    ) -> Tensor:
        ctx.save_for_backward(powers, starts, c)
        ctx.left = left
        kernel = c.new_empty(len(left), powers.shape[2], c.shape[2])
        for i, (k, out) in enumerate(zip(left, kernel)):
            torch.mm(powers[:k].flatten(0, 1).T,
                     _from(c[:k], starts[:k, :, i, None]).flatten(0, 1), out=out)
        return kernel.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        powers, starts, c = ctx.saved_tensors
        of_starts, of_powers, of_c = [], powers[:0], c[:0]
        blocks = grad.unflatten(0, (len(ctx.left), -1))
        with no_autocast([c]):
            for i, k in reversed(list(enumerate(ctx.left))):
                start = starts[:k, :, i, None]
                mixed = _from(c[:k], start).flatten(0, 1)
                new = (mixed @ blocks[i].T).unflatten(0, (k, 2))
                of_powers = _with_zeros(of_powers, k) + new
                new = (powers[:k].flatten(0, 1) @ blocks[i]).unflatten(0, (k, 2))
                # _from is linear in both, and its own transpose.
                of_c = _with_zeros(of_c, k) + _from(new, start)
                new = _from(new, c[:k]).sum(dim=2, keepdim=True)
                of_starts.append(_with_zeros(new, len(c)))
        of_powers, of_c = (_with_zeros(t, len(c)) for t in (of_powers, of_c))
        return of_powers, torch.cat(of_starts[::-1], dim=2), of_c, None


def _with_zeros(x: Tensor, length: int) -> Tensor:
    """x (k, …) and zeros, (length, …)."""
    return x if len(x) == length else torch.cat((x, x.new_zeros(length - len(x), *x.shape[1:])))


def _rates(dss: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The real and imaginary part of λ, and the gains, of a DSS, ours or the published one.

    In float32 at least: rounded rates of decay forget at other times.
    """
    re, im = _rate(dss)
    return re, im, _gains(re, im, torch.stack((dss.C_real, dss.C_imag)).to(re.dtype))


def _rate(dss: Any) -> tuple[Tensor, Tensor]:
    dtype = wide(dss.C_real.dtype)
    re, im = -dss.Lambda_real.to(dtype).exp(), dss.Lambda_imag.to(dtype)
    return re, im.exp() if dss.dss_kernel_lambda_imag_exp else im


def convolve(dss: Any, x: Tensor, n: int) -> Tensor:
    """The convolution of a DSS, ours or the published one, with x (b, n, dim)."""
    u = dss.norm(x)
    with no_autocast([x]):
        kernel = _kernel(*_rates(dss), n)
    return _convolve(dss, u, kernel)


def _convolve(dss: Any, u: Tensor, kernel: Tensor) -> Tensor:
    return ops.fft_conv(u.unsqueeze(-1), kernel, dss.param_D.unsqueeze(-1)).squeeze(-1)


def _go_on(dss: "DSS", u: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The convolution with u (b, n, dim), normed, and the state after it.

    The state, (b, dim, N), is z_hk = Σ_j exp(λ_k (n - 1 - j)) u_jh of all steps so far: what they
    add to the output t steps after the last of them is Re Σ_k c_kh exp(λ_k t) z_hk.
    """
    with no_autocast([u]):
        if state is not None and u.shape[1] == 1:
            return _step(dss, u, state)
        re, im, c = _rates(dss)
        after = _state_after(re, im, u.to(re.dtype), state)
        kernel = _kernel(re, im, c, u.shape[1])
    out = _convolve(dss, u, kernel)
    if state is not None:
        with no_autocast([u]):
            gains = torch.complex(*c).mT
            out = (out + _of_state(re, im, gains * state, u.shape[1])).to(u.dtype)
    return out, after


def _step(dss: "DSS", u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`_go_on` by one step: what the parameters alone say is made anew for each, but only what is
    as small as λ, (N,). The gains are c_hk (exp(λ_k) - 1) / λ_k; the state takes the factors.
    """
    re, im = _rate(dss)
    power = torch.complex(*_exponential(re, im))
    factor = (power - 1) / torch.complex(re, im)
    return dss_step(state, u, power, factor, dss.C_real, dss.C_imag, dss.param_D,
                    may_write(state))


def _state_after(re: Tensor, im: Tensor, u: Tensor, state: Tensor | None) -> Tensor:
    """Block by block, each with those λ alone whose powers until the end are not 0, the slowest."""
    left, n, order = len(re), u.shape[1], None
    looks = n > BLOCK and re.device.type == "cpu" and _is_plain(re) and all(
        bool(x.isfinite().all()) for x in (u, state) if x is not None)  # 0 · ∞ is to stay NaN
    if looks:
        order = re.argsort(descending=True)
        re, im, state = re[order], im[order], None if state is None else state[..., order]
    longest, end = min(BLOCK, n), 0
    ages = torch.arange(longest - 1, -1, -1, device=u.device)[:, None]
    powers = _exponential(re * ages, im * ages)  # (2, longest, N)
    for block in u.split(BLOCK, dim=1):
        m = block.shape[1]
        end += m
        if looks:
            left = int(_exponential(re * (n - end), im * (n - end)).any(dim=0).sum())
        new = torch.complex(*(block.mT @ part[longest - m :, :left] for part in powers))
        if state is not None:
            before = F.pad(state, (0, left - state.shape[-1]))
            new = new + torch.complex(*_exponential(m * re[:left], m * im[:left])) * before
        state = new
    assert state is not None  # there is a block
    return state if order is None else state[..., order.argsort()]


def _of_state(re: Tensor, im: Tensor, weighed: Tensor, n: int) -> Tensor:
    """Re Σ_k weighed_bhk · exp(λ_k t) for t from 1 to n: (b, n, h)."""
    parts = []
    for steps in torch.arange(1, n + 1, device=re.device).split(BLOCK):
        powers = _exponential(re[:, None] * steps, im[:, None] * steps)  # (2, N, steps)
        parts.append((weighed.real @ powers[0] - weighed.imag @ powers[1]).mT)
    return torch.cat(parts, dim=1)


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
        self.kernel_N = kernel_N
        self.norm = nn.LayerNorm(dim)
        self.Lambda_real = nn.Parameter(torch.randn(kernel_N))
        self.Lambda_imag = nn.Parameter(torch.randn(kernel_N))
        self.C_real = nn.Parameter(torch.randn(dim, kernel_N))
        self.C_imag = nn.Parameter(torch.randn(dim, kernel_N))
        self.param_D = nn.Parameter(torch.randn(dim))
        self.dss_kernel_lambda_imag_exp = dss_kernel_lambda_imag_exp

    def forward(
        self, x: Tensor, *, cache: Cache = None, return_cache: bool = False
    ) -> Tensor | tuple[Tensor, Cache]:
        n = check_sequence("DSS", x, self.dim)
        if cache is None and not return_cache:
            return convolve(self, x, n)
        if cache is not None:
            check_tensor("DSS", "cache", cache, (wide_complex(self.C_real.dtype),), like=("x", x))
            check_shape("DSS", "cache", cache, "b dim kernel_N",
                        {"b": x.shape[0], "dim": self.dim, "kernel_N": self.kernel_N})
        out, cache = _go_on(self, self.norm(x), cache)
        return (out, cache) if return_cache else out


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

    def forward(
        self, x: Tensor, *, cache: Cache = None, return_cache: bool = False
    ) -> Tensor | tuple[Tensor, Cache]:
        return run_gated("GSS", self, self.dss, x, cache, return_cache, self.reverse_seq)


class GatedStateSpacesLM(nn.Module):
    """A language model of `depth` GSS blocks.

    x (b, n) token ids, int64 or int32 → logits (b, n, num_tokens), or with labels (b, n),
    int64, their mean cross entropy. Any n ≥ 1. With return_cache also a cache, from which a
    later call goes on.
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

    def forward(
        self, x: Tensor, labels: Tensor | None = None, *, cache: Cache = None,
        return_cache: bool = False,
    ) -> Tensor | tuple[Tensor, Cache]:
        return run("GatedStateSpacesLM", self, x, labels, cache, return_cache)
