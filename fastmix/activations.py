"""The activations that the gating units know by name."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


class Activation(NamedTuple):
    """A function, and its gradient."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(the gradient of y, x, y = forward(x)) → the gradient of x, in the memory of the first"""


ACTIVATIONS = {
    "identity": Activation(lambda x: x, lambda grad, x, y: grad),
    "tanh": Activation(
        torch.tanh, lambda grad, x, y: aten.tanh_backward(grad, y, grad_input=grad)),
    "sigmoid": Activation(
        torch.sigmoid, lambda grad, x, y: aten.sigmoid_backward(grad, y, grad_input=grad)),
    "gelu": Activation(F.gelu, lambda grad, x, y: aten.gelu_backward(grad, x, grad_input=grad)),
    "silu": Activation(F.silu, lambda grad, x, y: aten.silu_backward(grad, x, grad_input=grad)),
}

# In the operators' schemas, in place of a name, where the caller applies a function of their own:
# the operator returns the mixed gate, neither activated nor multiplied by res. (A user's None is
# "identity".)
OUTSIDE = "outside"
