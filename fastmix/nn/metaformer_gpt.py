"""Twin of metaformer_gpt.metaformer_gpt: exponential averages and running means in a GPT."""

import torch
from torch import nn

from fastmix import ops
from fastmix.checks import INTEGER, REAL, check_length, check_tensor, check_tokens
from fastmix.nn import mhesa
from fastmix.nn._checks import check_sequence, check_sizes, with_checked_features

__all__ = ["cummean", "conv1d_fft", "MeanCenteringPool", "MultiheadExponentialTimeDecay",
           "FeedForward", "MetaformerGPT"]

COUNTS = (*INTEGER, torch.int16, torch.int8, torch.uint8, torch.bool)


def cummean(x, *, dim):
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


def conv1d_fft(x, weights, dim=-2, weight_dim=-1):
    """fastmix.nn.mhesa.conv1d_fft where weights always gets one trailing axis.

    x (…, n, …), n at dim; weights (…, m, …), m at weight_dim. ValueError unless weight_dim,
    counted from the end, is one axis behind dim.
    """
    time = mhesa.time_axis("x", x, "dim", dim)
    weight_time = mhesa.time_axis("weights", weights, "weight_dim", weight_dim)
    if weight_time != time + 1 or (dim >= 0 and weights.ndim >= x.ndim):
        raise mhesa.axes_error(
            "weight_dim must meet dim once weights has one more axis (and then no more than x, "
            "if dim ≥ 0)", x, dim, weights, weight_dim)
    return mhesa.conv1d_fft(x, weights, time, weight_time)


class MeanCenteringPool(nn.Module):
    """How far the mean so far lies from each step, projected: x (b, n, dim) → (b, n, dim)."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        check_sequence(self, x, self.norm.normalized_shape[0])
        x = self.norm(x)
        return self.proj(ops.cumulative_mean(x) - x)


class MultiheadExponentialTimeDecay(nn.Module):
    """An exponential average along time, one learned α per head.

    y_t = (1 - α_h) y_{t-1} + α_h u_t over heads · dim_head channels, α = σ(alpha), between
    a LayerNorm and linear maps in and out. x (b, n, dim) → (b, n, dim). ValueError for no
    heads or heads of no channels.
    """

    def __init__(self, dim, *, heads=8, dim_head=64):
        super().__init__()
        check_sizes("MultiheadExponentialTimeDecay", heads=heads, dim_head=dim_head)
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.alpha = nn.Parameter(torch.randn(heads))
        self.project_in = nn.Linear(dim, heads * dim_head, bias=False)
        self.project_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x):
        check_sequence(self, x, self.norm.normalized_shape[0])
        u = self.project_in(self.norm(x)).unflatten(-1, (self.heads, -1))
        alpha = self.alpha.sigmoid()
        return self.project_out(ops.decay_conv(u, 1 - alpha, alpha).flatten(-2))


def FeedForward(dim, mult=4):
    """LayerNorm, then two bias-free linear maps around a GELU, int(dim · mult) wide, as an
    nn.Sequential: x (…, dim) → (…, dim). ValueError for another width.
    """
    hidden_dim = int(dim * mult)
    return with_checked_features("FeedForward", dim, nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, hidden_dim, bias=False),
        nn.GELU(),
        nn.Linear(hidden_dim, dim, bias=False)))


class MetaformerGPT(nn.Module):
    """A language model of `depth` layers: exponential average, mean centering, feedforward.

    x (b, n) token ids, int64 or int32, 1 ≤ n ≤ max_seq_len → logits (b, n, num_tokens).
    """

    def __init__(
        self, *, num_tokens, dim, depth, heads=16, dim_head=32, max_seq_len=2048, ff_mult=4
    ):
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

    def forward(self, x):
        check_tokens("MetaformerGPT", "x", x, self.token_emb, self.pos_emb.num_embeddings)
        x = self.token_emb(x) + self.pos_emb.weight[:x.shape[1]]
        for time_decay, pool, feedforward in self.layers:
            x = time_decay(x) + x
            x = pool(x) + x
            x = feedforward(x) + x
        return self.to_logits(x)
