"""Checks of modules' sizes and of their input.

Checks look at what arrives and hold it against integers that were stored when the module was
built. They never look into a child: its parameters may be elsewhere, empty or of another shape
until it is called. Devices are left to torch, because a hook may move things.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastmix import _torch_private
from fastmix.checks import INTEGER, check_length, check_shape, check_tensor, is_plain_real


def is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether calling `module` does what `kind` does and nothing else.

    Only then may an operator take its place: not a subclass, nothing that hooks, replaces
    forward or parametrises (which makes it a subclass).
    """
    exactly = type(module) is kind or (
        torch.compiler.is_exporting()  # which gives each module a subclass of its own
        and isinstance(module, kind) and type(module).forward is kind.forward)
    return exactly and not (
        module._forward_pre_hooks or module._forward_hooks
        or module._backward_pre_hooks or module._backward_hooks
        or "forward" in module.__dict__
        or _torch_private.has_global_hooks())


def check_sizes(where: str, **sizes: int | None) -> None:
    """Each at least 1; None passes."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{where}: {name} must be at least 1, got {size}")


def check_sequence(where: str, x: Tensor, dim: int) -> int:
    """x (b, n, dim), real, with n ≥ 1. Returns n."""
    if is_plain_real(x):  # each step of a text comes here several times
        shape = x.shape
        if len(shape) == 3 and shape[2] == dim and shape[1] > 0 < dim:
            return shape[1]
    check_tensor(where, "x", x)
    n = check_shape(where, "x", x, "b n dim", {"dim": dim})["n"]
    check_length(where, "x", n)
    return n


def check_features(where: str, x: Tensor, dim: int) -> None:
    """x (…, dim), real."""
    if is_plain_real(x) and x.shape[-1:] == (dim,):
        return
    check_tensor(where, "x", x)
    if x.shape[-1:] != (dim,):
        raise ValueError(
            f"{where}: x must have shape (…, dim) = (…, {dim}), got {tuple(x.shape)}")


def check_feed_forward(net: nn.Sequential, input: tuple[Tensor]) -> None:
    """A forward pre-hook: `net`, a FeedForward, takes x (…, net.dim) only."""
    if not torch.jit.is_scripting():
        for x in input:
            check_features("FeedForward", x, net.dim)  # type: ignore[arg-type]


def feed_forward(dim: int, *layers: nn.Module) -> nn.Sequential:
    """A Sequential of `layers` that raises a clear error for x of another width than `dim`.

    The check is a hook, so that the whole stays the plain Sequential that was published.
    """
    net = nn.Sequential(*layers)
    net.dim = dim  # type: ignore[assignment]
    net.register_forward_pre_hook(check_feed_forward)
    return net


def got_tokens(x: Tensor) -> str:
    """The end of an error about token ids x, where they can be read."""
    return "" if _torch_private.transforms_active() else (
        f", got {int(x.min())} to {int(x.max())}")


def embed_tokens(
    where: str, embedding: Callable[[Tensor], Tensor], x: Tensor, max_length: int | None = None,
    advice: str = "",
) -> Tensor:
    """embedding(x), where x holds token ids (b, n), integers, with 1 ≤ n ≤ max_length. `advice`
    ends the error of a token that is out of range.

    A module that was put in the embedding's place may take any (b, n, …), such as soft tokens for a
    Linear. On CPUs a token that is out of range raises a clear IndexError; elsewhere, looking for
    one would mean waiting for the device.
    """
    if type(embedding) is nn.Embedding:
        check_tensor(where, "x", x, INTEGER)
        n = check_shape(where, "x", x, "b n")["n"]
    else:
        n = x.shape[1]
    check_length(where, "x", n, max_length)
    try:
        out = embedding(x)
    except IndexError as error:
        count = getattr(embedding, "num_embeddings", None)
        expected = "that the embedding has" if count is None else f"from 0 to {count - 1}"
        raise IndexError(
            f"{where}: x must hold token ids {expected}{got_tokens(x)}{advice}") from error
    if x.is_meta and not out.is_meta:  # torch would go on with whatever the memory holds
        raise ValueError(f"{where}: x must hold token ids, got one on meta, which holds none")
    return out
