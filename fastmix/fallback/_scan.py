"""The chunked linear scan that linear_scan, gate_loop and decay_conv share, and its transpose."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmix.fallback._segments import output_buffer
from fastmix.fallback._values import all_finite

# Sequences this short are scanned step by step.
DIRECT = 16


def adjoint(gates: Tensor, grad_states: Tensor, g_next: Tensor, reverse: bool = False) -> Tensor:
    """g_t = grad_states_t + conj(gates_{t+1}) g_{t+1}, from g_{n-1} = grad_states_{n-1} + g_next.

    The transpose of `scan`: g is the gradient of its inputs where `grad_states` is that of its
    states. `reverse` is the direction of the scan that is transposed.
    """
    late, body = (slice(None, -1), slice(1, None)) if reverse else (slice(1, None), slice(None, -1))
    last = 0 if reverse else -1
    g = torch.empty_like(grad_states, memory_format=torch.contiguous_format)
    g[:, last] = grad_states[:, last] + g_next
    if grad_states.shape[1] > 1:
        gates = torch.conj_physical(gates if gates.shape[1] == 1 else gates[:, late])
        scan(gates, grad_states[:, body], g[:, last], not reverse, g[:, body])
    return g


def scan(gates: Tensor, inputs: Tensor, initial: Tensor, reverse: bool = False,
         out: Tensor | None = None) -> Tensor:
    """h_t = gates_t · h_{t-1} + inputs_t from h_{-1} = initial; every state (b, n, …).

    gates (b, n, …) broadcasts against inputs (b, n, …); one time step of gates
    (b, 1, …) holds for all. Three sweeps of √n vectorised steps: reduce every chunk to
    its end, scan the ends, run every chunk from its entry. Only products of gates are
    formed, never quotients, so gates of 0 are exact. Products may be beyond the range of numbers
    where no state is, because a state is 0: on CPUs an end that is not finite has every step taken
    one by one. `out` is where the states go, if given.
    """
    n = inputs.shape[1]
    out = output_buffer(inputs, gates, initial) if out is None else out
    if n <= DIRECT:
        return _scan_steps(gates, inputs, 1, initial, reverse, out)
    constant = gates.shape[1] == 1
    # The error of one gate's power is the same in every chunk and adds up: few chunks then.
    length = 1 << (math.isqrt(n - 1).bit_length() if constant
                   else math.isqrt(n // 3).bit_length() - 1)
    chunks = n // length
    rest = n - chunks * length

    # Whole chunks come first in the direction of the scan, the rest after them.
    whole, tail = (slice(rest, None), slice(None, rest)) if reverse else (
        slice(None, n - rest), slice(n - rest, None))
    chunk_gates = gates.unsqueeze(1) if constant else gates[:, whole].unflatten(1, (chunks, length))
    chunk_inputs = inputs[:, whole].unflatten(1, (chunks, length))

    product: Any = None
    end: Any = None
    for gate, step in zip(*(_steps_in_order(t, 2, reverse, length)
                            for t in (chunk_gates, chunk_inputs))):
        end = step if end is None else torch.addcmul(step, gate, end)
        if not constant:
            product = gate if product is None else product * gate
    if constant:
        product = chunk_gates[:, :, 0] ** length
    ends = scan(product, end, initial, reverse)
    if not all_finite(ends):
        return _scan_steps(gates, inputs, 1, initial, reverse, out)
    first = initial.unsqueeze(1)
    entries = (torch.cat([ends[:, 1:], first], dim=1) if reverse
               else torch.cat([first, ends[:, :-1]], dim=1))
    states = _scan_steps(chunk_gates, chunk_inputs, 2, entries, reverse,
                    None if out is None else out[:, whole].unflatten(1, (chunks, length)))
    if rest:
        last = ends[:, 0] if reverse else ends[:, -1]
        tail_states = _scan_steps(gates if constant else gates[:, tail], inputs[:, tail], 1, last,
                             reverse, None if out is None else out[:, tail])
    if out is not None:
        return out
    states = states.flatten(1, 2)
    if rest == 0:
        return states
    return torch.cat([tail_states, states] if reverse else [states, tail_states], dim=1)


def _steps_in_order(tensor: Tensor, axis: int, reverse: bool, count: int) -> Sequence[Tensor]:
    """The `count` steps along an axis, in the direction of the scan; a constant one repeats."""
    steps = tensor.unbind(axis)
    steps = steps if len(steps) == count else steps * count
    return steps[::-1] if reverse else steps


def _scan_steps(gates: Tensor, inputs: Tensor, axis: int, state: Tensor, reverse: bool,
                out: Tensor | None) -> Tensor:
    """The states along an axis, in `out` if there is one."""
    count = inputs.shape[axis]
    outputs = [None] * count if out is None else _steps_in_order(out, axis, reverse, count)
    states = []
    for gate, step, output in zip(_steps_in_order(gates, axis, reverse, count),
                                 _steps_in_order(inputs, axis, reverse, count), outputs):
        state = torch.addcmul(step, gate, state, out=output)
        states.append(state)
    return torch.stack(states[::-1] if reverse else states, axis) if out is None else out
