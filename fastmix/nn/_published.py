"""Functions that `fastmix.accelerate` runs in the place of published classes' forward.

Each function takes a published module as `self`, calls the children that the published forward
calls, and returns the same numbers. A child that only moves axes (a Rearrange) is called only if it
was changed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from fastmix import ops
from fastmix.dtypes import wide
from fastmix.nn import gss
from fastmix.nn._checks import is_plain
from fastmix.nn.g_mlp_gpt import g_mlp_gpt
from fastmix.nn.g_mlp_gpt.reversible import ReversibleSequence
from fastmix.nn.gateloop_transformer import gateloop_transformer, simplified_gate_loop


def mean_centering_pool(self: Any, x: Tensor) -> Tensor:
    x = self.norm(x)
    return self.proj(ops.cumulative_mean(x) - x)


def exponential_time_decay(self: Any, x: Tensor) -> Tensor:
    u = self.project_in(self.norm(x)).unflatten(-1, (self.heads, -1))
    alpha = self.alpha.to(wide(self.alpha.dtype)).sigmoid()
    return self.project_out(ops.decay_conv(u, 1 - alpha, alpha).flatten(-2))


def mhesa(self: Any, x: Tensor) -> Tensor:
    u = self.norm(x.flip(1) if self.reverse_seq else x)
    alpha = self.alphas.to(wide(self.alphas.dtype)).sigmoid()
    dampening = self.dampen_factors.to(wide(self.dampen_factors.dtype)).sigmoid()
    heads = u.unflatten(-1, (self.heads, -1))
    out = ops.decay_conv(heads, (1 - alpha) * dampening, alpha).flatten(-2)
    out = out + u * self.param_D
    return out.flip(1) if self.reverse_seq else out


def efficient_ds_conv(self: Any, x: Tensor) -> Tensor:
    u = self.norm(x).unflatten(-1, (self.heads, -1))
    skip = self.param_D.unflatten(0, (self.heads, -1))
    return ops.fft_conv(u, self.to_weight(x), skip).flatten(-2)


def dss(self: Any, x: Tensor) -> Tensor:
    return gss.convolve(self, x, x.shape[1])


def attention(self: Any, x: Tensor) -> Tensor:
    q, k, v = self.to_qkv(x)[:, None].chunk(3, dim=-1)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
    return self.to_out(out[:, 0])


def local_attention(self: Any, x: Tensor) -> Tensor:
    q, k, _ = self.to_qkv(x).chunk(3, dim=-1)
    return self.to_out(g_mlp_gpt._attend_in_windows(q, k, self.window, self.scale))


def causal_sgu(self: Any, x: Tensor, gate_res: Tensor | None = None) -> Tensor:
    n, channels = x.shape[1], x.shape[-1] // 2
    x, gate_res = g_mlp_gpt._match_gate_res("CausalSGU", x, gate_res)
    if g_mlp_gpt._is_known_norm(self.norm, channels):
        return ops.causal_sgu(x, self.weight, self.bias, gate_residual=gate_res,
                              **g_mlp_gpt._norm_and_activation(self))
    res, gate = x.chunk(2, dim=-1)
    mixed = g_mlp_gpt._mix(
        self.norm(gate)[:, None], self.weight[:, :n, :n], self.bias[:, :n])[:, 0]
    return g_mlp_gpt._gate(self, mixed, gate_res, res)


def causal_local_sgu(self: Any, x: Tensor, gate_res: Tensor | None = None) -> Tensor:
    n, channels = x.shape[1], x.shape[-1] // 2
    x, gate_res = g_mlp_gpt._match_gate_res("CausalLocalSGU", x, gate_res)
    if g_mlp_gpt._is_known_norm(self.norm, channels):
        return ops.windowed_sgu(x, self.weight, self.bias, gate_residual=gate_res,
                                **g_mlp_gpt._norm_and_activation(self))
    res, gate = x.chunk(2, dim=-1)
    gate = g_mlp_gpt.pad_to_multiple(gate, self.window, dim=1).unflatten(1, (-1, self.window))
    mixed = g_mlp_gpt._mix(self.norm(gate), self.weight, self.bias).flatten(1, 2)[:, :n]
    return g_mlp_gpt._gate(self, mixed, gate_res, res)


def causal_full_attention(
    self: Any, x: Tensor, ablate_complex: bool = False, ablate_state_transition: bool = False
) -> Tensor:
    if self.data_dependent_rel_pos or not self.softmax_normalize:  # no plain softmax attention
        return type(self).forward(self, x, ablate_complex, ablate_state_transition)
    q, k, v = self.to_qkv(x)
    if self.rotary_emb is not None:
        q = self.rotary_emb.rotate_queries_or_keys(q)
        k = self.rotary_emb.rotate_queries_or_keys(k)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
    if self.to_gates is not None:
        out = out * self.to_gates(x)
    return self.to_out(out)


def gate_looped_attention(
    self: Any, x: Tensor, ablate_complex: bool = False, ablate_state_transition: bool = False
) -> Tensor:
    split, merge = self.split_heads, self.merge_heads
    q, k, v = self.to_qkv(x).chunk(3, dim=-1)
    if is_plain(split, Rearrange):
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
    else:
        q, k, v = (rearrange(split(t), "(b h) n d -> b n h d", h=self.heads) for t in (q, k, v))
    z = self.to_a
    if _ends_in_rearrange(z):
        z = z[0](x).unflatten(-1, (self.heads, 2))
    else:
        z = rearrange(z(x), "(b h) n 1 1 c -> b n h c", h=self.heads)
    if ablate_state_transition:
        out = ops.gate_loop(q, k, v, gates=q.new_ones(q.shape[2]))
    else:
        out = ops.gate_loop(q, k, v, **gateloop_transformer._gates(
            z, self.frac_gradient_state_transition, ablate_complex))
    if is_plain(merge, Rearrange):
        out = out.flatten(-2)
    else:
        out = merge(rearrange(out, "b n h d -> (b h) n d"))
    out = self.maybe_sub_ln(out)
    if self.to_gates is not None:
        out = out * self.to_gates(x)
    return self.to_out(out)


def simple_gate_loop(
    self: Any, x: Tensor, cache: Any = None, return_cache: bool = False
) -> Any:
    x = self.norm(x)
    if _ends_in_rearrange(self.to_qkva):
        q, kv, a = self.to_qkva[0](x).chunk(3, dim=-1)
    else:
        q, kv, a = rearrange(self.to_qkva(x), "t (b d) n 1 -> t b n d", d=self.dim)
    return simplified_gate_loop.scan(self, q, kv, a, cache, return_cache)


def _ends_in_rearrange(net: nn.Module) -> bool:
    """Whether `net` is (a layer, a Rearrange), to which nothing was done."""
    return is_plain(net, nn.Sequential) and len(net) == 2 and (  # type: ignore[arg-type]
        is_plain(net[1], Rearrange))  # type: ignore[index]


class Replacement(NamedTuple):
    forward: Callable
    runs: str
    """what it runs on, in words"""


VERSIONS = {  # of the packages whose forwards these are
    "metaformer_gpt": ("metaformer-gpt", "0.0.5"),
    "gated_state_spaces_pytorch": ("gated-state-spaces-pytorch", "0.1.0"),
    "g_mlp_gpt": ("g-mlp-gpt", "0.0.15"),
    "gateloop_transformer": ("gateloop-transformer", "0.2.5"),
}

_GATELOOP = "gateloop_transformer.gateloop_transformer"
_METAFORMER = "metaformer_gpt.metaformer_gpt"
_STATE_SPACES = "gated_state_spaces_pytorch"
_SDPA = "scaled_dot_product_attention"

REPLACEMENTS = {  # (module, class): what takes the place of its forward
    (_METAFORMER, "MeanCenteringPool"): Replacement(mean_centering_pool, "ops.cumulative_mean"),
    (_METAFORMER, "MultiheadExponentialTimeDecay"): Replacement(
        exponential_time_decay, "ops.decay_conv"),
    (f"{_STATE_SPACES}.mhesa", "MHESA"): Replacement(mhesa, "ops.decay_conv"),
    (f"{_STATE_SPACES}.dsconv", "EfficientDsConv"): Replacement(
        efficient_ds_conv, "ops.fft_conv"),
    (f"{_STATE_SPACES}.gss", "DSS"): Replacement(dss, "ops.fft_conv"),
    ("g_mlp_gpt.g_mlp_gpt", "Attention"): Replacement(attention, _SDPA),
    ("g_mlp_gpt.g_mlp_gpt", "LocalAttention"): Replacement(local_attention, _SDPA),
    ("g_mlp_gpt.g_mlp_gpt", "CausalSGU"): Replacement(causal_sgu, "ops.causal_sgu"),
    ("g_mlp_gpt.g_mlp_gpt", "CausalLocalSGU"): Replacement(
        causal_local_sgu, "ops.windowed_sgu"),
    ("g_mlp_gpt.reversible", "ReversibleSequence"): Replacement(
        ReversibleSequence.forward, "plain autograd that replays"),
    (_GATELOOP, "CausalFullAttention"): Replacement(causal_full_attention, _SDPA),
    (_GATELOOP, "GateLoopedAttention"): Replacement(gate_looped_attention, "ops.gate_loop"),
    ("gateloop_transformer.simplified_gate_loop", "SimpleGateLoopLayer"): Replacement(
        simple_gate_loop, "ops.linear_scan"),
}
