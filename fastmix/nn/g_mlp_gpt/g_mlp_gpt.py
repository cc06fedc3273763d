"""gMLP language model with spatial gating: the twin of `g_mlp_gpt.g_mlp_gpt`
(g-mlp-gpt==0.0.15; Liu et al. 2021, "Pay Attention to MLPs").

Same arguments, checkpoints, initial weights and results. The gating units run on
`fastmix.ops`, which take the place of their `norm` and `act` where these are of the classes
they know and nothing was done to them, and call them otherwise; `mask` is there for checkpoints.
"""

import itertools
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fastmix import ops
from fastmix.checks import check_divides, check_length, check_tensor, match_dtypes
from fastmix.nn._cache import (
    Cache,
    ModelCache,
    append,
    call,
    call_operator,
    check_total,
    last_rows,
    split_cache,
    split_model_cache,
    step_numbers,
    use_up,
)
from fastmix.nn._checks import (
    check_features,
    check_sequence,
    check_sizes,
    embed_tokens,
    is_plain,
)
from fastmix.nn._helpers import cast_tuple as cast_tuple
from fastmix.nn._helpers import exists as exists
from fastmix.nn.g_mlp_gpt.reversible import ReversibleSequence, SequentialSequence
from fastmix.states import Rows, concatenate, may_write, select_rows

__all__ = [
    "Residual", "PreNorm", "GEGLU", "FeedForward", "Attention", "LocalAttention", "CausalSGU",
    "CausalLocalSGU", "AxiallyFold", "gMLPBlock", "gMLPGPT", "ReversibleSequence",
    "SequentialSequence", "pad_to_multiple", "dropout_layers"]


def pad_to_multiple(tensor: Tensor, multiple: int, dim: int = -1, value: float = 0) -> Tensor:
    """Pads axis `dim` at its end with `value`, up to the next multiple of `multiple`."""
    missing = -tensor.shape[dim] % multiple
    if missing == 0:
        return tensor
    later_axes = tensor.ndim - 1 - dim % tensor.ndim
    return F.pad(tensor, (0, 0) * later_axes + (0, missing), value=value)


def dropout_layers(layers: Sequence, prob_survival: float) -> Sequence:
    """The layers that survive a draw with `prob_survival` each; at least one does."""
    if prob_survival == 1:
        return layers
    dropped = (torch.empty(len(layers)).uniform_(0, 1) > prob_survival).tolist()
    if all(dropped):
        dropped[random.randrange(len(layers))] = False
    return [layer for layer, gone in zip(layers, dropped) if not gone]


def _check_gated_width(where: str, name: str, dim: int, heads: int) -> None:
    check_sizes(where, **{name: dim})
    if dim % 2 != 0:
        raise ValueError(f"{where}: {name} must be even, got {dim}")
    check_divides(where, "heads", heads, f"{name} // 2", dim // 2)


class Residual(nn.Module):
    """fn(x) + x."""

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            check_tensor("Residual", "x", x)
        return x + self.fn(x)


class PreNorm(nn.Module):
    """fn of the layer-normed x (…, dim); keyword arguments go to fn, `cache` among them."""

    def __init__(self, dim: int, fn: Callable) -> None:
        super().__init__()
        self.dim = dim
        self.fn = fn
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor | tuple[Tensor, Cache]:
        check_features("PreNorm", x, self.dim)
        return self.fn(self.norm(x), **kwargs)


class GEGLU(nn.Module):
    """(…, 2d) = [value, gate] -> value · gelu(gate), (…, d)."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            check_tensor("GEGLU", "x", x)
            if x.ndim < 1 or x.shape[-1] % 2 != 0:
                raise ValueError(
                    f"GEGLU: the last axis of x must be even, got shape {tuple(x.shape)}")
        value, gate = x.chunk(2, dim=-1)
        return F.gelu(gate) * value


class FeedForward(nn.Module):
    """(…, dim) -> (…, dim) through GEGLU of width int(dim · mult · 2 / 3)."""

    def __init__(self, dim: int, mult: float = 4) -> None:
        super().__init__()
        self.dim = dim
        width = int(dim * mult * 2 / 3)
        self.net = nn.Sequential(nn.Linear(dim, 2 * width), GEGLU(), nn.Linear(width, dim))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            check_features("FeedForward", x, self.dim)
        return self.net(x)


class Attention(nn.Module):
    """Causal attention with one head: x (b, n, dim_in) -> (b, n, dim_out)."""

    def __init__(self, dim_in: int, dim_out: int, dim_inner: int) -> None:
        super().__init__()
        self.dim_in = dim_in
        check_sizes("Attention", dim_inner=dim_inner)
        self.scale = dim_inner ** -0.5
        self.to_qkv = nn.Linear(dim_in, 3 * dim_inner, bias=False)
        self.to_out = nn.Linear(dim_inner, dim_out)

    def forward(
        self, x: Tensor, *, cache: Cache = None, return_cache: bool = False
    ) -> Tensor | tuple[Tensor, Cache]:
        n = check_sequence("Attention", x, self.dim_in)
        # Without an axis of heads torch would hold the products of all pairs of steps.
        q, k, v = self.to_qkv(x)[:, None].chunk(3, dim=-1)
        visible = None
        if cache is not None or return_cache:
            cache = append("Attention", cache, k[:, 0], v[:, 0])
            k, v = (rows[:, None] for rows in cache.tensors)
            if k.shape[2] > n:
                steps = step_numbers(cache)
                # (b, 1, n, m): which of m keys each of n queries sees
                visible = ((steps >= 0)[:, None] & (steps[:, None] <= steps[:, -n:, None]))[:, None]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None, scale=self.scale)
        out = self.to_out(out[:, 0])
        return (out, cache) if return_cache else out


def _attend_in_windows(q: Tensor, k: Tensor, w: int, scale: float) -> Tensor:
    """LocalAttention's attention of all queries to the keys (b, n, d), from the first step on."""
    n = q.shape[1]
    q = rearrange(pad_to_multiple(q, w, dim=1), "b (i r) d -> b i r d", r=w)
    # (b, i, 2w, d): a view, since the windows of neighbours share rows.
    k = F.pad(k, (0, 0, w, -n % w)).unfold(1, 2 * w, w).transpose(2, 3)
    visible = torch.ones(w, 2 * w, dtype=torch.bool, device=q.device).tril(w)
    out = F.scaled_dot_product_attention(q, k, k, attn_mask=visible, scale=scale)
    return rearrange(out, "b i r d -> b (i r) d")[:, :n]


class LocalAttention(nn.Module):
    """Causal attention with one head to the own and the previous window:
    x (b, n, dim_in) -> (b, n, dim_out).

    As in the published package, the keys are also the values (the last third of `to_qkv`
    has no effect), and the `window` zero keys before the first window are not masked: they
    take their share of the softmax.
    """

    def __init__(self, dim_in: int, dim_inner: int, dim_out: int, window: int = 128) -> None:
        super().__init__()
        self.dim_in = dim_in
        check_sizes("LocalAttention", dim_inner=dim_inner, window=window)
        self.scale = dim_inner ** -0.5
        self.window = window
        self.to_qkv = nn.Linear(dim_in, 3 * dim_inner, bias=False)
        self.to_out = nn.Linear(dim_inner, dim_out)

    def forward(
        self, x: Tensor, *, cache: Cache = None, return_cache: bool = False
    ) -> Tensor | tuple[Tensor, Cache]:
        check_sequence("LocalAttention", x, self.dim_in)
        q, k, _ = self.to_qkv(x).chunk(3, dim=-1)
        kept = None
        if cache is not None or return_cache:
            rows = append("LocalAttention", cache, k, kept=2 * self.window - 1)
            kept = last_rows(rows, 2 * self.window - 1)
        out = self.to_out(_attend_in_windows(q, k, self.window, self.scale) if cache is None
                          else self._go_on(q, rows))
        return (out, kept) if return_cache else out

    def _go_on(self, q: Tensor, rows: Rows) -> Tensor:
        """The newest queries q (b, n, d), and all keys that they see or more."""
        w, (k,), outs = self.window, rows.tensors, []
        steps = step_numbers(rows)
        ends = itertools.accumulate((part.shape[1] for part in q.split(w, dim=1)),
                                    initial=k.shape[1] - q.shape[1])
        for part, (start, end) in zip(q.split(w, dim=1), itertools.pairwise(ends)):
            near = slice(max(0, start - 2 * w + 1), end)
            at, key_at = steps[:, start:end, None], steps[:, None, near]
            visible = (key_at <= at) & (key_at >= (at // w - 1) * w)  # (b, n, m)
            outs.append(F.scaled_dot_product_attention(
                part, k[:, near], k[:, near], attn_mask=visible, scale=self.scale))
        return torch.cat(outs, dim=1)


_ACTIVATION_NAMES = {nn.Identity: "identity", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid",
                     nn.SiLU: "silu", nn.GELU: "gelu"}


def _activation(act: Callable[[Tensor], Tensor]) -> str | Callable[[Tensor], Tensor]:
    """The name of an activation that operators fuse, any other callable as it is."""
    for kind, name in _ACTIVATION_NAMES.items():
        if isinstance(act, kind):
            exact = getattr(act, "approximate", "none") == "none"
            return name if exact and is_plain(act, kind) else act
    return act


def _match_gate_res(
    where: str, x: Tensor, gate_res: Tensor | None
) -> tuple[Tensor, Tensor | None]:
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


def _is_known_norm(norm: nn.Module, channels: int) -> bool:
    """Whether operators may take the norm's parameters instead of calling it."""
    return is_plain(norm, nn.LayerNorm) and norm.normalized_shape == (channels,)


def _norm_and_activation(unit: Any) -> dict[str, Any]:
    """The arguments by which an operator takes the place of a gating unit's norm and act; the unit
    is ours or a published one."""
    return {"norm_weight": unit.norm.weight, "norm_bias": unit.norm.bias, "eps": unit.norm.eps,
            "activation": _activation(unit.act)}


def _gate(unit: Any, mixed: Tensor, gate_res: Tensor | None, res: Tensor) -> Tensor:
    """A gating unit's output from what its gate is mixed to, by its own act."""
    return unit.act(mixed if gate_res is None else mixed + gate_res) * res


def _mix(gate: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gate (b, windows, w, c), normed → (b, windows, w, c), each window mixed with the one before.

    It mixes as the operators do, for a gate that another norm than a layer norm has normed, which
    they cannot take. weight (h, w, 2w), or (h, w, w) where windows mix only themselves; bias
    (h, w).
    """
    h, w, columns = weight.shape
    gate = gate.unflatten(-1, (h, -1))
    mixed = torch.einsum("h r j, b i j h d -> b i r h d", weight[..., -w:].tril(), gate)
    if columns > w:
        before = F.pad(gate, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
        mixed = mixed + torch.einsum("h r j, b i j h d -> b i r h d", weight[..., :w], before)
    return (mixed + bias.T[..., None]).flatten(-2)


def _mix_rows(rows: Rows, n: int, weight: Tensor, bias: Tensor) -> Tensor:
    """Mixes the newest n of `rows` as `_mix` does; each row is at its own step of its sequence."""
    (gate,), steps = rows.tensors, step_numbers(rows)
    h, w, columns = weight.shape
    at = steps[:, -n:, None]
    column = steps[:, None] - at // w * w + columns - w  # (b, n, m)
    visible = (steps[:, None] >= 0) & (steps[:, None] <= at) & (column >= 0)
    mixing = weight[:, at % w, column.clamp(0, columns - 1)].where(visible, 0)
    mixed = torch.einsum("h b n m, b m h d -> b n h d", mixing, gate.unflatten(-1, (h, -1)))
    return (mixed + bias[:, at[..., 0] % w].permute(1, 2, 0)[..., None]).flatten(-2)


class CausalSGU(nn.Module):
    """Causal spatial gating unit: x (b, n, dim) = [res, gate] -> (b, n, dim // 2), n ≤ dim_seq.

    The layer-normed gate is mixed over time by `weight` (heads, dim_seq, dim_seq), lower
    triangle only; `bias` (heads, dim_seq) and `gate_res`, which broadcasts to (b, n, dim // 2),
    are added; `act` of that multiplies res. Twin of `g_mlp_gpt.g_mlp_gpt.CausalSGU`. ValueError
    for an odd dim, heads that do not divide dim // 2, n = 0 or n > dim_seq.
    """

    def __init__(
        self, dim: int, dim_seq: int, init_eps: float = 1e-3, heads: int = 4,
        act: Callable[[Tensor], Tensor] = nn.Identity(),
    ) -> None:
        super().__init__()
        _check_gated_width("CausalSGU", "dim", dim, heads)
        check_sizes("CausalSGU", dim_seq=dim_seq)
        self.dim = dim
        self.norm = nn.LayerNorm(dim // 2)
        self.heads = heads
        bound = init_eps / dim_seq
        self.weight = nn.Parameter(torch.empty(heads, dim_seq, dim_seq).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.ones(heads, dim_seq))
        self.act = act
        self.register_buffer("mask", torch.ones(dim_seq, dim_seq, dtype=torch.bool).tril())

    def forward(
        self, x: Tensor, gate_res: Tensor | None = None, *, cache: Cache = None,
        return_cache: bool = False,
    ) -> Tensor | tuple[Tensor, Cache]:
        where = "CausalSGU"
        n = check_sequence(where, x, self.dim)
        weight, bias = self.weight, self.bias  # once: a parametrization may count the calls
        length = weight.shape[-1]
        check_length(where, "x", n, length)
        x, gate_res = _match_gate_res(where, x, gate_res)
        if not _is_known_norm(self.norm, self.dim // 2):
            res, gate = x.chunk(2, dim=-1)
            gate, kept = self.norm(gate), None
            if cache is not None or return_cache:
                kept = append(where, cache, gate, kept=length)
                check_total(where, kept.steps, length)
            if kept is not None and cache is not None:
                mixed = _mix_rows(kept, n, weight, bias)
            else:
                mixed = _mix(gate[:, None], weight[:, :n, :n], bias[:, :n])[:, 0]
            if kept is not None:
                kept = last_rows(kept, length)
            out = _gate(self, mixed, gate_res, res)
        else:
            out, kept = call_operator(
                ops.causal_sgu, x, weight, bias, gate_residual=gate_res, cache=cache,
                return_cache=return_cache, in_place=may_write(cache), **_norm_and_activation(self))
        return (out, kept) if return_cache else out


class CausalLocalSGU(nn.Module):
    """CausalSGU that mixes the own and the previous window only, for any n: `weight`
    (heads, window, 2 · window), `bias` (heads, window). `dim_seq` is not used.
    Twin of `g_mlp_gpt.g_mlp_gpt.CausalLocalSGU`.
    """

    def __init__(
        self, dim: int, dim_seq: int, init_eps: float = 1e-3, heads: int = 4, window: int = 128,
        act: Callable[[Tensor], Tensor] = nn.Identity(),
    ) -> None:
        super().__init__()
        _check_gated_width("CausalLocalSGU", "dim", dim, heads)
        check_sizes("CausalLocalSGU", window=window)
        self.dim = dim
        self.norm = nn.LayerNorm(dim // 2)
        self.heads = heads
        self.window = window
        bound = init_eps / window
        self.weight = nn.Parameter(torch.empty(heads, window, 2 * window).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.ones(heads, window))
        self.act = act
        visible = torch.ones(window, 2 * window, dtype=torch.bool).tril(window)
        self.register_buffer("mask", visible)

    def forward(
        self, x: Tensor, gate_res: Tensor | None = None, *, cache: Cache = None,
        return_cache: bool = False,
    ) -> Tensor | tuple[Tensor, Cache]:
        where = "CausalLocalSGU"
        n = check_sequence(where, x, self.dim)
        weight, bias = self.weight, self.bias  # once, as in CausalSGU
        x, gate_res = _match_gate_res(where, x, gate_res)
        if not _is_known_norm(self.norm, self.dim // 2):
            res, gate = x.chunk(2, dim=-1)
            # As the published unit calls it: windows, the last one filled up with zeros.
            gate = pad_to_multiple(gate, self.window, dim=1).unflatten(1, (-1, self.window))
            gate, kept = self.norm(gate), None
            if cache is not None or return_cache:
                kept = append(where, cache, gate.flatten(1, 2)[:, :n], kept=2 * self.window - 1)
            if kept is not None and cache is not None:
                mixed = _mix_rows(kept, n, weight, bias)
            else:
                mixed = _mix(gate, weight, bias).flatten(1, 2)[:, :n]
            if kept is not None:
                kept = last_rows(kept, 2 * self.window - 1)
            out = _gate(self, mixed, gate_res, res)
        else:
            out, kept = call_operator(
                ops.windowed_sgu, x, weight, bias, gate_residual=gate_res, cache=cache,
                return_cache=return_cache, in_place=may_write(cache), **_norm_and_activation(self))
        return (out, kept) if return_cache else out


class AxiallyFold(nn.Module):
    """Runs fn on the `every` interleaved subsequences of x (b, n, dim), then mixes the last
    `every` steps with a causal depthwise convolution. every ≤ 1: fn alone. ValueError for
    every < 0.
    """

    def __init__(self, dim: int, every: int, fn: Callable) -> None:
        super().__init__()
        if every < 0:
            raise ValueError(f"AxiallyFold: every must be at least 0, got {every}")
        self.dim = dim
        self.fn = fn
        self.every = every
        self.conv = nn.Conv1d(dim, dim, every, groups=dim) if every > 1 else None

    def forward(
        self, x: Tensor, *, cache: Cache = None, return_cache: bool = False
    ) -> Tensor | tuple[Tensor, Cache]:
        n, every = check_sequence("AxiallyFold", x, self.dim), self.every
        if self.conv is None:
            x, cache = call(self.fn, x, cache, return_cache)
            return (x, cache) if return_cache else x
        if cache is not None or return_cache:
            return self._stream(self.conv, x, cache, return_cache)
        x = rearrange(pad_to_multiple(x, every, dim=1), "b (n e) d -> (b e) n d", e=every)
        x = rearrange(self.fn(x), "(b e) n d -> b d (n e)", e=every)
        x = self.conv(F.pad(x[..., :n], (every - 1, 0)))
        return rearrange(x, "b d n -> b n d")

    def _stream(
        self, conv: nn.Module, x: Tensor, cache: Cache, return_cache: bool
    ) -> Tensor | tuple[Tensor, Cache]:
        """The cache: one of fn per subsequence, that of the next step first, and the steps of
        fn's output that the convolution still needs."""
        (b, n, _), every = x.shape, self.every
        *queue, tail = split_cache("AxiallyFold", cache, every + 1)
        # How many of the n steps each subsequence gets, and which have had none so far.
        counts = [len(range(i, n, every)) for i in range(every)]
        folded: list[Tensor] = [x[:, :0]] * every
        keys = [(counts[i], queue[i] is None) for i in range(every)]
        for (count, new), group in itertools.groupby(range(every), key=keys.__getitem__):
            if count == 0:
                continue
            members = list(group)
            steps = torch.cat([x[:, i::every] for i in members])
            before = None if new else queue[members[0]]
            if before is not None and len(members) > 1:
                before = concatenate([queue[i] for i in members], [b] * len(members))
            out, after = self.fn(steps, cache=before, return_cache=True)
            for i, part in zip(members, out.split(b)):
                folded[i] = part
            for row, i in enumerate(members):
                queue[i] = after if len(members) == 1 else (
                    select_rows(after, slice(row * b, (row + 1) * b)))
        longest = counts[0]
        out = torch.stack([F.pad(f, (0, 0, 0, longest - f.shape[1])) for f in folded], dim=2)
        out = out.flatten(1, 2)[:, :n].mT
        out = torch.cat((out.new_zeros(*out.shape[:2], every - 1) if tail is None else tail, out),
                        dim=-1)
        first = n % every
        kept = (*queue[first:], *queue[:first], out[..., 1 - every:].clone())
        out = conv(out).mT
        return (out, kept) if return_cache else out


def _is_windowed(window: int | None, seq_len: int) -> bool:
    return window is not None and window < seq_len


class gMLPBlock(nn.Module):
    """Linear, GELU, spatial gating unit, Linear: x (b, n, dim) -> (b, n, dim).

    `window` below seq_len makes the gating unit (and the attention that `attn_dim` adds to
    its gate) local. `causal` changes nothing but the initial SGU weights: it arrives there
    as `init_eps`, so False starts them at zero. Twin of `g_mlp_gpt.g_mlp_gpt.gMLPBlock`.
    """

    def __init__(
        self, *, dim: int, seq_len: int, dim_ff: int, heads: int = 4, causal: bool = False,
        window: int | None = None, attn_dim: int | None = None,
        act: Callable[[Tensor], Tensor] = nn.Identity(),
    ) -> None:
        super().__init__()
        self.dim = dim
        _check_gated_width("gMLPBlock", "dim_ff", dim_ff, heads)
        check_sizes("gMLPBlock", seq_len=seq_len, attn_dim=attn_dim)
        local: dict[str, Any] = {"window": window} if _is_windowed(window, seq_len) else {}
        attention, sgu = (LocalAttention, CausalLocalSGU) if local else (Attention, CausalSGU)

        self.attn = None if attn_dim is None else attention(
            dim_in=dim, dim_inner=attn_dim, dim_out=dim_ff // 2, **local)
        self.proj_in = nn.Sequential(nn.Linear(dim, dim_ff), nn.GELU())
        self.sgu = sgu(dim_ff, seq_len, init_eps=causal, heads=heads, act=act, **local)
        self.proj_out = nn.Linear(dim_ff // 2, dim)

    def forward(
        self, x: Tensor, *, cache: Cache = None, return_cache: bool = False
    ) -> Tensor | tuple[Tensor, Cache]:
        check_sequence("gMLPBlock", x, self.dim)
        attn_cache, sgu_cache = split_cache("gMLPBlock", cache, 2)
        gate_res = None
        if self.attn is not None:
            gate_res, attn_cache = call(self.attn, x, attn_cache, return_cache)
        mixed, sgu_cache = call(
            self.sgu, self.proj_in(x), sgu_cache, return_cache, gate_res=gate_res)
        out = self.proj_out(mixed)
        return (out, (attn_cache, sgu_cache)) if return_cache else out


class gMLPGPT(nn.Module):
    """gMLP language model: token ids x (b, n), int64 or int32 -> logits (b, n, num_tokens).

    window: None, a window length, or one entry per layer, each a window length or a pair
    (window length, fold). attn_dim: None, a width, or one per layer. reversible: layers of
    (gMLP, feedforward) on ReversibleSequence, of which training skips each with probability
    1 - prob_survival; without it prob_survival has no effect. Twin of
    `g_mlp_gpt.g_mlp_gpt.gMLPGPT`.

    n may exceed seq_len as far as every layer can serve it: windowed layers serve any n,
    others seq_len times their fold. With return_cache it also returns a cache, from which a later
    call goes on, up to the same n in all; training that skips layers refuses one. ValueError for a
    longer x, for n = 0, for widths that heads do not divide and for a `window` tuple whose length
    is not depth.
    """

    def __init__(
        self, *, num_tokens: int, dim: int, depth: int, seq_len: int, heads: int = 1,
        ff_mult: int = 4, prob_survival: float = 1., reversible: bool = False,
        window: int | tuple | None = None, attn_dim: int | tuple | None = None,
        act: Callable[[Tensor], Tensor] = nn.Identity(),
    ) -> None:
        super().__init__()
        dim_ff = dim * ff_mult
        _check_gated_width("gMLPGPT", "dim * ff_mult", dim_ff, heads)
        per_layer = window if isinstance(window, tuple) else (window,) * depth
        windows = [w if isinstance(w, tuple) else (w, 1) for w in per_layer]
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
        # The longest input, None if any is taken.
        self.max_seq_len = min(
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

    def forward(
        self, x: Tensor, *, cache: Cache = None, return_cache: bool = False
    ) -> Tensor | tuple[Tensor, Cache]:
        where = "gMLPGPT"
        x = embed_tokens(where, self.to_embed, x, self.max_seq_len)
        seen, (cache,) = split_model_cache(where, x, cache, 1, self.max_seq_len)
        steps = use_up(seen, x.shape[1])
        x, cache = call(
            self.net, x, cache, return_cache, layer_dropout=1. - self.prob_survival)
        out = self.to_logits(x)
        return (out, ModelCache(steps, (cache,))) if return_cache else out
