"""gMLP language model with spatial gating: the twin of `g_mlp_gpt.g_mlp_gpt` and
`g_mlp_gpt.reversible` (g-mlp-gpt==0.0.15; Liu et al. 2021, "Pay Attention to MLPs").

Same arguments, checkpoints, initial weights and results. The gating units run on
`fastmix.ops`; their `norm`, `act` and `mask` submodules and buffers hold what checkpoints
hold, but a fused operator does not call them one by one, so hooks on them do not fire.
"""

import random
import warnings

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from fastmix import ops
from fastmix.checks import (
    check_divides, check_length, check_tensor, check_tokens, match_dtypes)
from fastmix.nn._checks import check_features, check_floating, check_sequence, check_sizes
from fastmix.nn.reversible import ReversibleSequence, SequentialSequence

__all__ = [
    "Residual", "PreNorm", "GEGLU", "FeedForward", "Attention", "LocalAttention", "CausalSGU",
    "CausalLocalSGU", "AxiallyFold", "gMLPBlock", "gMLPGPT", "ReversibleSequence",
    "SequentialSequence", "pad_to_multiple", "dropout_layers"]


def pad_to_multiple(tensor, multiple, dim=-1, value=0):
    """Pads axis `dim` at its end with `value`, up to the next multiple of `multiple`."""
    missing = -tensor.shape[dim] % multiple
    if missing == 0:
        return tensor
    later_axes = tensor.ndim - 1 - dim % tensor.ndim
    return F.pad(tensor, (0, 0) * later_axes + (0, missing), value=value)


def dropout_layers(layers, prob_survival):
    """The layers that survive a draw with `prob_survival` each; at least one does."""
    if prob_survival == 1:
        return layers
    dropped = (torch.empty(len(layers)).uniform_(0, 1) > prob_survival).tolist()
    if all(dropped):
        dropped[random.randrange(len(layers))] = False
    return [layer for layer, gone in zip(layers, dropped) if not gone]


def _check_gated_width(where, name, dim, heads):
    check_sizes(where, **{name: dim})
    if dim % 2 != 0:
        raise ValueError(f"{where}: {name} must be even, got {dim}")
    check_divides(where, "heads", heads, f"{name} // 2", dim // 2)


class Residual(nn.Module):
    """fn(x) + x."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        check_floating(self, x)
        return x + self.fn(x)


class PreNorm(nn.Module):
    """fn of the layer-normed x (…, dim); keyword arguments go to fn."""

    def __init__(self, dim, fn):
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(dim)

    def forward(self, x, **kwargs):
        check_features(self, x, self.norm.normalized_shape[-1])
        return self.fn(self.norm(x), **kwargs)


class GEGLU(nn.Module):
    """(…, 2d) = [value, gate] -> value · gelu(gate), (…, d)."""

    def forward(self, x):
        check_floating(self, x)
        if x.ndim < 1 or x.shape[-1] % 2 != 0:
            raise ValueError(f"GEGLU: the last axis of x must be even, got shape {tuple(x.shape)}")
        value, gate = x.chunk(2, dim=-1)
        return F.gelu(gate) * value


class FeedForward(nn.Module):
    """(…, dim) -> (…, dim) through GEGLU of width int(dim · mult · 2 / 3)."""

    def __init__(self, dim, mult=4):
        super().__init__()
        width = int(dim * mult * 2 / 3)
        self.net = nn.Sequential(nn.Linear(dim, 2 * width), GEGLU(), nn.Linear(width, dim))

    def forward(self, x):
        check_features(self, x, self.net[0].in_features)
        return self.net(x)


class Attention(nn.Module):
    """Causal attention with one head: x (b, n, dim_in) -> (b, n, dim_out)."""

    def __init__(self, dim_in, dim_out, dim_inner):
        super().__init__()
        check_sizes("Attention", dim_inner=dim_inner)
        self.scale = dim_inner ** -0.5
        self.to_qkv = nn.Linear(dim_in, 3 * dim_inner, bias=False)
        self.to_out = nn.Linear(dim_inner, dim_out)

    def forward(self, x):
        check_sequence(self, x, self.to_qkv.in_features)
        q, k, v = self.to_qkv(x)[:, None].chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.to_out(out[:, 0])


class LocalAttention(nn.Module):
    """Causal attention with one head to the own and the previous window:
    x (b, n, dim_in) -> (b, n, dim_out).

    As in the published package, the keys are also the values (the last third of `to_qkv`
    has no effect), and the `window` zero keys before the first window are not masked: they
    take their share of the softmax.
    """

    def __init__(self, dim_in, dim_inner, dim_out, window=128):
        super().__init__()
        check_sizes("LocalAttention", dim_inner=dim_inner, window=window)
        self.scale = dim_inner ** -0.5
        self.window = window
        self.to_qkv = nn.Linear(dim_in, 3 * dim_inner, bias=False)
        self.to_out = nn.Linear(dim_inner, dim_out)

    def forward(self, x):
        n, w = check_sequence(self, x, self.to_qkv.in_features), self.window
        q, k, _ = self.to_qkv(x).chunk(3, dim=-1)
        q = rearrange(pad_to_multiple(q, w, dim=1), "b (i r) d -> b i r d", r=w)
        # (b, i, 2w, d): a view, since the windows of neighbours share rows.
        k = F.pad(k, (0, 0, w, -n % w)).unfold(1, 2 * w, w).transpose(2, 3)
        visible = torch.ones(w, 2 * w, dtype=torch.bool, device=x.device).tril(w)
        out = F.scaled_dot_product_attention(q, k, k, attn_mask=visible, scale=self.scale)
        return self.to_out(rearrange(out, "b i r d -> b (i r) d")[:, :n])


_ACTIVATION_NAMES = {
    nn.Identity: "identity", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.SiLU: "silu"}


def _activation(act):
    """The name of an activation that operators fuse, any other callable as it is."""
    if type(act) is nn.GELU and act.approximate == "none":
        return "gelu"
    return _ACTIVATION_NAMES.get(type(act), act)


def _match_gate_res(where, x, gate_res):
    """x (b, n, 2c) and gate_res, broadcast to (b, n, c), in one dtype."""
    if gate_res is None:
        return x, None
    check_tensor(where, "gate_res", gate_res, like=("x", x))
    b, n, width = x.shape
    shape = b, n, width // 2
    sizes = zip(gate_res.shape[::-1], shape[::-1])
    if gate_res.ndim > 3 or any(size not in (1, full) for size, full in sizes):
        raise ValueError(f"{where}: gate_res must broadcast to (b, n, dim // 2) = {shape}, "
                         f"got {tuple(gate_res.shape)}")
    return match_dtypes(where, x=x, gate_res=gate_res.expand(shape))


class CausalSGU(nn.Module):
    """Causal spatial gating unit: x (b, n, dim) = [res, gate] -> (b, n, dim // 2), n ≤ dim_seq.

    The layer-normed gate is mixed over time by `weight` (heads, dim_seq, dim_seq), lower
    triangle only; `bias` (heads, dim_seq) and `gate_res`, which broadcasts to (b, n, dim // 2),
    are added; `act` of that multiplies res. Twin of `g_mlp_gpt.g_mlp_gpt.CausalSGU`. ValueError
    for an odd dim, heads that do not divide dim // 2, n = 0 or n > dim_seq.
    """

    def __init__(self, dim, dim_seq, init_eps=1e-3, heads=4, act=nn.Identity()):
        super().__init__()
        _check_gated_width("CausalSGU", "dim", dim, heads)
        check_sizes("CausalSGU", dim_seq=dim_seq)
        self.norm = nn.LayerNorm(dim // 2)
        self.heads = heads
        bound = init_eps / dim_seq
        self.weight = nn.Parameter(torch.empty(heads, dim_seq, dim_seq).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.ones(heads, dim_seq))
        self.act = act
        self.register_buffer("mask", torch.ones(dim_seq, dim_seq, dtype=torch.bool).tril())

    def forward(self, x, gate_res=None):
        n = check_sequence(self, x, 2 * self.norm.normalized_shape[0])
        check_length("CausalSGU", "x", n, self.weight.shape[-1])
        x, gate_res = _match_gate_res("CausalSGU", x, gate_res)
        return ops.causal_sgu(
            x, self.weight, self.bias, norm_weight=self.norm.weight, norm_bias=self.norm.bias,
            eps=self.norm.eps, gate_residual=gate_res, activation=_activation(self.act))


class CausalLocalSGU(nn.Module):
    """CausalSGU that mixes the own and the previous window only, for any n: `weight`
    (heads, window, 2 · window), `bias` (heads, window). `dim_seq` is not used.
    Twin of `g_mlp_gpt.g_mlp_gpt.CausalLocalSGU`.
    """

    def __init__(self, dim, dim_seq, init_eps=1e-3, heads=4, window=128, act=nn.Identity()):
        super().__init__()
        _check_gated_width("CausalLocalSGU", "dim", dim, heads)
        check_sizes("CausalLocalSGU", window=window)
        self.norm = nn.LayerNorm(dim // 2)
        self.heads = heads
        self.window = window
        bound = init_eps / window
        self.weight = nn.Parameter(torch.empty(heads, window, 2 * window).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.ones(heads, window))
        self.act = act
        visible = torch.ones(window, 2 * window, dtype=torch.bool).tril(window)
        self.register_buffer("mask", visible)

    def forward(self, x, gate_res=None):
        check_sequence(self, x, 2 * self.norm.normalized_shape[0])
        x, gate_res = _match_gate_res("CausalLocalSGU", x, gate_res)
        return ops.windowed_sgu(
            x, self.weight, self.bias, norm_weight=self.norm.weight, norm_bias=self.norm.bias,
            eps=self.norm.eps, gate_residual=gate_res, activation=_activation(self.act))


class AxiallyFold(nn.Module):
    """Runs fn on the `every` interleaved subsequences of x (b, n, dim), then mixes the last
    `every` steps with a causal depthwise convolution. every ≤ 1: fn alone. ValueError for
    every < 0.
    """

    def __init__(self, dim, every, fn):
        super().__init__()
        if every < 0:
            raise ValueError(f"AxiallyFold: every must be at least 0, got {every}")
        self.dim = dim
        self.fn = fn
        self.every = every
        self.conv = nn.Conv1d(dim, dim, every, groups=dim) if every > 1 else None

    def forward(self, x):
        n, every = check_sequence(self, x, self.dim), self.every
        if every <= 1:
            return self.fn(x)
        x = rearrange(pad_to_multiple(x, every, dim=1), "b (n e) d -> (b e) n d", e=every)
        x = rearrange(self.fn(x), "(b e) n d -> b d (n e)", e=every)
        x = self.conv(F.pad(x[..., :n], (every - 1, 0)))
        return rearrange(x, "b d n -> b n d")


def _is_windowed(window, seq_len):
    return window is not None and window < seq_len


class gMLPBlock(nn.Module):
    """Linear, GELU, spatial gating unit, Linear: x (b, n, dim) -> (b, n, dim).

    `window` below seq_len makes the gating unit (and the attention that `attn_dim` adds to
    its gate) local. `causal` changes nothing but the initial SGU weights: it arrives there
    as `init_eps`, so False starts them at zero. Twin of `g_mlp_gpt.g_mlp_gpt.gMLPBlock`.
    """

    def __init__(self, *, dim, seq_len, dim_ff, heads=4, causal=False, window=None,
                 attn_dim=None, act=nn.Identity()):
        super().__init__()
        _check_gated_width("gMLPBlock", "dim_ff", dim_ff, heads)
        check_sizes("gMLPBlock", seq_len=seq_len, attn_dim=attn_dim)
        local = {"window": window} if _is_windowed(window, seq_len) else {}
        attention, sgu = (LocalAttention, CausalLocalSGU) if local else (Attention, CausalSGU)

        self.attn = None if attn_dim is None else attention(
            dim_in=dim, dim_inner=attn_dim, dim_out=dim_ff // 2, **local)
        self.proj_in = nn.Sequential(nn.Linear(dim, dim_ff), nn.GELU())
        self.sgu = sgu(dim_ff, seq_len, init_eps=causal, heads=heads, act=act, **local)
        self.proj_out = nn.Linear(dim_ff // 2, dim)

    def forward(self, x):
        check_sequence(self, x, self.proj_out.out_features)
        gate_res = None if self.attn is None else self.attn(x)
        return self.proj_out(self.sgu(self.proj_in(x), gate_res=gate_res))


class gMLPGPT(nn.Module):
    """gMLP language model: token ids x (b, n), int64 or int32 -> logits (b, n, num_tokens).

    window: None, a window length, or one entry per layer, each a window length or a pair
    (window length, fold). attn_dim: None, a width, or one per layer. reversible: layers of
    (gMLP, feedforward) on ReversibleSequence, of which training skips each with probability
    1 - prob_survival; without it prob_survival has no effect. Twin of
    `g_mlp_gpt.g_mlp_gpt.gMLPGPT`.

    n may exceed seq_len as far as every layer can serve it: windowed layers serve any n,
    others seq_len times their fold. ValueError beyond that, for n = 0, for widths that heads
    do not divide and for a `window` tuple of another length than depth.
    """

    def __init__(self, *, num_tokens, dim, depth, seq_len, heads=1, ff_mult=4, prob_survival=1.,
                 reversible=False, window=None, attn_dim=None, act=nn.Identity()):
        super().__init__()
        dim_ff = dim * ff_mult
        _check_gated_width("gMLPGPT", "dim * ff_mult", dim_ff, heads)
        windows = window if isinstance(window, tuple) else (window,) * depth
        windows = [w if isinstance(w, tuple) else (w, 1) for w in windows]
        if len(windows) != depth:
            raise ValueError(
                f"gMLPGPT: window must have one entry for each of depth={depth} layers, "
                f"got {len(windows)}")
        attn_dims = attn_dim if isinstance(attn_dim, tuple) else (attn_dim,) * depth
        if len(attn_dims) != depth:
            warnings.warn(
                f"gMLPGPT: attn_dim has {len(attn_dims)} entries for depth={depth}; the model "
                f"gets {min(len(attn_dims), depth)} layers", stacklevel=2)

        self.seq_len = seq_len
        self.prob_survival = prob_survival
        self._longest_input = min(
            (seq_len * max(fold, 1) for w, fold in windows[:len(attn_dims)]
             if not _is_windowed(w, seq_len)), default=None)

        self.to_embed = nn.Embedding(num_tokens, dim)
        layers = nn.ModuleList()
        for (w, fold), attn in zip(windows, attn_dims):
            block = gMLPBlock(dim=dim, dim_ff=dim_ff, seq_len=seq_len, heads=heads, window=w,
                              act=act, attn_dim=attn)
            layer = nn.ModuleList([PreNorm(dim, AxiallyFold(dim, fold, block))])
            if reversible:
                layer.append(FeedForward(dim, mult=ff_mult))
            layers.append(layer)
        self.net = (ReversibleSequence if reversible else SequentialSequence)(layers)
        self.to_logits = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_tokens))

    def forward(self, x):
        check_tokens("gMLPGPT", "x", x, self.to_embed, self._longest_input)
        x = self.net(self.to_embed(x), layer_dropout=1. - self.prob_survival)
        return self.to_logits(x)
