"""The parts that the two spatial gating units share: schema, fake, checks and states."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmix.activations import ACTIVATIONS, OUTSIDE
from fastmix.checks import (
    Passed,
    check_divides,
    check_flag,
    check_length,
    check_number,
    check_shape,
    check_tensor,
    match_dtypes,
    match_parameter,
)
from fastmix.dtypes import wide
from fastmix.fallback import _sgu_state
from fastmix.ops._register import Operator, may_step, no_autocast, step_operator
from fastmix.ops._states import check_state
from fastmix.states import steps_on_host

ARGUMENTS = ("Tensor x, Tensor weight, Tensor bias, Tensor? norm_weight, Tensor? norm_bias, "
             "float eps, Tensor? gate_residual, str activation")
_step = step_operator("sgu_step", f"Tensor(a!) rows, {ARGUMENTS}, int t", _sgu_state.step)
_passed = {window: Passed() for window in ("w", "s")}
BATCHED: dict[str, int | None] = {"x": 3, "gate_residual": 3}


def fake(x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor | None,
         norm_bias: Tensor | None, eps: float, gate_residual: Tensor | None,
         activation: str) -> Tensor:
    b, n, width = x.shape
    return x.new_empty(b, n, width // 2)


def checked_call(
        where: str, operator: Operator, window: str, x: Any, weight: Any, bias: Any,
        norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
        gate_residual: Any, activation: str | Callable[[Tensor], Tensor] | None,
        initial_state: Any, return_state: bool, in_place: bool, kind: type,
        resume: Callable) -> Any:
    """Checks the arguments and calls the operator.

    `window` is the letter of weight's axis, w or s; `kind` is the state's class. Where there is an
    initial state, `resume` runs instead of the operator.
    """
    tensors: tuple[Any, ...] = (x, weight, bias, norm_weight, norm_bias, gate_residual)
    key, passed = None, _passed[window]
    of_state: Any = () if initial_state is None else initial_state
    if initial_state is None or type(initial_state) is kind:
        key = passed.key(*tensors, *of_state)
    if not passed.has(key):
        tensors = _check(where, window, tensors, initial_state, kind)
        passed.add(key)
    x, weight, bias, norm_weight, norm_bias, gate_residual = tensors
    check_number(where, "eps", eps)
    outside = callable(activation)
    if not outside and activation is not None and activation not in tuple(ACTIVATIONS):
        raise ValueError(f"{where}: activation must be None, a callable or one of "
                         f"{tuple(ACTIVATIONS)}, "
                         f"got {activation!r}")
    check_flag(where, "return_state", return_state)
    check_flag(where, "in_place", in_place)
    n, size = x.shape[1], weight.shape[2]
    arguments = (x, weight, bias, norm_weight, norm_bias, eps, gate_residual,
                 OUTSIDE if outside else activation or "identity")
    state = None
    if initial_state is not None:
        host = steps_on_host(initial_state.steps)
        if window == "s":
            _check_room(where, n, host, size)
        if in_place:
            _check_writable(where, initial_state)
        rows = initial_state.rows
        t = _step_of_all(n, host, rows, in_place)
        if t is not None and may_step(key, *tensors, rows):
            rows = rows if in_place else rows.clone(memory_format=torch.contiguous_format)
            out = _step(rows, *arguments, t)
        else:
            with torch.no_grad() if in_place else contextlib.nullcontext(), no_autocast(arguments):
                out, rows = resume(*arguments, *initial_state, in_place)
        steps = initial_state.steps.add_(n) if in_place else initial_state.steps + n
        state = kind(rows, steps)
    else:
        out = operator(*arguments)
        if return_state:
            with no_autocast(arguments):
                rows = _sgu_state.first_rows(x, norm_weight, norm_bias, eps, size)
            state = kind(rows, torch.full_like(rows[:, 0, 0], n, dtype=torch.int64))
    if callable(activation):
        out = activation(out) * x[..., : x.shape[2] // 2]
    return (out, state) if return_state else out


def _check(where: str, window: str, tensors: tuple[Any, ...], initial_state: Any,
           kind: type) -> tuple[Any, ...]:
    """Checks the tensors and returns all but the state's, in the dtypes in which they are taken."""
    x, weight, bias, norm_weight, norm_bias, gate_residual = tensors
    check_tensor(where, "x", x)
    sizes = check_shape(where, "x", x, "b n 2c")
    check_length(where, "x", sizes["n"])
    if sizes["2c"] % 2:
        raise ValueError(f"{where}: x must have an even last axis [res, gate], got {sizes['2c']}: "
                         "torch.cat((res, gate), dim=-1) has both")
    sizes["c"] = sizes["2c"] // 2
    check_tensor(where, "weight", weight, like=("x", x))
    columns = "2w" if window == "w" else "s"
    sizes = check_shape(where, "weight", weight, f"h {window} {columns}", sizes)
    if window == "w" and sizes["2w"] != 2 * sizes["w"]:
        raise ValueError(f"{where}: weight must have shape (h, w, 2w), got {tuple(weight.shape)}: "
                         "a row for each step of a window, columns for those of two windows")
    if window == "s":
        check_length(where, "x", sizes["n"], sizes["s"])
    check_divides(where, "weight's h", sizes["h"], "c", sizes["c"])
    parameters: dict[str, Any] = {"weight": weight, "bias": bias, "norm_weight": norm_weight,
                                  "norm_bias": norm_bias}
    for name, layout in (("bias", f"h {window}"), ("norm_weight", "c"), ("norm_bias", "c")):
        if parameters[name] is not None or name == "bias":
            check_tensor(where, name, parameters[name], like=("x", x))
            check_shape(where, name, parameters[name], layout, sizes)
    if gate_residual is not None:
        check_tensor(where, "gate_residual", gate_residual, like=("x", x), wider=False)
        check_shape(where, "gate_residual", gate_residual, "b n c", sizes)
        x, gate_residual = match_dtypes(where, x=x, gate_residual=gate_residual)
    if initial_state is not None:
        size = sizes["s"] if window == "s" else 2 * sizes["w"]
        check_state(where, initial_state, kind, x, {"rows": f"b {size} c"}, wide(x.dtype), sizes)
    return (x, *(None if value is None else match_parameter(where, name, value, ("x", x))
                 for name, value in parameters.items()), gate_residual)


def _step_of_all(n: int, steps: list[int] | None, rows: Tensor, in_place: bool) -> int | None:
    """The step that all sequences are at, if x is that step alone and `rows` can take its row."""
    if n > 1 or not steps or steps[0] < 0 or min(steps) < max(steps):
        return None
    return steps[0] if rows.is_contiguous() or not in_place else None


def _check_writable(where: str, state: Any) -> None:
    """Refuses what torch would find to be no tensor for writing when it has written half of it."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return
    if any(t.is_inference() for t in state):
        raise RuntimeError(f"{where}: initial_state was made in inference mode and can be written "
                           "in place there only: leave in_place out, which copies it")


def _check_room(where: str, n: int, steps: list[int] | None, s: int) -> None:
    """Refuses steps beyond the weight's, where they can be read without waiting for a device."""
    longest = max(steps or [0])
    if longest + n > s:
        raise ValueError(f"{where}: x must have at most {s - longest} time steps after the "
                         f"{longest} of initial_state, because weight has {s}, got n={n}: begin a "
                         "new sequence, or take a longer weight")
