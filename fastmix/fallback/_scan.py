"""The chunked linear scan that linear_scan, gate_loop and decay_conv share, and its transpose."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmix.fallback._segments import output_buffer
from fastmix.fallback._values import all_finite, first_false

# Sequences this short are scanned step by step.
DIRECT = 16
WALKED = 4


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
    where no state is, because a state is 0: on CPUs the steps of a chunk whose end is not finite
    are taken one by one. `out` is where the states go, if given.
    """
    n = inputs.shape[1]
    out = output_buffer(inputs, gates, initial) if out is None else out
    # Of no numbers, because the gradient of a power of a gate that is NaN would be 0 · NaN.
    if n <= DIRECT or not torch.compiler.is_compiling() and inputs.numel() == 0:
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
        if torch.is_grad_enabled() and any(t.requires_grad for t in (gates, inputs, initial)):
            # The gradient of what is left out here is 0, which no infinite product may meet.
            return _scan_steps(gates, inputs, 1, initial, reverse, out)
        ends = _ends(chunk_gates, chunk_inputs, product, end, initial, ends, reverse)
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


def _ends(gates: Tensor, inputs: Tensor, products: Tensor, from_zero: Tensor, state: Tensor,
          ends: Tensor, reverse: bool) -> Tensor:
    """`ends`, the states after chunks (b, chunks, length, …), where not all are finite, mended.

    `products` of gates and the ends `from_zero` (b, chunks, …) give the next state, and that of
    one that is not finite too, which no later step makes finite. Where they make something else of
    a state its chunk is walked step by step; after WALKED such chunks all are.
    """
    chunks = [*zip(*(_steps_in_order(t, 1, reverse, inputs.shape[1]) for t in (gates, inputs)))]
    if reverse:
        products, from_zero, ends = (t.flip(1) for t in (products, from_zero, ends))
    done, walked = [], 0
    while chunks:
        first = 0
        if walked < WALKED:
            if walked:
                ends = scan(products, from_zero, state)
            entries = torch.cat([state.unsqueeze(1), ends[:, :-1]], 1)
            stays = entries.isnan() | (entries.isinf() & products.isfinite() & (products != 0)
                                       & from_zero.isfinite())
            first = first_false(ends.isfinite() | stays, 1)
            done.append(ends[:, :first])
            if first == len(chunks):
                break
            state = entries[:, first]
        a, x = chunks[first]
        state = _scan_steps(a, x, 1, state, reverse, None)[:, 0 if reverse else -1]
        done.append(state.unsqueeze(1))
        walked += 1
        chunks, from_zero = chunks[first + 1 :], from_zero[:, first + 1 :]
        products = products if products.shape[1] == 1 else products[:, first + 1 :]
    ends = torch.cat(done, 1)
    return ends.flip(1) if reverse else ends


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
