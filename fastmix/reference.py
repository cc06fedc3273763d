"""The definition of every operator, in plain lines to check against a formula.

Nothing here is fast. Each function takes the arguments of its namesake in
`fastmix.ops` and computes in the dtype it is given: pass float64 (complex128) for
an oracle. Tests and the report hold every implementation against these.
"""

import torch
import torch.nn.functional as F


def linear_scan(gates, inputs, initial_state=None, *, reverse=False):
    """h_t = gates_t · h_{t-1} + inputs_t, for t = 0 … n-1 (n-1 … 0 if reverse)."""
    n = inputs.shape[1]
    gates = gates.reshape(*gates.shape, *(1,) * (inputs.ndim - gates.ndim))
    dtype = torch.promote_types(gates.dtype, inputs.dtype)
    h = torch.zeros_like(inputs[:, 0], dtype=dtype) if initial_state is None else initial_state
    states = [None] * n
    for t in reversed(range(n)) if reverse else range(n):
        h = gates[:, t] * h + inputs[:, t]
        states[t] = h
    return torch.stack(states, dim=1)


def gate_from_logits(gate_logits):
    """a = σ(|z|) · z / |z| for z = gate_logits[..., 0] + i · gate_logits[..., 1]; a = ½ at z = 0."""
    z = torch.view_as_complex(gate_logits.contiguous())
    at_zero = z == 0
    z = torch.where(at_zero, 1, z)
    return torch.where(at_zero, 0.5, torch.polar(z.abs().sigmoid(), z.angle()))


def gate_loop(q, k, v, gates=None, *, gate_logits=None, initial_state=None, return_state=False):
    """S_t = a_t S_{t-1} + k_t v_tᵀ, out_t = q_t · Re S_t, with a complex state S (dk, dv)."""
    a = gate_from_logits(gate_logits) if gates is None else gates
    b, n, h, dk = q.shape
    dv = v.shape[-1]
    state = q.new_zeros(b, h, dk, dv, dtype=a.dtype) if initial_state is None else initial_state
    out = []
    for t in range(n):
        outer = k[:, t, :, :, None] * v[:, t, :, None, :]
        state = a[:, t, :, None, None] * state + outer
        out.append((q[:, t, :, :, None] * state.real).sum(dim=-2))
    out = torch.stack(out, dim=1)
    return (out, state) if return_state else out


def decay_conv(x, decay, gain=None, *, initial_state=None, return_state=False):
    """y_t = decay_h · y_{t-1} + gain_h · x_t, per head h."""
    y = torch.zeros_like(x[:, 0]) if initial_state is None else initial_state
    out = []
    for t in range(x.shape[1]):
        u = x[:, t] if gain is None else gain[:, None] * x[:, t]
        y = decay[:, None] * y + u
        out.append(y)
    out = torch.stack(out, dim=1)
    return (out, y) if return_state else out


def fft_conv(x, kernel, skip=None):
    """y_t = Σ_{j ≤ t} kernel_j · x_{t-j} + skip · x_t, per head, kernel shared by its channels."""
    n, m = x.shape[1], kernel.shape[-2]
    kernel = kernel.expand(x.shape[0], -1, -1)
    y = torch.zeros_like(x) if skip is None else skip * x
    for j in range(min(n, m)):
        shifted = F.pad(x[:, : n - j], (0, 0, 0, 0, j, 0))
        y = y + kernel[:, j, None, :, None] * shifted
    return y


ACTIVATIONS = {
    None: lambda x: x,
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
}


def windowed_sgu(x, weight, bias, *, norm_weight=None, norm_bias=None, eps=1e-5,
                 gate_residual=None, activation=None):
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
    mixed = []
    for t in range(n):
        i, r = divmod(t, w)
        first = max((i - 1) * w, 0)
        row = weight[:, r, first - (i - 1) * w : r + w + 1]
        weighed = row.T[None, :, :, None] * gate[:, first : t + 1]
        mixed.append(weighed.sum(dim=1) + bias[:, r, None])
    mixed = torch.stack(mixed, dim=1).flatten(-2)
    if gate_residual is not None:
        mixed = mixed + gate_residual
    return ACTIVATIONS.get(activation, activation)(mixed) * res


def causal_sgu(x, weight, bias, *, norm_weight=None, norm_bias=None, eps=1e-5,
               gate_residual=None, activation=None):
    """windowed_sgu with a single window, as long as the weight: (h, s, s), s ≥ n."""
    return windowed_sgu(
        x, F.pad(weight, (weight.shape[-1], 0)), bias, norm_weight=norm_weight,
        norm_bias=norm_bias, eps=eps, gate_residual=gate_residual, activation=activation)


def cumulative_mean(x):
    """y_t = mean of x_0 … x_t, along axis 1."""
    return torch.stack([x[:, : t + 1].mean(dim=1) for t in range(x.shape[1])], dim=1)
