"""Twin of gated_state_spaces_pytorch.dsconv: convolutions that the input itself computes."""

import torch
from torch import nn

from fastmix import ops
from fastmix.checks import check_divides, check_tokens
from fastmix.nn._checks import check_sequence, check_sizes
from fastmix.nn.mhesa import conv1d_fft, token_loss

__all__ = ["conv1d_fft", "EfficientDsConv", "GatedDsConv", "GatedDsConvLM"]


class EfficientDsConv(nn.Module):
    """A causal convolution per head, as long as the sequence, plus a learned skip.

    The kernel is a linear map of x, (b, n, heads): lag l is weighed by what x_l says. It
    runs over the layer-normed input u; returns it plus param_D · u. x (b, n, dim) →
    (b, n, dim). ValueError unless heads divides dim.
    """

    def __init__(self, *, dim, heads):
        super().__init__()
        check_sizes("EfficientDsConv", dim=dim)
        check_divides("EfficientDsConv", "heads", heads, "dim", dim)
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.to_weight = nn.Linear(dim, heads, bias=False)
        self.param_D = nn.Parameter(torch.randn(dim))

    def forward(self, x):
        check_sequence(self, x, self.norm.normalized_shape[0])
        u = self.norm(x)
        heads = u.unflatten(-1, (self.heads, -1))
        skip = self.param_D.unflatten(0, (self.heads, -1))
        return ops.fft_conv(heads, self.to_weight(x), skip).flatten(-2)


class GatedDsConv(nn.Module):
    """A gated block around EfficientDsConv, with its residual: x (b, n, dim) → (b, n, dim).

    The convolution runs dim_dsconv wide, the gate int(dim_expansion_factor · dim) wide;
    reverse_seq runs it from the end. ValueError unless heads divides dim_dsconv. Gated
    State Spaces, arXiv:2206.13947, with a convolution in the place of the state space.
    """

    def __init__(
        self, *, dim, heads=8, dim_dsconv=512, dim_expansion_factor=4, reverse_seq=False
    ):
        super().__init__()
        check_sizes("GatedDsConv", dim_dsconv=dim_dsconv)
        check_divides("GatedDsConv", "heads", heads, "dim_dsconv", dim_dsconv)
        dim_hidden = int(dim_expansion_factor * dim)
        self.reverse_seq = reverse_seq
        self.norm = nn.LayerNorm(dim)
        self.to_u = nn.Sequential(nn.Linear(dim, dim_hidden, bias=False), nn.GELU())
        self.to_v = nn.Sequential(nn.Linear(dim, dim_dsconv, bias=False), nn.GELU())
        self.dsconv = EfficientDsConv(dim=dim_dsconv, heads=heads)
        self.to_gate = nn.Linear(dim_dsconv, dim_hidden, bias=False)
        self.to_out = nn.Linear(dim_hidden, dim)

    def forward(self, x):
        check_sequence(self, x, self.norm.normalized_shape[0])
        if self.reverse_seq:
            x = x.flip(1)
        normed = self.norm(x)
        gate = self.to_gate(self.dsconv(self.to_v(normed)))
        out = self.to_out(gate * self.to_u(normed)) + x
        return out.flip(1) if self.reverse_seq else out


class GatedDsConvLM(nn.Module):
    """A language model of `depth` GatedDsConv blocks.

    x (b, n) token ids, int64 or int32, 1 ≤ n ≤ max_seq_len → logits (b, n, num_tokens),
    or with labels (b, n), int64, their mean cross entropy.
    """

    def __init__(
        self, *, num_tokens, dim, depth, heads=8, dim_dsconv=512, max_seq_len=2048,
        dim_expansion_factor=4
    ):
        super().__init__()
        self.max_seq_len = max_seq_len
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.layers = nn.ModuleList(
            GatedDsConv(dim=dim, heads=heads, dim_dsconv=dim_dsconv,
                        dim_expansion_factor=dim_expansion_factor)
            for _ in range(depth))
        self.to_logits = nn.Linear(dim, num_tokens, bias=False)

    def forward(self, x, labels=None):
        where = "GatedDsConvLM"
        check_tokens(where, "x", x, self.token_emb, self.max_seq_len)
        x = self.token_emb(x)
        for layer in self.layers:
            x = layer(x)
        logits = self.to_logits(x)
        return logits if labels is None else token_loss(where, logits, labels)
