"""The gate loop: linear attention whose state decays and turns by a gate of the data."""

from fastmix.checks import (check_length, check_shape, check_tensor, match_dtypes,
                            match_parameter, wide_complex)
from fastmix.fallback import gate_loop as fallback
from fastmix.ops._register import (CARRY_EVERY, HEADS_CARRY_EVERY, Operator, carry_count,
                                   needs_gradient)


def _fake(q, k, v, gates, gate_logits, initial_state, carry_every):
    (b, n, h, dk), dv = q.shape, v.shape[-1]
    carries = carry_count(n, carry_every)
    dtype = wide_complex(q.dtype)
    return (q.new_empty(b, n, h, dv), q.new_empty(b, h, dk, dv, dtype=dtype),
            q.new_empty(b, carries, h, dk, dv, dtype=dtype))


_operator = Operator(
    "gate_loop",
    "Tensor q, Tensor k, Tensor v, Tensor? gates, Tensor? gate_logits, Tensor? initial_state, "
    "int carry_every",
    outputs="out state carries",
    fallback=fallback, fake=_fake,
    batched={"q": 4, "k": 4, "v": 4, "gates": 3, "gate_logits": 4, "initial_state": 4})


def gate_loop(q, k, v, gates=None, *, gate_logits=None, initial_state=None, return_state=False):
    """S_t = a_t S_{t-1} + k_t v_tᵀ, out_t = q_t · Re S_t

    Linear in n. With dk = dv = 1 (one head per channel, the paper's setting) it is a scan
    per channel; larger heads run in chunks of matrix products. States are never stored:
    backward recomputes them from every 64th, those of heads on CPUs from every 512th.

    Args:
        q, k: (b, n, h, dk), real, any strides
        v: (b, n, h, dv), the dtype of q
        gates: a (b, n, h), complex64 (complex128 for float64 q). Any complex value: 0
            forgets everything, abs a = 1 nothing.
        gate_logits: z (b, n, h, 2), real and imaginary part, the dtype of q or float32;
            a = σ(abs z) · z / abs z, and ½ at z = 0 with no gradient there. Exactly one of
            gates and gate_logits is given.
        initial_state: S_{-1} (b, h, dk, dv), complex64 (complex128 for float64); 0 if None
        return_state: also return S_{n-1} (b, h, dk, dv)

    Returns:
        (b, n, h, dv) in the dtype of q, or (that, state).

    Differentiable in every tensor, to any order. Raises TypeError and ValueError for
    arguments that do not fit.

    GateLoop (arXiv:2311.01927), as in gateloop-transformer.
    """
    where = "gate_loop"
    if (gates is None) == (gate_logits is None):
        given = "neither" if gates is None else "both"
        raise ValueError(
            f"{where}: exactly one of gates and gate_logits must be given, got {given}")
    check_tensor(where, "q", q)
    sizes = check_shape(where, "q", q, "b n h dk")
    check_length(where, "q", sizes["n"])
    check_tensor(where, "k", k, like=("q", q))
    check_shape(where, "k", k, "b n h dk", sizes)
    check_tensor(where, "v", v, like=("q", q))
    sizes = check_shape(where, "v", v, "b n h dv", sizes)
    q, k, v = match_dtypes(where, q=q, k=k, v=v)
    complex_dtype = wide_complex(q.dtype)
    if gates is not None:
        check_tensor(where, "gates", gates, (complex_dtype,), like=("q", q))
        check_shape(where, "gates", gates, "b n h", sizes)
    else:
        check_tensor(where, "gate_logits", gate_logits, like=("q", q))
        check_shape(where, "gate_logits", gate_logits, "b n h 2", sizes)
        gate_logits = match_parameter(where, "gate_logits", gate_logits, ("q", q))
    if initial_state is not None:
        check_tensor(where, "initial_state", initial_state, (complex_dtype,), like=("q", q))
        check_shape(where, "initial_state", initial_state, "b h dk dv", sizes)
    wanted = needs_gradient(q, k, v, gates, gate_logits, initial_state)
    diagonal = sizes["dk"] == sizes["dv"] == 1
    every = CARRY_EVERY if diagonal else HEADS_CARRY_EVERY.get(q.device.type, CARRY_EVERY)
    out, state, _ = _operator(q, k, v, gates, gate_logits, initial_state, every if wanted else 0)
    return (out, state) if return_state else out
