"""Caches: a module keeps in them what the next steps need of those so far.

A cache is a tensor, None or a tuple of caches. Each module makes its own out of its operators'
states and of its children's caches, and hands these back to them: it never looks into a child's.
Every tensor has the batch as its first axis. None is the beginning.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmix.checks import check_shape, check_tensor
from fastmix.states import Rows, may_write, steps_on_host

Cache = Any


class ModelCache(NamedTuple):
    """The cache of a language model."""

    steps: Tensor
    """(b,): how many tokens there were, int64"""
    layers: tuple[Cache, ...]
    """a cache per mixer"""


torch.serialization.add_safe_globals([ModelCache])  # as the states in fastmix.states


def call(
    mixer: Callable, x: Tensor, cache: Cache, return_cache: bool, **kwargs: Any
) -> tuple[Tensor, Cache]:
    """mixer(x) and its cache. Without a cache the mixer is called with x alone, because a module
    that was put in its place may know no caches."""
    if cache is None and not return_cache:
        return mixer(x, **kwargs), None
    return mixer(x, cache=cache, return_cache=True, **kwargs)


def call_operator(
    operator: Callable, *args: Any, cache: Cache, return_cache: bool, **kwargs: Any
) -> tuple[Tensor, Cache]:
    """The operator's output, and its state if that is asked for."""
    out = operator(*args, initial_state=cache, return_state=return_cache, **kwargs)
    return out if return_cache else (out, None)


def split_cache(where: str, cache: Cache, count: int) -> Sequence[Cache]:
    """The caches of `count` children."""
    if cache is None:
        return (None,) * count
    if type(cache) is not tuple or len(cache) != count:
        raise ValueError(f"{where}: cache must be one that a module of the same sizes returned, "
                         f"a tuple of {count}, got {describe(cache)}: begin with cache=None")
    return cache


def split_model_cache(
    where: str, x: Tensor, cache: Cache, count: int, max_length: int | None = None
) -> tuple[Tensor, Sequence[Cache]]:
    """The numbers of tokens (b,) that the rows of x (b, n) have had, and `count` mixers' caches.

    ValueError, on CPUs, if these and x together are more than max_length, or if the cache has been
    used up.
    """
    b, n = x.shape[:2]
    if cache is None:
        return torch.zeros(b, dtype=torch.int64, device=x.device), (None,) * count
    if not isinstance(cache, ModelCache) or len(cache.layers) != count:
        raise ValueError(
            f"{where}: cache must be one that a model of the same sizes returned, of {count} "
            f"mixers, got {describe(cache)}: begin with cache=None")
    check_steps(where, cache.steps, x)
    host = steps_on_host(cache.steps)
    if host and min(host) < 0:
        raise ValueError(f"{where}: cache must be one that no call has used up, got one that a "
                         "call within fastmix.states.in_place() wrote into: go on from the cache "
                         "that this call returned")
    if host and max_length is not None:
        _check_longest(where, max(host) + n, max_length)
    return cache.steps, cache.layers


def use_up(seen: Tensor, n: int) -> Tensor:
    """Returns the numbers of tokens (b,) after n more than `seen`, those of the cache that was
    handed in.

    Where caches are written in place, the call has used up that cache from here on, whether or not
    it comes to its end: on CPUs, where a later call can look at it, it counts -1 tokens.
    """
    steps = seen + n
    if may_write(seen) and steps_on_host(seen):
        seen.fill_(-1)
    return steps


def check_steps(where: str, steps: Any, x: Tensor) -> None:
    check_tensor(where, "cache.steps", steps, (torch.int64,), like=("x", x))
    check_shape(where, "cache.steps", steps, "b", {"b": x.shape[0]})


def check_total(where: str, count: Tensor, max_length: int) -> None:
    """Refuses more than `max_length` steps, where to look is not to wait for a device."""
    if host := steps_on_host(count):
        _check_longest(where, max(host), max_length)


def _check_longest(where: str, longest: int, max_length: int) -> None:
    if longest > max_length:
        raise ValueError(
            f"{where}: x must have at most {max_length} time steps together with those in cache, "
            f"got {longest}: begin anew from the last of them")


def describe(cache: Cache) -> str:
    """Describes a cache in an error."""
    if isinstance(cache, ModelCache):
        return f"one of {len(cache.layers)} mixers"
    if isinstance(cache, tuple):
        return f"{type(cache).__name__} of {len(cache)}"
    return type(cache).__name__


def refuse_reversed(where: str, cache: Cache, return_cache: bool) -> None:
    if cache is not None or return_cache:
        raise ValueError(
            f"{where}: cache and return_cache must be left out with reverse_seq=True, which "
            f"begins at the end: later steps would change earlier ones, got "
            f"return_cache={return_cache}")


def append(where: str, cache: Cache, *new: Tensor, kept: int | None = None) -> Rows:
    """Appends the rows `new`, (b, n, …) each, to those of `cache`.

    A cache that keeps only the newest `kept` rows has that many from the start, at first zeros: so
    no size depends on time.
    """
    b, n = new[0].shape[:2]
    if cache is None:
        zeros = torch.zeros(b, dtype=torch.int64, device=new[0].device)
        cache = Rows(zeros, tuple(t.new_zeros(b, kept or 0, *t.shape[2:]) for t in new))
    if not isinstance(cache, Rows) or len(cache.tensors) != len(new):
        raise ValueError(
            f"{where}: cache must be one that a module of the same sizes returned, Rows of "
            f"{len(new)} tensors, got {describe(cache)}: begin with cache=None")
    check_steps(where, cache.steps, new[0])
    for old, t in zip(cache.tensors, new):
        check_tensor(where, "cache", old, (t.dtype,), like=("x", t))
        m = old.shape[1:2] if kept is None else (kept,)
        if old.shape != (b, *m, *t.shape[2:]):
            raise ValueError(
                f"{where}: cache must hold rows ({b}, {'m' if kept is None else kept}, "
                f"{', '.join(map(str, t.shape[2:]))}), got {tuple(old.shape)}")
    return Rows(cache.steps + n, tuple(
        torch.cat((old, t), dim=1) for old, t in zip(cache.tensors, new)))


def last_rows(rows: Rows, count: int) -> Rows:
    """Returns the newest `count` rows, in memory of their own."""
    return Rows(rows.steps, tuple(t[:, -count:].clone() for t in rows.tensors))


def step_numbers(rows: Rows) -> Tensor:
    """The numbers (b, m) of the rows' steps in their sequences; negative before the first."""
    m = rows.tensors[0].shape[1]
    return rows.steps[:, None] + torch.arange(-m, 0, device=rows.steps.device)
