"""cumulative_mean's Triton kernels against the definition; interpreted where there is no GPU."""

import os

import pytest
import torch

import fastmix
from cases import check_errors, distance, squared_errors, unwritten_is_nan
from fastmix import ops, reference
from fastmix._triton import cumulative_mean as kernels
from fastmix._triton import plans

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F64 = torch.float64


@pytest.fixture
def cut(cut, monkeypatch):
    """Tiles have 16 steps here, so that short sequences have many."""
    monkeypatch.setattr(kernels, "tile", lambda channels, batch, dtype, tile_bytes: dict(
        RUNS=4, COLS=16, ROWS=4, num_warps=1))


def differentiate(mean, x, weight):
    """Returns the output and the gradient."""
    x = x.detach().requires_grad_()
    out = mean(x)
    return out, *torch.autograd.grad((out * weight).sum(), x)


def kernels_of(x, weight):
    with fastmix.force("triton"):
        return differentiate(ops.cumulative_mean, x, weight)


def both(x, weight):
    """Returns the kernels' output and gradient, and those of the definition."""
    return kernels_of(x, weight), differentiate(reference.cumulative_mean, x, weight)


@pytest.mark.parametrize("n", [1, 4, 17, 65])
def test_definition(cut, n):
    x, weight = torch.randn(2, 2, n, 9, dtype=F64, device=DEVICE)
    for actual, expected in zip(*both(x, weight)):
        assert distance(actual, expected) < 1e-12


@pytest.mark.parametrize("shape", [(3, 50), (2, 300, 4), (3, 50, 2, 5), (1, 1, 1), (1, 700, 40)])
def test_any_rank_with_the_real_tiles(shape):
    x, weight = torch.randn(2, *shape, dtype=F64, device=DEVICE)
    for actual, expected in zip(*both(x, weight)):
        assert distance(actual, expected) < 1e-12


@pytest.mark.parametrize("n, dtype, bound", [
    (16, F64, 1e-12), (17, F64, 1e-12), (33, torch.float32, 1e-6)])
def test_definition_with_wide_tiles(filled, n, dtype, bound):
    """Tiles are those of a GPU that channels alone fill: blocks of 128 and a rest."""
    assert kernels.tile(150, 1, dtype, 128)["COLS"] == 128
    x, weight = torch.randn(2, 1, n, 150, dtype=dtype, device=DEVICE)
    exact = differentiate(reference.cumulative_mean, x.double(), weight.double())
    for actual, expected in zip(kernels_of(x, weight), exact):
        assert distance(actual.double(), expected) < bound


def test_strides(cut):
    x = torch.randn(2, 4, 40, 3, 6, dtype=F64, device=DEVICE)
    one = torch.ones((), dtype=F64, device=DEVICE)  # its gradient comes back with strides 0
    for view in (x[0, ..., 1:4], x[1].transpose(0, 2), x[0].permute(3, 1, 0, 2)):
        assert not view.is_contiguous()
        for actual, expected in zip(*both(view, one)):
            assert distance(actual, expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding(cut, dtype):
    """Errors are at most twice those of the definition in float32, rounded to the dtype."""
    def draw():
        x, weight = torch.randn(2, 1, 131, 16, device=DEVICE).to(dtype)
        plain, exact = (differentiate(reference.cumulative_mean, x.to(wide), weight.to(wide))
                        for wide in (torch.float32, F64))
        return squared_errors(kernels_of(x, weight), plain, exact, floor=0)

    check_errors(draw)


def test_nothing_before_an_infinity_changes(cut):
    x = torch.randn(2, 50, 3, device=DEVICE)
    with fastmix.force("triton"):
        expected = ops.cumulative_mean(x)
        x[0, 30] = torch.inf
        actual = ops.cumulative_mean(x)
    assert torch.equal(actual[:, :30], expected[:, :30]) and torch.equal(actual[1], expected[1])
    assert not actual[0, 30:].isfinite().any()


def test_long_half_precision_sums_do_not_saturate():
    x = torch.ones(1, 5_000, 1, dtype=torch.bfloat16, device=DEVICE)
    with fastmix.force("triton"):
        assert torch.equal(ops.cumulative_mean(x), x)


def test_unwritten_memory_and_empty_batches(cut):
    x = torch.randn(2, 77, 3, device=DEVICE)
    with unwritten_is_nan():
        for actual, expected in zip(*both(x, x)):
            assert distance(actual, expected) < 1e-5
    for actual, again in zip(kernels_of(x, x), kernels_of(x, x)):
        assert torch.equal(actual, again)
    x = torch.randn(0, 20, 3, device=DEVICE, requires_grad=True)
    with fastmix.force("triton"):
        out = ops.cumulative_mean(x)
        (grad,) = torch.autograd.grad(out.sum(), x)
    assert out.shape == grad.shape == x.shape


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled")
def test_interpreted_calls_have_no_plans():
    with fastmix.force("triton"):
        for _ in range(3):
            ops.cumulative_mean(torch.randn(1, 3, 2))
    assert not plans.plans and not plans._seen
