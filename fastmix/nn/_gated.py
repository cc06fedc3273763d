"""What the gated blocks of Gated State Spaces do with a call, whatever their mixer is."""

from typing import Any

from torch import Tensor

from fastmix.nn._cache import Cache, call, refuse_reversed
from fastmix.nn._checks import check_sequence


def run_gated(
    where: str, block: Any, mixer: Any, x: Tensor, cache: Cache, return_cache: bool,
    reverse_seq: bool = False
) -> Tensor | tuple[Tensor, Cache]:
    """x + to_out(to_gate(mixer(to_v(normed))) · to_u(normed)), normed = norm(x), of the block's
    layers: x (b, n, dim) → (b, n, dim), with return_cache beside the mixer's cache."""
    check_sequence(where, x, block.dim)
    if reverse_seq:
        refuse_reversed(where, cache, return_cache)
        x = x.flip(1)
    normed = block.norm(x)
    mixed, cache = call(mixer, block.to_v(normed), cache, return_cache)
    out = block.to_out(block.to_gate(mixed) * block.to_u(normed)) + x
    if reverse_seq:
        out = out.flip(1)
    return (out, cache) if return_cache else out
