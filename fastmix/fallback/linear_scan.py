"""linear_scan in pure PyTorch: a chunked scan, and its transpose for the gradient."""

import torch
from torch import Tensor

from fastmix.dtypes import wide
from fastmix.fallback._carries import all_carries, segment_carries
from fastmix.fallback._scan import adjoint, scan
from fastmix.fallback._segments import concatenated, output_buffer, segments


def _dtypes(gates: Tensor, inputs: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the states, and the one they are computed in."""
    dtype = torch.promote_types(gates.dtype, inputs.dtype)
    return dtype, wide(dtype)


def _segments(inputs: Tensor, carry_every: int, reverse: bool) -> list[slice]:
    in_time = segments(inputs.shape[1], 2 * inputs[:, 0].numel(), carry_every)
    return in_time[::-1] if reverse else in_time


def forward(gates: Tensor, inputs: Tensor, initial_state: Tensor | None, reverse: bool,
            carry_every: int) -> tuple[Tensor, Tensor]:
    """All states (b, n, …) and the carries (b, ⌈n / carry_every⌉ + 1, …).

    gates (b, n, …) broadcasts against inputs (b, n, …).
    """
    dtype, state_dtype = _dtypes(gates, inputs)
    state = torch.zeros_like(inputs[:, 0]) if initial_state is None else initial_state
    state = state.to(state_dtype)
    whole = output_buffer(inputs, gates, state) if inputs.dtype == state_dtype else None
    out, carries = [], []
    for at in _segments(inputs, carry_every, reverse):
        states = scan(gates[:, at].to(state_dtype), inputs[:, at].to(state_dtype), state, reverse,
                      None if whole is None else whole[:, at])
        carries.append(segment_carries(states, state, carry_every, reverse))
        state = states[:, 0 if reverse else -1]
        out.append(states.to(dtype))
    if reverse:
        out, carries = out[::-1], carries[::-1]
    return concatenated(out) if whole is None else whole, all_carries(carries, state)


def backward(grad: Tensor, carries: Tensor, gates: Tensor, inputs: Tensor,
             initial_state: Tensor | None, reverse: bool,
             carry_every: int) -> tuple[Tensor | None, ...]:
    """With g the transposed scan of grad: dinputs = g, dgates_t = g_t conj(h_{t-1}).

    Returns the gradients of gates, inputs and initial_state (None where it was None).
    """
    _, state_dtype = _dtypes(gates, inputs)
    grad_gates, grad_inputs = (torch.empty_like(t, memory_format=torch.contiguous_format)
                               for t in (gates, inputs))
    g_next = torch.zeros_like(carries[:, 0])
    for at in reversed(_segments(inputs, carry_every, reverse)):
        entry = carries[:, ((at.stop - 1) if reverse else at.start) // carry_every]
        a = gates[:, at].to(state_dtype)
        states = scan(a, inputs[:, at].to(state_dtype), entry, reverse)
        before = (torch.cat([states[:, 1:], entry[:, None]], dim=1) if reverse
                  else torch.cat([entry[:, None], states[:, :-1]], dim=1))
        g = adjoint(a, grad[:, at].to(state_dtype), g_next, reverse)
        first = -1 if reverse else 0
        g_next = torch.conj_physical(a[:, first]) * g[:, first]
        grad_inputs[:, at] = _real_like(g, inputs)
        grad_a = (g * torch.conj_physical(before)).sum_to_size(a.shape)
        grad_gates[:, at] = _real_like(grad_a, gates)
    grad_initial = None
    if initial_state is not None:
        grad_initial = _real_like(g_next, initial_state).to(initial_state.dtype)
    return grad_gates, grad_inputs, grad_initial


def _real_like(grad: Tensor, like: Tensor) -> Tensor:
    return grad.real if grad.is_complex() and not like.is_complex() else grad
