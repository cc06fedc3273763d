"""causal_sgu's own: lengths below the weight's, the mask, refusals."""

import pytest
import torch

from cases import check_errors, distance, largest, squared_errors
from fastmix import ops, reference
from refusal import both_ways, check_refusal

F64 = torch.float64


def draw(n, s, h=2, c=6, b=2, dtype=F64):
    return (torch.randn(b, n, 2 * c, dtype=dtype), torch.randn(h, s, s, dtype=dtype),
            torch.randn(h, s, dtype=dtype))


@pytest.mark.parametrize("n, s", [(1, 1), (1, 9), (2, 2), (13, 31), (64, 64), (200, 211),
                                  (600, 600), (601, 1000)])
def test_definition(n, s):
    inputs = [t.requires_grad_() for t in draw(n, s)]
    weight = torch.randn(2, n, 6, dtype=F64)
    actual, expected = ops.causal_sgu(*inputs), reference.causal_sgu(*inputs)
    assert distance(actual, expected) < 1e-11
    for f, e in zip(torch.autograd.grad((actual * weight).sum(), inputs),
                    torch.autograd.grad((expected * weight).sum(), inputs)):
        assert distance(f, e) < 1e-10


@pytest.mark.long
def test_rounding_over_many_steps():
    """At most twice plain PyTorch's: a sum of 1,500 terms one by one would have six times that."""
    def errors():
        x, weight, bias = (t.float() for t in draw(1500, 1500, h=1, c=32, b=1))
        weight /= 1500**0.5
        actual = []
        for run, dtype in ((ops, torch.float32), (reference, torch.float32), (reference, F64)):
            inputs = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
            out = run.causal_sgu(*inputs)
            actual.append((out.detach(), *torch.autograd.grad(out.square().sum(), inputs)))
        return squared_errors(*actual)

    check_errors(errors, (1, 4, 16))


def test_it_is_a_window_as_long_as_the_sequence():
    x, weight, bias = draw(30, 40)
    doubled = torch.cat([torch.randn_like(weight), weight], dim=-1)
    assert distance(ops.causal_sgu(x, weight, bias), ops.windowed_sgu(x, doubled, bias)) < 1e-12


def test_weights_out_of_use_do_nothing_and_get_no_gradient():
    x, weight, bias = draw(300, 320)
    used = torch.ones(320, 320).tril().bool()
    used[300:], used[:, 300:] = False, False
    wild = torch.where(used, weight, torch.inf).requires_grad_()
    out = ops.causal_sgu(x, wild, bias)
    assert torch.equal(out, ops.causal_sgu(x, weight, bias))
    (grad,) = torch.autograd.grad(out.sum(), wild)
    assert largest(grad[:, ~used]) == 0 and largest(grad[:, used]) > 0


def refusals():
    x, weight, bias = draw(7, 9, dtype=torch.float32)
    return {
        "too long": ((x, weight[:, :6, :6], bias[:, :6]), {}, ValueError,
                     r"x must have at most 6 time steps, got n=7: x\[:, -6:\] has the last"),
        "not square": ((x, weight[..., 1:], bias), {}, ValueError,
                       r"weight must have shape \(h, s, s\), got \(2, 9, 8\)"),
        "no bias": ((x, weight, None), {}, TypeError, "bias must be a tensor, got NoneType"),
        "bias": ((x, weight, bias[:, 1:]), {}, ValueError,
                 r"bias must have shape \(h, s\) = \(2, 9\), got \(2, 8\)"),
        "rank": ((x[0, 0], weight, bias), {}, ValueError,
                 r"x must have shape \(b, n, 2c\), got \(12,\)"),
        "heads": ((x[..., :10], weight, bias), {}, ValueError, "weight's h must divide c"),
        "mixed": ((x, weight, bias.double()), {}, TypeError,
                  "bias must be float32 for float32 x, got float64"),
        "no steps": ((x[:, :0], weight, bias), {}, ValueError,
                     "x must have at least one time step"),
        "complex": ((x, weight.to(torch.complex64), bias), {}, TypeError,
                    "weight must be.*got complex64"),
        "integers": ((x.long(), weight, bias), {}, TypeError, "x must be.*got int64"),
        "devices": ((x, weight, bias.to("meta")), {}, ValueError,
                    "bias must be on cpu like x, got meta"),
    }


@pytest.mark.parametrize("name", refusals())
@both_ways
def test_refuses(name, way):
    check_refusal(way, ops.causal_sgu, *refusals()[name])


def test_gradients_of_doubles_whose_distance_overflows_are_finite():
    x = torch.tensor([1.0, 1, 1e308, -1e308], dtype=F64).repeat(1, 2, 1).requires_grad_()
    weight, bias, norm_weight = (torch.randn(shape, dtype=F64, requires_grad=True)
                                 for shape in ((1, 2, 2), (1, 2), (2,)))
    out = ops.causal_sgu(x, weight, bias, norm_weight=norm_weight,
                         norm_bias=torch.zeros(2, dtype=F64))
    grads = torch.autograd.grad(out.sum(), (x, norm_weight))
    assert all(grad.isfinite().all() for grad in grads)
