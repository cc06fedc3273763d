"""Twin of metaformer_gpt.autoregressive_wrapper."""

from typing import Any

from torch import Tensor, nn

from fastmix.nn._autoregressive import PaddingWrapper, split_labels
from fastmix.nn._helpers import eval_decorator as eval_decorator
from fastmix.nn._helpers import exists as exists
from fastmix.nn._helpers import top_k as top_k
from fastmix.nn._loss import cross_entropy

__all__ = ["AutoregressiveWrapper"]


class AutoregressiveWrapper(PaddingWrapper):
    """Draws tokens from `net`, and called with tokens x (b, n) returns the loss to train it by.

    max_seq_len has no effect: net takes all tokens, and refuses more than it can.
    """

    def __init__(self, net: nn.Module, max_seq_len: int = 2048, pad_value: int = 0) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.pad_value = pad_value
        self.net = net

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        x, labels = split_labels(x)
        logits = self.net(x, **kwargs)
        return cross_entropy("AutoregressiveWrapper", "x", logits.mT, labels.long())
