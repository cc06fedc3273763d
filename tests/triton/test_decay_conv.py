"""decay_conv's Triton kernels against the definition; interpreted where there is no GPU."""

import pytest
import torch

import fastmix
from cases import CASES, check_errors, distance, leaves, squared_errors, unwritten_is_nan, weigh
from fastmix import ops, reference
from fastmix._triton import decay_conv as kernels
from fastmix.fallback import decay_conv as fallback

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F64 = torch.float64


@pytest.fixture
def cut(cut, monkeypatch):
    """Tiles have 16 steps here, so that short sequences have many."""
    monkeypatch.setattr(kernels, "tile", lambda channels, batch, dtype, tile_bytes: dict(
        RUNS=4, COLS=16, ROWS=4, num_warps=1))


def drawn(name, n, dtype=F64, b=2):
    return {k: t.to(DEVICE) for k, t in CASES[name].make(n, dtype, b).items()}


def gradients(run, tensors, weights=None):
    outputs = run(tensors)
    weights = weights or [torch.randn_like(o) for o in outputs]
    return outputs, torch.autograd.grad(weigh(outputs, weights), tensors.values()), weights


def check(name, tensors):
    case = CASES[name]
    tensors = leaves(tensors)
    with fastmix.force("triton"):
        outputs, grads, weights = gradients(case.run, tensors)
    defined, defined_grads, _ = gradients(case.define, tensors, weights)
    for actual, expected in zip((*outputs, *grads), (*defined, *defined_grads), strict=True):
        assert distance(actual, expected) < 1e-11


@pytest.mark.parametrize("name", ["decay_conv", "decay_conv-plain"])
@pytest.mark.parametrize("n", [1, 4, 17, 65])
def test_definition(cut, name, n):
    check(name, drawn(name, n))


def test_definition_with_the_real_tiles():
    check("decay_conv", drawn("decay_conv", 140, b=1))


def drawn_wide(n, dtype):
    """As drawn, for the tiles of a GPU that channels alone fill: a block of 128 and a rest."""
    assert kernels.tile(160, 1, dtype, 128)["COLS"] == 128
    t = drawn("decay_conv", n, dtype, 1)
    return t | {"x": torch.randn(1, n, 8, 20, dtype=dtype, device=DEVICE),
                "initial_state": torch.randn(1, 8, 20, dtype=dtype, device=DEVICE)}


@pytest.mark.parametrize("n", [16, 17])
def test_definition_with_wide_tiles(filled, n):
    check("decay_conv", drawn_wide(n, F64))


def test_decays_at_and_beyond_the_edge(cut):
    """0 keeps the present, 1 sums, -1 alternates, 1.01 grows, a denormal does nothing."""
    decay = torch.tensor([0.0, 1.0, -1.0, 1.01, 5e-324, 0.999], dtype=F64, device=DEVICE,
                         requires_grad=True)
    x = torch.randn(2, 150, 6, 3, dtype=F64, device=DEVICE)
    weight = torch.randn_like(x)
    with fastmix.force("triton"):
        out = ops.decay_conv(x, decay)
        (actual,) = torch.autograd.grad((out * weight).sum(), decay)
    assert torch.equal(out[:, :, 0], x[:, :, 0])
    expected = reference.decay_conv(x, decay)
    assert distance(out, expected) < 1e-12
    (expected,) = torch.autograd.grad((expected * weight).sum(), decay)
    assert ((actual - expected).abs() <= 1e-11 * expected.abs()).all()


def test_carries_are_the_fallbacks(cut):
    t = drawn("decay_conv", 150)
    args = *t.values(), 64
    for actual, expected in zip(kernels.forward(*args), fallback.forward(*args), strict=True):
        assert distance(actual, expected) < 1e-12


def test_strides_and_expanded_gradients(cut):
    """Arguments are heads of a wider projection, axes transposed, and a gradient one number."""
    t = drawn("decay_conv", 40)
    b, n, h, d = t["x"].shape
    wide = torch.randn(b, n, h, 3 * d, dtype=F64, device=DEVICE)
    wide[..., d : 2 * d] = t["x"]
    for x in (wide[..., d : 2 * d], t["x"].permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1)):
        assert not x.is_contiguous()
        with fastmix.force("triton"):
            actual = ops.decay_conv(**t | {"x": x})
            x = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(ops.decay_conv(**t | {"x": x}).sum(), x)
        assert distance(actual, reference.decay_conv(**t)) < 1e-12
        (expected,) = torch.autograd.grad(reference.decay_conv(**t | {"x": x}).sum(), x)
        assert distance(grad, expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding(cut, dtype):
    """Errors are at most twice those of the definition in float32, rounded to the dtype."""
    check_rounding(dtype, lambda: drawn("decay_conv", 131, torch.float32, b=1))


def test_rounding_with_wide_tiles(filled):
    check_rounding(torch.bfloat16, lambda: drawn_wide(70, torch.float32),
                   (1, 4, 16, 64))


def check_rounding(dtype, make, draws=(3, 12, 48, 192)):
    def draw():
        t = {k: v.to(dtype if k != "initial_state" else torch.float32)
             for k, v in make().items()}
        with fastmix.force("triton"):
            ours, grads, weights = gradients(CASES["decay_conv"].run, leaves(t))
        plain, exact = (
            gradients(CASES["decay_conv"].define, leaves({k: v.to(wide) for k, v in t.items()}),
                      [w.to(wide) for w in weights])[:2] for wide in (torch.float32, F64))
        return squared_errors(*([*outputs, *grads[:3]] for outputs, grads in (
            (ours, grads), plain, exact)), floor=0)

    check_errors(draw, draws)


def test_slow_decay_keeps_its_accuracy():
    """The decay is 0.9999 over 1,500 steps in float32: the error of a power used again and again
    adds up. There are many channels, since plain PyTorch's error of one may happen to be small.
    """
    decay = torch.tensor([0.9999], device=DEVICE)
    x = 1 + torch.rand(1, 1500, 1, 64, device=DEVICE)
    with fastmix.force("triton"):
        actual = ops.decay_conv(x, decay)
    exact = reference.decay_conv(x.double(), decay.double())
    plain = reference.decay_conv(x, decay)
    assert (actual - exact).square().mean() <= 4 * (plain - exact).square().mean()


def test_decays_that_hardly_fade():
    """Decays are in [0.99, 1]: what all of 200 steps leave is still there."""
    t = drawn("decay_conv", 200, b=1)
    t["decay"] = 1 - torch.rand(8, dtype=F64, device=DEVICE) / 100
    check("decay_conv", t)


def test_nothing_before_an_infinity_changes(cut):
    t = drawn("decay_conv", 50)
    with fastmix.force("triton"):
        expected = ops.decay_conv(**t)
        t["x"][0, 30] = torch.inf
        actual = ops.decay_conv(**t)
    assert torch.equal(actual[:, :30], expected[:, :30]) and torch.equal(actual[1], expected[1])
    assert not actual[0, 30:].isfinite().any()


def test_unwritten_memory_never_shows(cut):
    case, tensors = CASES["decay_conv"], leaves(drawn("decay_conv", 77))
    with fastmix.force("triton"):
        outputs, grads, weights = gradients(case.run, tensors)
        with unwritten_is_nan():
            poisoned, poisoned_grads, _ = gradients(case.run, tensors, weights)
    for p, o in zip((*poisoned, *poisoned_grads), (*outputs, *grads)):
        assert torch.equal(p, o)


def test_empty_batch():
    tensors = leaves(drawn("decay_conv", 20, b=0))
    with fastmix.force("triton"):
        outputs, grads, _ = gradients(CASES["decay_conv"].run, tensors)
    assert outputs[0].shape == tensors["x"].shape
    for g, t in zip(grads, tensors.values()):
        assert g.shape == t.shape and (g == 0).all()
