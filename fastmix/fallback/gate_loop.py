"""gate_loop in pure PyTorch.

Head dimension 1 is a scan per channel. Larger heads go in chunks of matrix products:
inside a chunk the step from r to s weighs Re Π_{r<i≤s} a_i, and whatever came before
enters through the complex state at the chunk's start. Products of gates are formed step
by step: a gate of 0 is exact, and nothing is ever divided by one.
"""

import torch
import torch.nn.functional as F

from fastmix.fallback._scan import adjoint, entering, joined, scan, stretches, with_last


def _chunk(dk, dv):
    """Steps of time per chunk: its weights cost as much as its matrix products."""
    return 16 if max(dk, dv) <= 16 else 64


class _Activate(torch.autograd.Function):
    """a = σ(|z|) · z / |z|, ½ at z = 0; logits z (…, 2) → complex (…).

    Differentiated step by step, z / |z| near 0 would be a difference of large terms.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits):
        re, im = logits.unbind(-1)
        at_zero = (re == 0) & (im == 0)
        re, im = torch.where(at_zero, 1, re), torch.where(at_zero, 0, im)
        size = torch.hypot(re, im)
        sigmoid = torch.where(at_zero, 0.5, size.sigmoid())
        return torch.complex(re / size * sigmoid, im / size * sigmoid)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return _activate_backward(grad, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx, tangent):  # the Jacobian is symmetric
        moved = _activate_backward(torch.view_as_complex(tangent), *ctx.saved_tensors)
        return torch.view_as_complex(moved)


activate = _Activate.apply


def _activate_backward(grad, logits):
    """Along z the slope is σ'(|z|), across it σ(|z|) / |z|; 0 at z = 0."""
    re, im = logits.unbind(-1)
    size = torch.hypot(re, im)
    size = torch.where(size == 0, 1, size)
    re, im = re / size, im / size
    sigmoid = size.sigmoid()
    along = (re * grad.real + im * grad.imag) * (sigmoid * (1 - sigmoid))
    steepest = size.clamp(min=torch.finfo(size.dtype).tiny)
    across = (re * grad.imag - im * grad.real) * (sigmoid / steepest)
    return torch.stack([re * along - im * across, im * along + re * across], dim=-1)


def forward(q, k, v, gates, gate_logits, initial_state, carry_every):
    """out (b, n, h, dv), the last state (b, h, dk, dv) and the carries, complex.

    q, k (b, n, h, dk), v (b, n, h, dv); gates (b, n, h) complex or gate_logits
    (b, n, h, 2) real. The carries (b, ⌈n / carry_every⌉ + 1, h, dk, dv) are the states
    before every carry_every-th step, and the last one. carry_every is 0 where no gradient
    will be asked for: then there are none.
    """
    (b, n, h, dk), dv = q.shape, v.shape[-1]
    wide = torch.promote_types(q.dtype, torch.float32)
    state = initial_state
    if state is None:
        state = q.new_zeros(b, h, dk, dv, dtype=wide.to_complex())
    run, per_step = (_diagonal, 1) if dk == dv == 1 else (_chunked, _chunk(dk, dv))
    outs, carries = [], []
    for at in stretches(n, 2 * b * h * per_step, carry_every):
        a = (activate(gate_logits[:, at].to(wide)) if gates is None else gates[:, at])
        out, state, entries = run(q[:, at].to(wide), k[:, at].to(wide), v[:, at].to(wide),
                                  a, state, carry_every)
        outs.append(out.to(q.dtype))
        carries.append(entries)
    return joined(outs), state.clone(), with_last(carries, state)


def backward(grad, grad_state, carries, q, k, v, gates, gate_logits, initial_state, carry_every):
    """Gradients of q, k, v, gates, gate_logits and initial_state (None where it was None).

    With G_t = q_t grad_tᵀ + conj(a_{t+1}) G_{t+1}: dq = Re S · grad, dk = Re G · v,
    dv = k · Re G and da = Σ G_t conj(S_{t-1}). States are recomputed from the carries.
    """
    (b, n, h, dk), dv = q.shape, v.shape[-1]
    wide = torch.promote_types(q.dtype, torch.float32)
    run, per_step = ((_diagonal_backward, 1) if dk == dv == 1
                     else (_chunked_backward, _chunk(dk, dv)))
    grad_q, grad_k, grad_v = (torch.empty_like(t, memory_format=torch.contiguous_format)
                              for t in (q, k, v))
    grad_gates = torch.empty_like(gate_logits if gates is None else gates,
                                  memory_format=torch.contiguous_format)
    g = grad_state
    for at in reversed(stretches(n, 2 * b * h * per_step, carry_every)):
        logits = None if gate_logits is None else gate_logits[:, at].to(wide)
        a = activate(logits) if gates is None else gates[:, at]
        grad_q[:, at], grad_k[:, at], grad_v[:, at], grad_a, g = run(
            grad[:, at].to(wide), g, carries[:, at.start // carry_every],
            q[:, at].to(wide), k[:, at].to(wide), v[:, at].to(wide), a)
        grad_gates[:, at] = grad_a if gates is not None else _activate_backward(grad_a, logits)
    return (grad_q, grad_k, grad_v, None if gates is None else grad_gates,
            None if gate_logits is None else grad_gates,
            None if initial_state is None else g.clone())


# ---- head dimension 1: a scan over a (b, n, h)


def _diagonal(q, k, v, a, state, carry_every):
    states = scan(a, (k * v)[..., 0].to(a.dtype), state[..., 0, 0])[..., None, None]
    return q * states.real[..., 0], states[:, -1], entering(states, state, carry_every)


def _diagonal_backward(grad, g_next, entry, q, k, v, a):
    """g_next is what later steps ask of the last state; entry, the state before the first."""
    entry = entry[..., 0, 0]
    states = scan(a, (k * v)[..., 0].to(a.dtype), entry)
    g = adjoint(a, (q * grad)[..., 0].to(a.dtype), g_next[..., 0, 0])
    before = torch.cat([entry[:, None], states[:, :-1]], dim=1)
    g_entry = (torch.conj_physical(a[:, 0]) * g[:, 0])[..., None, None]
    real_g = g.real[..., None]
    return (grad * states.real[..., None], real_g * v, real_g * k,
            g * torch.conj_physical_(before), g_entry)


# ---- larger heads: matrix products over chunks of time, (b, chunks, h, steps, d)


def _split(x, length, value=0.0):
    """(b, n, h, …) → (b, ⌈n / length⌉, h, length, …), padded with `value`."""
    pad = -x.shape[1] % length
    if pad:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, pad), value=value)
    return x.unflatten(1, (-1, length)).movedim(2, 3)


def _merge(x, n):
    return x.movedim(3, 2).flatten(1, 2)[:, :n]


def _parts(x):
    """Real and imaginary part, each contiguous: a batched product of strided views is slow."""
    return x.real.contiguous(), x.imag.contiguous()


def _weights(a):
    """P[s, 0] = Π_{i ≤ s} a_i, P[s, r + 1] = Π_{r < i ≤ s} a_i, 0 for r > s: (…, c, c + 1)."""
    c = a.shape[-1]
    unit = torch.eye(c + 1, dtype=a.dtype, device=a.device)
    row = unit[0].expand(*a.shape[:-1], c + 1)
    rows = []
    for s in range(c):
        row = torch.addcmul(unit[s + 1], a[..., s, None], row)
        rows.append(row)
    return torch.stack(rows, dim=-2)


def _weights_backward(grad, weights, a):
    """da_s = Σ_r R[s, r] conj(P[s-1, r]), where R[s] = grad[s] + conj(a_{s+1}) R[s+1]."""
    grad_a = torch.empty_like(a, memory_format=torch.contiguous_format)
    row = torch.zeros_like(grad[..., 0, :])
    for s in reversed(range(a.shape[-1])):
        row = row + grad[..., s, :]
        if s == 0:
            grad_a[..., 0] = row[..., 0]
        else:
            before = torch.conj_physical(weights[..., s - 1, : s + 1])
            grad_a[..., s] = (row[..., : s + 1] * before).sum(-1)
        row = torch.conj_physical(a[..., s, None]) * row
    return grad_a


def _chunk_states(k, v, weights, state):
    """The state that enters every chunk, (b, chunks, h, dk, dv), and the last one."""
    to_end = weights[..., -1, 1:, None]
    update = torch.complex((k * to_end.real).mT @ v, (k * to_end.imag).mT @ v)
    after = scan(weights[..., -1, 0, None, None], update, state)
    return torch.cat([state[:, None], after[:, :-1]], dim=1), after[:, -1]


def _chunked(q, k, v, a, state, carry_every):
    n = q.shape[1]
    length = min(n, _chunk(q.shape[-1], v.shape[-1]))
    q, k, v, a = _split(q, length), _split(k, length), _split(v, length), _split(a, length, 1.0)
    weights = _weights(a)
    entries, state = _chunk_states(k, v, weights, state)
    from_entry = weights[..., 0, None]
    entries_re, entries_im = _parts(entries)
    out = ((q @ k.mT) * weights.real[..., 1:]) @ v
    out = out + from_entry.real * (q @ entries_re) - from_entry.imag * (q @ entries_im)
    carries = entries[:, :: carry_every // length] if carry_every else entries[:, :0]
    return _merge(out, n), state, carries


def _chunked_backward(grad, g_next, entry, q, k, v, a):
    n = q.shape[1]
    length = min(n, _chunk(q.shape[-1], v.shape[-1]))
    grad, q, k, v, a = (_split(grad, length), _split(q, length), _split(k, length),
                        _split(v, length), _split(a, length, 1.0))
    weights = _weights(a)
    entries, _ = _chunk_states(k, v, weights, entry)
    inside = weights.real[..., 1:]

    # Within the chunk.
    scores, grad_scores = q @ k.mT, grad @ v.mT
    grad_q = (grad_scores * inside) @ k
    grad_k = (grad_scores * inside).mT @ q
    grad_v = (scores * inside).mT @ grad
    grad_weights = torch.zeros_like(weights)
    grad_weights.real[..., 1:] = grad_scores * scores

    # Out of the entering state.
    re, im = weights[..., 0, None].real, weights[..., 0, None].imag
    by_re, by_im = (grad @ part.mT for part in _parts(entries))
    grad_q += re * by_re - im * by_im
    grad_weights.real[..., 0] += (q * by_re).sum(-1)
    grad_weights.imag[..., 0] -= (q * by_im).sum(-1)
    asked = torch.complex((q * re).mT @ grad, -((q * im).mT @ grad))

    # Into the leaving state: g is the gradient of the state after each chunk.
    to_end = weights[..., -1, 0, None, None]
    g_entries = scan(torch.conj_physical(to_end), asked, g_next, reverse=True)
    g = torch.cat([g_entries[:, 1:], g_next[:, None]], dim=1)
    grad_weights[..., -1, 0] += (g * torch.conj_physical(entries)).sum((-1, -2))
    re, im = weights[..., -1, 1:, None].real, weights[..., -1, 1:, None].imag
    g_re, g_im = _parts(g)
    by_re, by_im = v @ g_re.mT, v @ g_im.mT
    grad_k += re * by_re + im * by_im
    grad_v += re * (k @ g_re) + im * (k @ g_im)
    grad_weights[..., -1, 1:] += torch.complex((k * by_re).sum(-1), (k * by_im).sum(-1))

    grad_a = _weights_backward(grad_weights, weights, a)
    return (_merge(grad_q, n), _merge(grad_k, n), _merge(grad_v, n), _merge(grad_a, n),
            g_entries[:, 0])
