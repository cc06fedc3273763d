"""Twin of g_mlp_gpt.autoregressive_wrapper."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastmix.nn._autoregressive import Wrapper, split_labels
from fastmix.nn._helpers import eval_decorator as eval_decorator
from fastmix.nn._helpers import top_k
from fastmix.nn._loss import cross_entropy

__all__ = ["AutoregressiveWrapper", "top_k"]


class AutoregressiveWrapper(Wrapper):
    """Draws tokens from `net`, and called with tokens x (b, n) returns the loss to train it by,
    of all tokens but `ignore_index`. net sees the last net.seq_len tokens. pad_value has no
    effect.
    """

    def __init__(self, net: nn.Module, ignore_index: int = -100, pad_value: int = 0) -> None:
        super().__init__()
        self.pad_value = pad_value
        self.ignore_index = ignore_index
        self.net = net
        self.max_seq_len: int = net.seq_len  # type: ignore[assignment]

    def generate(
        self, start_tokens: Tensor, seq_len: int, eos_token: int | None = None,
        temperature: float = 1., filter_logits_fn: Callable = top_k, filter_thres: float = 0.9,
        **kwargs: Any,
    ) -> Tensor:
        """The next seq_len tokens (b, seq_len) of start_tokens (b, n), or (seq_len,) of (n,).

        Each is drawn from the likeliest (1 - filter_thres) · num_tokens: as in the published
        package, filter_logits_fn has no effect. It ends where all rows draw eos_token in one
        step. Keywords go to net.
        """
        def ends(_: Tensor, new: Tensor) -> bool:
            return eos_token is not None and bool((new == eos_token).all())

        rows = start_tokens[None] if start_tokens.ndim == 1 else start_tokens
        out = self._continue(
            rows, seq_len, self.max_seq_len, temperature, filter_thres, ends, kwargs)
        out = out[:, rows.shape[1]:]
        return out[0] if start_tokens.ndim == 1 else out

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        x, labels = split_labels(x)
        logits = self.net(x, **kwargs)
        return cross_entropy("AutoregressiveWrapper", "x", logits.mT, labels.long(),
                             self.ignore_index)
