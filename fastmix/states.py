"""States: what the operators carry from one step to the next, as tensors with the batch first."""

import contextlib
import itertools
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
    """(b, m, h, d): what they and all steps before them add to the outputs of the m steps after
    them, or fewer at the epoch's end; (b, 0, h, d) of those under way"""


class FFTConvState(NamedTuple):
    """The state of `fft_conv`, where all rows of a batch are at the same step.

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


class FFTConvRows(NamedTuple):
    """The state of `fft_conv` where rows of a batch are at different steps, as `concatenate` joins
    them."""

    parts: tuple[FFTConvState, ...]
    """of the first rows, of those after them …"""


_in_place = ContextVar("caches are written in place", default=False)


@contextlib.contextmanager
def in_place() -> Iterator[None]:
    """Within it, models may write into the caches that they are handed, where no gradient is kept.

    If you have no other use for those caches, this saves copying what is large in them, such as
    the rows of gating units:

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


def may_write(state: Any = None) -> bool:
    """Whether caches are written in place here, and `state`, a tensor or a tuple of tensors, can
    be: a tensor made in inference mode can be written only there."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not _in_place.get():
        return False
    tensors = state if isinstance(state, tuple) else (state,)
    return torch.is_inference_mode_enabled() or not any(
        isinstance(t, Tensor) and t.is_inference() for t in tensors)


def steps_on_host(steps: Tensor) -> list[int] | None:
    """The values of `steps`, or None where looking would wait for a device or stop a trace."""
    if (type(steps) is not Tensor or steps.device.type != "cpu" or torch.compiler.is_compiling()
            or _torch_private.transforms_active()):
        return None
    return steps.tolist()


def select_rows(state: Any, rows: Tensor | Sequence[int] | slice) -> Any:
    """The state of the sequences `rows` of a batch, in that order: a copy.

    It takes a state of any operator, and tuples, named tuples, lists and dictionaries of such
    states; every tensor has the batch first. None stays None. A row may be chosen more than
    once, as in beam search.

    >>> out, state = fastmix.ops.cumulative_mean(torch.randn(3, 5, 2), return_state=True)
    >>> fastmix.select_rows(state, [2, 0, 0, 0]).sum.shape
    torch.Size([4, 2])
    """
    if isinstance(rows, slice):
        return _mapped(state, lambda tensor: tensor[rows].clone(),
                       lambda parts: _chosen(parts, range(_count(parts))[rows]))
    chosen = torch.as_tensor(rows)
    if chosen.dtype not in (torch.int64, torch.int32) or chosen.ndim != 1:
        raise TypeError("select_rows: rows must be a slice or integers (b,), got "
                        f"{str(chosen.dtype).removeprefix('torch.')} {tuple(chosen.shape)}")
    return _mapped(state, lambda tensor: tensor.index_select(0, chosen.to(tensor.device)),
                   lambda parts: _chosen(parts, chosen.tolist()))


def _count(rows: FFTConvRows) -> int:
    return sum(part.x.shape[0] for part in rows.parts)


def _chosen(rows: FFTConvRows, chosen: Sequence[int]) -> FFTConvState | FFTConvRows:
    """Those rows, in that order: neighbours of one part stay one."""
    places = [(part, row) for part in rows.parts for row in range(part.x.shape[0])]
    if any(not 0 <= i < len(places) for i in chosen):
        raise IndexError(f"select_rows: rows must be from 0 to {len(places) - 1}, got {chosen}")
    runs = itertools.groupby((places[i] for i in chosen), key=lambda place: id(place[0]))
    parts = [select_rows(run[0][0], [row for _, row in run])
             for run in (list(run) for _, run in runs)]
    if not parts:
        return select_rows(rows.parts[0], slice(0))
    return parts[0] if len(parts) == 1 else FFTConvRows(tuple(parts))


def _mapped(state: Any, select: Any, of_parts: Any = None) -> Any:
    """`state` with select(tensor) for each tensor, and of_parts(rows) for FFTConvRows."""
    if state is None:
        return None
    if isinstance(state, FFTConvRows):
        return of_parts(state)
    if isinstance(state, Tensor):
        return select(state)
    if isinstance(state, dict):
        return type(state)((key, _mapped(value, select, of_parts)) for key, value in state.items())
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*(_mapped(value, select, of_parts) for value in state))
    if isinstance(state, (tuple, list)):
        return type(state)(_mapped(value, select, of_parts) for value in state)
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
                                      FFTConvBlock, FFTConvState, FFTConvRows, Rows])


def concatenate(states: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Joins states of one module or operator, of `sizes` sequences each, into that of one batch.

    A state that is None, the beginning of a sequence, becomes a state of zeros.
    """
    if not can_join(states):
        raise ValueError("concatenate: states must be of one module or operator and differ in the "
                         "batch alone, got others: run these sequences apart")
    known = next((state for state in states if state is not None), None)
    if known is None:
        return None
    if isinstance(known, (FFTConvState, FFTConvRows)):
        return _joined(states, sizes, known)
    if not isinstance(known, (Tensor, Rows)):
        begin = (None,) * len(known)  # each part knows what its beginning is
        states = [begin if state is None else state for state in states]
        joined = [concatenate(parts, sizes) for parts in zip(*states)]
        return type(known)(*joined) if hasattr(known, "_fields") else tuple(joined)
    states = [_mapped(known, lambda t, b=size: t.new_zeros(b, *t.shape[1:])) if state is None
              else state for state, size in zip(states, sizes)]
    if isinstance(known, Tensor):
        return torch.cat(states)
    longest = max(rows.tensors[0].shape[1] for rows in states)
    tensors = ([_lengthened(t, longest) for t in rows.tensors] for rows in states)
    return Rows(torch.cat([rows.steps for rows in states]), tuple(map(torch.cat, zip(*tensors))))


def _joined(states: Sequence[FFTConvState | FFTConvRows | None], sizes: Sequence[int],
            known: FFTConvState | FFTConvRows) -> FFTConvState | FFTConvRows:
    """Joins states of fft_conv. Neighbouring parts that are at one step become one part."""
    x, kernel, tail, _ = _parts(known)[0]
    joined: list[FFTConvState] = []
    for state, size in zip(states, sizes):
        if state is None:
            state = FFTConvState(
                x.new_zeros(size, 0, *x.shape[2:]),
                None if kernel is None else kernel.new_zeros(size, 0, *kernel.shape[2:]),
                tail.new_zeros(size, 0, *tail.shape[2:]), ())
        for part in _parts(state):
            if joined and _layout(joined[-1]) == _layout(part):
                part = _catenated(joined.pop(), part)
            joined.append(part)
    return joined[0] if len(joined) == 1 else FFTConvRows(tuple(joined))


def _parts(state: FFTConvState | FFTConvRows) -> tuple[FFTConvState, ...]:
    return state.parts if isinstance(state, FFTConvRows) else (state,)


def _layout(state: Any) -> Any:
    """All shapes but the batch: states of one layout are at one step."""
    if state is None or isinstance(state, Tensor):
        return None if state is None else state.shape[1:]
    return tuple(map(_layout, state))


def _catenated(*states: Any) -> Any:
    """States of one layout, tensor by tensor."""
    if states[0] is None or isinstance(states[0], Tensor):
        return None if states[0] is None else torch.cat(states)
    parts = [_catenated(*of_all) for of_all in zip(*states)]
    return type(states[0])(*parts) if hasattr(states[0], "_fields") else tuple(parts)


def can_join(states: Sequence[Any]) -> bool:
    """Whether `concatenate` can join these states."""
    known = [state for state in states if state is not None]
    if not known:
        return True
    first = known[0]
    if isinstance(first, Rows):
        return all(isinstance(state, Rows) for state in known)
    if isinstance(first, (FFTConvState, FFTConvRows)):
        return all(isinstance(state, (FFTConvState, FFTConvRows)) for state in known) and len({
            (part.x.shape[2:], part.kernel is None)
            for state in known for part in _parts(state)}) == 1
    if isinstance(first, Tensor):
        return all(isinstance(t, Tensor) and t.shape[1:] == first.shape[1:] for t in known)
    return (all(type(state) is type(first) and len(state) == len(first) for state in known)
            and all(can_join(parts) for parts in zip(*known)))


def _lengthened(rows: Tensor, m: int) -> Tensor:
    """(b, m, …), zeros first."""
    b, known, *rest = rows.shape
    return torch.cat((rows.new_zeros(b, m - known, *rest), rows), dim=1)
