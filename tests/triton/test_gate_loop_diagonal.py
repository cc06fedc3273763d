"""gate_loop with head dim 1 in Triton: against the definition in float64."""

import importlib

import pytest
import torch

import fastmix
from cases import (
    complex_dtype,
    distance,
    leaves,
    random_decays,
    random_gates,
    unwritten_is_nan,
    weigh,
)
from fastmix import ops, reference

F64 = torch.float64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


ROUNDING = [(torch.float32, 3e-6, 3e-6), (torch.bfloat16, 2e-2, 2e-2),
            (torch.float16, 2e-3, 2e-3)]


@pytest.fixture
def chunks(monkeypatch):
    """What one program does in a row, many do at once: 64 steps each."""
    cut_into(64, monkeypatch)


def cut_into(length, monkeypatch):
    kernels = importlib.import_module("fastmix._triton.gate_loop_diagonal")
    monkeypatch.setattr(kernels, "_chunks", lambda programs, n, dtype: (length, -(-n // length)))


def draw(n, dtype=F64, b=1, h=1, logits=True, state=True):
    made = {name: torch.randn(b, n, h, 1, dtype=F64) for name in "qkv"}
    if logits:  # not near 0, where the gradient has a pole
        z = torch.polar(0.3 + 3 * torch.rand(b, n, h, dtype=F64),
                        6.3 * torch.rand(b, n, h, dtype=F64))
        made["gate_logits"] = torch.view_as_real(z)
    else:
        made["gates"] = random_gates(b, n, h, dtype=F64)
    if state:
        made["initial_state"] = torch.randn(b, h, 1, 1, dtype=torch.complex128)
    return {name: t.to(DEVICE, complex_dtype(dtype) if t.is_complex() else dtype)
            for name, t in made.items()}


def run(tensors):
    with fastmix.force("triton"):
        return ops.gate_loop(**tensors, return_state=True)


def gradients(function, tensors, weights):
    outputs = function(tensors)
    return outputs, torch.autograd.grad(weigh(outputs, weights), tensors.values())


def define(tensors):
    return reference.gate_loop(**tensors, return_state=True)


def check(tensors, value=1e-12, gradient=1e-11):
    tensors = {name: t.detach().requires_grad_() for name, t in tensors.items()}  # same strides
    exact = leaves({name: t.to(torch.complex128 if t.is_complex() else F64)
                    for name, t in tensors.items()})
    weights = [torch.randn_like(o) for o in run(tensors)]
    wide = [w.to(torch.complex128 if w.is_complex() else F64) for w in weights]
    outputs, grads = gradients(run, tensors, weights)
    defined, defined_grads = gradients(define, exact, wide)
    for o, d in zip(outputs, defined, strict=True):
        assert distance(o.to(d.dtype), d) < value
    for name, g, d in zip(tensors, grads, defined_grads, strict=True):
        assert g.isfinite().all()
        assert distance(g.to(d.dtype), d) < gradient, name


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 63, 64, 65, 131])
def test_around_every_edge(n):
    check(draw(n, logits=n % 2 == 1, state=n != 64))


@pytest.mark.parametrize("dtype, value, gradient", ROUNDING)
@pytest.mark.parametrize("logits", [True, False])
def test_dtypes(dtype, value, gradient, logits):
    check(draw(37, dtype, h=2, logits=logits), value, gradient)


def draw_real(n, dtype=F64, b=1, h=1, gates="gates"):
    """gates: "gates" (b, n, h), "logits" (b, n, h) or "decays" (h,)."""
    tensors = draw(n, dtype, b, h, logits=False)
    wide = torch.promote_types(dtype, torch.float32)
    tensors["initial_state"] = torch.randn(b, h, 1, 1, dtype=wide, device=DEVICE)
    made = {"gates": lambda: random_decays(b, n, h, dtype=dtype),
            "decays": lambda: random_decays(h, dtype=dtype),
            "logits": lambda: 3 * torch.randn(b, n, h, dtype=F64).to(dtype)}[gates]()
    del tensors["gates"]
    return tensors | {"gate_logits" if gates == "logits" else "gates": made.to(DEVICE)}


@pytest.mark.long
@pytest.mark.parametrize("n, gates", [(1, "gates"), (9, "decays"), (65, "logits"), (67, "gates")])
def test_real_gates(n, gates):
    check(draw_real(n, h=2, gates=gates))


@pytest.mark.long
@pytest.mark.parametrize("dtype, value, gradient", ROUNDING)
def test_real_gates_in(dtype, value, gradient):
    check(draw_real(37, dtype, h=2), value, gradient)


@pytest.mark.long
def test_real_gates_in_chunks_of_time(chunks):
    check(draw_real(131))
    tensors = draw_real(65)
    del tensors["initial_state"]
    check(tensors)


def test_real_gates_of_zero_reset_exactly_and_strides_are_read():
    tensors = draw_real(70, torch.float32, h=2)
    tensors["gates"][:, 0] = 0.5  # else what was drawn may reset before
    tensors["gates"][:, 40] = 0
    a, state = run(tensors)
    other = {name: torch.stack([t, t + 1], dim=-1)[..., 0] for name, t in tensors.items()}
    other["initial_state"] = other["initial_state"] + 5
    assert not any(other[name].is_contiguous() for name in ("q", "gates"))
    b, other_state = run(other)
    assert torch.equal(a[:, 40:], b[:, 40:]) and torch.equal(state, other_state)
    assert not torch.equal(a[:, :40], b[:, :40])


@pytest.mark.parametrize("kind", [draw, pytest.param(draw_real, marks=pytest.mark.long)])
def test_more_channels_than_a_tile_holds(kind):
    check(kind(5, h=17, b=2))


def test_slices_of_one_projection_and_split_logits():
    n, h = 20, 2
    qkv = torch.randn(1, n, 3 * h, dtype=F64, device=DEVICE)
    q, k, v = (t.unflatten(-1, (h, 1)) for t in qkv.chunk(3, dim=-1))
    halves = torch.randn(1, n, 2, h, dtype=F64, device=DEVICE).transpose(2, 3)
    given = {"q": q, "k": k, "v": v, "gate_logits": halves}
    for dtype in (F64, torch.float32):
        cast = {name: t.to(dtype) for name, t in given.items()}
        assert cast["gate_logits"].stride(-1) != 1
        dense = {name: t.contiguous() for name, t in cast.items()}
        for o, e in zip(run(cast), run(dense)):
            assert torch.equal(o, e)


@pytest.mark.parametrize("kind", [
    "logits", "gates", pytest.param("real", marks=pytest.mark.long)])
@pytest.mark.parametrize("dtype, value, gradient", [(F64, 1e-12, 1e-11), *ROUNDING[:2]])
def test_gradients_of_slices_of_one_projection(dtype, value, gradient, kind):
    """Gates and states are every second number of wider tensors."""
    tensors = (draw_real(67, dtype, b=2, h=3) if kind == "real" else
               draw(67, dtype, b=2, h=3, logits=kind == "logits"))
    projection = torch.cat([tensors[name] for name in "qkv"], dim=2)
    tensors.update(zip("qkv", projection.chunk(3, dim=2)))
    for name in tensors.keys() - set("qkv"):
        tensors[name] = torch.stack([tensors[name], tensors[name] + 1], dim=-1)[..., 0]
    assert not any(t.is_contiguous() for t in tensors.values())
    check(tensors, value, gradient)


def test_time_strides_whose_tiles_leave_32_bits():
    """They are slices of a tensor of more than 2^31 numbers, hardly a page of which is touched."""
    dtype, value, gradient = next(r for r in ROUNDING if r[0] == torch.bfloat16)
    tensors, far = draw(66, dtype, state=False), 1 << 25
    base = torch.empty(66 * far, dtype=dtype, device=DEVICE)
    for at, name in enumerate(("q", "k", "v", "gate_logits")):
        x = tensors[name]
        tensors[name] = base.as_strided(x.shape, (1, far, 1, 1), 2 * at).copy_(x)
    check(tensors, value, gradient)


@pytest.mark.parametrize("dtype, value, gradient", ROUNDING[1:])
def test_split_logits_in_half_precision(dtype, value, gradient):
    tensors = draw(37, dtype, h=2)
    split = tensors["gate_logits"].transpose(2, 3).contiguous().transpose(2, 3)
    check({**tensors, "gate_logits": split}, value, gradient)
    wide = torch.cat([split[..., 1:], tensors["gate_logits"]], dim=-1)  # side by side, not aligned
    check({**tensors, "gate_logits": wide[..., 1:]}, value, gradient)


@pytest.mark.parametrize("logits", [True, False])
def test_gates_that_hardly_fade(logits):
    """Gates have sizes in [0.99, 1]: what all of 260 steps leave is still there."""
    tensors = draw(260, logits=logits)
    size, angle = torch.rand(2, 1, 260, 1, dtype=F64, device=DEVICE)
    if logits:
        z = torch.polar(4.6 + 5 * size, 6.3 * angle)
        tensors["gate_logits"] = torch.view_as_real(z)
    else:
        tensors["gates"] = torch.polar(1 - size / 100, 6.3 * angle)
    check(tensors)
    check({name: t.to(torch.complex64 if t.is_complex() else torch.float32)
           for name, t in tensors.items()}, 1e-5, 1e-5)


def test_reset_and_unit_gates():
    """A gate of 0 forgets even what is infinite in later gradients; of size 1, nothing."""
    tensors = draw(70, logits=False)
    tensors["gates"] = torch.polar(torch.ones(1, 70, 1, dtype=F64),
                                   6.3 * torch.rand(1, 70, 1, dtype=F64)).to(DEVICE)
    check(tensors)
    tensors["gates"][:, 40] = 0
    check(tensors)
    other = {**tensors, "initial_state": tensors["initial_state"] + 5}
    (a, _), (b, _) = run(tensors), run(other)
    assert torch.equal(a[:, 40:], b[:, 40:]) and not torch.equal(a[:, :40], b[:, :40])


def test_logits_at_zero():
    tensors = draw(9)
    tensors["gate_logits"][:, 3:5] = 0
    check(tensors)
    grad_leaves = leaves(tensors)
    grad = torch.autograd.grad(run(grad_leaves)[0].sum(), grad_leaves["gate_logits"])[0]
    assert (grad[:, 3:5] == 0).all() and (grad[:, 5:] != 0).all()


def test_chunks_of_time(chunks):
    check(draw(131))
    check(draw(129, logits=False, state=False))


def test_chunks_whose_rows_are_several_times_what_is_loaded_at_once(monkeypatch):
    cut_into(192, monkeypatch)
    check(draw(410))


@pytest.mark.parametrize("dtype, value, gradient", ROUNDING[:2])
@pytest.mark.parametrize("logits", [True, False])
def test_chunks_of_time_in(chunks, dtype, value, gradient, logits):
    check(draw(131, dtype, logits=logits), value, gradient)


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("schedule", ["one walk", "chunks"])
def test_expanded_gradient_and_unwritten_memory(schedule, logits, request):
    """Two runs give equal bits."""
    if schedule == "chunks":
        request.getfixturevalue("chunks")
    tensors = leaves(draw(66, logits=logits))

    def both():
        out, _ = run(tensors)
        return out.detach(), *torch.autograd.grad(out.sum(), tensors.values())

    with unwritten_is_nan():
        actual = both()
    out, _ = define(tensors)
    expected = out, *torch.autograd.grad(out.sum(), tensors.values())
    for f, again, e in zip(actual, both(), expected, strict=True):
        assert torch.equal(f, again) and distance(f, e) < 1e-11


def test_empty_batch():
    tensors = leaves(draw(5, b=0))
    outputs, grads = gradients(run, tensors, run(tensors))
    assert [tuple(o.shape) for o in outputs] == [(0, 5, 1, 1), (0, 1, 1, 1)]
    assert all(g.shape == t.shape for g, t in zip(grads, tensors.values()))
