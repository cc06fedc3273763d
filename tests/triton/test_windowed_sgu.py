"""windowed_sgu's Triton kernels: both schedules, every block edge, dtypes, layouts, memory."""

import pytest
import torch
from cases import distance

import fastmix
from fastmix import ops, reference
from fastmix._triton import windowed_sgu as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F64 = torch.float64


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Runs of several tiles, groups of several windows, also in small tensors."""
    monkeypatch.setattr(kernels, "PROGRAMS", 4)


def draw(n, w, h=2, c=6, b=2, affine=True, residual=True, dtype=F64):
    def randn(*shape):
        return torch.randn(*shape, dtype=F64).to(DEVICE, dtype)

    tensors = {"x": randn(b, n, 2 * c), "weight": randn(h, w, 2 * w), "bias": randn(h, w)}
    if affine:
        tensors["norm_weight"], tensors["norm_bias"] = randn(2, c).unbind(0)
    if residual:
        tensors["gate_residual"] = randn(b, n, c)
    return tensors


def values_and_gradients(run, tensors, grad, **options):
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    leaves["x"] = tensors["x"].detach().requires_grad_()
    out = run(**leaves, **options)
    return out.detach(), *torch.autograd.grad(out, leaves.values(), grad)


def kernel(**options):
    with fastmix.force("triton"):
        return ops.windowed_sgu(**options)


def found_and_expected(tensors, grad=None, **options):
    if grad is None:
        grad = torch.randn(*tensors["x"].shape[:2], tensors["x"].shape[2] // 2, dtype=F64,
                           device=DEVICE)
    with fastmix.force("triton"):
        found = values_and_gradients(ops.windowed_sgu, tensors, grad, **options)
    return found, values_and_gradients(reference.windowed_sgu, tensors, grad, **options)


def check(tensors, grad=None, **options):
    for f, e in zip(*found_and_expected(tensors, grad, **options), strict=True):
        assert distance(f, e) < 1e-11


# Windows up to 32 walk in float64, several to a tile of 16 or 32 rows; wider ones are tiles.
@pytest.mark.parametrize("n, w", [
    (1, 1), (37, 1), (2, 3), (50, 5), (15, 16), (16, 16), (17, 16), (33, 16), (97, 16), (40, 17),
    (31, 32), (65, 32), (101, 31), (33, 33), (67, 33), (100, 40), (64, 64), (129, 64), (7, 50)])
def test_definition(n, w):
    check(draw(n, w, b=1 + (n < 40)), activation="gelu")


def test_many_programs(monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 512)
    check(draw(37, 3), activation="gelu")


@pytest.mark.parametrize("activation", [None, "identity", "tanh", "sigmoid", "gelu", "silu",
                                        torch.cos])
@pytest.mark.parametrize("w", [6, 34])
def test_activations(w, activation):
    check(draw(40, w, residual=activation in ("tanh", torch.cos)), activation=activation)


@pytest.mark.parametrize("c, h", [(2, 2), (9, 3), (40, 1), (70, 2), (16, 16)])
def test_channels_and_heads(c, h):
    check(draw(21, 4, h, c, b=1, affine=c == 9, residual=False), activation="silu")
    check(draw(41, 35, h, c, b=1, affine=c != 9, residual=False), activation="silu")


@pytest.mark.parametrize("norm", ["norm_weight", "norm_bias"])
def test_half_an_affine_norm(norm):
    tensors = draw(30, 7)
    del tensors[norm]
    check(tensors)


@pytest.mark.parametrize("w", [4, 36])
def test_strides(w):
    """Slices of wider tensors, steps innermost, and gradients that are one number."""
    tensors = draw(40, w)
    wider = {name: torch.stack([t, t + 1], dim=-1)[..., 0] for name, t in tensors.items()}
    turned = {name: t.transpose(0, -1).contiguous().transpose(0, -1)
              for name, t in tensors.items()}
    turned["x"] = tensors["x"].transpose(1, 2).contiguous().transpose(1, 2)
    grad = torch.ones((), dtype=F64, device=DEVICE).expand(2, 40, 6)
    for activation in ("tanh", torch.sin):
        for changed in (wider, turned):
            check(changed, grad, activation=activation)


@pytest.mark.parametrize("w", [4, 36])
@pytest.mark.parametrize("residual", [True, False])
def test_stretches_of_little_scratch_and_unwritten_memory(w, residual, monkeypatch):
    """The mixture's gradient is kept for one sequence, or a few windows, at a time."""
    tensors = draw(150, w, b=3, residual=residual)
    grad = torch.randn(3, 150, 6, dtype=F64, device=DEVICE)
    whole = values_and_gradients(kernel, tensors, grad, activation="gelu")
    for scratch in (150 * 6 * 8 * 2, 150 * 6 * 8, 3 * w * 6 * 8):
        monkeypatch.setattr(kernels, "SCRATCH", scratch)
        torch.use_deterministic_algorithms(True)  # fills what is not written with NaN
        try:
            parts = values_and_gradients(kernel, tensors, grad, activation="gelu")
        finally:
            torch.use_deterministic_algorithms(False)
        for p, e in zip(parts, whole, strict=True):
            assert distance(p, e) < 1e-13


@pytest.mark.parametrize("w", [8, 40])
def test_masked_weights_do_nothing_and_get_no_gradient(w):
    tensors = draw(3 * w - 5, w)
    grad = torch.randn(2, 3 * w - 5, 6, dtype=F64, device=DEVICE)
    expected = values_and_gradients(kernel, tensors, grad)
    mask = torch.ones(w, 2 * w, device=DEVICE).tril(w).bool()
    tensors["weight"] = torch.where(mask, tensors["weight"], torch.nan)
    found = values_and_gradients(kernel, tensors, grad)
    for f, e in zip(found, expected):
        assert torch.equal(f, e)
    assert found[2][:, ~mask].eq(0).all() and found[2][:, mask].ne(0).all()


@pytest.mark.parametrize("w", [8, 40])
def test_a_nan_stays_in_the_windows_that_see_it(w):
    tensors = draw(8 * w, w, b=2)
    clean = kernel(**tensors)
    tensors["x"][0, 5 * w + 3, -1] = torch.nan
    out = kernel(**tensors)
    assert torch.equal(out[1], clean[1])
    assert out[0, 5 * w + 3 : 7 * w].isnan().all()
    assert out[0, : w].isfinite().all()


def test_constant_rows_of_the_gate():
    tensors = draw(20, 8)
    tensors["x"][:, 3] = 5.0
    check(tensors, eps=1e-3)


@pytest.mark.parametrize("activation", [None, "tanh", torch.sin])
def test_empty_batch(activation):
    tensors = draw(5, 4, b=0)
    out, *grads = values_and_gradients(
        kernel, tensors, torch.zeros(0, 5, 6, dtype=F64, device=DEVICE), activation=activation)
    assert out.shape == (0, 5, 6)
    for g, t in zip(grads, tensors.values(), strict=True):
        assert g.shape == t.shape and g.eq(0).all()


def squared_errors(tensors, grad, **options):
    """Of ours and of plain PyTorch in float32, both rounded, against float64; per result."""
    ours = values_and_gradients(kernel, tensors, grad, **options)
    plain, exact = (
        values_and_gradients(reference.windowed_sgu, {k: t.to(d) for k, t in tensors.items()},
                             grad.to(d), **options) for d in (torch.float32, F64))
    return torch.tensor([
        [(o - e).square().mean(), (p.to(o.dtype) - e).square().mean(),
         (torch.finfo(o.dtype).eps / 8 * e).square().mean()]
        for o, p, e in zip(ours, plain, exact, strict=True)])


# Half precision windows up to 128 walk.
@pytest.mark.parametrize("parameters", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n, w, activation", [(70, 6, "gelu"), (75, 20, None), (200, 129, "silu")])
def test_rounding_is_at_most_twice_the_definitions(n, w, activation, dtype, parameters):
    if dtype == parameters:
        pytest.skip("nothing mixed")
    total = 0
    for _ in range(8 if n < 200 else 1):
        tensors = draw(n, w, c=8, dtype=dtype)
        if parameters is not None:
            tensors.update({k: torch.randn_like(t, dtype=parameters) for k, t in tensors.items()
                            if k not in ("x", "gate_residual")})
        grad = torch.randn(2, n, 8, device=DEVICE).to(dtype)
        total = total + squared_errors(tensors, grad, activation=activation)
    ours, plain, floor = total.sqrt().unbind(1)
    assert (ours <= 2 * plain + floor).all(), (ours / plain).tolist()
