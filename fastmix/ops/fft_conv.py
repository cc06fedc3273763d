"""Long causal convolution, with a kernel per sample and head if wanted."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastmix.checks import (
    Passed,
    check_flag,
    check_length,
    check_shape,
    check_tensor,
    match_dtypes,
    match_parameter,
)
from fastmix.dtypes import autocast_enabled, wide
from fastmix.fallback import fft_conv as fallback
from fastmix.ops import _fft_conv_state
from fastmix.ops._register import Operator, no_autocast
from fastmix.states import FFTConvBlock, FFTConvRows, FFTConvState

_operator = Operator(
    "fft_conv", "Tensor x, Tensor kernel, Tensor? skip", outputs="out",
    fallback=fallback, fake=lambda x, kernel, skip: x.new_empty(x.shape),
    batched={"x": 4, "kernel": 3})
_passed = {revealed: Passed() for revealed in (False, True)}


@overload
def fft_conv(x: Tensor, kernel: Tensor, skip: Tensor | None = None, *, revealed: bool = False,
             initial_state: FFTConvState | FFTConvRows | None = None,
             return_state: Literal[False] = False) -> Tensor: ...


@overload
def fft_conv(x: Tensor, kernel: Tensor, skip: Tensor | None = None, *, revealed: bool = False,
             initial_state: FFTConvState | FFTConvRows | None = None,
             return_state: Literal[True]) -> tuple[Tensor, FFTConvState | FFTConvRows]: ...


@overload
def fft_conv(x: Tensor, kernel: Tensor, skip: Tensor | None = None, *, revealed: bool = False,
             initial_state: FFTConvState | FFTConvRows | None = None,
             return_state: bool = False) -> Tensor | tuple[Tensor, FFTConvState | FFTConvRows]: ...


def fft_conv(x: Tensor, kernel: Tensor, skip: Tensor | None = None, *, revealed: bool = False,
             initial_state: FFTConvState | FFTConvRows | None = None,
             return_state: bool = False) -> Tensor | tuple[Tensor, FFTConvState | FFTConvRows]:
    """Convolves a sequence causally with kernels of any length, even one per sample.

    y_t = Σ_{j ≤ t} kernel_j · x_{t-j} + skip · x_t

    There is one kernel per head, shared by the head's channels; for a kernel per channel, as in
    Hyena, make every channel a head: h = dim, d = 1. O(n log n) time, linear memory.

    Args:
        x: (b, n, h, d), float64, float32, bfloat16 or float16, any strides. Time is axis 1,
            before the heads: (b, h, n, d) must be transposed.
        kernel: (b, m, h), one per sample, or (m, h) for all; any m ≥ 1, lags from n on have
            no effect. The dtype of x, or float32 where x has 16 bits.
        skip: (h, d), a weight of each channel's own input, in a dtype of the kernel; nothing is
            added if None
        revealed: whether lag l of the kernel becomes known with step l, as in GatedDsConv: kernel
            is then (b, n, h), the lags of the steps of x. Otherwise every call takes the whole
            kernel.
        initial_state: the FFTConvState that the steps before x left; none if None. Or the
            FFTConvRows of rows that are at different steps, as fastmix.states.concatenate makes
            them.
        return_state: also return the state after x. A step from a state takes O(log² n) time on
            average, and O(n log n) where it begins a new epoch; the state holds the steps so far,
            or as many as the kernel has lags.

    Returns:
        (b, n, h, d) in the dtype of x, or (that, state) with return_state. Transforms run in
        float32 (float64 for float64). They carry rounding from any step to every other. NaN,
        infinity and magnitudes far above all before them do not reach earlier steps on CPUs; on
        GPUs they do. Outputs that NaN or infinity reach are NaN.

    Differentiable in every tensor, to any order. Raises TypeError and ValueError for arguments
    that do not fit.

    The data-dependent long convolution of gated-state-spaces-pytorch (GatedDsConv); with a
    shared kernel, the long convolution of S4, Hyena and their kin. The skip is their D.

    >>> x = torch.tensor([1.0, 0.0, 2.0, 0.0]).view(1, 4, 1, 1)
    >>> kernel = torch.tensor([3.0, 1.0]).view(2, 1)
    >>> fft_conv(x, kernel).flatten().round()
    tensor([3., 1., 6., 2.])

    A sequence in pieces, each entered from the state after the one before:

    >>> first, state = fft_conv(x[:, :2], kernel, return_state=True)
    >>> fft_conv(x[:, 2:], kernel, initial_state=state).flatten().round()
    tensor([6., 2.])
    """
    where = "fft_conv"
    check_flag(where, "revealed", revealed)
    check_flag(where, "return_state", return_state)
    key = _passed[revealed].key(x, kernel, skip)
    if not _passed[revealed].has(key):
        x, kernel, skip = _check(where, x, kernel, skip, revealed)
        _passed[revealed].add(key)
    if isinstance(initial_state, FFTConvRows):
        out, rows = _run_rows(where, x, kernel, skip, revealed, initial_state)
        return (out, rows) if return_state else out
    if initial_state is not None:
        try:
            stepped = _fft_conv_state.step(key, x, kernel, skip, revealed, initial_state)
        except Exception:
            _check_state(where, initial_state, x, revealed)  # which says what does not fit
            raise
        if stepped is not None:
            return stepped if return_state else stepped[0]
        _check_state(where, initial_state, x, revealed)  # its shapes are others at each step
    elif not return_state:
        return _operator(x, kernel, skip)
    dtype = wide(x.dtype)
    inputs = x.to(dtype)
    lags = kernel.to(dtype) if revealed else kernel  # not all of a long kernel for each step
    if initial_state is None:
        out, state = _fft_conv_state.first(_convolve, inputs, lags, revealed)
    else:
        out, state = _fft_conv_state.advance(_convolve, inputs, lags, initial_state)
    if skip is not None:
        out = torch.addcmul(out, skip.to(dtype), inputs)
    return (out.to(x.dtype), state) if return_state else out.to(x.dtype)


def _check(where: str, x: Any, kernel: Any, skip: Any,
           revealed: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checks the tensors and returns them in the dtypes in which they are taken."""
    check_tensor(where, "x", x)
    sizes = check_shape(where, "x", x, "b n h d")
    check_length(where, "x", sizes["n"])
    check_tensor(where, "kernel", kernel, like=("x", x))
    if autocast_enabled(x.device.type):
        x, kernel = match_dtypes(where, x=x, kernel=kernel)
    kernel = match_parameter(where, "kernel", kernel, ("x", x))
    layout = "m h" if kernel.ndim == 2 else "b m h"
    check_length(where, "kernel", check_shape(where, "kernel", kernel, layout, sizes)["m"])
    if skip is not None:
        check_tensor(where, "skip", skip, like=("x", x))
        check_shape(where, "skip", skip, "h d", sizes)
        skip = match_parameter(where, "skip", skip, ("x", x))
    if revealed and (kernel.ndim != 3 or kernel.shape[1] != sizes["n"]):
        raise ValueError(f"{where}: with revealed=True kernel must have shape (b, n, h) = "
                         f"({sizes['b']}, {sizes['n']}, {sizes['h']}), the lags that come with the "
                         f"steps of x, got {tuple(kernel.shape)}")
    return x, kernel, skip


def _run_rows(where: str, x: Tensor, kernel: Tensor, skip: Tensor | None, revealed: bool,
              state: FFTConvRows) -> tuple[Tensor, FFTConvRows]:
    """Calls fft_conv once for each part of the batch whose rows are at one step."""
    for i, part in enumerate(state.parts):
        if not isinstance(part, FFTConvState) or not isinstance(part.x, Tensor):
            raise TypeError(f"{where}: initial_state.parts[{i}] must be an FFTConvState, got "
                            f"{type(part).__name__}: fastmix.states.concatenate joins states")
    sizes = [part.x.shape[0] for part in state.parts]
    if sum(sizes) != x.shape[0]:
        raise ValueError(f"{where}: initial_state must be of b = {x.shape[0]} rows like x, got "
                         f"{sum(sizes)}")
    kernels = [kernel] * len(sizes) if kernel.ndim == 2 else kernel.split(sizes)
    runs = [fft_conv(rows, of_rows, skip, revealed=revealed, initial_state=part, return_state=True)
            for rows, of_rows, part in zip(x.split(sizes), kernels, state.parts)]
    parts = tuple(part for _, part in runs if isinstance(part, FFTConvState))
    with no_autocast([x]):  # where torch joins no float16 on CPUs
        return torch.cat([out for out, _ in runs]), FFTConvRows(parts)


def _convolve(x: Tensor, kernel: Tensor) -> Tensor:
    return _operator(x, kernel, None)


def _check_state(where: str, state: FFTConvState, x: Tensor, revealed: bool) -> None:
    if not isinstance(state, FFTConvState):
        raise TypeError(f"{where}: initial_state must be an FFTConvState, as {where} returns it "
                        f"with return_state=True, got {type(state).__name__}")
    if revealed != (state.kernel is not None):
        raise ValueError(f"{where}: initial_state must come from a call with revealed={revealed} "
                         f"like this one, got that of one with revealed={not revealed}: make all "
                         "calls alike")
    if not isinstance(state.blocks, tuple) or not all(
            isinstance(block, FFTConvBlock) for block in state.blocks):
        raise TypeError(f"{where}: initial_state.blocks must be a tuple of FFTConvBlocks, got "
                        f"{str(state.blocks)[:40]}")
    b, _, h, d = x.shape
    sizes, dtype = {"b": b, "h": h, "d": d}, wide(x.dtype)
    whole, of_lags = (b, h, d), (b, h)

    def fits(value: Any, shape: tuple[int, ...]) -> bool:
        """Whether `value` passes what is checked below; this costs less."""
        return (type(value) is Tensor and value.dtype == dtype and value.device == x.device
                and value.layout == torch.strided and not value.is_nested
                and value.ndim == len(shape) + 1
                and (value.shape[0], *value.shape[2:]) == shape)

    known = fits(state.x, whole) and fits(state.tail, whole) and all(
        fits(block.x, whole) and fits(block.ahead, whole) for block in state.blocks)
    parts: list[FFTConvState | FFTConvBlock] = [state, *state.blocks]
    if known and (not revealed or all(
            part.kernel is not None and fits(part.kernel, of_lags)
            and part.kernel.shape[1] == part.x.shape[1] for part in parts)):
        return

    def check(name: str, value: Any, layout: str, sizes: dict[str, int]) -> dict[str, int]:
        check_tensor(where, f"initial_state.{name}", value, (dtype,), like=("x", x))
        return check_shape(where, f"initial_state.{name}", value, layout, sizes)

    for i, part in enumerate(parts):
        of, steps = (f"blocks[{i - 1}].", "m") if i else ("", "p")
        of_steps = check(f"{of}x", part.x, f"b {steps} h d", sizes)
        if revealed or part.kernel is not None:
            check(f"{of}kernel", part.kernel, f"b {steps} h", of_steps)
        if isinstance(part, FFTConvBlock):
            check(f"{of}ahead", part.ahead, "b m h d", sizes)
        else:
            check("tail", part.tail, "b e h d", sizes)
