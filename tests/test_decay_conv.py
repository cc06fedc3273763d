"""decay_conv's own: decays at the edge, states handed over, refusals."""

import pytest
import torch

from cases import distance
from fastmix import ops, reference
from refusal import both_ways, check_refusal

F64 = torch.float64


def test_decays_at_and_beyond_the_edge():
    """0 keeps the present, 1 sums, -1 alternates, 1.01 grows, a denormal does nothing."""
    decay = torch.tensor([0.0, 1.0, -1.0, 1.01, 5e-324, 0.5], dtype=F64, requires_grad=True)
    x = torch.randn(2, 300, 6, 3, dtype=F64)
    out = ops.decay_conv(x, decay)
    assert distance(out, reference.decay_conv(x, decay)) < 1e-12
    assert torch.equal(out[:, :, 0], x[:, :, 0])
    assert distance(out[:, :, 1], x[:, :, 1].cumsum(1)) < 1e-12
    weight = torch.randn_like(x)
    (actual,) = torch.autograd.grad((out * weight).sum(), decay)
    (expected,) = torch.autograd.grad((reference.decay_conv(x, decay) * weight).sum(), decay)
    assert ((actual - expected).abs() <= 1e-11 * expected.abs()).all()


def test_it_is_a_convolution_with_a_geometric_kernel():
    decay, gain = torch.rand(2, 3, dtype=F64).unbind(0)
    x = torch.randn(2, 257, 3, 2, dtype=F64)
    kernel = gain * decay ** torch.arange(257, dtype=F64)[:, None]
    assert distance(ops.decay_conv(x, decay, gain), ops.fft_conv(x, kernel)) < 1e-12


def test_segments_joined_by_their_states_make_the_whole():
    decay, gain = torch.rand(2, 3, dtype=F64).unbind(0)
    x = torch.randn(2, 150, 3, 2, dtype=F64)
    whole, last = ops.decay_conv(x, decay, gain, return_state=True)
    state, pieces = None, []
    for start, stop in ((0, 1), (1, 64), (64, 131), (131, 150)):
        piece, state = ops.decay_conv(x[:, start:stop], decay, gain, initial_state=state,
                                      return_state=True)
        pieces.append(piece)
    assert distance(torch.cat(pieces, 1), whole) < 1e-13
    assert distance(state, last) < 1e-13


def test_no_batch_leaves_no_gradient_to_a_decay_that_is_none():
    """Differentiated again it is 0 too, not the slope of a power times zeros."""
    x = torch.randn(0, 20, 3, 1)
    decay = torch.full((3,), torch.nan, requires_grad=True)
    for create_graph in (False, True):
        (grad,) = torch.autograd.grad(ops.decay_conv(x, decay).sum(), decay,
                                      create_graph=create_graph)
        assert torch.equal(grad, torch.zeros(3))


def test_half_precision_data_with_float32_parameters():
    x = torch.randn(2, 90, 3, 4).bfloat16()
    decay, gain = torch.rand(2, 3).unbind(0)
    out, state = ops.decay_conv(x, decay, gain, return_state=True)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    exact = reference.decay_conv(x.double(), decay.double(), gain.double())
    assert distance(out.double(), exact) < 2**-8


def refusals():
    x, decay = torch.randn(2, 7, 3, 4), torch.rand(3)
    return {
        "rank": ((x[0], decay), {}, ValueError,
                 r"x must have shape \(b, n, h, d\), got \(7, 3, 4\)"),
        "heads": ((x, decay[:2]), {}, ValueError,
                  r"decay must have shape \(h\) = \(3\), got \(2,\)"),
        "gain": ((x, decay, decay[None]), {}, ValueError, "gain must have shape"),
        "state": ((x, decay), {"initial_state": x[:, 0, :, :2]}, ValueError,
                  r"initial_state must have shape \(b, h, d\) = \(2, 3, 4\), got \(2, 3, 2\)"),
        "half state": ((x.half(), decay), {"initial_state": x[:, 0].half()}, TypeError,
                       "initial_state must be float32, got float16"),
        "complex": ((x, decay.to(torch.complex64)), {}, TypeError, "decay must be.*got complex64"),
        "integers": ((x.long(), decay), {}, TypeError, "x must be.*got int64"),
        "wide decay": ((x, decay.double()), {}, TypeError,
                       "decay must be float32 for float32 x, got float64: convert it, by "
                       r"\.to\(torch.float32\)"),
        "no steps": ((x[:, :0], decay), {}, ValueError,
                     "x must have at least one time step, got n=0: leave empty sequences out"),
        "devices": ((x, decay.to("meta")), {}, ValueError,
                    r"decay must be on cpu like x, got meta: move it, by \.to\('cpu'\)"),
        "a number": ((x, 0.5), {}, TypeError, "decay must be a tensor, got float"),
    }


@pytest.mark.parametrize("name", refusals())
@both_ways
def test_refuses(name, way):
    check_refusal(way, ops.decay_conv, *refusals()[name])
