"""gate_loop's own: gates at the edge, states handed over, both ways of giving gates, refusals."""

import pytest
import torch
from cases import complex_dtype, distance, implementations, largest
from refusal import check_refusal

import fastmix
from fastmix import ops, reference

F64 = torch.float64


def draw(n=50, h=3, dk=2, dv=3, dtype=F64, b=2):
    q, k = torch.randn(2, b, n, h, dk, dtype=dtype)
    return q, k, torch.randn(b, n, h, dv, dtype=dtype)


def unit_gates(*shape, size=1.0):
    angle = 6.3 * torch.rand(*shape, dtype=F64)
    return torch.polar(torch.full_like(angle, size), angle)


HEADS = [(1, 1), (2, 3), (16, 16), (1, 5)]


@pytest.mark.parametrize("dk, dv", HEADS)
def test_gate_of_zero_forgets_exactly(dk, dv):
    """What came before a reset leaves no trace, however large."""
    q, k, v = draw(200, dk=dk, dv=dv)
    gates = unit_gates(2, 200, 3)
    gates[:, 77] = 0
    v[:, :77] *= 1e200
    out = ops.gate_loop(q, k, v, gates)
    assert largest(out[:, :77]) > 1e199
    late = ops.gate_loop(q[:, 77:], k[:, 77:], v[:, 77:], gates[:, 77:])
    assert distance(out[:, 77:], late) < 1e-13


@pytest.mark.parametrize("dk, dv", HEADS)
def test_all_gates_zero_keep_only_the_present(dk, dv):
    q, k, v = draw(130, dk=dk, dv=dv)
    out = ops.gate_loop(q, k, v, torch.zeros(2, 130, 3, dtype=torch.complex128))
    assert distance(out, (q * k).sum(-1, keepdim=True) * v) < 1e-13


@pytest.mark.parametrize("dk, dv", HEADS)
def test_gates_of_one_are_plain_linear_attention(dk, dv):
    q, k, v = draw(130, dk=dk, dv=dv)
    out = ops.gate_loop(q, k, v, torch.ones(2, 130, 3, dtype=torch.complex128))
    scores = torch.einsum("bihd,bjhd->bhij", q, k).tril()
    assert distance(out, torch.einsum("bhij,bjhd->bihd", scores, v)) < 1e-12


@pytest.mark.parametrize("dk, dv", [(1, 1), (4, 4)])
def test_unit_gates_stay_accurate_over_65536_steps(dk, dv):
    """float32, abs a = 1 throughout: nothing decays, nothing may drift."""
    n = 65_536
    q, k, v = draw(n, h=1, dk=dk, dv=dv, b=1)
    gates = unit_gates(1, n, 1)
    exact = ops.gate_loop(q, k, v, gates)
    found = ops.gate_loop(q.float(), k.float(), v.float(), gates.to(torch.complex64))
    assert found.isfinite().all()
    assert distance(found.double(), exact) < 2e-4


@pytest.mark.parametrize("size", [0.99, 0.999, 1.0])
@pytest.mark.parametrize("dk, dv", HEADS)
def test_gradients_across_blocks_where_little_decays(dk, dv, size):
    """Gates so close to 1 that a gradient reaches over every block edge."""
    n = 200
    inputs = [t.requires_grad_() for t in (*draw(n, dk=dk, dv=dv, b=1),
                                           unit_gates(1, n, 3, size=size))]
    weight = torch.randn(1, n, 3, dv, dtype=F64)
    weight[:, :150] = 0
    for found, expected in zip(*(torch.autograd.grad((f(*inputs) * weight).sum(), inputs)
                                 for f in (ops.gate_loop, reference.gate_loop))):
        assert largest(expected) > 0
        assert distance(found, expected) < 1e-11


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
        found = [torch.autograd.grad(weighed(z), z, create_graph=graph)[0]
                 for graph in (False, True)]
        found.append(torch.func.grad(weighed)(z))
    for grad in found:
        error = (torch.view_as_complex(grad.double()) - expected).abs() / expected.abs()
        assert error.max() < 16 * torch.finfo(dtype).eps


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


def refusals():
    q, k, v = draw(7, dtype=torch.float32)
    z, a = torch.randn(2, 7, 3, 2), torch.randn(2, 7, 3, dtype=torch.complex64)
    s = torch.randn(2, 3, 2, 3, dtype=torch.complex64)
    return {
        "neither": ((q, k, v), {}, ValueError, "exactly one of gates and gate_logits.*neither"),
        "both": ((q, k, v, a), {"gate_logits": z}, ValueError, "exactly one.*both"),
        "q rank": ((q[0], k, v, a), {}, ValueError, r"q must have shape \(b, n, h, dk\), got \(7, 3, 2\)"),
        "k length": ((q, k[:, 1:], v, a), {}, ValueError,
                     r"k must have shape \(b, n, h, dk\) = \(2, 7, 3, 2\), got \(2, 6, 3, 2\)"),
        "v heads": ((q, k, v[:, :, 1:], a), {}, ValueError, r"v must have shape.*got \(2, 7, 2, 3\)"),
        "gates shape": ((q, k, v, a[..., None]), {}, ValueError, r"gates must have shape \(b, n, h\)"),
        "logits shape": ((q, k, v), {"gate_logits": z[..., :1]}, ValueError,
                         r"gate_logits must have shape \(b, n, h, 2\) = .*got \(2, 7, 3, 1\)"),
        "state shape": ((q, k, v, a), {"initial_state": s.mT}, ValueError, "initial_state must have shape"),
        "real gates": ((q, k, v, a.real), {}, TypeError, "gates must be complex64, got float32"),
        "complex logits": ((q, k, v), {"gate_logits": z.to(torch.complex64)}, TypeError,
                           "gate_logits must be float64 or float32.*got complex64"),
        "complex q": ((q.to(torch.complex64), k, v, a), {}, TypeError, "q must be.*got complex64"),
        "integer v": ((q, k, v.long(), a), {}, TypeError, "v must be.*got int64"),
        "mixed dtypes": ((q, k.double(), v, a), {}, TypeError, "k must be float32 like q, got float64"),
        "wide gates": ((q, k, v, a.to(torch.complex128)), {}, TypeError, "gates must be complex64"),
        "real state": ((q, k, v, a), {"initial_state": s.real}, TypeError, "initial_state must be complex64"),
        "no steps": ((q[:, :0], k[:, :0], v[:, :0], a[:, :0]), {}, ValueError, "q must have at least one time step"),
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
def test_refuses(name):
    check_refusal(ops.gate_loop, *refusals()[name])
