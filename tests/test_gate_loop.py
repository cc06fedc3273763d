"""gate_loop's own: gates at the edge, states handed over, both ways of giving gates, refusals."""

import contextlib

import pytest
import torch

import fastmix
from cases import (
    check_errors,
    complex_dtype,
    distance,
    implementations,
    largest,
    leaves,
    random_decays,
    squared_errors,
)
from fastmix import ops, reference
from fastmix.ops._register import OPERATORS
from refusal import both_ways, check_refusal

F64 = torch.float64


def draw(n=50, h=3, dk=2, dv=3, dtype=F64, b=2):
    q, k = torch.randn(2, b, n, h, dk, dtype=dtype)
    return q, k, torch.randn(b, n, h, dv, dtype=dtype)


def unit_gates(*shape, size=1.0, real=False):
    angle = 6.3 * torch.rand(*shape, dtype=F64)
    gates = torch.polar(torch.full_like(angle, size), angle)
    return size * gates.real.sgn() if real else gates


HEADS = [(1, 1), (2, 3), (16, 16), (1, 5)]
either_kind = pytest.mark.parametrize("real", [False, True])


@either_kind
@pytest.mark.parametrize("dk, dv", HEADS)
def test_gate_of_zero_forgets_exactly(dk, dv, real):
    """What came before a reset leaves no trace, however large."""
    q, k, v = draw(200, dk=dk, dv=dv)
    gates = unit_gates(2, 200, 3, real=real)
    gates[:, 77] = 0
    v[:, :77] *= 1e200
    out = ops.gate_loop(q, k, v, gates)
    assert largest(out[:, :77]) > 1e199
    late = ops.gate_loop(q[:, 77:], k[:, 77:], v[:, 77:], gates[:, 77:])
    assert distance(out[:, 77:], late) < 1e-13


@either_kind
@pytest.mark.parametrize("dk, dv", HEADS)
def test_all_gates_zero_keep_only_the_present(dk, dv, real):
    q, k, v = draw(130, dk=dk, dv=dv)
    out = ops.gate_loop(q, k, v, torch.zeros(2, 130, 3, dtype=F64 if real else torch.complex128))
    assert distance(out, (q * k).sum(-1, keepdim=True) * v) < 1e-13


@pytest.mark.parametrize("implementation", implementations("gate_loop"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("first", [1e30, 3e38])
@pytest.mark.parametrize("dk, dv, n", [(1, 1, 4), (1, 1, 70), (3, 3, 4), (24, 20, 70)])
def test_a_first_gate_multiplies_nothing(dk, dv, n, first, dtype, implementation):
    """Also where products from it on are beyond the range of numbers, which no state is."""
    gates = torch.ones(1, n, 2, dtype=dtype)
    gates[0, :4] = torch.tensor([first, 1e30, 0, 1])[:, None]
    tensors = {"q": torch.ones(1, n, 2, dk), "k": torch.ones(1, n, 2, dk),
               "v": torch.ones(1, n, 2, dv), "gates": gates}

    def results(run, dtype):
        grad_leaves = leaves({name: t.to(torch.promote_types(t.dtype, dtype))
                              for name, t in tensors.items()})
        out = run(**grad_leaves)
        return out, *torch.autograd.grad(out.sum(), grad_leaves.values(), create_graph=True), \
            *torch.autograd.grad(out.sum(), grad_leaves.values())

    with fastmix.force(implementation):
        actual = results(ops.gate_loop, torch.float32)
    for ours, exact in zip(actual, results(reference.gate_loop, F64), strict=True):
        torch.testing.assert_close(ours, exact.to(ours.dtype), rtol=1e-5, atol=0)


@pytest.mark.parametrize("implementation", implementations("gate_loop"))
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dk, dv", [(1, 1), (2, 3), (24, 20)])
def test_a_first_gate_that_is_not_finite_gives_no_numbers(dk, dv, value, dtype, implementation):
    """As in the definition, whose state of 0 it multiplies."""
    q, k, v = draw(70, dk=dk, dv=dv)
    gates = random_decays(2, 70, 3, dtype=F64).to(dtype)
    gates[0, 0, 1] = value
    results = []
    for run in (ops.gate_loop, reference.gate_loop):
        grad_leaves = leaves({"q": q, "k": k, "v": v, "gates": gates})
        with fastmix.force(implementation):
            out = run(**grad_leaves)
            results.append([out, *torch.autograd.grad(out.sum(), grad_leaves.values())])
    for ours, defined in zip(*results, strict=True):
        assert torch.equal(ours.isfinite(), defined.isfinite())


@either_kind
@pytest.mark.parametrize("dk, dv", HEADS)
def test_gates_of_one_are_plain_linear_attention(dk, dv, real):
    q, k, v = draw(130, dk=dk, dv=dv)
    out = ops.gate_loop(q, k, v, torch.ones(2, 130, 3, dtype=F64 if real else torch.complex128))
    scores = torch.einsum("bihd,bjhd->bhij", q, k).tril()
    assert distance(out, torch.einsum("bhij,bjhd->bihd", scores, v)) < 1e-12


@either_kind
@pytest.mark.parametrize("dk, dv", [(1, 1), (4, 4)])
def test_unit_gates_stay_accurate_over_65536_steps(dk, dv, real):
    """float32, abs a = 1 throughout: nothing decays, nothing may drift."""
    n = 65_536
    q, k, v = draw(n, h=1, dk=dk, dv=dv, b=1)
    gates = unit_gates(1, n, 1, real=real)
    exact = ops.gate_loop(q, k, v, gates)
    actual = ops.gate_loop(q.float(), k.float(), v.float(),
                           gates.to(torch.float32 if real else torch.complex64))
    assert actual.isfinite().all()
    assert distance(actual.double(), exact) < 2e-4


@pytest.mark.parametrize("size", [0.99, 0.999, 1.0])
@pytest.mark.parametrize("dk, dv", HEADS)
def test_gradients_across_blocks_where_little_decays(dk, dv, size):
    """Gates so close to 1 that a gradient reaches over every block edge."""
    n = 200
    inputs = [t.requires_grad_() for t in (*draw(n, dk=dk, dv=dv, b=1),
                                           unit_gates(1, n, 3, size=size))]
    weight = torch.randn(1, n, 3, dv, dtype=F64)
    weight[:, :150] = 0
    for actual, expected in zip(*(torch.autograd.grad((f(*inputs) * weight).sum(), inputs)
                                 for f in (ops.gate_loop, reference.gate_loop))):
        assert largest(expected) > 0
        assert distance(actual, expected) < 1e-11


def test_logits_and_gates_agree():
    q, k, v = draw(90)
    logits = 5 * torch.randn(2, 90, 3, 2, dtype=F64)
    gates = torch.view_as_complex(logits)
    gates = gates.abs().sigmoid() * torch.exp(1j * gates.angle())
    assert distance(ops.gate_loop(q, k, v, gate_logits=logits),
                    ops.gate_loop(q, k, v, gates)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_logits(dtype):
    """Tiny and huge logits keep their direction; 0 is a half, without a gradient."""
    tiny, huge = torch.finfo(dtype).tiny, torch.finfo(dtype).max / 4
    logits = torch.tensor([[0, 0], [tiny, 0], [0, -tiny], [tiny, tiny], [huge, huge], [-huge, 0],
                           [0.0, huge], [tiny / 1024, 0]], dtype=dtype)
    expected = torch.tensor([0.5, 0.5, -0.5j, 0.5**0.5 * (0.5 + 0.5j), 0.5**0.5 * (1 + 1j), -1,
                             1j, 0.5], dtype=torch.complex128).to(complex_dtype(dtype))
    one = torch.ones(len(logits), 1, 1, 1, dtype=dtype)
    logits = logits[:, None, None].requires_grad_()
    state = torch.ones(len(logits), 1, 1, 1, dtype=expected.dtype)
    out, state = ops.gate_loop(one, 0 * one, one, gate_logits=logits, initial_state=state,
                               return_state=True)
    assert distance(state.flatten(), expected) < 8 * torch.finfo(dtype).eps
    (grad,) = torch.autograd.grad(state.real.sum() + state.imag.sum(), logits)
    assert not grad.isnan().any()
    assert largest(grad[0]) == 0


INF, NAN = float("inf"), float("nan")
# Logits, and their gates at every precision that holds the logits.
FAR_LOGITS = [((INF, 0.0), 1), ((-INF, 0.0), -1), ((0.0, INF), 1j), ((0.0, -INF), -1j),
              ((INF, 5.0), 1), ((-3e38, INF), 1j), ((INF, 3e38), 1), ((1e-38, -INF), -1j),
              ((INF, INF), 0.5**0.5 * (1 + 1j)), ((-INF, INF), 0.5**0.5 * (-1 + 1j)),
              ((3e38, 3e38), 0.5**0.5 * (1 + 1j)), ((-3e38, 1e38), (-3 + 1j) / 10**0.5),
              ((1e38, 0.0), 1), ((1e38, 1e-38), 1), ((0.0, -1e38), -1j), ((1e-38, 0.0), 0.5),
              ((-1e-38, 1e-38), 0.5**0.5 * (-0.5 + 0.5j)), ((6e4, -6e4), 0.5**0.5 * (1 - 1j))]


@pytest.mark.parametrize("implementation", ["reference", *implementations("gate_loop")])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(1, 1), (2, 3)])
def test_infinite_and_far_logits(dtype, implementation, heads):
    """A direction for every logit; derivatives are finite there, and 0 at infinity."""
    logits = torch.tensor([z for z, _ in FAR_LOGITS], dtype=F64)
    far = logits.to(dtype)
    # What the dtype has no room for has become another logit, with a gate of its own.
    kept = torch.isclose(far.double(), logits, rtol=1e-7, atol=0).all(-1)
    expected = torch.where(kept, torch.tensor([a for _, a in FAR_LOGITS], dtype=torch.complex128),
                           reference.gate_from_logits(far.double()))
    rows = len(far)
    q, k, v = (t.expand(rows, 3, 1, -1) for t in (
        torch.ones(heads[0], dtype=dtype), torch.zeros(heads[0], dtype=dtype),
        torch.ones(heads[1], dtype=dtype)))
    state = torch.ones(rows, 1, *heads, dtype=complex_dtype(dtype))
    logits = torch.stack([torch.tensor([1e9, 0]).to(dtype).expand(rows, 2), far,
                          torch.tensor([0, 1e9]).to(dtype).expand(rows, 2)], 1)[:, :, None]
    logits = logits.clone().requires_grad_()
    run = reference.gate_loop if implementation == "reference" else ops.gate_loop
    with contextlib.nullcontext() if implementation == "reference" else fastmix.force(
            implementation):
        _, last = run(q, k, v, gate_logits=logits, initial_state=state, return_state=True)
        assert ((last - 1j * expected[:, None, None, None]).abs()
                < 8 * torch.finfo(last.dtype).eps).all()
        loss = last.real.sum() + 2 * last.imag.sum()
        for graph in (False, True):
            (grad,) = torch.autograd.grad(loss, logits, retain_graph=True, create_graph=graph)
            assert grad.isfinite().all()
            assert largest(grad[far.isinf().any(-1), 1]) == 0
        (second,) = torch.autograd.grad(grad[:, 1].sum(), logits)
        assert largest(second[far.isinf().any(-1)]) == 0


@pytest.mark.parametrize("implementation", implementations("gate_loop"))
@pytest.mark.parametrize("z", [(NAN, 0.0), (0.0, NAN), (NAN, INF), (INF, NAN), (NAN, NAN)])
def test_a_logit_that_is_not_a_number_gives_none(z, implementation):
    one = torch.ones(1, 3, 1, 1)
    logits = torch.ones(1, 3, 1, 2)
    logits[0, 1, 0] = torch.tensor(z)
    with fastmix.force(implementation):
        out = ops.gate_loop(one, one, one, gate_logits=logits).flatten()
    assert out[0] == 1 and out[1:].isnan().all()


@pytest.mark.parametrize("implementation", implementations("gate_loop"))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_of_small_logits(dtype, implementation):
    """Also where a graph is made of them: along an axis, asked along it, the slope is σ'(|z|)."""
    size = 10 ** torch.linspace(-30 if dtype == torch.float32 else -140, 0, 60, dtype=F64)
    along = torch.tensor([1, 1j, -1, -1j], dtype=torch.complex128)[torch.randint(4, (60,))]
    weights = torch.randn(60, 1, 1, dtype=F64)
    expected = along[:, None, None] * weights * (size.sigmoid() * (-size).sigmoid())[:, None, None]
    one = torch.ones(60, 1, 1, 1, dtype=dtype)
    weights = (along.conj()[:, None, None] * weights).to(complex_dtype(dtype))[..., None]

    def weighed(z):
        out = ops.gate_loop(one, one, one, gate_logits=z, initial_state=torch.ones_like(weights),
                            return_state=True)[1]
        return (out * weights).real.sum()

    z = torch.view_as_real(size * along).to(dtype)[:, None, None].requires_grad_()
    with fastmix.force(implementation):
        actual = [torch.autograd.grad(weighed(z), z, create_graph=graph)[0]
                 for graph in (False, True)]
        actual.append(torch.func.grad(weighed)(z))
    for grad in actual:
        error = (torch.view_as_complex(grad.double()) - expected).abs() / expected.abs()
        assert error.max() < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("implementation", implementations("gate_loop"))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("heads", [(1, 1), (2, 3)])
def test_parts_of_a_gradient_end_one_by_one(dtype, implementation, heads):
    """Across a small logit z it is ½ i u w / |z|, for a gate's of i u w along i u, u = z / |z|: a
    part in range is right where the length, or the other part, leaves it."""
    info = torch.finfo(dtype)
    limit = 2 / info.tiny  # |z|, in its ratio to the direction, and how far beyond 2 limit i u w is
    cases = [(info.tiny / 16, (0.75, -0.5), 0.575), (info.tiny / 16, (-0.5, 0.75), -0.575),
             (info.tiny / 16, (2.0**-6, 1.0), 16.0), (info.tiny / 16, (1.0, 2.0**-6), -16.0),
             (info.tiny**0.25, (1.0, -(2.0**-20)), 1024.0)]
    z = torch.tensor([[scale * part for part in u] for scale, u, _ in cases], dtype=dtype)
    u = torch.tensor([u for _, u, _ in cases], dtype=F64)
    length = u.norm(dim=-1, keepdim=True)
    turned = torch.stack([-u[:, 1], u[:, 0]], -1) / length
    beyond = torch.tensor([b for _, _, b in cases], dtype=F64)[:, None]
    scale = torch.tensor([scale for scale, _, _ in cases], dtype=F64)[:, None]
    weights = turned * (4 * beyond * length * (limit * scale))  # = 2 |z| · beyond · 2 limit
    expected = 2 * turned * beyond  # in units of limit
    rows = len(cases)
    q, k, v = (torch.ones(rows, 1, 1, size, dtype=dtype) for size in (heads[0], *heads))
    state = torch.zeros(rows, 1, *heads, dtype=complex_dtype(dtype))
    state[..., 0, 0] = 1
    weights = torch.view_as_complex(weights).to(state.dtype)[:, None]

    def weighed(z):
        out = ops.gate_loop(q, 0 * k, v, gate_logits=z, initial_state=state, return_state=True)[1]
        return (out[..., 0, 0] * weights.conj()).real.sum()

    z = z[:, None, None].requires_grad_()
    with fastmix.force(implementation):
        grads = [torch.autograd.grad(weighed(z), z, create_graph=graph)[0]
                 for graph in (False, True)]
        grads.append(torch.func.grad(weighed)(z))
    held = expected.abs() < 2
    for grad in grads:
        parts = grad.detach()[:, 0, 0].double() / limit
        error = (parts - expected).abs() / expected.abs()
        assert error[held].max() < 16 * info.eps
        assert (parts == expected.sgn())[:-1][~held[:-1]].all()


@pytest.mark.parametrize("dk, dv", HEADS)
def test_segments_joined_by_their_states_make_the_whole(dk, dv):
    q, k, v = draw(150, dk=dk, dv=dv)
    logits = torch.randn(2, 150, 3, 2, dtype=F64)
    whole, last = ops.gate_loop(q, k, v, gate_logits=logits, return_state=True)
    state, pieces = None, []
    for start, stop in ((0, 1), (1, 64), (64, 131), (131, 150)):
        at = slice(start, stop)
        piece, state = ops.gate_loop(q[:, at], k[:, at], v[:, at], gate_logits=logits[:, at],
                                     initial_state=state, return_state=True)
        pieces.append(piece)
    assert distance(torch.cat(pieces, 1), whole) < 1e-13
    assert distance(state, last) < 1e-13


def test_state_dtypes():
    for dtype in (F64, torch.float32, torch.bfloat16, torch.float16):
        q, k, v = draw(5, dtype=dtype)
        out, state = ops.gate_loop(q, k, v, gate_logits=torch.randn(2, 5, 3, 2, dtype=dtype),
                                   return_state=True)
        assert (out.dtype, state.dtype) == (dtype, complex_dtype(dtype))


def test_slices_of_one_projection():
    """q, k, v as a model makes them: strided views of one tensor."""
    qkv = torch.randn(2, 80, 3 * 12, dtype=F64)
    q, k, v = (t.unflatten(-1, (4, 3)) for t in qkv.chunk(3, dim=-1))
    logits = torch.randn(2, 80, 8, dtype=F64).unflatten(-1, (4, 2))
    assert torch.equal(ops.gate_loop(q, k, v, gate_logits=logits),
                       ops.gate_loop(q.contiguous(), k.contiguous(), v.contiguous(),
                                     gate_logits=logits))


def test_autocast_promotes_what_it_mixed():
    q, k, v = draw(20, dtype=torch.float32)
    logits = torch.randn(2, 20, 3, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.gate_loop(q, k.bfloat16(), v.bfloat16(), gate_logits=logits.bfloat16())
    assert out.dtype == torch.float32
    expected = ops.gate_loop(q, k.bfloat16().float(), v.bfloat16().float(),
                             gate_logits=logits.bfloat16().float())
    assert torch.equal(out, expected)


# ---- real gates


@pytest.mark.parametrize("implementation", implementations("gate_loop"))
@pytest.mark.parametrize("dk, dv, n", [*((*d, 150) for d in HEADS), (24, 20, 150), (64, 64, 531)])
def test_real_gates_are_complex_ones_without_an_imaginary_part(dk, dv, n, implementation):
    """Outputs, states and every gradient, past every block edge; one gate resets, half turn."""
    q, k, v = draw(n, dk=dk, dv=dv)
    gates, state = random_decays(2, n, 3, dtype=F64), torch.randn(2, 3, dk, dv, dtype=F64)
    gates[:, 70] = 0
    weights = torch.randn(2, n, 3, dv, dtype=F64), torch.randn(2, 3, dk, dv, dtype=F64)
    results = []
    with fastmix.force(implementation):
        for kind in (torch.float64, torch.complex128):
            inputs = [t.clone().requires_grad_() for t in (q, k, v, gates, state)]
            out, last = ops.gate_loop(*inputs[:3], inputs[3].to(kind),
                                      initial_state=inputs[4].to(kind), return_state=True)
            assert last.dtype == kind
            loss = (out * weights[0]).sum() + (last.real * weights[1]).sum()
            results.append([out, last.real, *torch.autograd.grad(loss, inputs)])
    for real, complex_ in zip(*results):
        assert distance(real, complex_) < 1e-12


@pytest.mark.parametrize("dk, dv", HEADS)
def test_decays_hold_at_every_step_and_have_one_gradient(dk, dv):
    q, k, v = draw(80, dk=dk, dv=dv)
    for decays in (random_decays(3, dtype=F64), unit_gates(3, size=0.9)):
        decays.requires_grad_()
        every = decays.detach().expand(2, 80, 3).contiguous().requires_grad_()
        out, expected = (ops.gate_loop(q, k, v, gates) for gates in (decays, every))
        assert torch.equal(out, expected)
        (grad,), (of_each,) = (torch.autograd.grad(o.square().sum(), gates)
                               for o, gates in ((out, decays), (expected, every)))
        assert grad.shape == (3,) and distance(grad, of_each.sum((0, 1))) < 1e-13


def test_decays_are_not_copied_for_every_step(monkeypatch):
    """Nor are their gradients rounded before they are summed."""
    seen = []
    run = OPERATORS["gate_loop"].forward
    monkeypatch.setattr(OPERATORS["gate_loop"], "forward",
                        lambda *args: seen.append(args[3]) or run(*args))
    q, k, v = draw(20, dtype=torch.bfloat16)
    ops.gate_loop(q, k, v, torch.rand(3).bfloat16())
    (gates,) = seen
    assert gates.untyped_storage().nbytes() == 3 * 4 and gates.dtype == torch.float32


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
def test_real_logits_and_their_states(dtype):
    """σ(z), in the dtype of q or float32; the state is real, float32 at least, and so are
    carries."""
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = draw(40, dtype=dtype)
    z = 3 * torch.randn(2, 40, 3).to(dtype)
    for logits in (z, z.to(wide)):
        out, state = ops.gate_loop(q, k, v, gate_logits=logits, return_state=True)
        assert (out.dtype, state.dtype) == (dtype, wide)
        for gates in (z.to(wide).sigmoid(), z.to(wide).sigmoid().to(dtype)):
            close = ops.gate_loop(q, k, v, gates)
            exact = gates.dtype == wide
            assert torch.equal(out, close) if exact else distance(out, close) < 0.1
    gates = z.to(wide).sigmoid()
    carries = torch.ops.fastmix.gate_loop(q, k, v, gates, None, None, 64)[2]
    assert (carries.dtype, carries.shape) == (wide, (2, 2, 3, 2, 3))


@pytest.mark.parametrize("implementation", implementations("gate_loop"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dk, dv", [(1, 1), (24, 20)])
def test_float32_gates_beside_half_precision(dk, dv, dtype, implementation):
    """Values and gradients, those of gates in float32."""
    def errors():
        q, k, v = draw(70, dk=dk, dv=dv, dtype=dtype)
        tensors = {"q": q, "k": k, "v": v, "gates": random_decays(2, 70, 3, dtype=torch.float32)}
        weight, compared = torch.randn_like(v), []
        for run, kind in ((ops.gate_loop, None), (reference.gate_loop, torch.float32),
                          (reference.gate_loop, F64)):
            grad_leaves = leaves({name: t.to(kind or t.dtype) for name, t in tensors.items()})
            out = run(**grad_leaves)
            compared.append([out.detach(), *torch.autograd.grad(out, grad_leaves.values(),
                                                                weight.to(out.dtype))])
        assert [t.dtype for t in compared[0]] == [*[dtype] * 4, torch.float32]
        return squared_errors(*compared)

    with fastmix.force(implementation):
        check_errors(errors)


@pytest.mark.parametrize("implementation", ["reference", *implementations("gate_loop")])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(1, 1), (2, 3)])
def test_infinite_and_far_real_logits(dtype, implementation, heads):
    """Derivatives there are 0, of any order, and a NaN stays one."""
    z = torch.tensor([INF, -INF, 1e38, -1e38, 6e4, -6e4, 0.0, NAN], dtype=dtype)
    expected = torch.tensor([1, 0, 1, 0, 1, 0, 0.5, NAN], dtype=dtype)
    q = torch.ones(8, 2, 1, heads[0], dtype=dtype)
    v = torch.ones(8, 2, 1, heads[1], dtype=dtype)
    logits = torch.stack([torch.full_like(z, 9), z], 1)[..., None].requires_grad_()
    state = torch.ones(8, 1, *heads, dtype=torch.promote_types(dtype, torch.float32))
    run = reference.gate_loop if implementation == "reference" else ops.gate_loop
    with contextlib.nullcontext() if implementation == "reference" else fastmix.force(
            implementation):
        _, last = run(q, 0 * q, v, gate_logits=logits, initial_state=state, return_state=True)
        first = logits[:, 0, :, None, None].sigmoid()
        torch.testing.assert_close(last, (first * expected[:, None, None, None]).expand_as(last),
                                   rtol=4 * torch.finfo(dtype).eps, atol=0, equal_nan=True,
                                   check_dtype=False)
        (plain,) = torch.autograd.grad(last.sum(), logits, retain_graph=True)
        (grad,) = torch.autograd.grad(last.sum(), logits, create_graph=True)
        (second,) = torch.autograd.grad(grad[:, 1].sum(), logits)
    for result in (plain, grad, second):
        assert result[:7].isfinite().all() and result[7, 1].isnan()
        assert largest(result[:6, 1]) == 0
    assert (plain[6, 1] != 0).all()


def test_autocast_promotes_real_gates():
    q, k, v = draw(20, dtype=torch.float32)
    gates = torch.rand(2, 20, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.gate_loop(q, k, v, gates.bfloat16())
        constant = ops.gate_loop(q.bfloat16(), k.bfloat16(), v.bfloat16(), gates[0, 0].double())
    assert torch.equal(out, ops.gate_loop(q, k, v, gates.bfloat16().float()))
    assert constant.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gates", "gate_logits"])
def test_a_state_of_the_other_kind_goes_on_as_its_refusal_says(name, dtype):
    q, k, v = draw(5, dtype=dtype)
    real = {name: torch.rand(2, 5, 3).to(dtype)}
    state = torch.randn(2, 3, 2, 3, dtype=complex_dtype(dtype))

    def advised(given, state):
        with pytest.raises(TypeError, match="initial_state must be") as refused:
            ops.gate_loop(q, k, v, **given, initial_state=state)
        return eval(str(refused.value).split()[-1].removeprefix("gates="),
                    {"torch": torch, "initial_state": state, **given})

    turning = advised(real, state)
    expected = reference.gate_loop(q.to(F64), k.to(F64), v.to(F64), turning.to(torch.complex128),
                                   initial_state=state.to(torch.complex128))
    actual = ops.gate_loop(q, k, v, turning, initial_state=state)
    assert distance(actual.to(F64), expected) < 4 * torch.finfo(dtype).eps
    same = advised({"gates": turning}, state.real)
    assert same.dtype == state.dtype and torch.equal(same.real, state.real)


def refusals():
    q, k, v = draw(7, dtype=torch.float32)
    z, a = torch.randn(2, 7, 3, 2), torch.randn(2, 7, 3, dtype=torch.complex64)
    s = torch.randn(2, 3, 2, 3, dtype=torch.complex64)
    return {
        "neither": ((q, k, v), {}, ValueError, "exactly one of gates and gate_logits.*neither"),
        "both": ((q, k, v, a), {"gate_logits": z}, ValueError, "exactly one.*both"),
        "q rank": ((q[0], k, v, a), {}, ValueError,
                   r"q must have shape \(b, n, h, dk\), got \(7, 3, 2\)"),
        "k length": ((q, k[:, 1:], v, a), {}, ValueError,
                     r"k must have shape \(b, n, h, dk\) = \(2, 7, 3, 2\), got \(2, 6, 3, 2\)"),
        "v heads": ((q, k, v[:, :, 1:], a), {}, ValueError,
                    r"v must have shape.*got \(2, 7, 2, 3\)"),
        "gates shape": ((q, k, v, a[..., None]), {}, ValueError,
                        r"gates must have shape \(b, n, h\)"),
        "logits shape": ((q, k, v), {"gate_logits": z[..., :1]}, ValueError,
                         r"gate_logits must have shape \(b, n, h, 2\) = .*got \(2, 7, 3, 1\)"),
        "state shape": ((q, k, v, a), {"initial_state": s.mT}, ValueError,
                        "initial_state must have shape"),
        "integer gates": ((q, k, v, a.real.long()), {}, TypeError,
                          "gates must be complex64 or float32, got int64"),
        "wide real gates": ((q, k, v, a.real.double()), {}, TypeError,
                            "gates must be float32 for float32 q, got float64"),
        "decays of another length": ((q, k, v, torch.ones(7)), {}, ValueError,
                                     r"gates must have shape \(b, n, h\) = \(2, 7, 3\), or "
                                     r"\(h,\) = \(3,\) .*got \(7,\): give one number per head"),
        "flat logits": ((q, k, v), {"gate_logits": z.flatten(2)}, ValueError,
                        r"gate_logits must .*\(2, 7, 3, 2\), or \(b, n, h\) for real gates, got "
                        r"\(2, 7, 6\): gate_logits.unflatten\(-1, \(h, 2\)\)"),
        "real logits beside gates": ((q, k, v, a), {"gate_logits": z[..., 0]}, ValueError,
                                     r"exactly one .*both: logits of three axes are real gates .*"
                                     r"gates \* gate_logits.sigmoid\(\)"),
        "complex state beside real gates": (
            (q, k, v, a.real), {"initial_state": s}, TypeError,
            r"initial_state must be float32 beside real gates, got complex64: .*"
            r"give gates=gates.to\(torch.complex64\)"),
        "complex state beside real logits": (
            (q, k, v), {"gate_logits": z[..., 0], "initial_state": s}, TypeError,
            "initial_state must be float32 beside real gates, got complex64: .*give "
            r"gates=gate_logits.sigmoid\(\).to\(torch.complex64\)"),
        "channels without heads": ((q.flatten(2), k, v, a), {}, ValueError,
                                   r"q must .*got \(2, 7, 6\): q.unflatten\(-1, \(h, dk\)\)"),
        "heads before time": ((q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), a),
                              {}, ValueError, r"q, k and v must .*transpose\(1, 2\) q, k and v"),
        "complex logits": ((q, k, v), {"gate_logits": z.to(torch.complex64)}, TypeError,
                           "gate_logits must be float64 or float32.*got complex64: give "
                           "complex gates as gates, and complex logits as torch.view_as_real"),
        "complex q": ((q.to(torch.complex64), k, v, a), {}, TypeError, "q must be.*got complex64"),
        "integer v": ((q, k, v.long(), a), {}, TypeError, "v must be.*got int64"),
        "mixed dtypes": ((q, k.double(), v, a), {}, TypeError,
                         r"k must be float32 like q, got float64: convert it, by \.to\("),
        "wide gates": ((q, k, v, a.to(torch.complex128)), {}, TypeError, "gates must be complex64"),
        "real state": ((q, k, v, a), {"initial_state": s.real}, TypeError,
                       "initial_state must be complex64 beside complex gates, got float32: give "
                       r"initial_state.to\(torch.complex64\)"),
        "no steps": ((q[:, :0], k[:, :0], v[:, :0], a[:, :0]), {}, ValueError,
                     "q must have at least one time step"),
        "a list": ((q.tolist(), k, v, a), {}, TypeError, "q must be a tensor, got list"),
        "devices": ((q, k.to("meta"), v, a), {}, ValueError, "k must be on cpu like q, got meta"),
        "gates' device": ((q, k, v, a.to("meta")), {}, ValueError, "gates must be on cpu like q"),
        "logits' device": ((q, k, v), {"gate_logits": z.to("meta")}, ValueError,
                           "gate_logits must be on cpu like q"),
        "state's device": ((q, k, v, a), {"initial_state": s.to("meta")}, ValueError,
                           "initial_state must be on cpu like q"),
        "no channels": ((q[..., :0], k[..., :0], v, a), {}, ValueError,
                        r"q must have sizes of at least 1, got \(2, 7, 3, 0\)"),
        "no values": ((q, k, v[..., :0], a), {}, ValueError, "v must have sizes of at least 1"),
    }


@pytest.mark.parametrize("name", refusals())
@both_ways
def test_refuses(name, way):
    check_refusal(way, ops.gate_loop, *refusals()[name])
