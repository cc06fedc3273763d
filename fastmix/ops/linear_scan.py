"""The first-order linear recurrence, all states returned."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastmix.checks import (
    COMPLEX,
    REAL,
    Passed,
    check_flag,
    check_length,
    check_tensor,
    match_dtypes,
)
from fastmix.dtypes import autocast_enabled, wide, wide_complex
from fastmix.fallback import linear_scan as fallback
from fastmix.ops._carries import CARRY_EVERY, carry_count, needs_gradient
from fastmix.ops._register import Operator


def _states_dtype(gates: Tensor, inputs: Tensor) -> torch.dtype:
    return inputs.dtype if gates.dtype == inputs.dtype else torch.promote_types(
        gates.dtype, inputs.dtype)


def _fake(gates: Tensor, inputs: Tensor, initial_state: Tensor | None, reverse: bool,
          carry_every: int) -> tuple[Tensor, Tensor]:
    b, n, *rest = inputs.shape
    carries = carry_count(n, carry_every)
    dtype = _states_dtype(gates, inputs)
    return (inputs.new_empty(b, n, *rest, dtype=dtype),
            inputs.new_empty(b, carries, *rest, dtype=wide(dtype)))


_operator = Operator(
    "linear_scan",
    "Tensor gates, Tensor inputs, Tensor? initial_state, bool reverse, int carry_every",
    outputs="states carries",
    fallback=fallback, fake=_fake,
    batched={"gates": None, "inputs": None, "initial_state": None})
_passed = Passed()


@overload
def linear_scan(gates: Tensor, inputs: Tensor, initial_state: Tensor | None = None, *,
                reverse: bool = False,
                return_state: Literal[False] = False) -> Tensor: ...


@overload
def linear_scan(gates: Tensor, inputs: Tensor, initial_state: Tensor | None = None, *,
                reverse: bool = False,
                return_state: Literal[True]) -> tuple[Tensor, Tensor]: ...


@overload
def linear_scan(gates: Tensor, inputs: Tensor, initial_state: Tensor | None = None, *,
                reverse: bool = False,
                return_state: bool = False) -> Tensor | tuple[Tensor, Tensor]: ...


def linear_scan(gates: Tensor, inputs: Tensor, initial_state: Tensor | None = None, *,
                reverse: bool = False,
                return_state: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Runs a first-order linear recurrence and returns every state.

    h_t = gates_t · h_{t-1} + inputs_t

    Linear in n. Only products of gates are formed: a gate of 0 resets exactly, and gates of
    absolute value 1 stay accurate over long sequences.

    Args:
        gates: (b, n, …), real or complex. Its axes are the leading ones of inputs, each of
            the same size or, after n, 1: (b, n), (b, n, h) and (b, n, h, 1) all do for
            inputs (b, n, h, d). Gates that are the same at all steps: `gates.expand(b, n, …)`.
        inputs: (b, n, …), real or complex; time is axis 1
        initial_state: h_{-1} (b, …), shaped like one step of inputs; 0 if None
        reverse: run from t = n-1 down to 0
        return_state: also return the last state in the direction of the scan, h_{n-1}, or h_0
            with reverse, (b, …) in float32 or complex64 at least

    Returns:
        All states (b, n, …), complex if any argument is, or (those, state) with return_state.

    Real parts share one dtype: float64, float32, bfloat16 or float16 (states are summed in
    float32 at least; complex numbers beside half precision are complex64). initial_state has the
    dtype of the states, or of the state that is returned. Differentiable in every tensor, to any
    order. Raises TypeError and ValueError for arguments that do not fit.

    The scan of S5, Mamba, HGRN and other linear recurrent layers; the associative_scan of
    gateloop-transformer.

    >>> gates = torch.tensor([[0.5, 0.5, 0.0, 0.5]])
    >>> inputs = torch.tensor([[8.0, 0.0, 4.0, 0.0]])
    >>> linear_scan(gates, inputs)
    tensor([[8., 4., 4., 2.]])

    A sequence in pieces, each entered from the last state of the one before:

    >>> states, state = linear_scan(gates[:, :2], inputs[:, :2], return_state=True)
    >>> linear_scan(gates[:, 2:], inputs[:, 2:], state)
    tensor([[4., 2.]])
    """
    where = "linear_scan"
    key = _passed.key(gates, inputs, initial_state)
    if not _passed.has(key):
        gates, inputs, initial_state = _check(where, gates, inputs, initial_state)
        _passed.add(key)
    check_flag(where, "reverse", reverse)
    check_flag(where, "return_state", return_state)
    shape = inputs.shape
    dtype = _states_dtype(gates, inputs)
    wanted = needs_gradient(gates, inputs, initial_state)
    expanded = False
    if gates.shape != shape:
        gates = gates.reshape(*gates.shape, *(1,) * (inputs.ndim - gates.ndim))
        broadcast = [axis for axis, (g, i) in enumerate(zip(gates.shape, shape)) if g != i]
        expanded = bool(broadcast) and any(size != 1 for size in gates.shape[broadcast[0]:])
    rounded = dtype != wide(dtype)
    if wanted and (rounded and return_state or expanded and gates.dtype != wide(gates.dtype)):
        # The operator returns rounded states, and the last is not to be; its carries, which are
        # not rounded, have no gradient. Nor is the gradient of expanded gates, before it is summed.
        gates, inputs = gates.to(wide(gates.dtype)), inputs.to(wide(inputs.dtype))
    if expanded:
        gates = gates.expand(shape)  # kernels know gates that hold for whole heads only
    states, carries = _operator(gates, inputs, initial_state, reverse,
                                CARRY_EVERY if wanted or rounded and return_state else 0)
    if not return_state:
        return states if states.dtype == dtype else states.to(dtype)
    # Copied: a view would hold the memory of all.
    if rounded and not wanted:
        return states, carries[:, -1].clone()
    return states.to(dtype), states[:, 0 if reverse else -1].clone()


def _check(where: str, gates: Any, inputs: Any,
           initial_state: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checks the tensors and returns them in the dtypes in which they are taken."""
    check_tensor(where, "gates", gates, REAL + COMPLEX)
    check_tensor(where, "inputs", inputs, REAL + COMPLEX, like=("gates", gates))
    if inputs.ndim < 2:
        raise ValueError(f"{where}: inputs must have shape (b, n, …), got {tuple(inputs.shape)}: "
                         "inputs[None] has a batch")
    shape = inputs.shape
    if gates.shape != shape:
        _check_broadcast(where, gates, inputs)
    check_length(where, "inputs", shape[1])
    if gates.dtype != inputs.dtype:
        gates, inputs = _match(where, gates, inputs)
    if initial_state is not None:
        dtype = _states_dtype(gates, inputs)
        check_tensor(where, "initial_state", initial_state, REAL + COMPLEX, like=("gates", gates))
        if initial_state.dtype == wide(dtype) and not autocast_enabled(gates.device.type):
            pass  # a state that was returned
        elif gates.dtype == inputs.dtype:
            gates, inputs, initial_state = match_dtypes(
                where, gates=gates, inputs=inputs, initial_state=initial_state)
        else:
            check_tensor(where, "initial_state", initial_state, (dtype,))
        expected = (shape[0], *shape[2:])
        if initial_state.shape != expected:
            raise ValueError(f"{where}: initial_state must have shape {tuple(expected)}, "
                             f"got {tuple(initial_state.shape)}: take states[:, -1] of the piece "
                             "before")
    return gates, inputs, initial_state


def _check_broadcast(where: str, gates: Tensor, inputs: Tensor) -> None:
    fits = 2 <= gates.ndim <= inputs.ndim and gates.shape[:2] == inputs.shape[:2] and all(
        g == i or g == 1 for g, i in zip(gates.shape[2:], inputs.shape[2:]))
    if not fits:
        raise ValueError(f"{where}: gates must have leading axes of inputs {tuple(inputs.shape)}, "
                         f"of size 1 where broadcast after n, got {tuple(gates.shape)}: expand "
                         "those that are the same at all steps, gates.expand(b, n, …)")


def _match(where: str, gates: Tensor, inputs: Tensor) -> tuple[Tensor, ...]:
    """Equal real dtypes; complex with half precision is complex64 with float32 sums."""
    if gates.is_complex() == inputs.is_complex():
        return match_dtypes(where, gates=gates, inputs=inputs)
    number, real = (gates, inputs) if gates.is_complex() else (inputs, gates)
    if number.dtype != wide_complex(real.dtype):
        names = ("gates", "inputs") if gates.is_complex() else ("inputs", "gates")
        raise TypeError(f"{where}: {names[0]} must be {wide_complex(real.dtype)} for "
                        f"{real.dtype} {names[1]}, got {number.dtype}".replace("torch.", ""))
    return gates, inputs
