"""The gate loop: linear attention whose state decays, and turns, by a gate of the data.

Implementations take gates (b, n, h), complex or real, or the logits of complex gates. The function
takes more, and converts it here: it expands decays (h,), with strides of 0, and computes real gates
from their logits. So kernels know one kind of logits.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastmix.checks import (
    REAL,
    Passed,
    check_flag,
    check_length,
    check_shape,
    check_tensor,
    dtype_name,
    is_like,
    match_dtypes,
    match_parameter,
)
from fastmix.dtypes import wide, wide_complex
from fastmix.fallback import gate_loop as fallback
from fastmix.ops._carries import (
    CARRY_EVERY,
    HEADS_CARRY_EVERY,
    carry_count,
    needs_gradient,
)
from fastmix.ops._register import Operator


def _state_dtype(q: Tensor, gates: Tensor | None) -> torch.dtype:
    """The state is real where the gates are. Logits are those of complex gates by now."""
    real = gates is not None and not gates.is_complex()
    return wide(q.dtype) if real else wide_complex(q.dtype)


def _fake(q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None, gate_logits: Tensor | None,
          initial_state: Tensor | None, carry_every: int) -> tuple[Tensor, ...]:
    (b, n, h, dk), dv = q.shape, v.shape[-1]
    carries = carry_count(n, carry_every)
    dtype = _state_dtype(q, gates)
    return (q.new_empty(b, n, h, dv), q.new_empty(b, h, dk, dv, dtype=dtype),
            q.new_empty(b, carries, h, dk, dv, dtype=dtype))


_operator = Operator(
    "gate_loop",
    "Tensor q, Tensor k, Tensor v, Tensor? gates, Tensor? gate_logits, Tensor? initial_state, "
    "int carry_every",
    outputs="out state carries",
    fallback=fallback, fake=_fake,
    batched={"q": 4, "k": 4, "v": 4, "gates": 3, "gate_logits": 4, "initial_state": 4})
_passed = Passed()


@overload
def gate_loop(q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None = None, *,
              gate_logits: Tensor | None = None, initial_state: Tensor | None = None,
              return_state: Literal[False] = False) -> Tensor: ...


@overload
def gate_loop(q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None = None, *,
              gate_logits: Tensor | None = None, initial_state: Tensor | None = None,
              return_state: Literal[True]) -> tuple[Tensor, Tensor]: ...


@overload
def gate_loop(q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None = None, *,
              gate_logits: Tensor | None = None, initial_state: Tensor | None = None,
              return_state: bool = False) -> Tensor | tuple[Tensor, Tensor]: ...


def gate_loop(q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None = None, *,
              gate_logits: Tensor | None = None, initial_state: Tensor | None = None,
              return_state: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Linear attention whose state decays, and with complex gates turns, as the data choose.

    S_t = a_t S_{t-1} + k_t v_tᵀ, out_t = q_t · Re S_t

    Linear in n. With dk = dv = 1 (one head per channel, the paper's setting) it is a scan per
    channel; larger heads run in chunks of matrix products. States are not stored: backward
    recomputes them from every 64th, those of heads on CPUs from every 512th.

    Args:
        q, k: (b, n, h, dk), float64, float32, bfloat16 or float16, any strides. Time is axis 1,
            before the heads: (b, h, n, dk) must be transposed.
        v: (b, n, h, dv), the dtype of q
        gates: a (b, n, h), or (h,) if they are the same at all steps. Complex64 (complex128 for
            float64 q), or real, in the dtype of q, or float32 where q has 16 bits: the state is
            then real, in half the memory. Any value: 0 forgets everything before it, abs a = 1
            nothing.
        gate_logits: z (b, n, h, 2), real and imaginary part, in a dtype of real gates;
            a = σ(abs z) · z / abs z, and ½ at z = 0. An infinite z has the gate 1 times the
            direction of its infinite parts. There is no gradient at 0 and at infinity. Logits
            cannot give a gate of 0. Or z (b, n, h), for the real gates a = σ(z). Exactly one of
            gates and gate_logits is given.
        initial_state: S_{-1} (b, h, dk, dv); 0 if None. Complex64 (complex128 for float64) beside
            complex gates, float32 (float64) beside real ones.
        return_state: also return S_{n-1} (b, h, dk, dv)

    Returns:
        (b, n, h, dv) in the dtype of q, or (that, state) with return_state.

    Differentiable in every tensor, to any order. Raises TypeError and ValueError for arguments
    that do not fit.

    GateLoop (arXiv:2311.01927), as in gateloop-transformer.

    >>> q = k = torch.ones(1, 4, 1, 1)
    >>> v = torch.tensor([8.0, 0.0, 4.0, 0.0]).view(1, 4, 1, 1)
    >>> gates = torch.full((1, 4, 1), 0.5 + 0j)
    >>> gate_loop(q, k, v, gates).flatten()
    tensor([8., 4., 6., 3.])
    >>> gate_loop(q, k, v, torch.tensor([0.5])).flatten()  # a decay, for all steps
    tensor([8., 4., 6., 3.])

    The state comes only with return_state; without it, `out, state = …` would unpack the batch:

    >>> out, state = gate_loop(q, k, v, gates, return_state=True)
    >>> out.shape, state.shape
    (torch.Size([1, 4, 1, 1]), torch.Size([1, 1, 1, 1]))
    """
    where = "gate_loop"
    if (gates is None) == (gate_logits is None):
        given = "neither" if gates is None else "both"
        if isinstance(gate_logits, Tensor) and gate_logits.ndim == 3:
            given += (": logits of three axes are real gates by themselves; where both are meant, "
                      "give gates * gate_logits.sigmoid() as gates")
        raise ValueError(
            f"{where}: exactly one of gates and gate_logits must be given, got {given}")
    key = _passed.key(q, k, v, gates, gate_logits, initial_state)
    if not _passed.has(key):
        q, k, v, gates, gate_logits = _check(where, q, k, v, gates, gate_logits, initial_state)
        _passed.add(key)
    check_flag(where, "return_state", return_state)
    gates, gate_logits = _as_kernels_take(q, gates, gate_logits)
    wanted = needs_gradient(q, k, v, gates, gate_logits, initial_state)
    diagonal = q.shape[-1] == v.shape[-1] == 1
    every = CARRY_EVERY if diagonal else HEADS_CARRY_EVERY.get(q.device.type, CARRY_EVERY)
    out, state, _ = _operator(q, k, v, gates, gate_logits, initial_state, every if wanted else 0)
    return (out, state) if return_state else out


def _check(where: str, q: Any, k: Any, v: Any, gates: Any, gate_logits: Any,
           initial_state: Any) -> tuple[Any, ...]:
    """Checks the tensors and returns all but the state, in the dtypes in which they are taken."""
    check_tensor(where, "q", q)
    sizes = check_shape(where, "q", q, "b n h dk")
    check_length(where, "q", sizes["n"])
    if is_like(k, q) and is_like(v, q):
        sizes["dv"] = sizes["dk"]
    else:
        check_tensor(where, "k", k, like=("q", q), wider=False)
        check_shape(where, "k", k, "b n h dk", sizes)
        check_tensor(where, "v", v, like=("q", q), wider=False)
        sizes = check_shape(where, "v", v, "b n h dv", sizes)
        q, k, v = match_dtypes(where, q=q, k=k, v=v)
    given = "gates" if gate_logits is None else "gate_logits.sigmoid()"
    if gates is None:
        gate_logits = _check_logits(where, gate_logits, q, sizes)
    else:
        gates = _check_gates(where, gates, q, sizes)
    if initial_state is not None:
        real = gate_logits.ndim == 3 if gates is None else not gates.is_complex()
        _check_state(where, initial_state, wide(q.dtype) if real else wide_complex(q.dtype), given,
                     q, sizes)
    return q, k, v, gates, gate_logits


def _as_kernels_take(q: Tensor, gates: Tensor | None,
                     gate_logits: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """gates (b, n, h), or the logits of complex ones, and None in place of the other."""
    if gates is None and gate_logits is not None and gate_logits.ndim == 3:
        return gate_logits.to(wide(q.dtype)).sigmoid(), None
    if gates is not None and gates.ndim == 1:
        # Wide, so that the gradient is rounded once, after its sum over steps.
        gates = gates if gates.is_complex() else gates.to(wide(q.dtype))
        gates = gates.expand(q.shape[:3])
    return gates, gate_logits


def _check_gates(where: str, gates: Any, q: Tensor, sizes: dict[str, int]) -> Tensor:
    real = isinstance(gates, Tensor) and gates.dtype in REAL
    check_tensor(where, "gates", gates, REAL if real else (
        wide_complex(q.dtype), *dict.fromkeys((q.dtype, wide(q.dtype)))), like=("q", q))
    if real:
        gates = match_parameter(where, "gates", gates, ("q", q))
    b, n, h = sizes["b"], sizes["n"], sizes["h"]
    if gates.ndim != 1:
        _check_steps(where, "gates", gates, "b n h", q, sizes)
        return gates
    if gates.shape[0] != h:
        raise ValueError(
            f"{where}: gates must have shape (b, n, h) = {(b, n, h)}, or (h,) = ({h},) if they are "
            f"the same at all steps, got {tuple(gates.shape)}: give one number per head")
    return gates


def _check_logits(where: str, gate_logits: Any, q: Tensor, sizes: dict[str, int]) -> Tensor:
    if isinstance(gate_logits, Tensor) and gate_logits.is_complex():
        raise TypeError(
            f"{where}: gate_logits must be {' or '.join(map(dtype_name, REAL))}, got "
            f"{dtype_name(gate_logits.dtype)}: give complex gates as gates, and "
            "complex logits as torch.view_as_real(gate_logits)")
    check_tensor(where, "gate_logits", gate_logits, like=("q", q))
    real = gate_logits.ndim == 3
    _check_steps(where, "gate_logits", gate_logits, "b n h" if real else "b n h 2", q, sizes)
    return match_parameter(where, "gate_logits", gate_logits, ("q", q))


def _check_steps(where: str, name: str, given: Tensor, layout: str, q: Tensor,
                 sizes: dict[str, int]) -> None:
    """Checks the shape of gates or logits that differ from step to step."""
    b, n, h = sizes["b"], sizes["n"], sizes["h"]
    # What fits is asked first: a traced program may hold for n = h, too.
    if given.shape[:3] != (b, n, h) and given.shape[:3] == (b, h, n):
        raise ValueError(
            f"{where}: q, k and v must have shape (b, n, h, d), {name} ({layout}), got q "
            f"{tuple(q.shape)} and {name} {tuple(given.shape)}: transpose(1, 2) q, k and v, or "
            f"{name}, whichever has heads before time")
    if name == "gate_logits" and given.shape != (b, n, h) and given.shape == (b, n, 2 * h):
        raise ValueError(
            f"{where}: gate_logits must have shape (b, n, h, 2) = {(b, n, h, 2)}, or (b, n, h) for "
            f"real gates, got {tuple(given.shape)}: gate_logits.unflatten(-1, (h, 2)) has pairs")
    check_shape(where, name, given, layout, sizes)


def _check_state(where: str, state: Any, dtype: torch.dtype, given: str, q: Tensor,
                 sizes: dict[str, int]) -> None:
    """Checks an initial state, whose `dtype` follows from the gates. `given` is how the caller
    wrote the gates, for the advice in an error."""
    if isinstance(state, Tensor) and state.is_complex() != dtype.is_complex:
        kind, advice = ("complex", f"give initial_state.to({dtype})") if dtype.is_complex else (
            "real", "a complex state goes on with complex gates, give "
                    f"gates={given}.to({wide_complex(q.dtype)})")
        raise TypeError(
            f"{where}: initial_state must be {dtype_name(dtype)} beside {kind} gates, got "
            f"{dtype_name(state.dtype)}: {advice}")
    check_tensor(where, "initial_state", state, (dtype,), like=("q", q))
    check_shape(where, "initial_state", state, "b h dk dv", sizes)
