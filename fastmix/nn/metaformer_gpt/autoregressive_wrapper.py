"""Twin of metaformer_gpt.autoregressive_wrapper."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastmix.nn._autoregressive import PaddingWrapper, split_labels

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
        return F.cross_entropy(self.net(x, **kwargs).mT, labels.long())
