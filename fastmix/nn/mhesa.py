"""Twin of gated_state_spaces_pytorch.mhesa: exponential smoothing heads in a gated block."""

import torch
from torch import Tensor, nn

from fastmix import ops
from fastmix.checks import check_divides
from fastmix.dtypes import wide
from fastmix.nn._cache import Cache, call_operator, refuse_reversed
from fastmix.nn._checks import check_sequence, check_sizes
from fastmix.nn._conv1d_fft import conv1d_fft
from fastmix.nn._gated import run_gated
from fastmix.nn._language_model import run

__all__ = ["conv1d_fft", "MHESA", "GatedMHESA", "GatedExponentialSmoothingLM"]


class MHESA(nn.Module):
    """Exponential smoothing along time, one decay per head, plus a learned skip.

    y_t = (1 - α_h) δ_h y_{t-1} + α_h u_t of the layer-normed input u, α = σ(alphas) and
    δ = σ(dampen_factors); returns y + param_D · u. reverse_seq runs it from the end.
    x (b, n, dim) → (b, n, dim). ValueError unless heads divides dim. ETSformer,
    arXiv:2202.01381.
    """

    def __init__(self, *, dim: int, heads: int, reverse_seq: bool = False) -> None:
        super().__init__()
        check_sizes("MHESA", dim=dim)
        check_divides("MHESA", "heads", heads, "dim", dim)
        self.dim = dim
        self.heads = heads
        self.reverse_seq = reverse_seq
        self.norm = nn.LayerNorm(dim)
        self.alphas = nn.Parameter(torch.randn(heads))
        self.dampen_factors = nn.Parameter(torch.randn(heads))
        self.param_D = nn.Parameter(torch.randn(dim))

    def forward(
        self, x: Tensor, *, cache: Cache = None, return_cache: bool = False
    ) -> Tensor | tuple[Tensor, Cache]:
        check_sequence("MHESA", x, self.dim)
        if self.reverse_seq:
            refuse_reversed("MHESA", cache, return_cache)
        u = self.norm(x.flip(1) if self.reverse_seq else x)
        # In float32 at least: 1 - α of a slow head is 1 in bfloat16.
        alpha = self.alphas.to(wide(self.alphas.dtype)).sigmoid()
        dampening = self.dampen_factors.to(wide(self.dampen_factors.dtype)).sigmoid()
        decay = (1 - alpha) * dampening
        smooth, cache = call_operator(
            ops.decay_conv, u.unflatten(-1, (self.heads, -1)), decay, alpha, cache=cache,
            return_cache=return_cache)
        out = torch.addcmul(smooth.flatten(-2), u, self.param_D)
        if self.reverse_seq:
            out = out.flip(1)
        return (out, cache) if return_cache else out


class GatedMHESA(nn.Module):
    """A gated block around MHESA, with its residual: x (b, n, dim) → (b, n, dim).

    The smoothing runs dim_mhesa wide, the gate int(dim_expansion_factor · dim) wide.
    ValueError unless heads divides dim_mhesa. Gated State Spaces, arXiv:2206.13947, with
    smoothing in the place of the state space.
    """

    def __init__(
        self, *, dim: int, heads: int = 8, dim_mhesa: int = 512, dim_expansion_factor: float = 4
    ) -> None:
        super().__init__()
        check_sizes("GatedMHESA", dim_mhesa=dim_mhesa)
        check_divides("GatedMHESA", "heads", heads, "dim_mhesa", dim_mhesa)
        dim_hidden = int(dim_expansion_factor * dim)
        self.dim = dim
        self.norm = nn.LayerNorm(dim)
        self.to_u = nn.Sequential(nn.Linear(dim, dim_hidden, bias=False), nn.GELU())
        self.to_v = nn.Sequential(nn.Linear(dim, dim_mhesa, bias=False), nn.GELU())
        self.mhesa = MHESA(dim=dim_mhesa, heads=heads)
        self.to_gate = nn.Linear(dim_mhesa, dim_hidden, bias=False)
        self.to_out = nn.Linear(dim_hidden, dim)

    def forward(
        self, x: Tensor, *, cache: Cache = None, return_cache: bool = False
    ) -> Tensor | tuple[Tensor, Cache]:
        return run_gated("GatedMHESA", self, self.mhesa, x, cache, return_cache)


class GatedExponentialSmoothingLM(nn.Module):
    """A language model of `depth` GatedMHESA blocks.

    x (b, n) token ids, int64 or int32 → logits (b, n, num_tokens), or with labels (b, n),
    int64, their mean cross entropy. Any n ≥ 1. With return_cache also a cache, from which a
    later call goes on.
    """

    def __init__(
        self, *, num_tokens: int, dim: int, depth: int, heads: int = 8, dim_mhesa: int = 512,
        dim_expansion_factor: float = 4
    ) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.layers = nn.ModuleList(
            GatedMHESA(dim=dim, heads=heads, dim_mhesa=dim_mhesa,
                       dim_expansion_factor=dim_expansion_factor)
            for _ in range(depth))
        self.to_logits = nn.Linear(dim, num_tokens, bias=False)

    def forward(
        self, x: Tensor, labels: Tensor | None = None, *, cache: Cache = None,
        return_cache: bool = False,
    ) -> Tensor | tuple[Tensor, Cache]:
        return run("GatedExponentialSmoothingLM", self, x, labels, cache, return_cache)
