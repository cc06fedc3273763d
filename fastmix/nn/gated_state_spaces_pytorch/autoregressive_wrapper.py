"""Twin of gated_state_spaces_pytorch.autoregressive_wrapper."""

from typing import Any

from torch import Tensor, nn

from fastmix.nn._autoregressive import PaddingWrapper, split_labels
from fastmix.nn._helpers import eval_decorator as eval_decorator
from fastmix.nn._helpers import exists as exists
from fastmix.nn._helpers import top_k as top_k

__all__ = ["AutoregressiveWrapper"]


class AutoregressiveWrapper(PaddingWrapper):
    """Draws tokens from `net`, and called with tokens x (b, n) returns the loss to train it by.

    net sees the last max_seq_len tokens, and computes its loss itself.
    """

    def __init__(self, net: nn.Module, pad_value: int = 0, max_seq_len: int = 4096) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.pad_value = pad_value
        self.net = net

    @property
    def window(self) -> int:
        return self.max_seq_len

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        x, labels = split_labels(x)
        return self.net(x, labels=labels, **kwargs)
