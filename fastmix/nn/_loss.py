"""The loss of the language models."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmix.checks import check_shape, check_tensor
from fastmix.nn._checks import got_tokens


def token_loss(where: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of logits (b, n, num_tokens) at labels (b, n), int64, b ≥ 1."""
    check_tensor(where, "labels", labels, (torch.int64,), like=("x", logits))
    b, n, _ = logits.shape
    check_shape(where, "labels", labels, "b n", {"b": b, "n": n})
    if b < 1:
        raise ValueError(
            f"{where}: labels must hold at least 1 sequence, got shape {tuple(labels.shape)}")
    return cross_entropy(where, "labels", logits.flatten(0, 1), labels.flatten())


def cross_entropy(where: str, name: str, logits: Tensor, labels: Tensor,
                  ignore_index: int = -100) -> Tensor:
    """Torch's, of logits (b, num_tokens, …) at labels (b, …), the argument `name` of `where`."""
    try:
        return F.cross_entropy(logits, labels, ignore_index=ignore_index)
    except IndexError as error:
        raise IndexError(
            f"{where}: {name} must hold token ids from 0 to {logits.shape[1] - 1}, or "
            f"{ignore_index} where a step is left out{got_tokens(labels)}") from error
