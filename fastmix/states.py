"""States: what the operators carry from one step to the next, as tensors with the batch first."""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmix import _torch_private


class CumulativeMeanState(NamedTuple):
    """The state of `cumulative_mean`."""

    sum: Tensor
    """(b, …): the sum of all steps so far, float32 (float64 for float64 x)"""
    steps: Tensor
    """(b,): how many steps those are, int64"""


class WindowedSGUState(NamedTuple):
    """The state of `windowed_sgu`."""

    rows: Tensor
    """(b, 2w, c): the normed gates of the last 2w steps, step t at t mod 2w; 0 where there was
    no step yet; float32 (float64 for float64 x)"""
    steps: Tensor
    """(b,): how many steps there were, int64"""


class CausalSGUState(NamedTuple):
    """The state of `causal_sgu`."""

    rows: Tensor
    """(b, s, c): the normed gates of all steps so far, step t at t; 0 where there was no step
    yet; float32 (float64 for float64 x)"""
    steps: Tensor
    """(b,): how many steps there were, int64"""


class FFTConvBlock(NamedTuple):
    """Consecutive steps in an FFTConvState: 64, 128, 256 …, or fewer than 64 under way."""

    x: Tensor
    """(b, m, h, d)"""
    kernel: Tensor | None
    """(b, m, h): the lags that came with them, if lags come with steps"""
    ahead: Tensor
    """(b, m, h, d): what they add to the outputs of the m steps after them; (b, 0, h, d) of those
    under way"""


class FFTConvState(NamedTuple):
    """The state of `fft_conv`; all rows of a batch are at the same step.

    float32, or float64 for float64 x.
    """

    x: Tensor
    """(b, p, h, d): the steps before its epoch, or as many of the last as a kernel that is known
    has further lags"""
    kernel: Tensor | None
    """(b, p, h): the lags that came with those steps; None where the kernel is known"""
    tail: Tensor
    """(b, e, h, d): what those steps add to the outputs of the epoch's e steps"""
    blocks: tuple[FFTConvBlock, ...]
    """the steps of the epoch so far"""


_in_place = ContextVar("caches are written in place", default=False)


@contextlib.contextmanager
def in_place() -> Iterator[None]:
    """Within it models may write into the caches that they are handed, where no gradient is kept.

    Who has no other use for them saves copying what is large, the rows of gating units:

    >>> model = fastmix.nn.CausalSGU(8, 16, heads=2)
    >>> with torch.no_grad(), fastmix.states.in_place():
    ...     out, cache = model(torch.ones(1, 3, 8), return_cache=True)
    ...     out, cache = model(torch.ones(1, 1, 8), cache=cache, return_cache=True)
    >>> out.shape
    torch.Size([1, 1, 4])
    """
    before = _in_place.set(True)
    try:
        yield
    finally:
        _in_place.reset(before)


def may_write() -> bool:
    """Whether caches are written in place here."""
    return not torch.compiler.is_compiling() and not torch.is_grad_enabled() and _in_place.get()


def steps_on_host(steps: Tensor) -> list[int] | None:
    """Their values, where a CPU has them and nothing traces or maps what is done."""
    if (type(steps) is not Tensor or steps.device.type != "cpu" or torch.compiler.is_compiling()
            or _torch_private.transforms_active()):
        return None
    return steps.tolist()


def select_rows(state: Any, rows: Tensor | Sequence[int] | slice) -> Any:
    """The state of the sequences `rows` of a batch, in that order: a copy.

    Takes a state of any operator and whatever holds such states in tuples, named tuples, lists
    and dictionaries; every tensor has the batch first. None stays None. A row may be chosen
    often, as beams want it.

    >>> out, state = fastmix.ops.cumulative_mean(torch.randn(3, 5, 2), return_state=True)
    >>> fastmix.select_rows(state, [2, 0, 0, 0]).sum.shape
    torch.Size([4, 2])
    """
    if isinstance(rows, slice):
        return _mapped(state, lambda tensor: tensor[rows].clone())
    chosen = torch.as_tensor(rows)
    if chosen.dtype not in (torch.int64, torch.int32) or chosen.ndim != 1:
        raise TypeError("select_rows: rows must be a slice or integers (b,), got "
                        f"{str(chosen.dtype).removeprefix('torch.')} {tuple(chosen.shape)}")
    return _mapped(state, lambda tensor: tensor.index_select(0, chosen.to(tensor.device)))


def _mapped(state: Any, select: Any) -> Any:
    if state is None:
        return None
    if isinstance(state, Tensor):
        return select(state)
    if isinstance(state, dict):
        return type(state)((key, _mapped(value, select)) for key, value in state.items())
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*(_mapped(value, select) for value in state))
    if isinstance(state, (tuple, list)):
        return type(state)(_mapped(value, select) for value in state)
    raise TypeError("select_rows: a state must be made of tensors in tuples, lists and "
                    f"dictionaries, got {type(state).__name__}")


class Rows(NamedTuple):
    """The cache of attention, and of whatever else looks back at every step."""

    steps: Tensor
    """(b,): how many steps there were, int64"""
    tensors: tuple[Tensor, ...]
    """(b, m, …) each: the last m steps, the newest last; a sequence that has had fewer begins
    with zeros"""


# What torch.load makes from files with weights_only=True, its default.
torch.serialization.add_safe_globals([CumulativeMeanState, WindowedSGUState, CausalSGUState,
                                      FFTConvBlock, FFTConvState, Rows])


def concatenate(states: Sequence[Any], sizes: Sequence[int]) -> Any:
    """States of one module or operator, of `sizes` sequences each, as that of one batch.

    None, which is the beginning, stands for a state of zeros.
    """
    if not can_join(states):
        raise ValueError("concatenate: states must be of one module or operator, and those of "
                         "fft_conv at one step, got states of other shapes")
    known = next((state for state in states if state is not None), None)
    if known is None:
        return None
    states = [_mapped(known, lambda t, b=size: t.new_zeros(b, *t.shape[1:])) if state is None
              else state for state, size in zip(states, sizes)]
    if isinstance(known, Tensor):
        return torch.cat(states)
    if isinstance(known, Rows):
        longest = max(rows.tensors[0].shape[1] for rows in states)
        states = [Rows(rows.steps, tuple(_lengthened(t, longest) for t in rows.tensors))
                  for rows in states]
    joined = [concatenate(parts, sizes) for parts in zip(*states)]
    return type(known)(*joined) if hasattr(known, "_fields") else tuple(joined)


def can_join(states: Sequence[Any]) -> bool:
    """Whether `concatenate` can: those of fft_conv only where they are at one step."""
    known = [state for state in states if state is not None]
    if not known:
        return True
    first = known[0]
    if isinstance(first, Rows):
        return all(isinstance(state, Rows) for state in known)
    if isinstance(first, Tensor):
        return all(isinstance(t, Tensor) and t.shape[1:] == first.shape[1:] for t in known)
    return (all(type(state) is type(first) and len(state) == len(first) for state in known)
            and all(can_join(parts) for parts in zip(*known)))


def _lengthened(rows: Tensor, m: int) -> Tensor:
    """(b, m, …), zeros first."""
    b, known, *rest = rows.shape
    return torch.cat((rows.new_zeros(b, m - known, *rest), rows), dim=1)
