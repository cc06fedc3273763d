"""decay_conv in pure PyTorch: a scan with one gate for all time, and no FFT."""

import torch
from torch import Tensor

from fastmix.dtypes import wide
from fastmix.fallback._carries import all_carries, segment_carries
from fastmix.fallback._scan import adjoint, scan
from fastmix.fallback._segments import concatenated, output_buffer, segments


def _per_channel(values: Tensor, d: int, dtype: torch.dtype) -> Tensor:
    """(h,) → (h·d,): one value for every channel."""
    return values.to(dtype)[:, None].expand(-1, d).flatten()


def _states(x: Tensor, decay: Tensor, gain: Tensor | None, state: Tensor,
            out: Tensor | None = None) -> Tensor:
    """x (b, m, h·d) → y (b, m, h·d); decay, gain (h·d,); state (b, h·d)."""
    return scan(decay[None, None], x if gain is None else x * gain, state, out=out)


def forward(x: Tensor, decay: Tensor, gain: Tensor | None, initial_state: Tensor | None,
            carry_every: int) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, n, h, d), the last state (b, h, d) and the carries (b, ⌈n / carry_every⌉ + 1, h, d)."""
    b, n, h, d = x.shape
    dtype = wide(x.dtype)
    decay = _per_channel(decay, d, dtype)
    gain = None if gain is None else _per_channel(gain, d, dtype)
    state = (x.new_zeros(b, h * d, dtype=dtype) if initial_state is None
             else initial_state.flatten(1))
    whole = output_buffer(x, decay, state) if x.dtype == dtype else None
    segments_out, carries = [], []
    for at in segments(n, b * h * d, carry_every):
        y = _states(x[:, at].flatten(2).to(dtype), decay, gain, state,
                    None if whole is None else whole[:, at].flatten(2))
        carries.append(segment_carries(y, state, carry_every))
        state = y[:, -1]
        segments_out.append(y.to(x.dtype))
    out = concatenated(segments_out).unflatten(2, (h, d)) if whole is None else whole
    return (out, state.unflatten(1, (h, d)).clone(),
            all_carries(carries, state).unflatten(2, (h, d)))


def backward(grad: Tensor, grad_state: Tensor, carries: Tensor, x: Tensor, decay: Tensor,
             gain: Tensor | None, initial_state: Tensor | None,
             carry_every: int) -> tuple[Tensor | None, ...]:
    """g_t = grad_t + decay · g_{t+1}; dx = gain · g, dgain = Σ g x, ddecay = Σ g_t y_{t-1}.

    y is recomputed from the carries. Returns the gradients of x, decay, gain and
    initial_state (None where they were None).
    """
    b, n, h, d = x.shape
    dtype = wide(x.dtype)
    decays = _per_channel(decay, d, dtype)
    gains = None if gain is None else _per_channel(gain, d, dtype)
    carries = carries.flatten(2)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_decay, grad_gain = torch.zeros(2, h * d, dtype=dtype, device=x.device)
    g_next = grad_state.flatten(1)
    for at in reversed(segments(n, b * h * d, carry_every)):
        entry = carries[:, at.start // carry_every]
        inputs = x[:, at].flatten(2).to(dtype)
        y = _states(inputs, decays, gains, entry)
        g = adjoint(decays[None, None], grad[:, at].flatten(2).to(dtype), g_next)
        g_next = decays * g[:, 0]
        before = y[:, :-1].mul_(g[:, 1:])
        grad_decay += (g[:, 0] * entry).sum(0) + before.sum((0, 1))
        grad_segment = grad_x[:, at].flatten(2)
        if gain is None or gains is None:
            grad_segment.copy_(g)
        else:
            grad_gain += torch.mul(g, inputs, out=y).sum((0, 1))
            torch.mul(g, gains, out=grad_segment)
    grad_decay, grad_gain = (t.unflatten(0, (h, d)).sum(1) for t in (grad_decay, grad_gain))
    return (grad_x, grad_decay.to(decay.dtype), None if gain is None else grad_gain.to(gain.dtype),
            None if initial_state is None else g_next.unflatten(1, (h, d)).clone())
