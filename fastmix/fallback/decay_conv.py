"""decay_conv in pure PyTorch: a scan with one gate for all time, and no FFT."""

import torch

from fastmix.fallback._scan import adjoint, entering, joined, room, scan, stretches, with_last


def _per_channel(values, d, dtype):
    """(h,) → (h·d,): one value for every channel."""
    return None if values is None else values.to(dtype)[:, None].expand(-1, d).flatten()


def _states(x, decay, gain, state, out=None):
    """x (b, m, h·d) → y (b, m, h·d); decay, gain (h·d,); state (b, h·d)."""
    return scan(decay[None, None], x if gain is None else x * gain, state, out=out)


def forward(x, decay, gain, initial_state, carry_every):
    """y (b, n, h, d), the last state (b, h, d) and the carries (b, ⌈n / carry_every⌉ + 1, h, d).

    The carries are the states before every carry_every-th step, and the last one.
    carry_every is 0 where no gradient will be asked for: then there are none.
    """
    b, n, h, d = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    decay, gain = _per_channel(decay, d, wide), _per_channel(gain, d, wide)
    state = (x.new_zeros(b, h * d, dtype=wide) if initial_state is None
             else initial_state.flatten(1))
    whole = room(x, decay, state) if x.dtype == wide else None
    out, carries = [], []
    for at in stretches(n, b * h * d, carry_every):
        y = _states(x[:, at].flatten(2).to(wide), decay, gain, state,
                    None if whole is None else whole[:, at].flatten(2))
        carries.append(entering(y, state, carry_every))
        state = y[:, -1]
        out.append(y.to(x.dtype))
    out = joined(out).unflatten(2, (h, d)) if whole is None else whole
    return (out, state.unflatten(1, (h, d)).clone(),
            with_last(carries, state).unflatten(2, (h, d)))


def backward(grad, grad_state, carries, x, decay, gain, initial_state, carry_every):
    """g_t = grad_t + decay · g_{t+1}; dx = gain · g, dgain = Σ g x, ddecay = Σ g_t y_{t-1}.

    y is recomputed from the carries. Returns the gradients of x, decay, gain and
    initial_state (None where they were None).
    """
    b, n, h, d = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    per_channel, gains = _per_channel(decay, d, wide), _per_channel(gain, d, wide)
    carries = carries.flatten(2)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_decay, grad_gain = torch.zeros(2, h * d, dtype=wide, device=x.device)
    g_next = grad_state.flatten(1)
    for at in reversed(stretches(n, b * h * d, carry_every)):
        entry = carries[:, at.start // carry_every]
        inputs = x[:, at].flatten(2).to(wide)
        y = _states(inputs, per_channel, gains, entry)
        g = adjoint(per_channel[None, None], grad[:, at].flatten(2).to(wide), g_next)
        g_next = per_channel * g[:, 0]
        before = y[:, :-1].mul_(g[:, 1:])
        grad_decay += (g[:, 0] * entry).sum(0) + before.sum((0, 1))
        to = grad_x[:, at].flatten(2)
        if gain is None:
            to.copy_(g)
        else:
            grad_gain += torch.mul(g, inputs, out=y).sum((0, 1))
            torch.mul(g, gains, out=to)
    grad_decay, grad_gain = (t.unflatten(0, (h, d)).sum(1) for t in (grad_decay, grad_gain))
    return (grad_x, grad_decay.to(decay.dtype), None if gain is None else grad_gain.to(gain.dtype),
            None if initial_state is None else g_next.unflatten(1, (h, d)).clone())
