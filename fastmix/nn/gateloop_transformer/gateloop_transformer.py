"""Twin of `gateloop_transformer.gateloop_transformer` (0.2.5).

Same arguments, weights and numbers as the published classes; the gate loop itself runs
in `fastmix.ops.gate_loop`. Paper: GateLoop, https://arxiv.org/abs/2311.01927.
Shapes: b batch, n time steps, h heads, d channels of a head.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from fastmix import _torch_private, ops
from fastmix._complex import times
from fastmix.checks import (
    COMPLEX,
    INTEGER,
    REAL,
    check_divides,
    check_length,
    check_shape,
    check_tensor,
)
from fastmix.dtypes import wide, wide_complex
from fastmix.fallback.gate_loop import activated
from fastmix.nn._cache import (
    Cache,
    ModelCache,
    append,
    call,
    split_model_cache,
    step_numbers,
    use_up,
)
from fastmix.nn._checks import (
    check_features,
    check_sequence,
    check_sizes,
    embed_tokens,
    feed_forward,
    is_plain,
)
from fastmix.nn._helpers import Sequential as Sequential
from fastmix.nn._helpers import default as default
from fastmix.nn._helpers import exists as exists
from fastmix.nn._loss import cross_entropy
from fastmix.nn.gateloop_transformer.associative_scan import associative_scan
from fastmix.ops._register import decomposing

__all__ = ["RMSNorm", "PreNorm", "PostNorm", "FeedForward", "CausalFullAttention",
           "gate_loop_operator", "GateLoopedAttention", "Transformer", "associative_scan"]


def _gate_logits(z: Tensor, frac_gradient: float, ablate_complex: bool) -> Tensor:
    """z (…, 2), its gradient scaled by `frac_gradient`, its imaginary part zeroed if asked."""
    if (torch.is_grad_enabled() or torch.compiler.is_compiling()
            or _torch_private.transforms_active() or _torch_private.forward_mode_active()):
        blended = torch.lerp(z.detach(), z, frac_gradient)
        z = torch.where(blended.isnan(), z.detach(), blended)  # ∞ - ∞ is no number, but ∞ a logit
    return F.pad(z[..., :1], (0, 1)) if ablate_complex else z


def _gates(z: Tensor, frac_gradient: float, ablate_complex: bool) -> dict[str, Any]:
    """The argument for ops.gate_loop: logits z (b, n, h, 2), or real gates if asked, which
    are σ(|z|) with the sign of z's real part."""
    z = _gate_logits(z, frac_gradient, False)
    if not ablate_complex:
        return {"gate_logits": z}
    z = z[..., 0].to(wide(z.dtype))
    size = z.abs().sigmoid()
    return {"gates": torch.where(z < 0, -size, size)}


def _products_of_gates(z: Tensor) -> Tensor:
    """Re a_1 · … · a_i of the gates a of logits z (…, d, 2), for each i: (…, d)."""
    if not decomposing():
        logits = torch.complex(*z.unbind(-1))
        return torch.polar(logits.abs().sigmoid(), logits.angle()).cumprod(dim=-1).real
    gates = torch.stack(activated(z))
    products = list(itertools.accumulate(gates.unbind(-1), times))
    return torch.stack([product[0] for product in products], dim=-1)


class RMSNorm(nn.Module):
    """√dim · x / max(length of x, 1e-12), times the learned `gamma`, for x (…, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            check_features("RMSNorm", x, self.dim)
        if x.dtype == self.gamma.dtype and (x.dtype == torch.float32 or x.dtype == torch.float64):
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            return x / length.clamp_min(1e-12) * (self.gamma * self.scale)
        dtype = torch.promote_types(x.dtype, self.gamma.dtype)
        # In float32 at least: the length of a row and γ √dim are rounded once, with the result.
        unit = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
        gain = self.gamma.to(torch.promote_types(self.gamma.dtype, torch.float32)) * self.scale
        return (unit * gain).to(dtype)


class PreNorm(nn.Module):
    """fn(RMSNorm(x)) + x, for x (…, dim). Keywords go to `fn`, `return_cache` among them: then
    fn returns (output, cache), and so does this.
    """

    def __init__(self, dim: int, fn: Callable) -> None:
        super().__init__()
        self.dim = dim
        self.fn = fn
        self.norm = RMSNorm(dim)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor | tuple[Tensor, Cache]:
        check_features("PreNorm", x, self.dim)
        out = self.fn(self.norm(x), **kwargs)
        if kwargs.get("return_cache"):
            out, cache = out
            return x + out, cache
        return x + out


class PostNorm(nn.Module):
    """LayerNorm(fn(x) + x), for x (…, dim). Keywords go to `fn`, `return_cache` among them: then
    fn returns (output, cache), and so does this.
    """

    def __init__(self, dim: int, fn: Callable) -> None:
        super().__init__()
        self.dim = dim
        self.fn = fn
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor | tuple[Tensor, Cache]:
        check_features("PostNorm", x, self.dim)
        out = self.fn(x, **kwargs)
        if kwargs.get("return_cache"):
            out, cache = out
            return self.norm(x + out), cache
        return self.norm(x + out)


def FeedForward(dim: int, mult: int = 4) -> nn.Sequential:
    """dim → dim · mult → dim, with a GELU between, as an nn.Sequential. x (…, dim), ValueError
    for another width.
    """
    return feed_forward(dim, nn.Linear(dim, dim * mult), nn.GELU(), nn.Linear(dim * mult, dim))


def _turns_as_built(rotary: Any) -> bool:
    """Whether `rotary` is a RotaryEmbedding to which nothing was done, of axes (…, n, d)."""
    from rotary_embedding_torch import RotaryEmbedding

    own = ("rotate_queries_or_keys", "get_seq_pos")
    return is_plain(rotary, RotaryEmbedding) and not (
        rotary.use_xpos or rotary.seq_before_head_dim or any(n in rotary.__dict__ for n in own))


class CausalFullAttention(nn.Module):
    """Causal softmax attention, which the published package keeps to compare with.

    x (b, n, dim) → (b, n, dim), any floating dtype. `rotary_emb` needs the package
    rotary_embedding_torch. `data_dependent_rel_pos` multiplies each query's pairs of channels by
    the real part of a cumulative product of learned complex gates, and divides each key's by it.
    As in the published code that product runs over the channels, not over time, and numbers below
    1e-10, negative ones included, count as 1e-10. It turns the softmax off unless
    `softmax_normalize` says otherwise.
    ValueError where dim_head is odd under `data_dependent_rel_pos`, heads or dim_head is below
    1, or x is of another shape.
    """

    def __init__(
        self, dim: int, *, dim_head: int = 64, heads: int = 8, rotary_emb: bool = False,
        add_swish_gating: bool = False, data_dependent_rel_pos: bool = False,
        frac_gradient_data_dependent_rel_pos: float = 0.5,
        softmax_normalize: bool | None = None,
    ) -> None:
        super().__init__()
        check_sizes("CausalFullAttention", dim_head=dim_head, heads=heads)
        if data_dependent_rel_pos and dim_head % 2 != 0:
            raise ValueError(
                "CausalFullAttention: dim_head must be even with data_dependent_rel_pos, "
                f"got {dim_head}")
        dim_inner = dim_head * heads
        self.dim = dim
        self.scale = dim_head**-0.5
        self.softmax_normalize = (
            not data_dependent_rel_pos if softmax_normalize is None else softmax_normalize)
        self.data_dependent_rel_pos = data_dependent_rel_pos
        self.frac_gradient_data_dependent_rel_pos = frac_gradient_data_dependent_rel_pos

        self.rotary_emb: Any = None
        if rotary_emb:
            from rotary_embedding_torch import RotaryEmbedding

            self.rotary_emb = RotaryEmbedding(dim_head)
        self.to_qkv = nn.Sequential(
            nn.Linear(dim, 3 * dim_inner, bias=False), nn.Unflatten(-1, (3, heads, dim_head)))
        if data_dependent_rel_pos:
            self.to_a = nn.Sequential(
                nn.Linear(dim, dim_inner, bias=False),
                nn.Unflatten(-1, (heads, dim_head // 2, 2)))
        self.to_gates = None
        if add_swish_gating:
            self.to_gates = nn.Sequential(
                nn.Linear(dim, dim_inner, bias=False), nn.SiLU(),
                nn.Unflatten(-1, (heads, dim_head)))
        self.to_out = nn.Sequential(nn.Flatten(-2), nn.Linear(dim_inner, dim))

    def forward(
        self, x: Tensor, ablate_complex: bool = False, ablate_state_transition: bool = False, *,
        cache: Cache = None, return_cache: bool = False,
    ) -> Tensor | tuple[Tensor, Cache]:
        n = check_sequence("CausalFullAttention", x, self.dim)
        q, k, v = self.to_qkv(x).transpose(1, 3).unbind(2)  # (b, h, n, d) each
        decay = None
        if self.data_dependent_rel_pos and not ablate_state_transition:
            z = _gate_logits(
                self.to_a(x), self.frac_gradient_data_dependent_rel_pos, ablate_complex)
            z = z.to(wide(z.dtype))
            # An infinite one has no slope, and the gate of any large one of its direction.
            infinite = z.isinf()
            z = torch.where(infinite.any(-1, keepdim=True), 1e4 * infinite * z.detach().sign(), z)
            decay = _products_of_gates(z).clamp(min=1e-10)
            decay = decay.repeat_interleave(2, dim=-1).transpose(1, 2)

        m, key_decay, visible = n, decay, None
        if cache is not None or return_cache:
            # Keys are kept before they are turned: only the distance of two steps has an effect.
            new = (k, v) if decay is None else (k, v, decay)
            cache = append("CausalFullAttention", cache, *(t.transpose(1, 2) for t in new))
            k, v, *rest = (t.transpose(1, 2) for t in cache.tensors)
            key_decay = rest[0] if rest else None
            m = k.shape[2]
            steps = step_numbers(cache)
            if m > n:
                seen = (steps >= 0)[:, None] & (steps[:, None] <= steps[:, m - n:, None])
                visible = seen[:, None]  # (b, 1, n, m)
        if self.rotary_emb is not None:
            q, k = self._rotated(q, m - n), self._rotated(k, 0)
        if decay is not None:
            q, k = q * decay, k / key_decay

        if self.softmax_normalize and not self.data_dependent_rel_pos:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=visible, is_causal=visible is None, scale=self.scale)
        else:
            if visible is None:
                visible = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
            # Decayed logits reach 1e10, where only the same sums give the same softmax.
            sim = (q * self.scale) @ k.mT
            if self.softmax_normalize:
                sim = sim.masked_fill(~visible, -torch.inf).softmax(dim=-1)
            out = (sim.where(visible, 0) @ v.to(sim.dtype)).to(v.dtype)
        out = out.transpose(1, 2)
        if self.to_gates is not None:
            out = out * self.to_gates(x)
        out = self.to_out(out)
        return (out, cache) if return_cache else out

    def _rotated(self, x: Tensor, first: int) -> Tensor:
        """x (b, h, n, d), turned by the positions first … first + n - 1.

        The package counts positions in the dtypes of x and of the frequencies, and 16 bits cannot
        tell those above 256 apart, so they are counted in a wider dtype here. A rotary embedding of
        another class, or one that was changed, is called as it is.
        """
        rotary = self.rotary_emb
        if not _turns_as_built(rotary) or all(
                dtype == wide(dtype) for dtype in (x.dtype, rotary.freqs.dtype)):
            offset = {"offset": first} if first else {}
            return rotary.rotate_queries_or_keys(x.to(wide(x.dtype)), **offset).to(x.dtype)
        from rotary_embedding_torch import apply_rotary_emb

        dtype = wide(rotary.freqs.dtype)
        steps = rotary.get_seq_pos(x.shape[-2], device=x.device, dtype=dtype, offset=first)
        angles = (steps[:, None] * rotary.freqs.to(dtype)).repeat_interleave(2, dim=-1)
        return apply_rotary_emb(angles, x.to(wide(x.dtype))).to(x.dtype)


def gate_loop_operator(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
    """S_t = a_t · S_{t-1} + k_t v_tᵀ, out_t = q_t · Re S_t, for one head.

    q, k (b, n, d), v (b, n, e), real; a complex or real, (b, n, 1, 1) or any shape that
    broadcasts to (b, n, d, e) and has all n steps. Returns (b, n, e).
    With (b, n, 1, 1) no state is kept; with other shapes all of them are, as (b, n, d, e).
    TypeError and ValueError where dtypes or shapes are others.
    """
    where = "gate_loop_operator"
    for name, value in (("q", q), ("k", k), ("v", v)):
        check_tensor(where, name, value, like=("q", q))
    check_tensor(where, "a", a, REAL + COMPLEX, like=("q", q))
    sizes = check_shape(where, "q", q, "b n d")
    check_shape(where, "k", k, "b n d", sizes)
    sizes = check_shape(where, "v", v, "b n e", sizes)
    b, n, d, e = (sizes[axis] for axis in "bnde")
    check_length(where, "q", n)
    fits = a.ndim == 4 and a.shape[1] == n
    if not fits or any(size not in (1, full) for size, full in zip(a.shape, (b, n, d, e))):
        raise ValueError(
            f"{where}: a must have shape (b or 1, n, d or 1, e or 1) with (b, n, d, e) = "
            f"{(b, n, d, e)}, got {tuple(a.shape)}")

    a = a.to(wide_complex(q.dtype) if a.is_complex() else wide(q.dtype))
    if a.shape[2:] == (1, 1):
        q, k, v = (t.unsqueeze(2) for t in (q, k, v))
        return ops.gate_loop(q, k, v, gates=a.squeeze(3).expand(b, n, 1)).squeeze(2)
    outer = k.unsqueeze(3) * v.unsqueeze(2)
    states = ops.linear_scan(a.expand(b, n, d, e), outer.to(a.dtype))
    return (q.unsqueeze(3) * states.real).sum(dim=2).to(q.dtype)


class GateLoopedAttention(nn.Module):
    """Linear attention whose state decays and turns by a learned complex gate per time step.

    x (b, n, dim) → (b, n, dim), any floating dtype. heads defaults to dim_inner, and that
    to dim. `checkpoint_gate_looped_attn` is kept but changes nothing: the operator
    recomputes its states in backward anyway. `split_heads` and `merge_heads` run only
    where something was done to them: the operator needs neither. ValueError where heads does
    not divide dim_inner, or x is of another shape. With an ablation gates are real, and so is the
    state in a cache.
    """

    def __init__(
        self, dim: int, heads: int | None = None, dim_inner: int | None = None,
        checkpoint_gate_looped_attn: bool = True, add_swish_gating: bool = True,
        sub_ln: bool = False, frac_gradient_state_transition: float = 0.9,
    ) -> None:
        super().__init__()
        dim_inner = dim if dim_inner is None else dim_inner
        heads = dim_inner if heads is None else heads
        check_sizes("GateLoopedAttention", dim_inner=dim_inner)
        check_divides("GateLoopedAttention", "heads", heads, "dim_inner", dim_inner)
        self.dim = dim
        self.heads = heads
        self.checkpoint_gate_looped_attn = checkpoint_gate_looped_attn
        self.frac_gradient_state_transition = frac_gradient_state_transition

        self.split_heads = Rearrange("b n (h d) -> (b h) n d", h=heads)
        self.to_qkv = nn.Linear(dim, 3 * dim_inner, bias=False)
        self.to_a = nn.Sequential(nn.Linear(dim, 2 * heads), nn.Unflatten(-1, (heads, 2)))
        self.merge_heads = Rearrange("(b h) n d -> b n (h d)", h=heads)
        self.maybe_sub_ln = nn.LayerNorm(dim_inner) if sub_ln else nn.Identity()
        self.to_gates = None
        if add_swish_gating:
            self.to_gates = nn.Sequential(nn.Linear(dim, dim_inner, bias=False), nn.SiLU())
        self.to_out: nn.Module = nn.Identity()
        if add_swish_gating or dim_inner != dim:
            self.to_out = nn.Linear(dim_inner, dim, bias=False)

    def forward(
        self, x: Tensor, ablate_complex: bool = False, ablate_state_transition: bool = False, *,
        cache: Cache = None, return_cache: bool = False,
    ) -> Tensor | tuple[Tensor, Cache]:
        check_sequence("GateLoopedAttention", x, self.dim)
        if is_plain(self.split_heads, Rearrange):
            q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        else:
            q, k, v = map(self._split, self.to_qkv(x).chunk(3, dim=-1))
        if ablate_state_transition:
            gates = {"gates": q.new_ones(q.shape[2])}
        else:
            gates = _gates(self.to_a(x), self.frac_gradient_state_transition, ablate_complex)
        out, cache = ops.gate_loop(q, k, v, **gates, initial_state=cache, return_state=True)
        out = self.maybe_sub_ln(self._merge(out))
        if self.to_gates is not None:
            out = out * self.to_gates(x)
        out = self.to_out(out)
        return (out, cache) if return_cache else out

    def _split(self, x: Tensor) -> Tensor:
        """(b, n, h · d) → (b, n, h, d), through split_heads."""
        return rearrange(self.split_heads(x), "(b h) n d -> b n h d", h=self.heads)

    def _merge(self, x: Tensor) -> Tensor:
        """The way back, through merge_heads if that is not as it was built."""
        if is_plain(self.merge_heads, Rearrange):
            return x.flatten(-2)
        return self.merge_heads(rearrange(x, "b n h d -> (b h) n d"))


class Transformer(nn.Module):
    """GateLoop language model, or with `use_gate_looped_attn=False` its attention twin.

    x: token ids (b, n), int64 or int32, any n ≥ 1. Returns logits (b, n, num_tokens), or with
    `return_loss` the mean cross entropy of each token given those before it, which takes
    n ≥ 2; tokens that are `ignore_index` do not count, and are read as token 0. The ablations
    given at the call win over those given to the constructor. With `return_cache` also a cache,
    from which a later call goes on. TypeError for tokens that are no integers, ValueError for
    other shapes.
    """

    layers: Any  # a ModuleList of ModuleLists

    def __init__(
        self, dim: int, *, num_tokens: int, depth: int, dim_head: int = 64, heads: int = 8,
        ff_mult: int = 4, checkpoint_gate_looped_attn: bool = True,
        use_gate_looped_attn: bool = True, gate_loop_heads: int | None = None,
        attn_add_swish_gating: bool = True, dim_gate_looped_attn: int | None = None,
        attn_softmax_normalize: bool | None = None, data_dependent_rel_pos: bool = False,
        frac_gradient_state_transition: float = 0.9, ablate_complex: bool = False,
        ablate_state_transition: bool = False, rotary_emb: bool = False,
        post_ln_norm: bool = False, sub_ln: bool = False,
    ) -> None:
        super().__init__()
        self.ablate_complex = ablate_complex
        self.ablate_state_transition = ablate_state_transition

        def mixer() -> nn.Module:
            if use_gate_looped_attn:
                return GateLoopedAttention(
                    dim, gate_loop_heads, dim_gate_looped_attn, checkpoint_gate_looped_attn,
                    attn_add_swish_gating, sub_ln, frac_gradient_state_transition)
            return CausalFullAttention(
                dim, dim_head=dim_head, heads=heads, rotary_emb=rotary_emb,
                add_swish_gating=attn_add_swish_gating,
                data_dependent_rel_pos=data_dependent_rel_pos,
                frac_gradient_data_dependent_rel_pos=frac_gradient_state_transition,
                softmax_normalize=attn_softmax_normalize)

        wrap = PostNorm if post_ln_norm else PreNorm
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.layers = nn.ModuleList(
            nn.ModuleList((wrap(dim, mixer()), wrap(dim, FeedForward(dim, ff_mult))))
            for _ in range(depth))
        to_logits = nn.Linear(dim, num_tokens, bias=False)
        self.to_logits = to_logits if post_ln_norm else nn.Sequential(RMSNorm(dim), to_logits)

    def forward(
        self, x: Tensor, return_loss: bool = False, ablate_complex: bool | None = None,
        ablate_state_transition: bool | None = None, *, cache: Cache = None,
        return_cache: bool = False, ignore_index: int | None = None,
    ) -> Tensor | tuple[Tensor, Cache]:
        if ignore_index is not None and not return_loss:
            raise ValueError(f"Transformer: ignore_index={ignore_index} is for the loss: "
                             "return_loss must be True, got False")
        if return_loss:
            check_tensor("Transformer", "x", x, INTEGER)
            check_shape("Transformer", "x", x, "b n")
            if x.shape[0] < 1 or x.shape[1] < 2:
                raise ValueError(
                    "Transformer: return_loss predicts each token from those before it: x must "
                    f"hold at least 1 sequence of 2 tokens, got shape {tuple(x.shape)}")
            x, labels = x[:, :-1], x[:, 1:].long()
            if ignore_index is not None:
                labels = labels.masked_fill(labels == ignore_index, -100)
                x = x.masked_fill(x == ignore_index, 0)
        if ablate_complex is None:
            ablate_complex = self.ablate_complex
        if ablate_state_transition is None:
            ablate_state_transition = self.ablate_state_transition

        advice = (" (ignore_index=… names the token that does not count)"
                  if return_loss and ignore_index is None else "")
        x = embed_tokens("Transformer", self.token_emb, x, advice=advice)
        seen, caches = split_model_cache("Transformer", x, cache, len(self.layers))
        steps, kept = use_up(seen, x.shape[1]), []
        for (attn, ff), cache in zip(self.layers, caches):
            x, cache = call(
                attn, x, cache, return_cache, ablate_complex=ablate_complex,
                ablate_state_transition=ablate_state_transition)
            kept.append(cache)
            x = ff(x)
        out = self.to_logits(x)
        if return_loss:
            out = cross_entropy("Transformer", "x", out.flatten(0, 1), labels.flatten())
        return (out, ModelCache(steps, tuple(kept))) if return_cache else out
