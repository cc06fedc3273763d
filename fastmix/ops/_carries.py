"""Carries: the states that forward keeps so that backward need not begin at step 0.

They are an output of the registered operators whose state runs along time, (b, count, …) in the
wide dtype: the state before every `carry_every`-th step, in order of time, and the last one.
Backward starts from a carry and recomputes the states up to the next. carry_every is 0, and there
are none, where no gradient will be asked for.
"""

import torch
from torch import Tensor

from fastmix import _torch_private

CARRY_EVERY = 64
# Heads have large states. On devices whose kernels walk along time anyway, fewer are kept.
HEADS_CARRY_EVERY = {"cpu": 512}


def carry_count(n: int, carry_every: int) -> int:
    """The number of carries of n steps.

    At least two unless carry_every is 0: torch specialises compiled programs on sizes of one,
    and a program is to hold for sequences of one chunk and of many.
    """
    return (n + carry_every - 1) // carry_every + 1 if carry_every else 0


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be asked for of a function of these tensors, or a tangent."""
    enabled = torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        # Nothing can be unwrapped while a program is traced.
        return enabled and (_torch_private.transforms_active()
                            or any(t.requires_grad for t in tensors if t is not None))
    # Forward mode also runs where no gradient is kept, and tensors do not show it.
    return _torch_private.forward_mode_active() or enabled and any(
        _torch_private.requires_grad_anywhere(t) for t in tensors if t is not None)
