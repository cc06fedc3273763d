"""The activations that the gating units know by name."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
}

# In the operators' schemas, in place of a name, where the caller applies a function of their own:
# the operator returns the mixed gate, neither activated nor multiplied by res. (A user's None is
# "identity".)
OUTSIDE = "outside"
