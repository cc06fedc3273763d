"""Small functions that the published files have beside their classes, for who imports them."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def exists(value: Any) -> bool:
    """Whether `value` is anything but None."""
    return value is not None


def default(value: Any, other: Any) -> Any:
    """`value`, or `other` in the place of None."""
    return other if value is None else value


def cast_tuple(value: Any, num: int) -> tuple:
    """`value` num times, or as it is if it is a tuple."""
    return value if isinstance(value, tuple) else (value,) * num


def append_dims(x: Tensor, num_dims: int) -> Tensor:
    """x with num_dims more axes of size 1 at its end."""
    return x.reshape(*x.shape, *[1] * num_dims)


def pad_at_dim(
    t: Tensor, pad: tuple[int, int], dim: int = -1, value: float = 0.0
) -> Tensor:
    """t with as many of `value` before and behind axis `dim` as `pad` says."""
    later_axes = t.ndim - 1 - dim % t.ndim
    return F.pad(t, (0, 0) * later_axes + tuple(pad), value=value)


def Sequential(*modules: nn.Module | None) -> nn.Module:
    """The modules that are not None one after the other; of one that one, of none an Identity."""
    given = [module for module in modules if module is not None]
    if len(given) > 1:
        return nn.Sequential(*given)
    return given[0] if given else nn.Identity()


def eval_decorator(fn: Callable) -> Callable:
    """A function of a module, in eval mode while it runs."""
    @functools.wraps(fn)
    def run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        was_training = model.training
        model.eval()
        try:
            return fn(model, *args, **kwargs)
        finally:
            model.train(was_training)

    return run


def top_k(logits: Tensor, thres: float = 0.9) -> Tensor:
    """logits (b, num_tokens), -∞ but for the largest (1 - thres) · num_tokens."""
    values, tokens = logits.topk(int((1 - thres) * logits.shape[-1]), dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, tokens, values)
