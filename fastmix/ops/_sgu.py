"""The parts that the two spatial gating units share: schema, fake, checks and states."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmix.activations import ACTIVATIONS, OUTSIDE
from fastmix.checks import (
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
from fastmix.ops._register import Operator, no_autocast
from fastmix.ops._states import check_state
from fastmix.states import steps_on_host

ARGUMENTS = ("Tensor x, Tensor weight, Tensor bias, Tensor? norm_weight, Tensor? norm_bias, "
             "float eps, Tensor? gate_residual, str activation")
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
    """Checks the arguments and calls the operator; `window` names weight's axis w or s.

    `kind` is the state's class. From a state on it is `resume` that runs.
    """
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
    weight, bias, norm_weight, norm_bias = (
        None if value is None else match_parameter(where, name, value, ("x", x))
        for name, value in parameters.items())
    check_number(where, "eps", eps)
    outside = callable(activation)
    if not outside and activation is not None and activation not in tuple(ACTIVATIONS):
        raise ValueError(f"{where}: activation must be None, a callable or one of "
                         f"{tuple(ACTIVATIONS)}, "
                         f"got {activation!r}")
    check_flag(where, "return_state", return_state)
    check_flag(where, "in_place", in_place)
    size = sizes["s"] if window == "s" else 2 * sizes["w"]
    arguments = (x, weight, bias, norm_weight, norm_bias, eps, gate_residual,
                 OUTSIDE if outside else activation or "identity")
    state = None
    if initial_state is not None:
        check_state(where, initial_state, kind, x, {"rows": f"b {size} c"}, wide(x.dtype), sizes)
        if window == "s":
            _check_room(where, sizes["n"], initial_state.steps, size)
        with torch.no_grad() if in_place else contextlib.nullcontext(), no_autocast(arguments):
            out, rows = resume(*arguments, *initial_state, in_place)
            if in_place:
                state = kind(rows, initial_state.steps.add_(sizes["n"]))
            else:
                state = kind(rows, initial_state.steps + sizes["n"])
    else:
        out = operator(*arguments)
        if return_state:
            with no_autocast(arguments):
                rows = _sgu_state.first_rows(x, norm_weight, norm_bias, eps, size)
            state = kind(rows, torch.full_like(rows[:, 0, 0], sizes["n"], dtype=torch.int64))
    if callable(activation):
        out = activation(out) * x[..., : sizes["c"]]
    return (out, state) if return_state else out


def _check_room(where: str, n: int, steps: Tensor, s: int) -> None:
    """Refuses steps beyond the weight's, where they can be read without waiting for a device."""
    longest = max(steps_on_host(steps) or [0])
    if longest + n > s:
        raise ValueError(f"{where}: x must have at most {s - longest} time steps after the "
                         f"{longest} of initial_state, because weight has {s}, got n={n}")
