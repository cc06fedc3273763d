"""Twin of metaformer_gpt.metaformer_gpt: exponential averages and running means in a GPT."""

from typing import Any

import torch
from torch import Tensor, nn

from fastmix import ops
from fastmix.checks import INTEGER, REAL, check_length, check_tensor
from fastmix.dtypes import wide
from fastmix.nn import _conv1d_fft
from fastmix.nn._cache import (
    Cache,
    ModelCache,
    call,
    call_operator,
    split_cache,
    split_model_cache,
    use_up,
)
from fastmix.nn._checks import check_sequence, check_sizes, embed_tokens, feed_forward

__all__ = ["cummean", "conv1d_fft", "MeanCenteringPool", "MultiheadExponentialTimeDecay",
           "FeedForward", "MetaformerGPT"]

COUNTS = (*INTEGER, torch.int16, torch.int8, torch.uint8, torch.bool)


def cummean(x: Tensor, *, dim: int) -> Tensor:
    """The mean of everything up to each step along dim, the last axis but one.

    x (…, n, d), floating; for integers and bools the means come in the default dtype.
    The original divides by 1 … x.shape[1], which is the mean only where n = x.shape[1], as
    in (b, n, d). ValueError for any other dim or shape.
    """
    check_tensor("cummean", "x", x, (*REAL, *COUNTS))
    if x.ndim < 2 or dim not in (-2, x.ndim - 2) or x.shape[-2] != x.shape[1]:
        raise ValueError(
            "cummean: dim must be the last axis but one of x and as long as axis 1, "
            f"as dim=1 of (b, n, d) is, got dim={dim} and x of shape {tuple(x.shape)}")
    check_length("cummean", "x", x.shape[-2])
    if x.dtype in COUNTS:
        return cummean(x.double(), dim=dim).to(torch.get_default_dtype())
    batch = x.shape[:-2].numel()
    return ops.cumulative_mean(x.reshape(batch, *x.shape[-2:])).reshape(x.shape)


def conv1d_fft(x: Tensor, weights: Tensor, dim: int = -2, weight_dim: int = -1) -> Tensor:
    """fastmix.nn.mhesa.conv1d_fft, but weights always gets one trailing axis.

    x (…, n, …), n at dim; weights (…, m, …), m at weight_dim. ValueError unless weight_dim,
    counted from the end, is one axis after dim.
    """
    time = _conv1d_fft.time_axis("x", x, "dim", dim)
    weight_time = _conv1d_fft.time_axis("weights", weights, "weight_dim", weight_dim)
    if weight_time != time + 1 or (dim >= 0 and weights.ndim >= x.ndim):
        raise _conv1d_fft.axes_error(
            "weight_dim must meet dim once weights has one more axis (and then no more than x, "
            "if dim ≥ 0)", x, dim, weights, weight_dim)
    return _conv1d_fft.conv1d_fft(x, weights, time, weight_time)


class MeanCenteringPool(nn.Module):
    """Projects the difference of the mean so far and each step: x (b, n, dim) → (b, n, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(
        self, x: Tensor, *, cache: Cache = None, return_cache: bool = False
    ) -> Tensor | tuple[Tensor, Cache]:
        check_sequence("MeanCenteringPool", x, self.dim)
        x = self.norm(x)
        mean, cache = call_operator(ops.cumulative_mean, x, cache=cache, return_cache=return_cache)
        out = self.proj(mean - x)
        return (out, cache) if return_cache else out


class MultiheadExponentialTimeDecay(nn.Module):
    """An exponential average along time, one learned α per head.

    y_t = (1 - α_h) y_{t-1} + α_h u_t over heads · dim_head channels, α = σ(alpha), between
    a LayerNorm and linear maps in and out. x (b, n, dim) → (b, n, dim). ValueError for no
    heads or heads of no channels.
    """

    def __init__(self, dim: int, *, heads: int = 8, dim_head: int = 64) -> None:
        super().__init__()
        check_sizes("MultiheadExponentialTimeDecay", heads=heads, dim_head=dim_head)
        self.dim = dim
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.alpha = nn.Parameter(torch.randn(heads))
        self.project_in = nn.Linear(dim, heads * dim_head, bias=False)
        self.project_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(
        self, x: Tensor, *, cache: Cache = None, return_cache: bool = False
    ) -> Tensor | tuple[Tensor, Cache]:
        check_sequence("MultiheadExponentialTimeDecay", x, self.dim)
        u = self.project_in(self.norm(x)).unflatten(-1, (self.heads, -1))
        # In float32 at least: 1 - α of a slow head is 1 in bfloat16.
        alpha = self.alpha.to(wide(self.alpha.dtype)).sigmoid()
        average, cache = call_operator(
            ops.decay_conv, u, 1 - alpha, alpha, cache=cache, return_cache=return_cache)
        out = self.project_out(average.flatten(-2))
        return (out, cache) if return_cache else out


def FeedForward(dim: int, mult: float = 4) -> nn.Sequential:
    """LayerNorm, then two bias-free linear maps around a GELU, int(dim · mult) wide, as an
    nn.Sequential: x (…, dim) → (…, dim). ValueError for another width.
    """
    hidden_dim = int(dim * mult)
    return feed_forward(
        dim,
        nn.LayerNorm(dim),
        nn.Linear(dim, hidden_dim, bias=False),
        nn.GELU(),
        nn.Linear(hidden_dim, dim, bias=False))


class MetaformerGPT(nn.Module):
    """A language model of `depth` layers: exponential average, mean centering, feedforward.

    x (b, n) token ids, int64 or int32, 1 ≤ n ≤ max_seq_len → logits (b, n, num_tokens). With
    return_cache also a cache, from which a later call goes on, up to max_seq_len in all. A longer
    embedding in the place of `pos_emb` takes longer x.
    """

    layers: Any  # a ModuleList of ModuleLists

    def __init__(
        self, *, num_tokens: int, dim: int, depth: int, heads: int = 16, dim_head: int = 32,
        max_seq_len: int = 2048, ff_mult: float = 4
    ) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.pos_emb = nn.Embedding(max_seq_len, dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([
                MultiheadExponentialTimeDecay(dim, heads=heads, dim_head=dim_head),
                MeanCenteringPool(dim),
                FeedForward(dim, mult=ff_mult)])
            for _ in range(depth))
        self.to_logits = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, num_tokens, bias=False))

    @property
    def max_seq_len(self) -> int | None:
        """From the embedding that is there now, which may be another one than was built; None where
        it does not say how many positions it has."""
        return getattr(self.pos_emb, "num_embeddings", None)

    def forward(
        self, x: Tensor, *, cache: Cache = None, return_cache: bool = False
    ) -> Tensor | tuple[Tensor, Cache]:
        where, longest = "MetaformerGPT", self.max_seq_len
        x = embed_tokens(where, self.token_emb, x, longest)
        n = x.shape[1]
        seen, caches = split_model_cache(where, x, cache, len(self.layers), longest)
        if cache is not None and n == 1:
            positions = seen[:, None]
        else:
            positions = torch.arange(n, device=x.device)
            positions = positions if cache is None else seen[:, None] + positions
        try:
            x = x + self.pos_emb(positions)
        except IndexError as error:
            raise IndexError(f"{where}: x must have no more time steps, with those in cache, than "
                             f"pos_emb has positions, got x of {n}") from error
        steps, kept = use_up(seen, n), []
        for (time_decay, pool, feedforward), cache in zip(self.layers, caches):
            decay_cache, pool_cache = split_cache(where, cache, 2)
            out, decay_cache = call(time_decay, x, decay_cache, return_cache)
            x = out + x
            out, pool_cache = call(pool, x, pool_cache, return_cache)
            x = out + x
            kept.append((decay_cache, pool_cache))
            x = feedforward(x) + x
        out = self.to_logits(x)
        return (out, ModelCache(steps, tuple(kept))) if return_cache else out
