"""linear_scan's Triton kernels against the definition; interpreted where there is no GPU."""

import pytest
import torch

import fastmix
from cases import (
    CASES,
    check_errors,
    distance,
    leaves,
    random_gates,
    squared_errors,
    unwritten_is_nan,
    weigh,
)
from fastmix import ops, reference
from fastmix._triton import linear_scan as kernels
from fastmix.fallback import linear_scan as fallback

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F64 = torch.float64
NAMES = [name for name in CASES if name.startswith("linear_scan")]


def on_device(tensors):
    return {k: t.to(DEVICE) for k, t in tensors.items()}


def gradients(run, tensors, weights=None):
    outputs = run(tensors)
    weights = weights or [torch.randn_like(o) for o in outputs]
    return outputs, torch.autograd.grad(weigh(outputs, weights), tensors.values()), weights


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [1, 65, 131])
def test_definition(cut, name, n):
    tensors = leaves(on_device(CASES[name].make(n, F64, 1)))
    with fastmix.force("triton"):
        outputs, grads, weights = gradients(CASES[name].run, tensors)
    defined, defined_grads, _ = gradients(CASES[name].define, tensors, weights)
    for actual, expected in zip((*outputs, *grads), (*defined, *defined_grads), strict=True):
        assert distance(actual, expected) < 1e-11


def check(gates, inputs, initial_state=None, **options):
    """Compares values and gradients in float64; gates broadcast over trailing axes."""
    tensors = {"gates": gates, "inputs": inputs, "initial_state": initial_state}
    tensors = leaves({name: t.to(DEVICE) for name, t in tensors.items() if t is not None})
    with fastmix.force("triton"):
        outputs, grads, weights = gradients(
            lambda t: [ops.linear_scan(**t, **options)], tensors)
    defined, defined_grads, _ = gradients(
        lambda t: [reference.linear_scan(**t, **options)], tensors, weights)
    for actual, expected in zip((*outputs, *grads), (*defined, *defined_grads), strict=True):
        assert distance(actual, expected) < 1e-11


@pytest.mark.parametrize("reverse", [False, True])
def test_real_gates_of_complex_inputs(reverse):
    gates = torch.rand(1, 70, 3, dtype=F64)
    inputs, state = torch.randn(1, 71, 3, 2, dtype=torch.complex128).split([70, 1], dim=1)
    check(gates, inputs, state[:, 0], reverse=reverse)


@pytest.mark.parametrize("shape", [(1, 20, 2, 3, 2), (1, 20, 2, 3, 2, 2), (1, 20, 2, 1, 1, 1)])
def test_six_axes(shape):
    check(random_gates(*shape, dtype=F64), torch.randn(1, 20, 2, 3, 2, 2, dtype=F64),
          torch.randn(1, 2, 3, 2, 2, dtype=torch.complex128))


def forward_and_backward(inputs, gates):
    """Returns the kernels' own results in float64, and the definition's."""
    ours = {"gates": gates.detach().requires_grad_(), "inputs": inputs.detach().requires_grad_()}
    with fastmix.force("triton"):
        outputs, grads, weights = gradients(lambda t: [ops.linear_scan(**t)], ours)
    defined, defined_grads, _ = gradients(
        lambda t: [reference.linear_scan(t["gates"].expand(inputs.shape), t["inputs"])],
        ours, weights)
    for actual, expected in zip((*outputs, *grads), (*defined, *defined_grads), strict=True):
        assert distance(actual, expected) < 1e-11


# Axes after n that lie in memory as two, or one.
LAID_OUT = {
    "heads last": lambda: torch.rand(1, 20, 2, 3, 4, dtype=F64).permute(0, 1, 4, 2, 3),
    "a slice of channels": lambda: torch.rand(1, 20, 2, 3, 8, dtype=F64)[..., :4],
    "a slice of heads": lambda: torch.rand(1, 20, 5, 3, 4, dtype=F64)[:, :, 1:3],
    "axes of size 1 between": lambda: torch.rand(1, 20, 2, 1, 3, 1, dtype=F64).expand(
        1, 20, 2, 1, 3, 1).transpose(2, 4),
}


@pytest.mark.parametrize("gates", ["as inputs", "a gate for the first axis", "contiguous"])
@pytest.mark.parametrize("layout", LAID_OUT)
def test_five_axes_and_more_are_read_where_they_are(layout, gates, monkeypatch):
    inputs, a = (LAID_OUT[layout]().to(DEVICE) for _ in range(2))
    if gates == "contiguous":
        a = a.contiguous()
    elif gates != "as inputs":
        a = torch.rand(1, 20, inputs.shape[2], *(1,) * (inputs.ndim - 3), dtype=F64, device=DEVICE)
    views, where = kernels._heads_and_channels, []

    def noted(*tensors):
        made = views(*tensors)
        where.extend((t.data_ptr(), view.data_ptr())
                     for t, view in zip(tensors[:2], made[:2], strict=True))
        return made

    monkeypatch.setattr(kernels, "_heads_and_channels", noted)
    forward_and_backward(inputs, a)
    assert len(where) == 4
    # Gates that lie otherwise are copied, and those that a slice of channels keeps apart.
    kept = where if gates == "as inputs" else where[1::2]
    assert all(before == after for before, after in kept)


def test_gates_between_broadcast_axes():
    """Gates and inputs together lie as three axes: the gates are copied, the inputs are not."""
    forward_and_backward(torch.rand(1, 20, 2, 3, 4, dtype=F64, device=DEVICE),
                         torch.rand(1, 20, 2, 1, 4, dtype=F64, device=DEVICE))


def test_inputs_of_three_axes_that_are_apart_are_refused():
    inputs = torch.rand(1, 20, 4, 6, 8, device=DEVICE)[:, :, ::2, ::2, ::2]
    with fastmix.force("triton"), pytest.raises(
            RuntimeError, match=r"more than two axes after n, .*; pass inputs.contiguous\(\)"):
        ops.linear_scan(torch.rand_like(inputs), inputs)
    assert kernels.why_not(inputs, inputs.contiguous(), None, False, 64) is None


def test_gates_that_hardly_fade():
    """Gates are in [0.99, 1]: what all of 200 steps leave is still there."""
    gates = 1 - torch.rand(1, 200, 3, dtype=F64) / 100
    check(gates, torch.randn(1, 200, 3, dtype=F64))
    turning = torch.polar(gates, 6.3 * torch.rand_like(gates))
    check(turning, torch.randn(1, 200, 3, dtype=torch.complex128), reverse=True)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 40), (1, 40, 2), (1, 40, 2, 1), (1, 40, 1, 4), (1, 40, 2, 4)])
def test_gates_broadcast_over_trailing_axes(shape, reverse):
    gates = random_gates(*shape, dtype=F64).to(DEVICE).requires_grad_()
    inputs = torch.randn(1, 40, 2, 4, dtype=F64, device=DEVICE)
    full = gates.reshape(*shape, *(1,) * (4 - len(shape))).expand(inputs.shape)
    with fastmix.force("triton"):
        actual = ops.linear_scan(gates, inputs, reverse=reverse)
        weight = torch.randn_like(actual)
        (grad,) = torch.autograd.grad(weigh([actual], [weight]), gates)
    expected = reference.linear_scan(full, inputs, reverse=reverse)
    assert distance(actual, expected) < 1e-12
    (defined,) = torch.autograd.grad(weigh([expected], [weight]), gates)
    assert distance(grad, defined) < 1e-11


@pytest.mark.parametrize("reverse", [False, True])
def test_carries_are_the_fallbacks(cut, reverse):
    gates, inputs = torch.rand(2, 1, 150, 3, dtype=F64, device=DEVICE)
    args = gates, inputs, None, reverse, 64
    for actual, expected in zip(kernels.forward(*args), fallback.forward(*args), strict=True):
        assert distance(actual, expected) < 1e-12


def test_resets_unit_gates_and_strides(cut):
    """Gates are 0 and 1, arguments slices of one projection, and a gradient one number."""
    both = torch.rand(1, 150, 3, 2, dtype=F64, device=DEVICE)
    both[:, :, 1, 0] = 1
    both[:, 70, 2, 0] = 0
    both[:, :70, 2, 1] *= 1e200
    gates, inputs = (t.detach().requires_grad_() for t in both.unbind(-1))
    with fastmix.force("triton"):
        actual = ops.linear_scan(gates, inputs)
        grads = torch.autograd.grad(actual[..., :2].sum(), (gates, inputs))
    expected = reference.linear_scan(gates, inputs)
    defined = torch.autograd.grad(expected[..., :2].sum(), (gates, inputs))
    assert distance(actual[..., :2], expected[..., :2]) < 1e-12
    assert distance(actual[:, 70:], expected[:, 70:]) < 1e-12
    for g, d in zip(grads, defined):
        assert distance(g[..., :2], d[..., :2]) < 1e-11


def check_rounding(dtype, lengths, draws=(3, 12, 48), **options):
    """Errors are at most twice those of the definition in float32, rounded to the dtype."""
    def errors(n):
        t = {k: v.to(dtype)
             for k, v in on_device(CASES["linear_scan"].make(n, torch.float32)).items()}
        with fastmix.force("triton"):
            ours, grads, weights = gradients(
                lambda t: [ops.linear_scan(**t, **options)], leaves(t))
        plain, exact = (
            gradients(lambda t: [reference.linear_scan(**t, **options)],
                      leaves({k: v.to(wide) for k, v in t.items()}),
                      [w.to(wide) for w in weights])[:2] for wide in (torch.float32, F64))
        return squared_errors(*([*outputs, *grads] for outputs, grads in (
            (ours, grads), plain, exact)), floor=0)

    check_errors(lambda: sum(errors(n) for n in lengths), draws)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding(dtype):
    check_rounding(dtype, [131])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_around_the_edges_of_chunks_and_tiles(dtype):
    check_rounding(dtype, [65, 257], (1, 4, 16))


def test_rounding_in_reverse():
    """Steps beyond the end come first there, and must hand the initial state on."""
    check_rounding(torch.bfloat16, [65], reverse=True)


def test_unwritten_memory_and_empty_batches():
    case = CASES["linear_scan"]
    tensors = leaves(on_device(case.make(77, F64, 1)))
    with fastmix.force("triton"):
        outputs, grads, weights = gradients(case.run, tensors)
        with unwritten_is_nan():
            poisoned, poisoned_grads, _ = gradients(case.run, tensors, weights)
        for p, o in zip((*poisoned, *poisoned_grads), (*outputs, *grads)):
            assert torch.equal(p, o)
        tensors = leaves(on_device(case.make(20, F64, 0)))
        _, grads, _ = gradients(case.run, tensors)
    for g, t in zip(grads, tensors.values()):
        assert g.shape == t.shape and (g == 0).all()
