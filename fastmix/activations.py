"""The activations that the gating units know by name."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
ROOT_HALF, GAUSS = 0.5**0.5, (2 * math.pi) ** -0.5


class Activation(NamedTuple):
    """A function, and its gradient."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(the gradient of y, x, y = forward(x)) → the gradient of x, in the memory of the first"""


def _normal_share(x: Tensor) -> Tensor:
    """The normal distribution's share below x. PyTorch's gelu takes 1 + erf, which loses the digits
    of float32 from -2 downwards. Beyond 39 the slope, which a gradient times x would meet as an
    infinity, is left out; not of infinite x, where gelu has none."""
    bounded = torch.where(x.isinf(), x, x.clamp(-39, 39))
    return 0.5 * torch.special.erfc(-ROOT_HALF * bounded)


def _tanh_backward(grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """1 - y² has no digits where y is near 1, and neither has 1 - y of sigmoid's."""
    e = x.abs().mul_(-2).exp_()
    return grad.mul_(4 * e / (1 + e).square_())


def _sigmoid_backward(grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    e = x.abs().neg_().exp_()
    return grad.mul_(e / (1 + e).square_())


def _gelu_backward(grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return grad.mul_(_normal_share(x) + x * (-0.5 * x * x).exp_().mul_(GAUSS))


ACTIVATIONS = {
    "identity": Activation(lambda x: x, lambda grad, x, y: grad),
    "tanh": Activation(torch.tanh, _tanh_backward),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_backward),
    "gelu": Activation(lambda x: x * _normal_share(x), _gelu_backward),
    "silu": Activation(F.silu, lambda grad, x, y: aten.silu_backward(grad, x, grad_input=grad)),
}

# In the operators' schemas, in place of a name, where the caller applies a function of their own:
# the operator returns the mixed gate, neither activated nor multiplied by res. (A user's None is
# "identity".)
OUTSIDE = "outside"
