"""Twin of `gateloop_transformer.gateloop_transformer` and `.associative_scan` (0.2.5).

Same arguments, weights and numbers as the published classes; the gate loop itself runs
in `fastmix.ops.gate_loop`. Paper: GateLoop, https://arxiv.org/abs/2311.01927.
Shapes: b batch, n time steps, h heads, d channels of a head.
"""

import torch
import torch.nn.functional as F
from einops.layers.torch import Rearrange
from torch import nn

from fastmix import ops
from fastmix.checks import (
    COMPLEX, REAL, check_divides, check_length, check_shape, check_tensor, check_tokens)
from fastmix.nn._checks import (
    check_features, check_sequence, check_sizes, with_checked_features)

__all__ = ["RMSNorm", "PreNorm", "PostNorm", "FeedForward", "CausalFullAttention",
           "gate_loop_operator", "GateLoopedAttention", "Transformer", "associative_scan"]


def _gate_logits(z, frac_gradient, ablate_complex):
    """z (…, 2), its gradient scaled by `frac_gradient`, its imaginary part zeroed if asked."""
    z = torch.lerp(z.detach(), z, frac_gradient)
    return F.pad(z[..., :1], (0, 1)) if ablate_complex else z


class RMSNorm(nn.Module):
    """√dim · x / max(length of x, 1e-12), times the learned `gamma`, for x (…, dim)."""

    def __init__(self, dim):
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        check_features(self, x, self.gamma.shape[0])
        return F.normalize(x, dim=-1) * (self.gamma * self.scale)


class PreNorm(nn.Module):
    """fn(RMSNorm(x)) + x, for x (…, dim). Keywords go to `fn`."""

    def __init__(self, dim, fn):
        super().__init__()
        self.fn = fn
        self.norm = RMSNorm(dim)

    def forward(self, x, **kwargs):
        check_features(self, x, self.norm.gamma.shape[0])
        return x + self.fn(self.norm(x), **kwargs)


class PostNorm(nn.Module):
    """LayerNorm(fn(x) + x), for x (…, dim). Keywords go to `fn`."""

    def __init__(self, dim, fn):
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(dim)

    def forward(self, x, **kwargs):
        check_features(self, x, self.norm.normalized_shape[-1])
        return self.norm(x + self.fn(x, **kwargs))


def FeedForward(dim, mult=4):
    """dim → dim · mult → dim, with a GELU between, as an nn.Sequential. x (…, dim), ValueError
    for another width.
    """
    return with_checked_features("FeedForward", dim, nn.Sequential(
        nn.Linear(dim, dim * mult), nn.GELU(), nn.Linear(dim * mult, dim)))


class CausalFullAttention(nn.Module):
    """Causal softmax attention, which the published package keeps to compare with.

    x (b, n, dim) → (b, n, dim), any floating dtype. `rotary_emb` needs the package
    rotary_embedding_torch. `data_dependent_rel_pos` (float32 and float64 only) scales each
    query's pairs of channels, and each key's by the inverse, by the real part of a cumulative
    product of learned complex gates; as in the published code that product runs over the
    channels, not over time, and what is below 1e-10 (all that is negative, too) counts as
    1e-10. It turns the softmax off unless `softmax_normalize` says otherwise.
    ValueError where dim_head is odd under `data_dependent_rel_pos`, heads or dim_head is below
    1, or x is of another shape.
    """

    def __init__(
        self, dim, *, dim_head=64, heads=8, rotary_emb=False, add_swish_gating=False,
        data_dependent_rel_pos=False, frac_gradient_data_dependent_rel_pos=0.5,
        softmax_normalize=None,
    ):
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

        self.rotary_emb = None
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

    def forward(self, x, ablate_complex=False, ablate_state_transition=False):
        check_sequence(self, x, self.dim)
        q, k, v = self.to_qkv(x).transpose(1, 3).unbind(2)  # (b, h, n, d) each
        if self.rotary_emb is not None:
            q = self.rotary_emb.rotate_queries_or_keys(q)
            k = self.rotary_emb.rotate_queries_or_keys(k)

        if self.data_dependent_rel_pos and not ablate_state_transition:
            z = _gate_logits(
                self.to_a(x), self.frac_gradient_data_dependent_rel_pos, ablate_complex)
            z = torch.view_as_complex(z)
            gates = torch.polar(z.abs().sigmoid(), z.angle())
            decay = gates.cumprod(dim=-1).real.clamp(min=1e-10)
            decay = decay.repeat_interleave(2, dim=-1).transpose(1, 2)
            q, k = q * decay, k / decay

        if self.softmax_normalize and not self.data_dependent_rel_pos:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        else:
            # Decayed logits reach 1e10, where only the same sums give the same softmax.
            sim = (q * self.scale) @ k.mT
            if self.softmax_normalize:
                n = x.shape[1]
                future = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
                sim = sim.masked_fill(future, -torch.inf).softmax(dim=-1)
            out = sim.tril() @ v
        out = out.transpose(1, 2)
        if self.to_gates is not None:
            out = out * self.to_gates(x)
        return self.to_out(out)


def associative_scan(operator, elems):
    """All running results of an associative `operator` along axis 1, in about 2 log₂ n calls.

    elems: tensors (b, n, …). `operator(earlier, later)` takes two lists of such tensors and
    returns one; it need not commute. Returns a list. ValueError where lengths differ.
    """
    levels = [list(elems)]
    if not levels[0] or any(e.ndim < 2 or e.shape[1] != elems[0].shape[1] for e in elems):
        raise ValueError(
            "associative_scan: elems must be tensors (b, n, …) of one length n, "
            f"got {[tuple(e.shape) for e in elems]}")

    # Up: each level holds the totals of neighbouring pairs of the level below.
    while (n := levels[-1][0].shape[1]) > 1:
        pairs = n // 2 * 2
        levels.append(list(operator(
            [e[:, 0:pairs:2] for e in levels[-1]], [e[:, 1:pairs:2] for e in levels[-1]])))

    # Down: the scan of a level's pairs is that level's scan at 1, 3, 5, …; one more element
    # each gives 2, 4, 6, …; and at 0 it is the element itself.
    odd = levels.pop()
    while levels:
        level = levels.pop()
        m = (level[0].shape[1] - 1) // 2
        even = operator([o[:, :m] for o in odd], [e[:, 2::2] for e in level])
        odd = [torch.cat((e[:, :1], torch.stack((o[:, :m], x), dim=2).flatten(1, 2), o[:, m:]), 1)
               for e, o, x in zip(level, odd, even)]
    return odd


def gate_loop_operator(q, k, v, a):
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

    a = a.to(torch.promote_types(q.dtype, torch.complex64))
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
    recomputes its states in backward anyway. `split_heads` and `merge_heads` are there for code
    that uses them; the operator needs neither. ValueError where heads does not divide
    dim_inner, or x is of another shape.
    """

    def __init__(
        self, dim, heads=None, dim_inner=None, checkpoint_gate_looped_attn=True,
        add_swish_gating=True, sub_ln=False, frac_gradient_state_transition=0.9,
    ):
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
        self.to_out = nn.Identity()
        if add_swish_gating or dim_inner != dim:
            self.to_out = nn.Linear(dim_inner, dim, bias=False)

    def forward(self, x, ablate_complex=False, ablate_state_transition=False):
        check_sequence(self, x, self.dim)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in self.to_qkv(x).chunk(3, dim=-1))
        if ablate_state_transition:
            dtype = torch.promote_types(q.dtype, torch.complex64)
            out = ops.gate_loop(q, k, v, gates=q.new_ones(q.shape[:3], dtype=dtype))
        else:
            z = _gate_logits(self.to_a(x), self.frac_gradient_state_transition, ablate_complex)
            out = ops.gate_loop(q, k, v, gate_logits=z)
        out = self.maybe_sub_ln(out.flatten(-2))
        if self.to_gates is not None:
            out = out * self.to_gates(x)
        return self.to_out(out)


class Transformer(nn.Module):
    """GateLoop language model, or with `use_gate_looped_attn=False` its attention twin.

    x: token ids (b, n), int64 or int32, any n ≥ 1. Returns logits (b, n, num_tokens), or with
    `return_loss` the mean cross entropy of each token given those before it, which takes
    n ≥ 2. The ablations given at the call win over those given to the constructor. TypeError
    for tokens that are no integers, ValueError for other shapes.
    """

    def __init__(
        self, dim, *, num_tokens, depth, dim_head=64, heads=8, ff_mult=4,
        checkpoint_gate_looped_attn=True, use_gate_looped_attn=True, gate_loop_heads=None,
        attn_add_swish_gating=True, dim_gate_looped_attn=None, attn_softmax_normalize=None,
        data_dependent_rel_pos=False, frac_gradient_state_transition=0.9, ablate_complex=False,
        ablate_state_transition=False, rotary_emb=False, post_ln_norm=False, sub_ln=False,
    ):
        super().__init__()
        self.ablate_complex = ablate_complex
        self.ablate_state_transition = ablate_state_transition

        def mixer():
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
        self.to_logits = nn.Linear(dim, num_tokens, bias=False)
        if not post_ln_norm:
            self.to_logits = nn.Sequential(RMSNorm(dim), self.to_logits)

    def forward(
        self, x, return_loss=False, ablate_complex=None, ablate_state_transition=None,
    ):
        check_tokens("Transformer", "x", x, self.token_emb)
        if return_loss:
            if x.shape[0] < 1 or x.shape[1] < 2:
                raise ValueError(
                    "Transformer: return_loss predicts each token from those before it: x must "
                    f"hold at least 1 sequence of 2 tokens, got shape {tuple(x.shape)}")
            x, labels = x[:, :-1], x[:, 1:]
        if ablate_complex is None:
            ablate_complex = self.ablate_complex
        if ablate_state_transition is None:
            ablate_state_transition = self.ablate_state_transition

        x = self.token_emb(x)
        for attn, ff in self.layers:
            x = attn(
                x, ablate_complex=ablate_complex,
                ablate_state_transition=ablate_state_transition)
            x = ff(x)
        logits = self.to_logits(x)
        if return_loss:
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten().long())
        return logits
