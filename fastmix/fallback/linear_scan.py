"""linear_scan in pure PyTorch: a chunked scan, and its transpose for the gradient."""

import torch

from fastmix.fallback._scan import adjoint, entering, joined, room, scan, stretches, with_last


def _dtypes(gates, inputs):
    """The dtype of the states, and the one they are computed in."""
    dtype = torch.promote_types(gates.dtype, inputs.dtype)
    return dtype, torch.promote_types(dtype, torch.float32)


def _stretches(inputs, carry_every, reverse):
    # Complex, and several at once: less time per stretch, for the memory.
    found = stretches(inputs.shape[1], 2 * inputs[:, 0].numel(), carry_every)
    return found[::-1] if reverse else found


def forward(gates, inputs, initial_state, reverse, carry_every):
    """All states (b, n, …) and the carries (b, ⌈n / carry_every⌉ + 1, …).

    gates (b, n, …) broadcasts against inputs (b, n, …). The carries are the states before
    every carry_every-th step, and the last one of the scan. carry_every is 0 where no
    gradient will be asked for: then there are none.
    """
    dtype, wide = _dtypes(gates, inputs)
    state = torch.zeros_like(inputs[:, 0]) if initial_state is None else initial_state
    state = state.to(wide)
    whole = room(inputs, gates, state) if inputs.dtype == wide else None
    out, carries = [], []
    for at in _stretches(inputs, carry_every, reverse):
        states = scan(gates[:, at].to(wide), inputs[:, at].to(wide), state, reverse,
                      None if whole is None else whole[:, at])
        carries.append(entering(states, state, carry_every, reverse))
        state = states[:, 0 if reverse else -1]
        out.append(states.to(dtype))
    if reverse:
        out, carries = out[::-1], carries[::-1]
    return joined(out) if whole is None else whole, with_last(carries, state)


def backward(grad, carries, gates, inputs, initial_state, reverse, carry_every):
    """With g the transposed scan of grad: dinputs = g, dgates_t = g_t conj(h_{t-1}).

    Returns the gradients of gates, inputs and initial_state (None where it was None).
    """
    _, wide = _dtypes(gates, inputs)
    grad_gates, grad_inputs = (torch.empty_like(t, memory_format=torch.contiguous_format)
                               for t in (gates, inputs))
    g_next = torch.zeros_like(carries[:, 0])
    for at in reversed(_stretches(inputs, carry_every, reverse)):
        entry = carries[:, ((at.stop - 1) if reverse else at.start) // carry_every]
        a = gates[:, at].to(wide)
        states = scan(a, inputs[:, at].to(wide), entry, reverse)
        before = (torch.cat([states[:, 1:], entry[:, None]], dim=1) if reverse
                  else torch.cat([entry[:, None], states[:, :-1]], dim=1))
        g = adjoint(a, grad[:, at].to(wide), g_next, reverse)
        first = -1 if reverse else 0
        g_next = torch.conj_physical(a[:, first]) * g[:, first]
        grad_inputs[:, at] = _real_like(g, inputs)
        grad_a = (g * torch.conj_physical(before)).sum_to_size(a.shape)
        grad_gates[:, at] = _real_like(grad_a, gates)
    grad_initial = None
    if initial_state is not None:
        grad_initial = _real_like(g_next, initial_state).to(initial_state.dtype)
    return grad_gates, grad_inputs, grad_initial


def _real_like(grad, like):
    return grad.real if grad.is_complex() and not like.is_complex() else grad
