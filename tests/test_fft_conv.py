"""fft_conv's own: lengths of kernel and sequence, causality, many shapes, refusals."""

import pytest
import torch

from cases import distance, largest
from fastmix import ops, reference
from refusal import both_ways, check_refusal

F64 = torch.float64


@pytest.mark.parametrize("n, m", [(1, 1), (1, 9), (2, 1), (127, 128), (128, 127), (509, 509),
                                  (512, 512), (513, 100), (100, 513), (1021, 1021), (2048, 3)])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("skips", [False, True])
def test_definition(n, m, shared, skips):
    x = torch.randn(2, n, 2, 3, dtype=F64)
    kernel = torch.randn(*(() if shared else (2,)), m, 2, dtype=F64)
    check_definition(x, kernel, *[torch.randn(2, 3, dtype=F64)] * skips)


def check_definition(*tensors):
    weight = torch.randn_like(tensors[0])
    leaves = [t.requires_grad_() for t in tensors]
    actual, expected = ops.fft_conv(*leaves), reference.fft_conv(*leaves)
    assert distance(actual, expected) < 1e-12
    for f, e in zip(torch.autograd.grad((actual * weight).sum(), leaves),
                    torch.autograd.grad((expected * weight).sum(), leaves), strict=True):
        assert distance(f, e) < 1e-12


@pytest.mark.parametrize("h, d", [(1, 1), (1, 7), (7, 1), (64, 2), (3, 33), (9, 16)])
def test_odd_numbers_of_heads_and_channels(h, d):
    check_definition(torch.randn(3, 300, h, d, dtype=F64), torch.randn(3, 300, h, dtype=F64),
                     torch.randn(h, d, dtype=F64))


def test_short_kernels_of_long_sequences():
    """Natively in chunks, or without transforms; a skip counts once for each step."""
    for m in (5, 200):
        check_definition(torch.randn(1, 5000, 2, 3, dtype=F64), torch.randn(m, 2, dtype=F64),
                         torch.randn(3, 2, dtype=F64).T)


def test_the_future_and_lags_beyond_the_sequence_do_nothing():
    x, kernel = torch.randn(1, 600, 2, 2, dtype=F64), torch.randn(1, 900, 2, dtype=F64)
    out = ops.fft_conv(x, kernel)
    changed = x.clone()
    changed[:, 400:] = 1e3
    assert largest(ops.fft_conv(changed, kernel)[:, :400] - out[:, :400]) < 1e-9
    kernel = kernel.requires_grad_()
    (grad,) = torch.autograd.grad(ops.fft_conv(x, kernel).sum(), kernel)
    assert largest(grad[:, 600:]) == 0 and largest(grad[:, :600]) > 0


def test_error_in_float32_is_within_1e6_of_the_largest_output():
    x, kernel = torch.randn(1, 8192, 2, 4), torch.randn(1, 8192, 2)
    exact = ops.fft_conv(x.double(), kernel.double())
    assert distance(ops.fft_conv(x, kernel).double(), exact) < 1e-6


def test_a_million_steps():
    """n = 1,048,576: an impulse response is the kernel itself."""
    n = 1 << 20
    x = torch.zeros(1, n, 1, 2)
    x[0, 5] = 1.0
    kernel = torch.randn(n, 1)
    out = ops.fft_conv(x, kernel)
    assert largest(out[0, 5:, 0, 0] - kernel[: n - 5, 0]) < 1e-4
    assert largest(out[0, :5]) < 1e-4


def refusals():
    x, kernel = torch.randn(2, 7, 3, 4), torch.rand(2, 7, 3)
    return {
        "rank": ((x[0], kernel), {}, ValueError,
                 r"x must have shape \(b, n, h, d\), got \(7, 3, 4\)"),
        "batch": ((x, kernel[:1]), {}, ValueError,
                  r"kernel must have shape \(b, m, h\) = \(2, m, 3\), got \(1, 7, 3\)"),
        "heads": ((x, kernel[0, :, :2]), {}, ValueError,
                  r"kernel must have shape \(m, h\) = \(m, 3\), got \(7, 2\)"),
        "kernel rank": ((x, kernel[0, :, 0]), {}, ValueError, "kernel must have shape"),
        "empty kernel": ((x, kernel[:, :0]), {}, ValueError,
                         "kernel must have at least one time step"),
        "no steps": ((x[:, :0], kernel), {}, ValueError, "x must have at least one time step"),
        "complex": ((x, kernel.to(torch.complex64)), {}, TypeError,
                    "kernel must be.*got complex64"),
        "mixed": ((x, kernel.half()), {}, TypeError,
                  "kernel must be float32 for float32 x, got float16"),
        "integers": ((x.int(), kernel), {}, TypeError, "x must be.*got int32"),
        "skip's shape": ((x, kernel, x[0, 0, 0]), {}, ValueError,
                         r"skip must have shape \(h, d\) = \(3, 4\), got \(4,\)"),
        "skip's dtype": ((x, kernel, x[0, 0].double()), {}, TypeError,
                         "skip must be float32 for float32 x, got float64"),
        "skip's device": ((x, kernel, x[0, 0].to("meta")), {}, ValueError,
                          "skip must be on cpu like x, got meta"),
        "devices": ((x, kernel.to("meta")), {}, ValueError,
                    "kernel must be on cpu like x, got meta"),
    }


@pytest.mark.parametrize("name", refusals())
@both_ways
def test_refuses(name, way):
    check_refusal(way, ops.fft_conv, *refusals()[name])
