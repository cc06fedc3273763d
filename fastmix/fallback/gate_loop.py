"""gate_loop in pure PyTorch.

Head dimension 1 is a scan per channel. Larger heads go in chunks of matrix products:
inside a chunk the step from r to s weighs Re Π_{r<i≤s} a_i, and whatever came before
enters through the state at the chunk's start. Products of gates are formed step
by step: a gate of 0 is exact, and nothing is ever divided by one. Real gates have a real state
and no imaginary parts anywhere, at half the products.

A chunk multiplies q and k before v comes in, gates before states, and what is later by a zero.
Where q kᵀ would lose its digits, or a result is not finite, CPUs form every step's state, as for
head dimension 1: the results are those of the definition then.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmix._complex import times
from fastmix.dtypes import wide
from fastmix.fallback._carries import all_carries, segment_carries
from fastmix.fallback._scan import adjoint, scan
from fastmix.fallback._segments import concatenated, segments
from fastmix.fallback._values import all_finite, is_anything, products_fit


def _chunk(dk: int, dv: int) -> int:
    """Steps of time per chunk: its weights cost as much as its matrix products."""
    return 16 if max(dk, dv) <= 16 else 64


def _polar(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z (…, 2) → its direction (…, 2), its larger part, its length, and their ratio in [1, √2].

    No square overflows or loses digits. An infinite z has the direction of its infinite parts,
    and a length whose derivative is finite. At z = 0 all are 0 but the ratio.
    """
    larger = logits.detach().abs().amax(-1)
    at_zero = larger == 0
    parts = logits / torch.where(at_zero, 1, larger)[..., None]
    parts = torch.where(larger.isinf()[..., None], logits.isinf() * logits.sign(), parts)
    size = torch.where(at_zero, 1, parts.square().sum(-1)).sqrt()
    length = larger.clamp(max=torch.finfo(larger.dtype).max) * size
    return parts / size[..., None], larger, length, size


def activated(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of σ(|z|) · z / |z|, ½ at z = 0."""
    direction, larger, length, _ = _polar(logits)
    re, im = (direction * length.sigmoid()[..., None]).unbind(-1)
    return torch.where(larger == 0, 0.5, re), im


class _Activate(torch.autograd.Function):
    """a = σ(|z|) · z / |z|; logits z (…, 2) → complex (…).

    Differentiated step by step, z / |z| near 0 would be a difference of large terms.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor) -> Tensor:
        return torch.complex(*activated(logits))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _activate_backward(grad, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # the Jacobian is symmetric
        moved = _activate_backward(torch.complex(*tangent.unbind(-1)), *ctx.saved_tensors)
        return torch.complex(*moved.unbind(-1))


activate = _Activate.apply


def _activate_backward(grad: Tensor, logits: Tensor) -> Tensor:
    """Along z the slope is σ'(|z|), across it σ(|z|) / |z|; 0 at z = 0 and at infinity."""
    direction, larger, length, size = _polar(logits)
    re, im = direction.unbind(-1)
    sigmoid = length.sigmoid()
    along = (re * grad.real + im * grad.imag) * (sigmoid * (1 - sigmoid))
    turn = (re * grad.imag - im * grad.real) * (sigmoid / size)
    return torch.stack([re * along - _over(im * turn, larger),
                        im * along + _over(re * turn, larger)], dim=-1)


def _over(x: Tensor, larger: Tensor) -> Tensor:
    """x / larger, 0 where that is 0. It ends at a power of two where it would leave the range of
    numbers."""
    quotient = x / torch.where(larger == 0, 1, larger)
    limit = 2 / torch.finfo(larger.dtype).tiny
    return torch.where(quotient.isinf() & x.isfinite(), quotient.sign() * limit, quotient)


def forward(q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None, gate_logits: Tensor | None,
            initial_state: Tensor | None, carry_every: int) -> tuple[Tensor, Tensor, Tensor]:
    """out (b, n, h, dv), the last state (b, h, dk, dv) and the carries.

    State and carries are complex or real, as the gates are.

    q, k (b, n, h, dk), v (b, n, h, dv); gates (b, n, h), complex or real, or gate_logits
    (b, n, h, 2) of complex ones; the carries (b, ⌈n / carry_every⌉ + 1, h, dk, dv).
    """
    (b, n, h, dk), dv = q.shape, v.shape[-1]
    dtype = wide(q.dtype)
    state_dtype = dtype if gates is not None and not gates.is_complex() else dtype.to_complex()
    state = initial_state
    if state is None:
        state = q.new_zeros(b, h, dk, dv, dtype=state_dtype)
    run, per_step = (_diagonal, 1) if dk == dv == 1 else (_chunked, _chunk(dk, dv))
    given: Any = gate_logits if gates is None else gates
    outs, carries = [], []
    for at in segments(n, 2 * b * h * per_step, carry_every):
        a = (given[:, at].to(state_dtype) if gates is not None
             else activate(given[:, at].to(dtype)))
        out, state, entries = run(q[:, at].to(dtype), k[:, at].to(dtype), v[:, at].to(dtype),
                                  a, state, carry_every)
        outs.append(out.to(q.dtype))
        carries.append(entries)
    return concatenated(outs), state.clone(), all_carries(carries, state)


def backward(grad: Tensor, grad_state: Tensor, carries: Tensor, q: Tensor, k: Tensor, v: Tensor,
             gates: Tensor | None, gate_logits: Tensor | None, initial_state: Tensor | None,
             carry_every: int) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, gates, gate_logits and initial_state (None where it was None).

    With G_t = q_t grad_tᵀ + conj(a_{t+1}) G_{t+1}: dq = Re S · grad, dk = Re G · v,
    dv = k · Re G and da = Σ G_t conj(S_{t-1}). States are recomputed from the carries.
    """
    (b, n, h, dk), dv = q.shape, v.shape[-1]
    dtype = wide(q.dtype)
    run, per_step = ((_diagonal_backward, 1) if dk == dv == 1
                     else (_chunked_backward, _chunk(dk, dv)))
    grad_q, grad_k, grad_v = (torch.empty_like(t, memory_format=torch.contiguous_format)
                              for t in (q, k, v))
    given: Any = gate_logits if gates is None else gates
    grad_given = torch.empty_like(given, memory_format=torch.contiguous_format)
    g = grad_state
    for at in reversed(segments(n, 2 * b * h * per_step, carry_every)):
        logits = None if gates is not None else given[:, at].to(dtype)
        a = given[:, at].to(carries.dtype) if logits is None else activate(logits)
        grad_q[:, at], grad_k[:, at], grad_v[:, at], grad_a, g = run(
            grad[:, at].to(dtype), g, carries[:, at.start // carry_every],
            q[:, at].to(dtype), k[:, at].to(dtype), v[:, at].to(dtype), a)
        grad_given[:, at] = grad_a if logits is None else _activate_backward(grad_a, logits)
    return (grad_q, grad_k, grad_v, None if gates is None else grad_given,
            None if gate_logits is None else grad_given,
            None if initial_state is None else g.clone())


# ---- head dimension 1: a scan over a (b, n, h)


def _diagonal(q: Tensor, k: Tensor, v: Tensor, a: Tensor, state: Tensor,
              carry_every: int) -> tuple[Tensor, Tensor, Tensor]:
    states = scan(a, (k * v)[..., 0].to(a.dtype), state[..., 0, 0])[..., None, None]
    return q * states.real[..., 0], states[:, -1], segment_carries(states, state, carry_every)


def _diagonal_backward(grad: Tensor, g_next: Tensor, entry: Tensor, q: Tensor, k: Tensor, v: Tensor,
                       a: Tensor) -> tuple[Tensor, ...]:
    """g_next is the gradient of the last state from later steps; entry, the state before the
    first."""
    entry = entry[..., 0, 0]
    states = scan(a, (k * v)[..., 0].to(a.dtype), entry)
    g = adjoint(a, (q * grad)[..., 0].to(a.dtype), g_next[..., 0, 0])
    before = torch.cat([entry[:, None], states[:, :-1]], dim=1)
    g_entry = (torch.conj_physical(a[:, 0]) * g[:, 0])[..., None, None]
    real_g = g.real[..., None]
    return (grad * states.real[..., None], real_g * v, real_g * k,
            g * torch.conj_physical_(before), g_entry)


# ---- larger heads: matrix products over chunks of time, (b, chunks, h, steps, d)


def _split(x: Tensor, length: int, value: float = 0.0) -> Tensor:
    """(b, n, h, …) → (b, ⌈n / length⌉, h, length, …), padded with `value`."""
    pad = -x.shape[1] % length
    if pad:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, pad), value=value)
    return x.unflatten(1, (-1, length)).movedim(2, 3)


def _merge(x: Tensor, n: int) -> Tensor:
    return x.movedim(3, 2).flatten(1, 2)[:, :n]


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    """Real and imaginary part, or a real x alone."""
    return (x.real, x.imag) if x.is_complex() else (x,)


def _dense_parts(x: Tensor) -> list[Tensor]:
    """The same, each contiguous: a batched product of strided views is slow."""
    return [part.contiguous() for part in _parts(x)]


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.complex(*parts) if len(parts) == 2 else parts[0]


def _real_product(x: Tensor, parts: list[Tensor]) -> Tensor:
    """Re(x y), of the parts of y."""
    return (x.real * parts[0] - x.imag * parts[1]) if x.is_complex() else x * parts[0]


def _weights(a: Tensor) -> Tensor:
    """P[s, 0] = Π_{i ≤ s} a_i, P[s, r + 1] = Π_{r < i ≤ s} a_i, 0 for r > s: (…, c, c + 1)."""
    c = a.shape[-1]
    unit = torch.eye(c + 1, dtype=a.dtype, device=a.device)
    row = unit[0].expand(*a.shape[:-1], c + 1)
    rows = []
    for s in range(c):
        row = torch.addcmul(unit[s + 1], a[..., s, None], row)
        rows.append(row)
    return torch.stack(rows, dim=-2)


def _weights_backward(grad: Tensor, weights: Tensor, a: Tensor) -> Tensor:
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


def _chunk_states(k: Tensor, v: Tensor, weights: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state that enters every chunk, (b, chunks, h, dk, dv), and the last one."""
    to_end = weights[..., -1, 1:, None]
    update = _joined([(k * part).mT @ v for part in _parts(to_end)])
    after = scan(weights[..., -1, 0, None, None], update, state)
    return torch.cat([state[:, None], after[:, :-1]], dim=1), after[:, -1]


def _stepwise(q: Tensor, k: Tensor, v: Tensor, a: Tensor, state: Tensor, carry_every: int,
              length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Computes what _chunked does from the states of all steps, `length` of them at once to bound
    the memory.
    """
    outs, carries = [], []
    for queries, keys, values, gates in zip(*(t.split(length, 1) for t in (q, k, v, a))):
        states = _states(keys, values, gates, state)
        outs.append((queries[..., None] * states.real).sum(-2))
        carries.append(state)
        state = states[:, -1]
    entries = torch.stack(carries, 1)
    return torch.cat(outs, 1), state, (
        entries[:, :: carry_every // length] if carry_every else entries[:, :0])


def _stepwise_backward(grad: Tensor, g_next: Tensor, entry: Tensor, q: Tensor, k: Tensor, v: Tensor,
                       a: Tensor, length: int) -> tuple[Tensor, ...]:
    """Computes what _chunked_backward does from the states of all steps."""
    chunks = [*zip(*(t.split(length, 1) for t in (grad, q, k, v, a)))]
    entries = [entry]
    for _, _, keys, values, gates in chunks[:-1]:
        entries.append(_states(keys, values, gates, entries[-1])[:, -1])
    grads, g_entry = [], g_next
    for (grad, q, k, v, a), entry in zip(reversed(chunks), reversed(entries)):
        states, a = _states(k, v, a, entry), a[..., None, None]
        g = adjoint(a, (q[..., None] * grad[..., None, :]).to(a.dtype), g_entry)
        before = torch.cat([entry[:, None], states[:, :-1]], 1)
        grads.append(((states.real * grad[..., None, :]).sum(-1),
                      (g.real * v[..., None, :]).sum(-1), (g.real * k[..., None]).sum(-2),
                      (g * torch.conj_physical(before)).sum((-1, -2))))
        g_entry = torch.conj_physical(a[:, 0]) * g[:, 0]
    return (*(torch.cat(parts[::-1], 1) for parts in zip(*grads)), g_entry)


def _states(k: Tensor, v: Tensor, a: Tensor, entry: Tensor) -> Tensor:
    """All of them, (b, n, h, dk, dv)."""
    return scan(a[..., None, None], (k[..., None] * v[..., None, :]).to(a.dtype), entry)


def _chunked(q: Tensor, k: Tensor, v: Tensor, a: Tensor, state: Tensor,
             carry_every: int) -> tuple[Tensor, Tensor, Tensor]:
    n = q.shape[1]
    length = min(n, _chunk(q.shape[-1], v.shape[-1]))
    steps = q, k, v, a, state, carry_every, length
    q, k, v, a = _split(q, length), _split(k, length), _split(v, length), _split(a, length, 1.0)
    if is_anything(q) or not products_fit(q, k):  # vmap hides the gradients that come back, too
        return _stepwise(*steps)
    weights = _weights(a)
    entries, state = _chunk_states(k, v, weights, state)
    carries = entries[:, :: carry_every // length] if carry_every else entries[:, :0]
    out = ((q @ k.mT) * weights.real[..., 1:]) @ v
    for sign, from_entry, part in zip((1, -1), _parts(weights[..., 0, None]),
                                      _dense_parts(entries)):
        out = torch.add(out, from_entry * (q @ part), alpha=sign)
    if not all_finite(out, state):
        return _stepwise(*steps)
    return _merge(out, n), state, carries


def _chunked_backward(grad: Tensor, g_next: Tensor, entry: Tensor, q: Tensor, k: Tensor, v: Tensor,
                      a: Tensor) -> tuple[Tensor, ...]:
    n = q.shape[1]
    length = min(n, _chunk(q.shape[-1], v.shape[-1]))
    steps = grad, g_next, entry, q, k, v, a, length
    grad, q, k, v, a = (_split(grad, length), _split(q, length), _split(k, length),
                        _split(v, length), _split(a, length, 1.0))
    if not (products_fit(q, k) and products_fit(grad, v)):
        return _stepwise_backward(*steps)
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

    # Out of the entry.
    from_entry = weights[..., 0, None]
    by_entries = [grad @ part.mT for part in _dense_parts(entries)]
    grad_q += _real_product(from_entry, by_entries)
    grad_weights[..., 0] += torch.conj_physical(_joined([(q * by).sum(-1) for by in by_entries]))
    grad_updates = torch.conj_physical(
        _joined([(q * part).mT @ grad for part in _parts(from_entry)]))

    # Into the exit: g is the gradient of the state after each chunk.
    to_end = weights[..., -1, 0, None, None]
    g_entries = scan(torch.conj_physical(to_end), grad_updates, g_next, reverse=True)
    g = torch.cat([g_entries[:, 1:], g_next[:, None]], dim=1)
    grad_weights[..., -1, 0] += (g * torch.conj_physical(entries)).sum((-1, -2))
    into_exit = torch.conj_physical(weights[..., -1, 1:, None])
    g_parts = _dense_parts(g)
    by_g = [v @ part.mT for part in g_parts]
    grad_k += _real_product(into_exit, by_g)
    grad_v += _real_product(into_exit, [k @ part for part in g_parts])
    grad_weights[..., -1, 1:] += _joined([(k * by).sum(-1) for by in by_g])

    grad_a = _weights_backward(grad_weights, weights, a)
    if not all_finite(grad_q, grad_k, grad_v, grad_a, g_entries[:, 0]):
        return _stepwise_backward(*steps)
    return (_merge(grad_q, n), _merge(grad_k, n), _merge(grad_v, n), _merge(grad_a, n),
            g_entries[:, 0])


# ---- in real arithmetic: complex numbers are pairs (2, …) of their parts


def decomposed(q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None, gate_logits: Tensor | None,
               initial_state: Tensor | None, carry_every: int) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` without complex numbers, which other runtimes do not have; no carries.

    One level of chunks, √n of √n steps, so that a program has few nodes.
    """
    if gates is not None and not gates.is_complex():
        return forward(q, k, v, gates, gate_logits, initial_state, carry_every)
    (b, n, h, dk), dv = q.shape, v.shape[-1]
    dtype = wide(q.dtype)
    given: Any = gate_logits if gates is None else torch.view_as_real(gates)
    re, im = activated(given.to(dtype)) if gates is None else given.to(dtype).unbind(-1)
    if initial_state is None:
        state = q.new_zeros(2, b, h, dk, dv, dtype=dtype)
        # No state is there that the first gate could multiply, and products with it may overflow.
        re, im = (torch.cat([0 * part[:, :1], part[:, 1:]], 1) for part in (re, im))
    else:
        state = torch.view_as_real(initial_state).movedim(-1, 0)
    length = math.isqrt(n - 1) + 1
    a = torch.stack([_split(re, length, 1.0), _split(im, length)])
    q_, k_, v_ = (_split(t.to(dtype), length) for t in (q, k, v))

    unit = torch.eye(length + 1, dtype=dtype, device=q.device)
    units = torch.stack([unit, torch.zeros_like(unit)])[:, :, None, None, None]
    row, rows = units[:, 0], []
    for s in range(length):
        row = units[:, s + 1] + times(a[..., s, None], row)
        rows.append(row)
    weights = torch.stack(rows, dim=-2)

    to_end = weights[..., -1, :, None]
    updates = (k_ * to_end[..., 1:, :]).mT @ v_
    entries = []
    for i in range(updates.shape[2]):
        entries.append(state)
        state = times(to_end[:, :, i, :, :1], state) + updates[:, :, i]
    out = ((q_ @ k_.mT) * weights[0, ..., 1:]) @ v_
    re, im = weights[..., :1] * (q_ @ torch.stack(entries, dim=2))
    out = _merge(out + re - im, n).to(q.dtype)
    return out, torch.complex(*state), state[0, :, None][:, :0]
