"""Twin of `gateloop_transformer.simplified_gate_loop` (0.2.5): a gate loop without heads.

Shapes: b batch, n time steps, d channels, each with a state of one number.
"""

import functools
import inspect
from typing import Any

import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from fastmix import ops
from fastmix.checks import check_shape, check_tensor
from fastmix.dtypes import wide
from fastmix.nn._cache import describe
from fastmix.nn._checks import check_sequence, is_plain
from fastmix.nn._helpers import default as default
from fastmix.nn._helpers import exists as exists
from fastmix.nn.gateloop_transformer.associative_scan import associative_scan as associative_scan
from fastmix.nn.gateloop_transformer.gateloop_transformer import RMSNorm

__all__ = ["gate_loop_operator", "SimpleGateLoopLayer"]

Cache = tuple[Tensor, Tensor]
WHERE = "SimpleGateLoopLayer"


def eps_by_dtype(dtype: torch.dtype) -> float:
    """The least gate that `heinsen_associative_scan` knows."""
    return 1e-7 if dtype == torch.float16 else 1e-20


def abs_clamp_eps(t: Tensor, eps: float | None = None) -> Tensor:
    """t, of which no number but 0 is nearer to 0 than eps."""
    return t.sign() * t.abs().clamp_min(default(eps, eps_by_dtype(t.dtype)))


def binary_operator(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The pair (gate, state) of a run of steps after that of the steps before it, as one pair."""
    return a[0] * b[0], torch.addcmul(b[1], b[0], a[1])


def heinsen_associative_scan(
    a: Tensor, kv: Tensor, eps: float | None = None
) -> tuple[Tensor, Tensor]:
    """Products of all gates a (b, n, d) so far, of which none is below eps, and the states
    h_t = a_t · h_{t-1} + kv_t. (The published function is named for its algorithm.)"""
    gates = a.clamp_min(default(eps, eps_by_dtype(a.dtype)))
    return gates.cumprod(dim=1), ops.linear_scan(gates, kv)


def gate_loop_operator(
    q: Tensor, kv: Tensor, a: Tensor, cache: Cache | None = None, heinsen: bool = False
) -> tuple[Tensor, Cache]:
    """h_t = a_t · h_{t-1} + kv_t, out_t = q_t · h_t, for q, kv, a (b, n, d), real.

    cache: the product of all gates before, and the state before, (b, d) each. Returns the
    outputs and the cache behind them. `heinsen` changes nothing: it chose the algorithm.
    """
    product, state = (None, None) if cache is None else cache
    states = ops.linear_scan(a, kv, state)
    gates = a.prod(dim=1)
    return q * states, (gates if product is None else product * gates, states[:, -1])


class SimpleGateLoopLayer(nn.Module):
    """A gate loop per channel between an RMSNorm and, with `post_ln`, a LayerNorm.

    h_t = σ(a_t) · h_{t-1} + kv_t, out_t = q_t · h_t, where (q, kv, a) is one linear map of the
    normed x; `reverse` runs it from the end. x (b, n, dim) → (b, n, dim), any floating dtype.
    `use_heinsen` and `use_jax_associative_scan` change nothing: they choose the algorithm, of
    which there is one here, and need no jax. `split_heads` and `gate_loop_fn` run only where
    something was done to them.

    cache: what an earlier call with `return_cache` returned beside its output: the product of
    all gates so far and the state, (b · dim, 1) each, with channels inside the batch, as in the
    published package. Sequences are chosen from `t.view(b, dim)` of each, not by
    `fastmix.select_rows`. ValueError for `return_cache` with `reverse`, and for x or a cache of
    another shape.
    """

    def __init__(
        self, dim: int, prenorm: bool = True, use_heinsen: bool = False,
        use_jax_associative_scan: bool = False, post_ln: bool = False, reverse: bool = False,
    ) -> None:
        super().__init__()
        if use_heinsen and use_jax_associative_scan:
            raise ValueError("SimpleGateLoopLayer: use_heinsen and use_jax_associative_scan must "
                             "not both be True")
        self.norm: nn.Module = RMSNorm(dim) if prenorm else nn.Identity()
        self.dim = dim
        self.to_qkva = nn.Sequential(
            nn.Linear(dim, 3 * dim, bias=False), nn.Unflatten(-1, (3, dim)))
        self.use_heinsen = use_heinsen
        self.use_jax = use_jax_associative_scan
        self.gate_loop_fn = gate_loop_operator
        self.maybe_post_ln: nn.Module = nn.LayerNorm(dim) if post_ln else nn.Identity()
        self.split_heads = Rearrange("(b d) n 1 -> b n d", d=dim)
        self.reverse = reverse

    def forward(
        self, x: Tensor, cache: Cache | None = None, return_cache: bool = False
    ) -> Tensor | tuple[Tensor, Cache]:
        check_sequence(WHERE, x, self.dim)
        q, kv, a = self.to_qkva(self.norm(x)).unbind(2)
        return scan(self, q, kv, a, cache, return_cache)


def scan(
    layer: Any, q: Tensor, kv: Tensor, a: Tensor, cache: Cache | None, return_cache: bool
) -> Tensor | tuple[Tensor, Cache]:
    """The scan of a SimpleGateLoopLayer, ours or the published one, of q, kv, a (b, n, dim)."""
    if return_cache and layer.reverse:
        raise ValueError(f"{WHERE}: return_cache must be False with reverse: a layer that runs "
                         "from the end has no state to go on from")
    if not _is_known(layer.gate_loop_fn):
        return _call_gate_loop_fn(layer, q, kv, a, cache, return_cache)
    dtype = wide(a.dtype)  # in float32 at least: the gate of a slow channel is 1 in bfloat16
    gates, kv = a.to(dtype).sigmoid(), kv.to(dtype)
    product, state = _unpack(cache, gates, a.dtype)
    states = ops.linear_scan(gates, kv, state, reverse=layer.reverse)
    out = (q * states).to(q.dtype)
    if not is_plain(layer.split_heads, Rearrange):
        out = layer.split_heads(out.transpose(1, 2).flatten(0, 1).unsqueeze(-1))
    out = layer.maybe_post_ln(out)
    if not return_cache:
        return out
    total = gates.prod(dim=1) if product is None else product * gates.prod(dim=1)
    return out, (total.view(-1, 1), states[:, -1].reshape(-1, 1))


def _is_known(gate_loop_fn: Any) -> bool:
    """Whether `gate_loop_fn` is ours or one of those that the published layer chooses from. They
    compute the same, and `ops.linear_scan` takes their place.

    It tells them by the module their code is in, which a wrapper around them does not share.
    """
    function = gate_loop_fn
    if type(function) is functools.partial and not function.args and (
            function.keywords.keys() <= {"heinsen"}):
        function = function.func
    if function is gate_loop_operator:
        return True
    published = "gateloop_transformer.simplified_gate_loop"
    inner = inspect.unwrap(function)  # by jax2torch and by jax's jit
    return (getattr(inner, "__name__", None), _file(inner), _file(function)) in (
        ("gate_loop_operator", published, published),
        ("jax_gate_loop_operator", published, "jax2torch.jax2torch"))


def _file(function: Any) -> str | None:
    """The module that a function was written in."""
    return getattr(function, "__globals__", {}).get("__name__")


def _call_gate_loop_fn(
    layer: Any, q: Tensor, kv: Tensor, a: Tensor, cache: Cache | None, return_cache: bool
) -> Tensor | tuple[Tensor, Cache]:
    """A `gate_loop_fn` that was put there gets what the published layer gives, (b · dim, n, 1)."""
    rows = [t.transpose(1, 2).flatten(0, 1).unsqueeze(-1) for t in (q, kv, a)]
    q, kv, a = [t.flip(1) for t in rows] if layer.reverse else rows
    out, cache = layer.gate_loop_fn(q, kv, a.sigmoid(), cache=cache)
    out = layer.maybe_post_ln(layer.split_heads(out))
    out = out.flip(1) if layer.reverse else out
    return (out, cache) if return_cache else out


def _unpack(
    cache: Cache | None, gates: Tensor, narrow: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The product of the gates before and the state before, (b, dim) each; those of the
    published layer come in the `narrow` dtype of its x."""
    if cache is None:
        return None, None
    if not isinstance(cache, (tuple, list)) or len(cache) != 2:
        raise TypeError(f"{WHERE}: cache must be a tuple of two tensors, as return_cache=True "
                        f"returns it, got {describe(cache)}")
    b, _, dim = gates.shape
    rows = []
    for name, tensor in zip(("cache[0]", "cache[1]"), cache):
        check_tensor(WHERE, name, tensor, tuple(dict.fromkeys((gates.dtype, narrow))),
                     like=("x", gates))
        check_shape(WHERE, name, tensor, "b·dim 1", {"b·dim": b * dim})
        rows.append(tensor.view(b, dim).to(gates.dtype))
    product, state = rows
    return product, state
