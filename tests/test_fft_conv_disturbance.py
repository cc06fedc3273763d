"""fft_conv and values that a transform cannot hold: NaN, infinity, huge and tiny numbers.

No output may feel what comes after its step, and so for the gradients, whichever argument it
comes in. `n - 1 - lag` is the last step whose gradient of x meets a lag, and so on: each test
says which results the changed steps do not reach.
"""

import pytest
import torch

import fastmix
from cases import distance, implementations, largest
from fastmix import ops, reference

SHAPES = {  # n, m, h, d, whether the kernel is shared
    "one transform": (300, 300, 2, 16, False),
    "kernels in lanes": (300, 200, 5, 3, False),
    "one channel a head": (129, 129, 3, 1, True),
    "matrices in pure PyTorch": (40, 40, 2, 16, True),
    "chunks": (4500, 60, 1, 4, True),
    "few lags": (200, 5, 2, 3, False),
}
BAD = [1e10, float("nan"), float("-inf")]
every_implementation = pytest.mark.parametrize("implementation", implementations("fft_conv"))
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def draw(n, m, h, d, shared, dtype=torch.float32):
    x, kernel = torch.randn(2, n, h, d), torch.randn(*(() if shared else (2,)), m, h) / m**0.5
    return tuple(t.to(dtype) for t in (x, kernel, torch.randn(h, d), torch.randn_like(x)))


def results(x, kernel, skip, weight):
    """y and the gradients of x and kernel."""
    leaves = [t.detach().requires_grad_() for t in (x, kernel)]
    y = ops.fft_conv(*leaves, skip)
    return y.detach(), *torch.autograd.grad(y, leaves, weight.to(y.dtype))


def exact(*tensors):
    with fastmix.force("fallback"):
        return results(*(t.double() for t in tensors))


def check_same(actual, expected, tolerance=1e-5):
    if actual.numel():
        assert largest(actual - expected) <= tolerance * largest(expected)


@every_implementation
@every_shape
@pytest.mark.parametrize("bad", BAD)
def test_nothing_reaches_what_comes_before_it(implementation, shape, bad):
    n, m = shape[:2]
    tensors = draw(*shape)
    y, grad_x, grad_kernel = exact(*tensors)
    for t in {0, 3, n // 3, n - 1}:
        with fastmix.force(implementation):
            # in x, of one channel: outputs before t; lags that take no step from t on
            x, kernel, skip, weight = (a.clone() for a in tensors)
            x[:, t:, 0, -1] = bad
            actual = results(x, kernel, skip, weight)
            check_same(actual[0][:, :t], y[:, :t])
            check_same(actual[0][..., :-1], y[..., :-1])
            check_same(actual[1], grad_x)
            check_same(actual[2][..., n - t :, :], grad_kernel[..., n - t :, :])
            if bad != bad:
                assert actual[0][:, t:, 0, -1].isnan().all()
                assert actual[2][..., : min(m, n - t), 0].isnan().all()

            # in the gradient, up to t: steps and lags beyond
            x, kernel, skip, weight = (a.clone() for a in tensors)
            weight[:, : t + 1, 0, -1] = bad
            actual = results(x, kernel, skip, weight)
            check_same(actual[1][:, t + 1 :], grad_x[:, t + 1 :])
            check_same(actual[1][..., :-1], grad_x[..., :-1])
            check_same(actual[2][..., t + 1 :, :], grad_kernel[..., t + 1 :, :])
            if bad != bad:
                assert actual[1][:, : t + 1, 0, -1].isnan().all()
                assert actual[2][..., : min(m, t + 1), 0].isnan().all()

            # in the kernel of one head: outputs before the lag, gradients of the last steps
            x, kernel, skip, weight = (a.clone() for a in tensors)
            lag = min(t, m - 1)
            kernel[..., lag:, 0] = bad
            actual = results(x, kernel, skip, weight)
            check_same(actual[0][:, :lag], y[:, :lag])
            check_same(actual[1][:, n - lag :], grad_x[:, n - lag :])
            check_same(actual[2], grad_kernel)
            if bad != bad:
                assert actual[0][:, lag:, 0].isnan().all()
                assert actual[1][:, : n - lag, 0].isnan().all()


@every_implementation
@pytest.mark.parametrize("growth", [2.0**8, 2.0**13])
def test_the_past_keeps_its_digits_where_numbers_grow(implementation, growth):
    """A beginning feels no more than 1e-5 of its own size, however early it ends."""
    n = 2000
    x, kernel, skip, weight = draw(n, n, 2, 4, False)
    for at in (1, 5, 40, 1000):
        large, later = x.clone(), weight.clone()
        large[:, at:] *= growth
        later[:, : n - at] *= growth
        with fastmix.force(implementation):
            y, _, grad_kernel = results(large, kernel, skip, weight)
            _, grad_x, later_kernel = results(x, kernel, skip, later)
        expected, _, expected_kernel = exact(large, kernel, skip, weight)
        _, expected_x, expected_later_kernel = exact(x, kernel, skip, later)
        check_same(y[:, :at], expected[:, :at])
        check_same(grad_x[:, n - at :], expected_x[:, n - at :])
        check_same(grad_kernel[:, n - at :], expected_kernel[:, n - at :])
        check_same(later_kernel[:, n - at :], expected_later_kernel[:, n - at :])


@every_implementation
def test_the_past_has_the_same_bits_whatever_the_disturbance(implementation):
    x, kernel, _, weight = draw(*SHAPES["one transform"])
    with fastmix.force(implementation):
        actual = []
        for bad in (1e10, 1e30, float("nan"), float("inf")):
            y = x.clone()
            y[:, 100:] = bad
            actual.append(results(y, kernel, None, weight)[0][:, :100])
    assert all(torch.equal(actual[0], f) for f in actual[1:])


@every_implementation
def test_nan_in_short_kernels_reach_ends(implementation):
    """A NaN in x reaches as many outputs as there are lags."""
    for m in (5, 60):
        x, kernel, _, _ = draw(4500, m, 2, 3, True)
        expected = ops.fft_conv(x.double(), kernel.double())
        x[:, 1000, 0, 0] = float("nan")
        with fastmix.force(implementation):
            y = ops.fft_conv(x, kernel)
        nan = y.isnan()
        assert nan[:, 1000 : 1000 + m, 0, 0].all() and nan.sum() == 2 * m
        check_same(y.where(~nan, 0), expected.where(~nan, 0))


@every_implementation
def test_magnitudes_that_grow_by_sixty_powers_of_ten(implementation):
    """Every output relative to its own size, as a sum of products has it."""
    n = 600
    x = torch.randn(1, n, 2, 4) * torch.logspace(-30, 30, n)[:, None, None]
    kernel = torch.rand(n, 2) * 0.9 ** torch.arange(n)[:, None] + 1e-3
    expected = reference.fft_conv(x.double(), kernel.double())
    own = reference.fft_conv(x.double().abs(), kernel.double().abs())
    with fastmix.force(implementation):
        y = ops.fft_conv(x, kernel)
    assert largest((y - expected) / own) < 1e-4
    with fastmix.force(implementation):  # and in float64, which holds more in one transform
        y = ops.fft_conv(x.double(), kernel.double())
    assert largest((y - expected) / own) < 1e-6


@every_implementation
@pytest.mark.parametrize("x_size, kernel_size", [(1e10, 1e-40), (1.0, 1e-37), (1e-30, 1e20),
                                                 (1e36, 1e-20), (1e-38, 1e10)])
def test_tiny_and_huge_numbers_keep_their_digits(implementation, x_size, kernel_size):
    x, kernel, skip, weight = draw(300, 300, 2, 8, False)
    x, kernel, skip = x * x_size, kernel * kernel_size, skip * kernel_size
    expected = exact(x, kernel, skip, weight)
    with fastmix.force(implementation):
        actual = results(x, kernel, skip, weight)
    for f, e in zip(actual, expected, strict=True):
        assert largest(f - e) <= 1e-6 * largest(e) + 1e-44


@every_implementation
def test_a_beginning_of_zeros_stays_zero(implementation):
    x, kernel, _, weight = draw(*SHAPES["kernels in lanes"])
    x[:, :150] = 0
    x[:, 150:, 0, 0] = 1e10
    weight[:, 120:] = 0
    with fastmix.force(implementation):
        y, grad_x, _ = results(x, kernel, None, weight)
    assert not y[:, :150].any() and not grad_x[:, 120:].any()
    assert y[:, 150:].any() and grad_x[:, :120].any()


@every_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_nan_and_infinity_in_other_dtypes(implementation, dtype):
    tensors = draw(*SHAPES["one transform"], dtype)
    expected = exact(*tensors)
    x = tensors[0].clone()
    x[:, 200:] = torch.tensor([float("nan"), float("inf")] * 8, dtype=dtype)
    with fastmix.force(implementation):
        y, grad_x, grad_kernel = results(x, *tensors[1:])
    tolerance = max(2 * torch.finfo(dtype).eps, 1e-14)
    check_same(y[:, :200], expected[0][:, :200], tolerance)
    check_same(grad_x, expected[1], tolerance)
    check_same(grad_kernel[..., 100:, :], expected[2][..., 100:, :], tolerance)


@every_implementation
def test_skips_that_are_no_part_of_a_spectrum(implementation):
    """They multiply the input itself, so each stays with its own step."""
    tensors = draw(*SHAPES["one transform"])
    expected, *_ = exact(*tensors)
    x, kernel, skip, weight = tensors
    skip = skip.clone()
    skip[0, 0], skip[1, 1] = float("nan"), 1e30
    with fastmix.force(implementation):
        y = ops.fft_conv(x, kernel, skip)
    assert y[:, :, 0, 0].isnan().all()
    check_same(y[:, :, 1, 1], x[:, :, 1, 1].double() * float(skip[1, 1]))
    check_same(y[..., 2:], expected[..., 2:])


@every_implementation
def test_under_vmap_and_with_any_number_of_threads(implementation):
    x, kernel, *_ = draw(*SHAPES["one transform"])
    expected = ops.fft_conv(x.double(), kernel.double())
    x[:, 100:] = float("nan")
    with fastmix.force(implementation):
        mapped = torch.vmap(ops.fft_conv)(x[:, None], kernel[:, None])[:, 0]
        y = ops.fft_conv(x, kernel)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            single = ops.fft_conv(x, kernel)
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(y[:, :100], single[:, :100])
    for actual in (mapped, y):
        check_same(actual[:, :100], expected[:, :100])
        assert actual[:, 100:].isnan().all()


@every_implementation
@pytest.mark.parametrize("mapped", [0, 1])
def test_values_of_one_argument_that_vmap_hides(implementation, mapped):
    """There is no cutting then: derivatives inside vmap run, whatever the other argument holds."""
    x, kernel, *_ = draw(*SHAPES["one transform"])
    arguments = [x, kernel]
    arguments[1 - mapped][:, 100:] = 1e30

    def gradient(argument):
        def run(argument):
            return ops.fft_conv(*(argument if i == mapped else a for i, a in enumerate(arguments)))

        out, pull = torch.func.vjp(run, argument)
        return pull(torch.ones_like(out))[0]

    several = torch.stack([arguments[mapped], 2 * arguments[mapped]])
    with fastmix.force(implementation):
        assert torch.vmap(gradient)(several).shape == several.shape


@every_implementation
def test_derivatives_through_segments(implementation):
    """Second derivatives and forward mode go through pure PyTorch, which cuts as well."""
    x, kernel, _, _ = draw(60, 60, 1, 3, True, torch.float64)
    x = x * torch.logspace(0, 12, 60, dtype=torch.float64)[:, None, None]
    leaves = [x.requires_grad_(), kernel.requires_grad_()]
    with fastmix.force(implementation):
        grads = torch.autograd.grad(ops.fft_conv(*leaves).square().sum(), leaves,
                                    create_graph=True)
        second = torch.autograd.grad(sum(g.sum() for g in grads), leaves)
    defined = torch.autograd.grad(reference.fft_conv(*leaves).square().sum(), leaves,
                                  create_graph=True)
    for f, e in zip(second, torch.autograd.grad(sum(g.sum() for g in defined), leaves),
                    strict=True):
        assert distance(f, e) < 1e-9


@pytest.mark.parametrize("d", [1, 8])  # a transform, and matrices
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_torch_func_gives_gradients_that_are_finite_where_the_definition_is(d, mapped, bad):
    def gradients(function, x, kernel):
        grad = torch.func.grad(lambda *args: function(*args).sum(), (0, 1))
        return torch.vmap(grad)(x, kernel) if mapped else grad(x[0], kernel[0])

    for x_at, kernel_at in ((7, []), ([], 7)):
        tensors = x, kernel = torch.randn(2, 1, 20, 2, d), torch.randn(2, 20, 2)
        x[0, 0, x_at, 0, 0] = bad
        kernel[0, kernel_at, 0] = bad
        for y, e in zip(gradients(ops.fft_conv, *tensors),
                        gradients(reference.fft_conv, *tensors), strict=True):
            assert torch.equal(y.isfinite(), e.isfinite())
            check_same(y.where(e.isfinite(), 0), e.where(e.isfinite(), 0))


def test_the_definition_keeps_a_nan_of_the_kernel_from_earlier_steps():
    kernel = torch.randn(5, 2)
    kernel[3, 0] = float("nan")
    y = reference.fft_conv(torch.randn(1, 6, 2, 2), kernel)
    assert y[:, :3].isfinite().all() and y[:, 3:, 0].isnan().all() and y[..., 1, :].isfinite().all()
