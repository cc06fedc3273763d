"""gate_loop for heads in Triton: values and gradients against the definition in float64."""

import pytest
import torch

import fastmix
from cases import (
    check_errors,
    complex_dtype,
    distance,
    leaves,
    random_decays,
    random_gates,
    squared_errors,
    state_dtype,
    unwritten_is_nan,
    weigh,
)
from fastmix import reference
from fastmix._triton import gate_loop, gate_loop_heads, target

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F64 = torch.float64


def draw(n, dk, dv, logits, state, b=1, h=2):
    """Draws float64 arguments, away from the pole of the logits' gradient."""
    made = {"q": torch.randn(b, n, h, dk, dtype=F64), "k": torch.randn(b, n, h, dk, dtype=F64),
            "v": torch.randn(b, n, h, dv, dtype=F64)}
    if logits:
        z = torch.polar(0.3 + 3 * torch.rand(b, n, h, dtype=F64),
                        6.3 * torch.rand(b, n, h, dtype=F64))
        made["gate_logits"] = torch.view_as_real(z)
    else:
        made["gates"] = random_gates(b, n, h, dtype=F64)
    if state:
        made["initial_state"] = torch.randn(b, h, dk, dv, dtype=torch.complex128)
    return made


def draw_real(n, dk, dv, gates, state, b=1, h=2):
    """gates: "gates" (b, n, h), "logits" (b, n, h) or "decays" (h,)."""
    made = draw(n, dk, dv, False, state, b, h)
    del made["gates"]
    if gates == "logits":
        made["gate_logits"] = 3 * torch.randn(b, n, h, dtype=F64)
    else:
        made["gates"] = random_decays(*(b, n, h) if gates == "gates" else (h,), dtype=F64)
    if state:
        made["initial_state"] = made["initial_state"].real.clone()
    return made


def in_dtype(tensors, dtype, logits=None):
    """Rounds to dtype, complex numbers and states to float32 or float64, logits to their own."""
    return {name: t.to(complex_dtype(dtype) if t.is_complex() else
                       logits or dtype if name == "gate_logits" else dtype)
            for name, t in tensors.items()}


def kernels(tensors, weights=None):
    """Returns outputs and gradients of the kernels, back on the CPU."""
    grad_leaves = leaves({name: t.to(DEVICE) for name, t in tensors.items()})
    with fastmix.force("triton"):
        outputs = fastmix.ops.gate_loop(**grad_leaves, return_state=True)
        if weights is None:
            return [o.detach().cpu() for o in outputs]
        grads = torch.autograd.grad(
            weigh(outputs, [w.to(DEVICE) for w in weights]), grad_leaves.values())
    return [o.detach().cpu() for o in (*outputs, *grads)]


def defined(tensors, weights):
    grad_leaves = leaves(tensors)
    outputs = reference.gate_loop(**grad_leaves, return_state=True)
    return [o.detach() for o in (*outputs, *torch.autograd.grad(weigh(outputs, weights),
                                                               grad_leaves.values()))]


def weights_for(tensors, dtype, real=False):
    (b, n, h, dk), dv = tensors["q"].shape, tensors["v"].shape[-1]
    state = state_dtype(dtype) if real else complex_dtype(dtype)
    return [torch.randn(b, n, h, dv, dtype=dtype), torch.randn(b, h, dk, dv, dtype=state)]


@pytest.mark.parametrize("n, dk, dv, logits, state", [
    (2, 1, 5, True, False), (15, 16, 17, False, True), (16, 7, 1, True, True),
    (17, 4, 16, False, False), *(pytest.param(*others, marks=pytest.mark.long) for others in (
        (1, 3, 2, False, True), (35, 17, 20, True, True), (50, 2, 3, False, True)))])
def test_definition_in_float64(n, dk, dv, logits, state):
    tensors = draw(n, dk, dv, logits, state, b=2 if n < 16 else 1)
    weights = weights_for(tensors, F64)
    for actual, expected in zip(kernels(tensors, weights), defined(tensors, weights), strict=True):
        assert distance(actual, expected) < 1e-12


@pytest.mark.long
@pytest.mark.parametrize("n, dk, dv, gates, state", [
    (1, 3, 2, "gates", True), (18, 17, 3, "gates", True), (17, 2, 3, "decays", False),
    (16, 4, 1, "logits", True)])
def test_definition_of_real_gates_in_float64(n, dk, dv, gates, state):
    tensors = draw_real(n, dk, dv, gates, state)
    weights = weights_for(tensors, F64, real=True)
    for actual, expected in zip(kernels(tensors, weights), defined(tensors, weights), strict=True):
        assert actual.dtype == expected.dtype and distance(actual, expected) < 1e-12


@pytest.mark.long
@pytest.mark.parametrize("dtype, gates, bound", [
    (torch.bfloat16, torch.bfloat16, 2e-2), (torch.float16, torch.float16, 2e-3),
    (torch.float32, torch.float32, 2e-6), (torch.bfloat16, torch.float32, 2e-2)])
def test_real_gates_in(dtype, gates, bound):
    """The gradients of gates are rounded to their dtype. Heads have one block, or two."""
    tensors = draw_real(67, 20, 36, "gates", True, h=1)
    kinds = {"initial_state": state_dtype(dtype), "gates": gates}
    tensors = {name: t.to(kinds.get(name, dtype)) for name, t in tensors.items()}
    weights = weights_for(tensors, dtype, real=True)
    exact = defined({name: t.to(F64) for name, t in tensors.items()}, [w.to(F64) for w in weights])
    actual = kernels(tensors, weights)
    assert [t.dtype for t in actual[1:]] == [t.dtype for t in (weights[1], *tensors.values())]
    for a, e in zip(actual, exact, strict=True):
        assert distance(a.to(F64), e) < bound


@pytest.mark.long
def test_a_real_gate_of_zero_resets_exactly_and_decays_are_not_copied():
    tensors = in_dtype(draw_real(34, 4, 4, "gates", True, h=1), torch.float32)
    tensors["gates"] = tensors["gates"].clamp(min=0.1)  # else what was drawn may reset before
    tensors["gates"][:, 20] = 0
    other = {**tensors, "initial_state": 1e9 * tensors["initial_state"]}
    (a, state), (b, other_state) = kernels(tensors), kernels(other)
    assert torch.equal(a[:, 20:], b[:, 20:]) and torch.equal(state, other_state)
    assert not torch.equal(a[:, :20], b[:, :20])
    decay = torch.tensor([-0.9])
    expanded = {**tensors, "gates": decay.expand(1, 34, 1).contiguous()}
    for one, all_steps in zip(kernels({**tensors, "gates": decay}), kernels(expanded), strict=True):
        assert torch.equal(one, all_steps)


def check_rounding(dtype, logits, edge):
    """Errors are at most twice the definition's, over lengths around a chunk's edge."""
    def errors(n, dk, dv):
        tensors = in_dtype(draw(n, dk, dv, logits is not None, True, h=1), dtype, logits)
        weights = weights_for(tensors, dtype)
        plain, exact = (defined(in_dtype(tensors, d), [
            w.to(complex_dtype(d) if w.is_complex() else d) for w in weights])
                        for d in (torch.float32, F64))
        return squared_errors(kernels(tensors, weights), plain, exact)

    # Heads of one block and of two.
    check_errors(lambda: errors(edge - 1, 20, 36) + errors(edge, 8, 3)
                 + errors(edge + 1, edge + 2, 6), (1, 4, 16))


@pytest.mark.parametrize("dtype, logits", [
    (torch.float32, None), (torch.float32, torch.float32), (torch.float16, torch.float16),
    (torch.bfloat16, None), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_rounding_is_at_most_twice_the_definitions(dtype, logits):
    check_rounding(dtype, logits, 32 if dtype == torch.float32 else 64)


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.long)])
def test_definition_of_heads_of_many_blocks(real):
    tensors = (draw_real(17, 80, 68, "gates", True, h=1) if real else
               draw(17, 80, 68, True, True, h=1))
    weights = weights_for(tensors, F64, real)
    for actual, expected in zip(kernels(tensors, weights), defined(tensors, weights), strict=True):
        assert distance(actual, expected) < 1e-12


def test_rounding_of_the_largest_heads():
    def errors():
        tensors = in_dtype(draw(65, 256, 256, True, True, h=1), torch.bfloat16)
        weights = weights_for(tensors, torch.bfloat16)
        plain, exact = (defined(in_dtype(tensors, d), in_dtype(
            dict(enumerate(weights)), d).values()) for d in (torch.float32, F64))
        return squared_errors(kernels(tensors, weights), plain, exact)

    check_errors(errors, (1, 3))


@pytest.mark.parametrize("logits", [True, False])
def test_gates_that_hardly_fade(logits):
    """Gates have sizes in [0.99, 1]: what all of 130 steps leave is still there."""
    made = draw(130, 3, 2, logits, True, h=1)
    size, angle = torch.rand(2, 1, 130, 1, dtype=F64)
    if logits:
        made["gate_logits"] = torch.view_as_real(torch.polar(4.6 + 5 * size, 6.3 * angle))
    else:
        made["gates"] = torch.polar(1 - size / 100, 6.3 * angle)
    for dtype, bound in ((F64, 1e-12), (torch.float32, 1e-5)):
        tensors = in_dtype(made, dtype)
        weights = weights_for(tensors, dtype)
        exact = defined(in_dtype(tensors, F64), in_dtype(dict(enumerate(weights)), F64).values())
        for actual, e in zip(kernels(tensors, weights), exact, strict=True):
            assert distance(actual.to(e.dtype), e) < bound


@pytest.mark.skipif(DEVICE == "cuda", reason="for the interpreter: a GPU runs what is its own")
@pytest.mark.parametrize("family, edge", [("sm80", 32), ("sm90", 64)])
@pytest.mark.parametrize("dtype, logits", [
    (torch.bfloat16, torch.bfloat16), (torch.float16, None)])
def test_rounding_with_the_chunks_and_parts_of(family, edge, dtype, logits, monkeypatch):
    """CUDA 8.0 has chunks of 32 steps of 16-bit data, 9.0 the weights of 64 steps in parts."""
    monkeypatch.setattr(target, "family", lambda: family)
    check_rounding(dtype, logits, edge)


@pytest.mark.skipif(DEVICE == "cuda", reason="for the interpreter: a GPU runs what is its own")
@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.long)])
def test_definition_with_weights_in_parts(real, monkeypatch):
    """On a GPU only 16-bit data has such parts: here float64 has, to be compared exactly."""
    monkeypatch.setattr(target, "family", lambda: "sm90")
    monkeypatch.setattr(gate_loop_heads, "LAUNCH", target.Table(
        *gate_loop_heads.LAUNCH.rows,
        target.Row("*", "*", "float64", "*", dict(C=64, BK=64, BV=32), "for this test")))
    tensors = draw_real(67, 5, 3, "gates", True) if real else draw(67, 5, 3, True, True)
    assert gate_loop_heads._chunk(tensors["q"], tensors["v"]) == 64
    weights = weights_for(tensors, F64, real)
    for actual, expected in zip(kernels(tensors, weights), defined(tensors, weights), strict=True):
        assert distance(actual, expected) < 1e-12


@pytest.mark.parametrize("n, dk, dv, logits, state", [
    (15, 16, 17, False, True), (35, 17, 20, True, True)])
def test_gradients_without_transposed_products(n, dk, dv, logits, state, monkeypatch):
    """They are for Hopper and for versions of Triton that make wrong code of the others."""
    seen, options = [], gate_loop_heads._options

    def unturned(kernel, *args):
        seen.append(kernel)
        return options(kernel, *args) | (dict(UNTURNED=True) if kernel == "_gradients" else {})

    tensors = draw(n, dk, dv, logits, state)
    weights = weights_for(tensors, F64)
    turned = kernels(tensors, weights)
    monkeypatch.setattr(gate_loop_heads, "_options", unturned)
    for actual, expected in zip(kernels(tensors, weights), turned, strict=True):
        assert distance(actual, expected) < 1e-14
    assert "_gradients" in seen


@pytest.mark.parametrize("arch, version, breaks", [
    (90, "3.6.0", True), (90, "3.7.0", True), (90, "3.7.1", False), (90, "3.9.0", False),
    (90, "3.10.0", False), (80, "3.6.0", False), (100, "3.6.0", False), (0, "3.6.0", False)])
def test_versions_of_triton_whose_transposed_products_are_wrong(arch, version, breaks, monkeypatch):
    monkeypatch.setattr(gate_loop_heads, "arch", lambda: arch)
    monkeypatch.setattr(gate_loop_heads.triton, "__version__", version)
    assert gate_loop_heads._breaks_transposed() == breaks


@pytest.mark.parametrize("n, dtype, real", [
    (70, torch.bfloat16, False), (17, F64, False),
    pytest.param(70, torch.bfloat16, True, marks=pytest.mark.long)])
def test_strides_are_read_and_buffers_filled(n, dtype, real):
    """Arguments are slices of one projection or turned, gradients expanded, fresh memory is NaN."""
    b, h, d = 2, 2, 6
    made = in_dtype(draw_real(n, d, d, "gates", True, b=b, h=h) if real else
                    draw(n, d, d, False, True, b=b, h=h), dtype)
    made["initial_state"] = made["initial_state"].to(
        (state_dtype if real else complex_dtype)(dtype))
    weights = weights_for(made, dtype, real)
    weights = [weights[0][:, :, :, :1].expand(b, n, h, d), weights[1].mT.contiguous().mT]
    expected = kernels(made, [w.contiguous() for w in weights])
    projection = torch.cat([made[name].flatten(2) for name in "qkv"], dim=-1).to(DEVICE)
    strided = dict(zip("qkv", (t.unflatten(-1, (h, d)) for t in projection.chunk(3, dim=-1))),
                   gates=made["gates"].to(DEVICE).permute(2, 1, 0).contiguous().permute(2, 1, 0),
                   initial_state=made["initial_state"].to(DEVICE).mT.contiguous().mT)
    grad_leaves = {name: strided[name].detach().requires_grad_() for name in made}
    assert not any(t.is_contiguous() for t in grad_leaves.values())
    with unwritten_is_nan():
        with fastmix.force("triton"):
            outputs = fastmix.ops.gate_loop(**grad_leaves, return_state=True)
            grads = torch.autograd.grad(
                outputs, grad_leaves.values(), [w.to(DEVICE) for w in weights])
    for actual, e in zip((*outputs, *grads), expected, strict=True):
        assert torch.equal(actual.detach().cpu(), e)


def test_gates_of_zero_reset_exactly_and_of_size_one_keep():
    """What came before a gate of 0 leaves no trace; 200 turns keep the size of the state."""
    n, d = 200, 4
    made = in_dtype(draw(n, d, d, False, True, b=1, h=1), torch.float32)
    size_one = torch.polar(torch.ones(1, n, 1, dtype=F64), 6.3 * torch.rand(1, n, 1, dtype=F64))
    made["gates"] = size_one.to(torch.complex64)
    weights = weights_for(made, torch.float32)
    exact = defined(in_dtype(made, F64), in_dtype(dict(enumerate(weights)), F64).values())
    for actual, e in zip(kernels(made, weights), exact, strict=True):
        assert distance(actual.to(e.dtype), e) < 2e-6
    reset = 101
    made["gates"][:, reset] = 0
    other = {name: t.clone() for name, t in made.items()}
    for name in "qkv":
        other[name][:, :reset] *= 1e3
    other["initial_state"] *= 1e9
    (out, state), (other_out, other_state) = kernels(made), kernels(other)
    assert torch.equal(out[:, reset:], other_out[:, reset:]) and torch.equal(state, other_state)


def test_gradients_through_gates_of_zero():
    """Gates are zeros and ones: where products of all others are asked for."""
    made = draw(40, 3, 2, False, True)
    made["gates"] = torch.rand(1, 40, 2).lt(0.8).to(torch.complex128)
    weights = weights_for(made, F64)
    for actual, expected in zip(kernels(made, weights), defined(made, weights), strict=True):
        assert distance(actual, expected) < 1e-12


def test_carries_are_the_states_before_every_64th_step():
    for dtype, bound in ((torch.bfloat16, 1e-6), (torch.float32, 1e-6), (F64, 1e-13)):
        made = in_dtype(draw(130, 3, 2, False, False, h=1), dtype)
        moved = [made[name].to(DEVICE) for name in ("q", "k", "v", "gates")]
        with fastmix.force("triton"):
            out, state, carries = torch.ops.fastmix.gate_loop(*moved, None, None, 64)
            plain_out, _, none = torch.ops.fastmix.gate_loop(*moved, None, None, 0)
        assert carries.shape == (1, 4, 1, 3, 2) and none.shape == (1, 0, 1, 3, 2)
        assert torch.equal(out, plain_out) and torch.equal(carries[:, -1], state)
        for i in range(3):
            before = {name: t[:, : 64 * i] for name, t in in_dtype(made, F64).items()}
            expected = (reference.gate_loop(**before, return_state=True)[1] if i
                        else torch.zeros(1, 1, 3, 2, dtype=torch.complex128))
            assert distance(carries[:, i].cpu().to(torch.complex128), expected) < bound


def test_empty_batch():
    made = draw(20, 3, 2, False, True, b=1)
    empty = {name: t[:0] for name, t in made.items()}
    weights = [w[:0] for w in weights_for(made, F64)]
    for actual, like in zip(kernels(empty, weights), kernels(made, weights_for(made, F64))):
        assert actual.shape == (0, *like.shape[1:]) and actual.dtype == like.dtype


def test_float64_is_refused_where_triton_cannot_compile_it(monkeypatch):
    monkeypatch.setattr(gate_loop, "is_amd", lambda: True)
    tensors = draw(5, 2, 2, True, False)
    with pytest.raises(RuntimeError, match="no products of float64 for AMD GPUs"):
        kernels(tensors)
    kernels(in_dtype(tensors, torch.float32))
    kernels(draw(5, 1, 1, True, False))
