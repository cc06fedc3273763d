"""The first-order linear recurrence, all states returned."""

import torch

from fastmix.checks import (COMPLEX, REAL, check_length, check_tensor, match_dtypes, wide,
                            wide_complex)
from fastmix.fallback import linear_scan as fallback
from fastmix.ops._register import CARRY_EVERY, Operator, carry_count, needs_gradient


def _fake(gates, inputs, initial_state, reverse, carry_every):
    b, n, *rest = inputs.shape
    carries = carry_count(n, carry_every)
    dtype = torch.promote_types(gates.dtype, inputs.dtype)
    return (inputs.new_empty(b, n, *rest, dtype=dtype),
            inputs.new_empty(b, carries, *rest, dtype=wide(dtype)))


_operator = Operator(
    "linear_scan",
    "Tensor gates, Tensor inputs, Tensor? initial_state, bool reverse, int carry_every",
    outputs="states carries",
    fallback=fallback, fake=_fake,
    batched={"gates": None, "inputs": None, "initial_state": None})


def linear_scan(gates, inputs, initial_state=None, *, reverse=False):
    """h_t = gates_t · h_{t-1} + inputs_t

    Time is axis 1. Linear in n. Only products of gates are formed: a gate of 0 resets
    exactly, and gates of absolute value 1 stay accurate over long sequences.

    Args:
        gates: (b, n, …), real or complex. Its axes are the leading ones of inputs, each of
            the same size or, after n, 1: (b, n), (b, n, h) and (b, n, h, 1) all do for
            inputs (b, n, h, d).
        inputs: (b, n, …), real or complex
        initial_state: h_{-1} (b, …), shaped like one step of inputs; 0 if None
        reverse: run from t = n-1 down to 0

    Returns:
        All states (b, n, …), complex if any argument is.

    Real parts share one dtype: float64, float32, bfloat16 or float16 (states are summed in
    float32 at least). initial_state has the dtype of the states. Differentiable in every
    tensor, to any order. Raises TypeError and ValueError for arguments that do not fit.
    """
    where = "linear_scan"
    check_tensor(where, "gates", gates, REAL + COMPLEX)
    check_tensor(where, "inputs", inputs, REAL + COMPLEX, like=("gates", gates))
    if inputs.ndim < 2:
        raise ValueError(f"{where}: inputs must have shape (b, n, …), got {tuple(inputs.shape)}")
    fits = 2 <= gates.ndim <= inputs.ndim and gates.shape[:2] == inputs.shape[:2] and all(
        g == i or g == 1 for g, i in zip(gates.shape[2:], inputs.shape[2:]))
    if not fits:
        raise ValueError(f"{where}: gates must have leading axes of inputs {tuple(inputs.shape)}, "
                         f"of size 1 where broadcast after n, got {tuple(gates.shape)}")
    check_length(where, "inputs", inputs.shape[1])
    gates, inputs = _match(where, gates, inputs)
    dtype = torch.promote_types(gates.dtype, inputs.dtype)
    if initial_state is not None:
        check_tensor(where, "initial_state", initial_state, REAL + COMPLEX, like=("gates", gates))
        if gates.dtype == inputs.dtype:
            gates, inputs, initial_state = match_dtypes(
                where, gates=gates, inputs=inputs, initial_state=initial_state)
        else:
            check_tensor(where, "initial_state", initial_state, (dtype,))
        expected = (inputs.shape[0], *inputs.shape[2:])
        if initial_state.shape != expected:
            raise ValueError(f"{where}: initial_state must have shape {tuple(expected)}, "
                             f"got {tuple(initial_state.shape)}")
    gates = gates.reshape(*gates.shape, *(1,) * (inputs.ndim - gates.ndim))
    broadcast = [axis for axis, (g, i) in enumerate(zip(gates.shape, inputs.shape)) if g != i]
    if broadcast and any(size != 1 for size in gates.shape[broadcast[0]:]):
        gates = gates.expand(inputs.shape)  # kernels know gates that hold for whole heads only
    carry_every = CARRY_EVERY if needs_gradient(gates, inputs, initial_state) else 0
    states, _ = _operator(gates, inputs, initial_state, reverse, carry_every)
    return states


def _match(where, gates, inputs):
    """Equal real dtypes; complex with half precision is complex64 with float32 sums."""
    if gates.is_complex() == inputs.is_complex():
        return match_dtypes(where, gates=gates, inputs=inputs)
    number, real = (gates, inputs) if gates.is_complex() else (inputs, gates)
    if number.dtype != wide_complex(real.dtype):
        names = ("gates", "inputs") if gates.is_complex() else ("inputs", "gates")
        raise TypeError(f"{where}: {names[0]} must be {wide_complex(real.dtype)} for "
                        f"{real.dtype} {names[1]}, got {number.dtype}".replace("torch.", ""))
    return gates, inputs
