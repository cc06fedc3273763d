"""The chunked linear scan that linear_scan, gate_loop and decay_conv share.

Long sequences are taken one stretch of time after the other, so that the temporaries of
a stretch stay in cache.
"""

import math

import torch

# Sequences this short are scanned step by step.
DIRECT = 16

# Real numbers in one of a stretch's temporaries: 2 MB in float32. An allocator hands blocks of
# that size out again and again, while large ones come fresh from the system, page by page.
STRETCH = 1 << 19


def stretches(n, per_step, multiple):
    """Slices of time that cover n, each but the last a multiple of `multiple` (or 64) long."""
    multiple = multiple or 64
    length = max(STRETCH // max(per_step * multiple, 1), 4) * multiple
    return [slice(start, min(start + length, n)) for start in range(0, n, length)]


def entering(states, initial, every, reverse=False):
    """The states (b, ⌈n / every⌉, …) in which every `every`-th step begins; none for 0."""
    if every == 0:
        return initial.unsqueeze(1)[:, :0]
    first = initial.unsqueeze(1)
    if reverse:
        return torch.cat([states[:, every::every], first], dim=1)
    return torch.cat([first, states[:, every - 1 : -1 : every]], dim=1)


def room(x, *others):
    """Memory like x for what is made of all these, or None: memory that was there before a
    result has no derivatives, and torch.func may be asking for some.
    """
    if any(t is not None and torch._C._functorch.is_functorch_wrapped_tensor(t)
           for t in (x, *others)):
        return None
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def adjoint(gates, asked, g_next, reverse=False):
    """g_t = asked_t + conj(gates_{t+1}) g_{t+1}, from g_{n-1} = asked_{n-1} + g_next.

    The transpose of `scan`: g is the gradient of its inputs where `asked` is that of its
    states. `reverse` is the direction of the scan that is transposed.
    """
    late, body = (slice(None, -1), slice(1, None)) if reverse else (slice(1, None), slice(None, -1))
    last = 0 if reverse else -1
    g = torch.empty_like(asked, memory_format=torch.contiguous_format)
    g[:, last] = asked[:, last] + g_next
    if asked.shape[1] > 1:
        gates = torch.conj_physical(gates if gates.shape[1] == 1 else gates[:, late])
        scan(gates, asked[:, body], g[:, last], not reverse, g[:, body])
    return g


def with_last(carries, state):
    """Carries of all stretches, and the last state of all, as `fastmix.ops` asks for them."""
    return joined([*carries, state.unsqueeze(1)[:, : 1 if carries[0].shape[1] else 0]])


def joined(pieces):
    """The stretches as one tensor, without a copy where there is only one."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def scan(gates, inputs, initial, reverse=False, out=None):
    """h_t = gates_t · h_{t-1} + inputs_t from h_{-1} = initial; every state (b, n, …).

    gates (b, n, …) broadcasts against inputs (b, n, …); one time step of gates
    (b, 1, …) holds for all. Three sweeps of √n vectorised steps: reduce every chunk to
    its end, scan the ends, run every chunk from its entry. Only products of gates are
    formed, never quotients, so gates of 0 are exact. `out` is where the states go, if given.
    """
    n = inputs.shape[1]
    out = room(inputs, gates, initial) if out is None else out
    if n <= DIRECT:
        return _steps(gates, inputs, 1, initial, reverse, out)
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

    product = end = None
    for gate, step in zip(*(_in_order(t, 2, reverse, length) for t in (chunk_gates, chunk_inputs))):
        end = step if end is None else torch.addcmul(step, gate, end)
        if not constant:
            product = gate if product is None else product * gate
    if constant:
        product = chunk_gates[:, :, 0] ** length
    ends = scan(product, end, initial, reverse)
    first = initial.unsqueeze(1)
    entries = (torch.cat([ends[:, 1:], first], dim=1) if reverse
               else torch.cat([first, ends[:, :-1]], dim=1))
    states = _steps(chunk_gates, chunk_inputs, 2, entries, reverse,
                    None if out is None else out[:, whole].unflatten(1, (chunks, length)))
    if rest:
        last = ends[:, 0] if reverse else ends[:, -1]
        tail_states = _steps(gates if constant else gates[:, tail], inputs[:, tail], 1, last,
                             reverse, None if out is None else out[:, tail])
    if out is not None:
        return out
    states = states.flatten(1, 2)
    if rest == 0:
        return states
    return torch.cat([tail_states, states] if reverse else [states, tail_states], dim=1)


def _in_order(tensor, axis, reverse, count):
    """The `count` steps along an axis, in the direction of the scan; a constant one repeats."""
    steps = tensor.unbind(axis)
    steps = steps if len(steps) == count else steps * count
    return steps[::-1] if reverse else steps


def _steps(gates, inputs, axis, state, reverse, out):
    """The states along an axis, in `out` if there is one."""
    count = inputs.shape[axis]
    places = [None] * count if out is None else _in_order(out, axis, reverse, count)
    states = []
    for gate, step, place in zip(_in_order(gates, axis, reverse, count),
                                 _in_order(inputs, axis, reverse, count), places):
        state = torch.addcmul(step, gate, state, out=place)
        states.append(state)
    return torch.stack(states[::-1] if reverse else states, axis) if out is None else out
