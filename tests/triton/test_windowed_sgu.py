"""windowed_sgu's Triton kernels: both schedules, every block edge, dtypes, layouts, memory."""

import pytest
import torch

import fastmix
from cases import check_errors, distance, squared_errors, unwritten_is_nan
from fastmix import ops, reference
from fastmix._triton import target
from fastmix._triton import windowed_sgu as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F64 = torch.float64


def launch(monkeypatch, names, **options):
    """Options of some kernels' launches, for a test."""
    monkeypatch.setattr(kernels, "LAUNCH", target.Table(
        *kernels.LAUNCH.rows, target.Row(names, "*", "*", "*", options, "for a test")))


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Small tensors have runs of several tiles and groups of several windows too."""
    launch(monkeypatch, kernels.MIXING, programs=4)
    launch(monkeypatch, "_norm_backward", programs=8)


def draw(n, w, h=2, c=6, b=1, affine=True, residual=True, dtype=F64):
    def randn(*shape):
        return torch.randn(*shape, dtype=F64).to(DEVICE, dtype)

    tensors = {"x": randn(b, n, 2 * c), "weight": randn(h, w, 2 * w), "bias": randn(h, w)}
    if affine:
        tensors["norm_weight"], tensors["norm_bias"] = randn(2, c).unbind(0)
    if residual:
        tensors["gate_residual"] = randn(b, n, c)
    return tensors


def differentiate(run, tensors, grad, **options):
    """Returns the output and the gradients of all tensors."""
    tensors = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    out = run(**tensors, **options)
    return out.detach(), *torch.autograd.grad(out, tensors.values(), grad)


def kernels_of(tensors, grad, **options):
    with fastmix.force("triton"):
        return differentiate(ops.windowed_sgu, tensors, grad, **options)


def output_grad(tensors):
    b, n, width = tensors["x"].shape
    return torch.randn(b, n, width // 2, dtype=F64).to(tensors["x"])


def check(tensors, grad=None, **options):
    grad = output_grad(tensors) if grad is None else grad
    actual = kernels_of(tensors, grad, **options)
    expected = differentiate(reference.windowed_sgu, tensors, grad, **options)
    for f, e in zip(actual, expected, strict=True):
        assert distance(f, e) < 1e-11


# Windows up to 32 walk in float64, several to a tile of 16 or 32 rows; wider ones are tiles.
@pytest.mark.parametrize("n, w", [
    (1, 1), (19, 1), (2, 3), (23, 5), (15, 16), (16, 16), (17, 16), (50, 16), (40, 17), (65, 32),
    (33, 31), (33, 33), (67, 33), (7, 50)])
def test_definition(n, w):
    check(draw(n, w, b=1 + (n < 20)), activation="gelu")


# To one step of the second window, but for the widest.
@pytest.mark.parametrize("n, w, dtype, bound", [
    (257, 256, F64, 1e-11), (513, 512, torch.float16, 4e-3), (140, 1024, torch.bfloat16, 2e-2)])
def test_wide_windows(n, w, dtype, bound, monkeypatch):
    # Thousands of programs where the others are tens; every other test has it.
    launch(monkeypatch, "_add_groups", block_bytes=1 << 16)
    tensors = draw(n, w, h=1, dtype=dtype)
    tensors["weight"] /= w ** 0.5
    grad = output_grad(tensors)
    exact = differentiate(reference.windowed_sgu, {k: t.double() for k, t in tensors.items()},
                          grad.double(), activation="silu")
    for f, e in zip(kernels_of(tensors, grad, activation="silu"), exact, strict=True):
        assert distance(f.double(), e) < bound


def test_many_programs(monkeypatch):
    launch(monkeypatch, kernels.MIXING, programs=512)
    check(draw(37, 3), activation="gelu")


@pytest.mark.parametrize("activation", [None, "identity", "tanh", "sigmoid", "gelu", "silu",
                                        torch.cos])
def test_activations(activation):
    residual = activation in ("tanh", torch.cos)
    check(draw(20, 6, residual=residual), activation=activation)
    check(draw(36, 34, h=1, c=2, residual=residual), activation=activation)


@pytest.mark.parametrize("c, h", [(2, 2), (9, 3), (35, 1), (70, 2)])
def test_channels_and_heads(c, h):
    check(draw(9, 4, h, c, b=1, affine=c == 9, residual=False), activation="silu")
    check(draw(36, 33, h, c, b=1, affine=c != 9, residual=False), activation="silu")


@pytest.mark.parametrize("norm", ["norm_weight", "norm_bias"])
def test_half_an_affine_norm(norm):
    tensors = draw(20, 7)
    del tensors[norm]
    check(tensors)


@pytest.mark.parametrize("n, w", [(20, 4), (36, 33)])
def test_strides(n, w):
    """Tensors are every second number, have other axes innermost, and gradients one number."""
    tensors = draw(n, w)
    every_second = {name: torch.stack([t, t + 1], dim=-1)[..., 0] for name, t in tensors.items()}
    turned = {name: t.transpose(0, -1).contiguous().transpose(0, -1)
              for name, t in tensors.items()}
    turned["x"] = tensors["x"].transpose(1, 2).contiguous().transpose(1, 2)
    grad = torch.ones((), dtype=F64, device=DEVICE).expand(1, n, 6)
    check(every_second, grad, activation="tanh")
    check(turned, grad, activation=torch.sin)


@pytest.mark.parametrize("n, w, b, residual, kind, bound", [
    (30, 4, 2, True, F64, 1e-13), (30, 4, 2, False, F64, 1e-13), (67, 33, 2, False, F64, 1e-13),
    (13, 4, 5, False, F64, 1e-13), (13, 4, 5, True, torch.float16, 1e-3),
    (37, 33, 5, False, torch.float16, 1e-3)])
def test_stretches_of_little_scratch_and_unwritten_memory(n, w, b, residual, kind, bound,
                                                          monkeypatch):
    """The mixture's gradient is kept for a few sequences, or a few windows, at a time; dnormed
    too where x is of a narrower kind than the parameters."""
    tensors = draw(n, w, h=1, c=2, b=b, residual=residual)
    if kind != F64:
        tensors = {name: t.to(kind if name in ("x", "gate_residual") else torch.float32)
                   for name, t in tensors.items()}
    grad = output_grad(tensors)
    whole = kernels_of(tensors, grad, activation="gelu")
    size = 2 * (8 if kind == F64 else 4)  # bytes of a step
    for scratch in (n * size, 2 * n * size, 3 * w * size):
        monkeypatch.setattr(kernels, "SCRATCH", scratch)
        with unwritten_is_nan():
            parts = kernels_of(tensors, grad, activation="gelu")
        for p, e in zip(parts, whole, strict=True):
            assert distance(p, e) < bound


@pytest.mark.parametrize("w", [8, 34])
def test_masked_weights_do_nothing_and_get_no_gradient(w):
    tensors = draw(2 * w, w, c=2)
    grad = output_grad(tensors)
    expected = kernels_of(tensors, grad)
    mask = torch.ones(w, 2 * w, device=DEVICE).tril(w).bool()
    tensors["weight"] = torch.where(mask, tensors["weight"], torch.nan)
    actual = kernels_of(tensors, grad)
    for f, e in zip(actual, expected):
        assert torch.equal(f, e)
    assert actual[2][:, ~mask].eq(0).all() and actual[2][:, mask].ne(0).all()


@pytest.mark.parametrize("w", [8, 34])
def test_a_nan_shows_where_it_is_seen(w):
    tensors = draw(3 * w, w, h=1, c=2, b=2)
    tensors["x"][0, w + 3, -1] = torch.nan
    with fastmix.force("triton"):
        out = ops.windowed_sgu(**tensors)
    assert out[1].isfinite().all() and out[0, w + 3 :].isnan().all()


def test_constant_rows_of_the_gate():
    tensors = draw(20, 8)
    tensors["x"][:, 3] = 5.0
    check(tensors, eps=1e-3)


@pytest.mark.parametrize("activation", [None, "tanh", torch.sin])
def test_empty_batch(activation):
    tensors = draw(5, 4, b=0)
    out, *grads = kernels_of(tensors, output_grad(tensors), activation=activation)
    assert out.shape == (0, 5, 6)
    for g, t in zip(grads, tensors.values(), strict=True):
        assert g.shape == t.shape and g.eq(0).all()


# Half precision windows up to 128 walk.
@pytest.mark.parametrize("n, w, activation, dtype, parameters", [
    (40, 6, "gelu", torch.float32, None), (40, 6, "gelu", torch.float16, None),
    (40, 6, "gelu", torch.bfloat16, None), (45, 20, None, torch.bfloat16, None),
    (40, 6, "gelu", torch.float16, torch.float32), (45, 20, None, torch.bfloat16, torch.float32),
    (131, 129, "silu", torch.bfloat16, None)])
def test_rounding_is_at_most_twice_the_definitions(n, w, activation, dtype, parameters):
    check_rounding(n, w, 8, activation, dtype, parameters)


@pytest.mark.skipif(DEVICE == "cuda", reason="for the interpreter: a GPU runs what is its own")
@pytest.mark.parametrize("family", ["sm80", "amd"])
@pytest.mark.parametrize("n, w, dtype", [
    (40, 20, torch.float16), (75, 70, torch.bfloat16)])
def test_rounding_with_the_tiles_of(family, n, w, dtype, monkeypatch):
    """Windows beyond 64 are tiles there, of at most 32 channels."""
    monkeypatch.setattr(target, "family", lambda: family)
    check_rounding(n, w, 40, "gelu", dtype)


def check_rounding(n, w, c, activation, dtype, parameters=None):
    def errors():
        tensors = draw(n, w, h=2 if c == 8 else 1, c=c, dtype=dtype)
        if parameters is not None:
            tensors.update({k: torch.randn_like(t, dtype=parameters)
                            for k, t in tensors.items() if k not in ("x", "gate_residual")})
        grad, options = output_grad(tensors), dict(activation=activation)
        plain, exact = (
            differentiate(reference.windowed_sgu, {k: t.to(d) for k, t in tensors.items()},
                          grad.to(d), **options) for d in (torch.float32, F64))
        return squared_errors(kernels_of(tensors, grad, **options), plain, exact)

    # The norm's gradients are too few to measure: tests/test_values.py draws more.
    check_errors(errors, (3, 12, 48) if n < 100 else (1, 4), torch.tensor(
        [4.0 if name.startswith("norm") else 2.0 for name in ["out", *draw(n, w)]]))
