"""windowed_sgu's own: windows and lengths, the mask, activations, refusals."""

import pytest
import torch

import fastmix
from cases import check_errors, distance, implementations, largest, squared_errors
from fastmix import ops, reference
from fastmix.activations import ACTIVATIONS
from refusal import both_ways, check_refusal

F64 = torch.float64


def draw(n, w, h=2, c=6, b=2, dtype=F64):
    return (torch.randn(b, n, 2 * c, dtype=dtype), torch.randn(h, w, 2 * w, dtype=dtype),
            torch.randn(h, w, dtype=dtype))


@pytest.mark.parametrize("w", [1, 2, 7, 16, 64])
@pytest.mark.parametrize("n", [1, 2, 6, 7, 8, 15, 63, 64, 65, 131])
def test_definition(n, w):
    inputs = [t.requires_grad_() for t in draw(n, w)]
    weight = torch.randn(2, n, 6, dtype=F64)
    actual, expected = ops.windowed_sgu(*inputs), reference.windowed_sgu(*inputs)
    assert distance(actual, expected) < 1e-12
    for f, e in zip(torch.autograd.grad((actual * weight).sum(), inputs),
                    torch.autograd.grad((expected * weight).sum(), inputs)):
        assert distance(f, e) < 1e-11


def test_masked_weights_do_nothing_and_get_no_gradient():
    x, weight, bias = draw(40, 8)
    mask = torch.ones(8, 16).tril(8).bool()
    wild = torch.where(mask, weight, torch.inf).requires_grad_()
    out = ops.windowed_sgu(x, wild, bias)
    assert torch.equal(out, ops.windowed_sgu(x, weight, bias))
    (grad,) = torch.autograd.grad(out.sum(), wild)
    assert largest(grad[:, ~mask]) == 0 and largest(grad[:, mask]) > 0


@pytest.mark.parametrize("activation", [None, "identity", "tanh", "sigmoid", "gelu", "silu"])
@pytest.mark.parametrize("operator", ["windowed_sgu", "causal_sgu"])
def test_named_activation_is_the_callable(operator, activation):
    x, weight, bias = draw(50, 60)
    weight = weight if operator == "windowed_sgu" else weight[..., :60]
    inputs = [t.requires_grad_() for t in (x, weight.contiguous(), bias)]
    named = getattr(ops, operator)(*inputs, activation=activation)
    function = ACTIVATIONS[activation or "identity"].forward
    called = getattr(ops, operator)(*inputs, activation=function)
    assert distance(named, called) < 1e-12
    for f, e in zip(torch.autograd.grad(named.square().sum(), inputs),
                    torch.autograd.grad(called.square().sum(), inputs)):
        assert distance(f, e) < 1e-11


@pytest.mark.skipif(fastmix.implementations("windowed_sgu", "cpu")["native"] is not None,
                    reason="the word is read in C++, which does not run here")
@pytest.mark.parametrize("operator", ["windowed_sgu", "causal_sgu"])
def test_an_unknown_word_in_an_exported_program_is_refused(operator):
    columns = 8 if operator == "windowed_sgu" else 4
    inputs = torch.zeros(1, 4, 8), torch.zeros(2, 4, columns), torch.zeros(2, 4)
    with pytest.raises(RuntimeError, match="no activation cosine: a program exported by another"):
        getattr(torch.ops.fastmix, operator)(*inputs, None, None, 1e-5, None, "cosine")


def test_an_activation_of_the_users_with_its_own_parameter():
    x, weight, bias = draw(20, 8)
    slope = torch.tensor(0.3, dtype=F64, requires_grad=True)
    out = ops.windowed_sgu(x, weight, bias, activation=lambda g: torch.where(g > 0, g, slope * g))
    (grad,) = torch.autograd.grad(out.sum(), slope)
    gate = reference.windowed_sgu(torch.cat([torch.ones_like(x[..., :6]), x[..., 6:]], -1),
                                  weight, bias)
    assert distance(grad, (gate.clamp(max=0) * x[..., :6]).sum()) < 1e-11


def test_constant_rows_of_the_gate():
    """Variance 0: the norm's eps alone keeps it finite."""
    x, weight, bias = draw(20, 8)
    x[:, 3] = 5.0
    x = x.requires_grad_()
    out = ops.windowed_sgu(x, weight, bias, eps=1e-3)
    assert distance(out, reference.windowed_sgu(x, weight, bias, eps=1e-3)) < 1e-12
    assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()


def refusals():
    x, weight, bias = draw(7, 4, dtype=torch.float32)
    return {
        "rank": ((x[0], weight, bias), {}, ValueError,
                 r"x must have shape \(b, n, 2c\), got \(7, 12\)"),
        "odd width": ((x[..., 1:], weight, bias), {}, ValueError,
                      "x must have an even last axis.*got 11"),
        "window": ((x, weight[..., 1:], bias), {}, ValueError,
                   r"weight must have shape \(h, w, 2w\), got \(2, 4, 7\)"),
        "weight rank": ((x, weight[0], bias), {}, ValueError, "weight must have shape"),
        "heads": ((x[..., :10], weight, bias), {}, ValueError,
                  "weight's h must divide c, got.*h=2.*c=5"),
        "no bias": ((x, weight, None), {}, TypeError, "bias must be a tensor, got NoneType"),
        "bias": ((x, weight, bias[:1]), {}, ValueError,
                 r"bias must have shape \(h, w\) = \(2, 4\), got \(1, 4\)"),
        "norm": ((x, weight, bias), {"norm_weight": x[0, 0]}, ValueError,
                 r"norm_weight must have shape \(c\) = \(6\), got \(12,\)"),
        "residual": ((x, weight, bias), {"gate_residual": x}, ValueError,
                     r"gate_residual must have shape \(b, n, c\) = \(2, 7, 6\), got \(2, 7, 12\)"),
        "activation": ((x, weight, bias), {"activation": "relu"}, ValueError,
                       "activation must be None, a callable or one of .*got 'relu'"),
        "a list of activations": ((x, weight, bias), {"activation": ["gelu"]}, ValueError,
                                  r"activation must be None, a callable.*got \['gelu'\]"),
        "eps": ((x, weight, bias), {"eps": "small"}, TypeError,
                "eps must be a number, got 'small'"),
        "complex": ((x, weight.to(torch.complex64), bias), {}, TypeError,
                    "weight must be.*got complex64"),
        "mixed": ((x, weight.double(), bias), {}, TypeError,
                  "weight must be float32 for float32 x, got float64"),
        "integers": ((x.long(), weight, bias), {}, TypeError, "x must be.*got int64"),
        "a list": ((x.tolist(), weight, bias), {}, TypeError, "x must be a tensor, got list"),
        "no steps": ((x[:, :0], weight, bias), {}, ValueError,
                     "x must have at least one time step"),
        "no window": ((x, weight[:, :0, :0], bias[:, :0]), {}, ValueError,
                      r"weight must have sizes of at least 1, got \(2, 0, 0\)"),
        "devices": ((x, weight.to("meta"), bias), {}, ValueError,
                    "weight must be on cpu like x, got meta"),
    }


@pytest.mark.parametrize("name", refusals())
@both_ways
def test_refuses(name, way):
    check_refusal(way, ops.windowed_sgu, *refusals()[name])


@pytest.mark.parametrize("operator", ["windowed_sgu", "causal_sgu"])
@pytest.mark.parametrize("c", [1, 2])
@pytest.mark.parametrize("scale, shift", [(0.03, 0.0), (1e-3, 1.0)])
def test_a_norm_over_few_channels(operator, c, scale, shift):
    """Its gradient is a difference of nearly equal sums, of small and of shifted gates."""
    def errors(implementation):
        x = scale * torch.randn(2, 1, 2 * c) + shift
        weight = torch.randn(1, 64, 128 if operator == "windowed_sgu" else 64)
        actual = []
        for run, dtype in ((ops, torch.float32), (reference, torch.float32), (reference, F64)):
            inputs = [t.to(dtype).requires_grad_() for t in (x, weight, torch.zeros(1, 64))]
            with fastmix.force(implementation):
                out = getattr(run, operator)(*inputs)
                actual.append(torch.autograd.grad(out.sum(), inputs[0]))
        return squared_errors(*actual)

    for implementation in implementations(operator):
        check_errors(lambda i=implementation: errors(i), (16, 48, 144))


def test_gradients_of_what_windows_share_are_rounded_once_under_transforms():
    """Each gate belongs to two slabs' products, and each norm to all: bfloat16 sums of theirs were
    off by several times the rounding of one."""
    torch.manual_seed(4)
    tensors = [t.bfloat16() for t in (
        torch.randn(1, 96, 16), torch.randn(2, 2, 4), torch.randn(2, 2), torch.randn(8))]

    def loss(function):
        def run(x, weight, bias, scale):
            out = function(x, weight, bias, norm_weight=scale, activation="silu")
            signs = 1 - 2 * (torch.arange(out.numel()) % 3 == 0).int().view(out.shape)
            return (out * signs).sum()

        return torch.func.grad(run, (0, 3))

    exact = loss(reference.windowed_sgu)(*(t.double() for t in tensors))
    with fastmix.force("fallback"):
        grads = loss(ops.windowed_sgu)(*tensors)
    for grad, e in zip(grads, exact, strict=True):
        assert ((grad.double() - e).abs() <= 2**-8 * e.abs() + 1e-4 * e.abs().max()).all()
