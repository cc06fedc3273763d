"""Twin of gated_state_spaces_pytorch.dsconv: convolutions that the input itself computes."""

import torch
from torch import Tensor, nn

from fastmix import ops
from fastmix.checks import check_divides
from fastmix.nn._cache import Cache, call_operator
from fastmix.nn._checks import check_sequence, check_sizes
from fastmix.nn._conv1d_fft import conv1d_fft
from fastmix.nn._gated import run_gated
from fastmix.nn._language_model import run

__all__ = ["conv1d_fft", "EfficientDsConv", "GatedDsConv", "GatedDsConvLM"]


class EfficientDsConv(nn.Module):
    """A causal convolution per head, as long as the sequence, plus a learned skip.

    The kernel is a linear map of x, (b, n, heads): lag l is weighed by what x_l says. It
    runs over the layer-normed input u; returns it plus param_D · u. x (b, n, dim) →
    (b, n, dim). ValueError unless heads divides dim.
    """

    def __init__(self, *, dim: int, heads: int) -> None:
        super().__init__()
        check_sizes("EfficientDsConv", dim=dim)
        check_divides("EfficientDsConv", "heads", heads, "dim", dim)
        self.dim = dim
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.to_weight = nn.Linear(dim, heads, bias=False)
        self.param_D = nn.Parameter(torch.randn(dim))

    def forward(
        self, x: Tensor, *, cache: Cache = None, return_cache: bool = False
    ) -> Tensor | tuple[Tensor, Cache]:
        check_sequence("EfficientDsConv", x, self.dim)
        u = self.norm(x)
        heads = u.unflatten(-1, (self.heads, -1))
        kernel = self.to_weight(x)
        skip = self.param_D.unflatten(0, (self.heads, -1))
        out, cache = call_operator(
            ops.fft_conv, heads, kernel, skip, cache=cache, return_cache=return_cache,
            revealed=cache is not None or return_cache)
        out = out.flatten(-2)
        return (out, cache) if return_cache else out


class GatedDsConv(nn.Module):
    """A gated block around EfficientDsConv, with its residual: x (b, n, dim) → (b, n, dim).

    The convolution runs dim_dsconv wide, the gate int(dim_expansion_factor · dim) wide;
    reverse_seq runs it from the end. ValueError unless heads divides dim_dsconv. Gated
    State Spaces, arXiv:2206.13947, with a convolution in the place of the state space.
    """

    def __init__(
        self, *, dim: int, heads: int = 8, dim_dsconv: int = 512,
        dim_expansion_factor: float = 4, reverse_seq: bool = False
    ) -> None:
        super().__init__()
        check_sizes("GatedDsConv", dim_dsconv=dim_dsconv)
        check_divides("GatedDsConv", "heads", heads, "dim_dsconv", dim_dsconv)
        dim_hidden = int(dim_expansion_factor * dim)
        self.dim = dim
        self.reverse_seq = reverse_seq
        self.norm = nn.LayerNorm(dim)
        self.to_u = nn.Sequential(nn.Linear(dim, dim_hidden, bias=False), nn.GELU())
        self.to_v = nn.Sequential(nn.Linear(dim, dim_dsconv, bias=False), nn.GELU())
        self.dsconv = EfficientDsConv(dim=dim_dsconv, heads=heads)
        self.to_gate = nn.Linear(dim_dsconv, dim_hidden, bias=False)
        self.to_out = nn.Linear(dim_hidden, dim)

    def forward(
        self, x: Tensor, *, cache: Cache = None, return_cache: bool = False
    ) -> Tensor | tuple[Tensor, Cache]:
        return run_gated("GatedDsConv", self, self.dsconv, x, cache, return_cache, self.reverse_seq)


class GatedDsConvLM(nn.Module):
    """A language model of `depth` GatedDsConv blocks.

    x (b, n) token ids, int64 or int32, 1 ≤ n ≤ max_seq_len → logits (b, n, num_tokens),
    or with labels (b, n), int64, their mean cross entropy. With return_cache also a cache, from
    which a later call goes on, up to max_seq_len in all.
    """

    def __init__(
        self, *, num_tokens: int, dim: int, depth: int, heads: int = 8, dim_dsconv: int = 512,
        max_seq_len: int = 2048, dim_expansion_factor: float = 4
    ) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.layers = nn.ModuleList(
            GatedDsConv(dim=dim, heads=heads, dim_dsconv=dim_dsconv,
                        dim_expansion_factor=dim_expansion_factor)
            for _ in range(depth))
        self.to_logits = nn.Linear(dim, num_tokens, bias=False)

    def forward(
        self, x: Tensor, labels: Tensor | None = None, *, cache: Cache = None,
        return_cache: bool = False,
    ) -> Tensor | tuple[Tensor, Cache]:
        return run("GatedDsConvLM", self, x, labels, cache, return_cache, self.max_seq_len)
