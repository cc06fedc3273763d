"""The definition of every operator, in plain lines to check against a formula.

Nothing here is fast. Each function takes the arguments of its namesake in
`fastmix.ops`, but of states only those of gate_loop and decay_conv, and linear_scan's
initial one: the others are defined by whole sequences. It computes in the dtype it is
given: pass float64 (complex128) for an oracle. Tests and the report hold every
implementation against these.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmix.activations import ACTIVATIONS


def linear_scan(gates: Tensor, inputs: Tensor, initial_state: Tensor | None = None, *,
                reverse: bool = False) -> Tensor:
    """h_t = gates_t · h_{t-1} + inputs_t, for t = 0 … n-1 (n-1 … 0 if reverse)."""
    n = inputs.shape[1]
    gates = gates.reshape(*gates.shape, *(1,) * (inputs.ndim - gates.ndim))
    dtype = torch.promote_types(gates.dtype, inputs.dtype)
    h = torch.zeros_like(inputs[:, 0], dtype=dtype) if initial_state is None else initial_state
    states: list = [None] * n
    for t in reversed(range(n)) if reverse else range(n):
        h = gates[:, t] * h + inputs[:, t]
        states[t] = h
    return torch.stack(states, dim=1)


def gate_from_logits(gate_logits: Tensor) -> Tensor:
    """a = σ(|z|) · z / |z|, ½ at z = 0, for z = gate_logits[..., 0] + i · gate_logits[..., 1].

    Where |z| is infinite, σ(|z|) is 1 and the direction is that of the infinite parts alone:
    (∞, 5) → 1, (0, -∞) → -i, (∞, ∞) → (1 + i) / √2. The gradient there is 0, as it is at z = 0.
    z is divided by its larger part before it is squared, so that every finite z keeps its
    direction, in every dtype. A NaN in either part gives NaN.
    """
    gate_logits = gate_logits.to(torch.promote_types(gate_logits.dtype, torch.float32))
    zero = (gate_logits == 0).all(-1, keepdim=True)
    larger = torch.where(zero, 1, gate_logits.detach()).abs().amax(-1, keepdim=True)
    z = torch.where(larger.isinf(), gate_logits.isinf() * gate_logits.sign(), gate_logits / larger)
    z = torch.where(zero, z.new_tensor([1, 0]), z)
    size = z.square().sum(-1, keepdim=True).sqrt()
    length = larger.clamp(max=torch.finfo(larger.dtype).max) * size  # 0 · ∞ has no derivative
    gate = torch.where(zero, 0.5, length.sigmoid()) * (z / size)
    return torch.complex(*gate.unbind(-1))


def gate_loop(q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None = None, *,
              gate_logits: Tensor | None = None, initial_state: Tensor | None = None,
              return_state: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} + k_t v_tᵀ, out_t = q_t · Re S_t, with a state S (dk, dv).

    The state is complex or real as the gates are. gates (b, n, h), or (h,) for all steps alike;
    gate_logits z (b, n, h, 2), or (b, n, h) for the real gates a = σ(z).
    """
    b, n, h, dk = q.shape
    if gates is not None:
        a = gates.expand(b, n, h)
    else:
        assert gate_logits is not None
        a = gate_logits.sigmoid() if gate_logits.ndim == 3 else gate_from_logits(gate_logits)
    dv = v.shape[-1]
    state = q.new_zeros(b, h, dk, dv, dtype=a.dtype) if initial_state is None else initial_state
    out = []
    for t in range(n):
        outer = k[:, t, :, :, None] * v[:, t, :, None, :]
        state = a[:, t, :, None, None] * state + outer
        out.append((q[:, t, :, :, None] * state.real).sum(dim=-2))
    outputs = torch.stack(out, dim=1)
    return (outputs, state) if return_state else outputs


def decay_conv(x: Tensor, decay: Tensor, gain: Tensor | None = None, *,
               initial_state: Tensor | None = None,
               return_state: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """y_t = decay_h · y_{t-1} + gain_h · x_t, per head h."""
    y = torch.zeros_like(x[:, 0]) if initial_state is None else initial_state
    out = []
    for t in range(x.shape[1]):
        u = x[:, t] if gain is None else gain[:, None] * x[:, t]
        y = decay[:, None] * y + u
        out.append(y)
    outputs = torch.stack(out, dim=1)
    return (outputs, y) if return_state else outputs


def fft_conv(x: Tensor, kernel: Tensor, skip: Tensor | None = None) -> Tensor:
    """y_t = Σ_{j ≤ t} kernel_j · x_{t-j} + skip · x_t, per head, kernel shared by its channels."""
    n, m = x.shape[1], kernel.shape[-2]
    kernel = kernel.expand(x.shape[0], -1, -1)
    y = torch.zeros_like(x) if skip is None else skip * x
    for j in range(min(n, m)):
        product = kernel[:, j, None, :, None] * x[:, : n - j]
        y = y + F.pad(product, (0, 0, 0, 0, j, 0))
    return y


def windowed_sgu(
        x: Tensor, weight: Tensor, bias: Tensor, *, norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None, eps: float = 1e-5, gate_residual: Tensor | None = None,
        activation: str | Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """out = activation(mix(norm(gate)) + bias + gate_residual) · res, with x = [res, gate].

    Row r of window i mixes the 2w gate vectors of windows i-1 and i: those at
    j ≤ r + w, that is, up to and including its own time step.
    """
    b, n, _ = x.shape
    h, w, _ = weight.shape
    res, gate = x.chunk(2, dim=-1)
    gate = gate - gate.mean(dim=-1, keepdim=True)
    gate = gate / (gate.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    gate = gate if norm_weight is None else gate * norm_weight
    gate = gate if norm_bias is None else gate + norm_bias
    gate = gate.unflatten(-1, (h, -1))
    rows = []
    for t in range(n):
        i, r = divmod(t, w)
        first = max((i - 1) * w, 0)
        row = weight[:, r, first - (i - 1) * w : r + w + 1]
        weighed = row.T[None, :, :, None] * gate[:, first : t + 1]
        rows.append(weighed.sum(dim=1) + bias[:, r, None])
    mixed = torch.stack(rows, dim=1).flatten(-2)
    if gate_residual is not None:
        mixed = mixed + gate_residual
    activate = activation if callable(activation) else ACTIVATIONS[activation or "identity"].forward
    return activate(mixed) * res


def causal_sgu(
        x: Tensor, weight: Tensor, bias: Tensor, *, norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None, eps: float = 1e-5, gate_residual: Tensor | None = None,
        activation: str | Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """windowed_sgu with a single window, as long as the weight: (h, s, s), s ≥ n."""
    return windowed_sgu(
        x, F.pad(weight, (weight.shape[-1], 0)), bias, norm_weight=norm_weight,
        norm_bias=norm_bias, eps=eps, gate_residual=gate_residual, activation=activation)


def cumulative_mean(x: Tensor) -> Tensor:
    """y_t = mean of x_0 … x_t, along axis 1."""
    return torch.stack([x[:, : t + 1].mean(dim=1) for t in range(x.shape[1])], dim=1)
