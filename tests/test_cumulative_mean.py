"""cumulative_mean's own: ranks, long half-precision sums, refusals."""

import pytest
import torch

from cases import distance
from fastmix import ops, reference
from refusal import both_ways, check_refusal


@pytest.mark.parametrize("shape", [(3, 50), (3, 50, 4), (3, 50, 2, 5), (1, 1, 1)])
def test_any_rank(shape):
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    actual, expected = ops.cumulative_mean(x), reference.cumulative_mean(x)
    assert distance(actual, expected) < 1e-13
    assert distance(torch.autograd.grad((actual * weight).sum(), x)[0],
                    torch.autograd.grad((expected * weight).sum(), x)[0]) < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_sums_do_not_saturate(dtype):
    """100,000 ones: a half-precision running sum would stop at 256 or overflow."""
    assert torch.equal(ops.cumulative_mean(torch.ones(1, 100_000, 1, dtype=dtype)),
                       torch.ones(1, 100_000, 1, dtype=dtype))


def refusals():
    x = torch.randn(2, 7, 3)
    return {
        "rank": ((x[0, :, 0],), {}, ValueError, r"x must have shape \(b, n, …\), got \(7,\)"),
        "integers": ((x.int(),), {}, TypeError, "x must be.*got int32"),
        "complex": ((x.to(torch.complex64),), {}, TypeError, "x must be.*got complex64"),
        "no steps": ((x[:, :0],), {}, ValueError, "x must have at least one time step"),
    }


@pytest.mark.parametrize("name", refusals())
@both_ways
def test_refuses(name, way):
    check_refusal(way, ops.cumulative_mean, *refusals()[name])


def test_the_gradient_of_outputs_and_state_is_rounded_once():
    """They cancel but for a hundredth."""
    x = torch.ones(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    out, state = ops.cumulative_mean(x, return_state=True)
    grad, = torch.autograd.grad((out.float() * 1.0078125).sum() - state.sum.sum() * 0.998, x)
    exact = 1.0078125 - 0.998
    assert abs(grad.item() - exact) <= 2**-8 * exact
