"""linear_scan's own: broadcasting, resets, both directions, dtypes, refusals."""

import pytest
import torch

from cases import distance
from fastmix import ops, reference
from refusal import both_ways, check_refusal

F64 = torch.float64


@pytest.mark.parametrize("shape", [(2, 90), (2, 90, 3), (2, 90, 3, 1), (2, 90, 1, 4), (2, 90, 3, 4),
                                   (2, 90, 1, 1)])
def test_gates_broadcast_over_trailing_axes(shape):
    gates = torch.rand(*shape, dtype=F64, requires_grad=True)
    inputs = torch.randn(2, 90, 3, 4, dtype=F64)
    full = gates.reshape(*shape, *(1,) * (4 - len(shape))).expand(2, 90, 3, 4)
    weight = torch.randn_like(inputs)
    for reverse in (False, True):
        actual = ops.linear_scan(gates, inputs, reverse=reverse)
        expected = reference.linear_scan(full, inputs, reverse=reverse)
        assert distance(actual, expected) < 1e-13
        (grad,) = torch.autograd.grad((actual * weight).sum(), gates)
        (defined,) = torch.autograd.grad((expected * weight).sum(), gates, retain_graph=True)
        assert grad.shape == gates.shape
        assert distance(grad, defined) < 1e-12


@pytest.mark.parametrize("number", [torch.bfloat16, torch.complex64])  # of inputs
def test_gradients_of_broadcast_16_bit_gates_are_rounded_once(number):
    """They are sums over the axes that a gate holds for: these cancel but for a hundredth."""
    gates = torch.tensor([0.0, 0.75]).view(1, 2, 1, 1).expand(1, 2, 1, 3).bfloat16()
    inputs = torch.tensor([1.234, -1.234]).view(1, 1, 2, 1).expand(1, 2, 2, 3).bfloat16()
    weight = torch.ones(1, 2, 2, 3)
    weight[:, 1, 0] = 1.0078125
    grads = []
    exact = torch.complex128 if number.is_complex else F64
    for function, dtype, of_inputs in ((ops.linear_scan, torch.bfloat16, number),
                                       (reference.linear_scan, F64, exact)):
        leaf = gates.to(dtype).requires_grad_()
        out = function(leaf, inputs.to(of_inputs))
        grads.append(torch.autograd.grad(out, leaf, weight.to(of_inputs))[0].double())
    assert torch.allclose(*grads, rtol=2**-8, atol=0)


def test_inputs_of_one_number_per_step():
    gates, inputs = torch.rand(2, 2, 70, dtype=F64).unbind(0)
    assert distance(ops.linear_scan(gates, inputs), reference.linear_scan(gates, inputs)) < 1e-13


def test_a_gate_of_zero_resets_exactly():
    gates, inputs = torch.rand(2, 2, 200, 3, dtype=F64).unbind(0)
    gates[:, 120] = 0
    inputs[:, :120] *= 1e200
    actual = ops.linear_scan(gates, inputs)
    late = ops.linear_scan(gates[:, 120:], inputs[:, 120:])
    assert distance(actual[:, 120:], late) < 1e-14


@pytest.mark.parametrize("reverse", [False, True])
def test_segments_joined_by_their_states(reverse):
    gates, inputs = torch.randn(2, 2, 150, 3, dtype=torch.complex128).unbind(0)
    gates = gates / (1 + gates.abs())
    whole = ops.linear_scan(gates, inputs, reverse=reverse)
    cuts = [(0, 1), (1, 64), (64, 131), (131, 150)]
    state, pieces = None, {}
    for start, stop in reversed(cuts) if reverse else cuts:
        pieces[start] = ops.linear_scan(gates[:, start:stop], inputs[:, start:stop], state,
                                        reverse=reverse)
        state = pieces[start][:, 0 if reverse else -1]
    assert distance(torch.cat([pieces[start] for start, _ in cuts], 1), whole) < 1e-13


def test_reverse_is_the_flipped_scan():
    gates, inputs = torch.rand(2, 2, 101, 3, dtype=F64).unbind(0)
    flipped = ops.linear_scan(gates.flip(1), inputs.flip(1)).flip(1)
    assert distance(ops.linear_scan(gates, inputs, reverse=True), flipped) < 1e-13


def test_unit_gates_over_65536_steps():
    angle = 6.3 * torch.rand(1, 65_536, 2, dtype=F64)
    gates, inputs = torch.polar(torch.ones_like(angle), angle), torch.randn(1, 65_536, 2, dtype=F64)
    actual = ops.linear_scan(gates.to(torch.complex64), inputs.float())
    assert distance(actual.to(gates.dtype), ops.linear_scan(gates, inputs)) < 2e-4


def test_autocast_promotes_to_the_initial_state():
    gates, inputs = torch.rand(2, 2, 20, 3).bfloat16().unbind(0)
    state = torch.randn(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = ops.linear_scan(gates, inputs, state)
    assert torch.equal(states, ops.linear_scan(gates.float(), inputs.float(), state))


def refusals():
    a, x = torch.rand(2, 2, 7, 3).unbind(0)
    c = a.to(torch.complex64)
    return {
        "rank": ((a[0, :, 0], x[0, :, 0]), {}, ValueError,
                 r"inputs must have shape \(b, n, …\), got \(7,\)"),
        "length": ((a[:, 1:], x), {}, ValueError, r"gates must have leading axes.*got \(2, 6, 3\)"),
        "extra axis": ((a[..., None], x), {}, ValueError, "gates must have leading axes"),
        "static": ((a[:, :1], x), {}, ValueError, r"gates must .*: expand .*gates\.expand\(b, n"),
        "too wide": ((a, x[..., :1]), {}, ValueError, "gates must have leading axes"),
        "state": ((a, x, x[:, 0, :2]), {}, ValueError,
                  r"initial_state must have shape \(2, 3\), got \(2, 2\)"),
        "state dtype": ((c, x.to(torch.complex64), x[:, 0]), {}, TypeError,
                        "initial_state must be complex64 like gates, got float32"),
        "mixed state dtype": ((c, x, x[:, 0]), {}, TypeError,
                              "initial_state must be complex64, got float32"),
        "mixed": ((a, x.double()), {}, TypeError, "inputs must be float32 like gates, got float64"),
        "mixed complex": ((a.to(torch.complex128), x), {}, TypeError,
                          "gates must be complex64 for float32 inputs, got complex128"),
        "integers": ((a, x.int()), {}, TypeError, "inputs must be.*got int32"),
        "no steps": ((a[:, :0], x[:, :0]), {}, ValueError,
                     "inputs must have at least one time step"),
        "a flag": ((a, x), {"reverse": "yes"}, TypeError,
                   "reverse must be True or False, got 'yes'"),
        "devices": ((a, x.to("meta")), {}, ValueError,
                    "inputs must be on cpu like gates, got meta"),
    }


@pytest.mark.parametrize("name", refusals())
@both_ways
def test_refuses(name, way):
    check_refusal(way, ops.linear_scan, *refusals()[name])
