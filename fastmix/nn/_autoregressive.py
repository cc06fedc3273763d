"""The base of the published packages' AutoregressiveWrappers: the same tokens under one seed."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmix.checks import INTEGER, check_length, check_shape, check_tensor
from fastmix.states import in_place

WHERE = "AutoregressiveWrapper"


class Wrapper(nn.Module):
    """Draws tokens from `net` and trains it to tell each from those before it."""

    net: nn.Module

    @torch.no_grad()
    def _continue(
        self, start_tokens: Tensor, seq_len: int, window: int | None, temperature: float,
        filter_thres: float, ends: Callable[[Tensor, Tensor], bool], kwargs: dict,
    ) -> Tensor:
        """start_tokens (b, n) and up to seq_len more: till ends(all, the newest (b, 1)).

        net sees the last `window` tokens. While those are all, it goes on from its cache; then,
        as each step moves every token of the window, it begins anew for each.
        """
        check_tensor(WHERE, "start_tokens", start_tokens, INTEGER)
        sizes = check_shape(WHERE, "start_tokens", start_tokens, "b n")
        check_length(WHERE, "start_tokens", sizes["n"])
        if not temperature > 0:
            raise ValueError(f"{WHERE}: temperature must be above 0, got {temperature}")
        keeps_cache = "return_cache" in inspect.signature(self.net.forward).parameters
        was_training = self.training
        self.eval()
        try:
            out = new = start_tokens
            cache = None
            for _ in range(seq_len):
                if keeps_cache and (window is None or out.shape[1] <= window):
                    with in_place():  # no one else knows this cache
                        logits, cache = self.net(new, cache=cache, return_cache=True, **kwargs)
                else:
                    logits = self.net(out if window is None else out[:, -window:], **kwargs)
                new = _draw(logits[:, -1], temperature, filter_thres)
                out = torch.cat((out, new), dim=1)
                if ends(out, new):
                    break
        finally:
            self.train(was_training)
        return out


class PaddingWrapper(Wrapper):
    """Pads what follows a row's eos_token."""

    pad_value: int

    @property
    def window(self) -> int | None:
        """The number of the last tokens that net sees; all if None."""
        return None

    def generate(
        self, start_tokens: Tensor, seq_len: int, eos_token: int | None = None,
        temperature: float = 1.0, filter_thres: float = 0.9, **kwargs: Any,
    ) -> Tensor:
        """The next seq_len tokens (b, seq_len) of start_tokens (b, n).

        Each is drawn from the likeliest (1 - filter_thres) · num_tokens. Once every row has had
        an eos_token, in start_tokens or since, it ends; what follows a row's first is pad_value.
        Keywords go to net.
        """
        def ends(out: Tensor, _: Tensor) -> bool:
            return eos_token is not None and bool((out == eos_token).any(dim=-1).all())

        out = self._continue(
            start_tokens, seq_len, self.window, temperature, filter_thres, ends, kwargs)
        if eos_token is not None and ends(out, out):
            out = _fill_after(out, eos_token, self.pad_value)
        return out[:, start_tokens.shape[1]:]


def _draw(logits: Tensor, temperature: float, filter_thres: float) -> Tensor:
    """One of the likeliest (1 - filter_thres) · num_tokens tokens, (b, 1)."""
    num_tokens = logits.shape[-1]
    k = int((1 - filter_thres) * num_tokens)
    if not 1 <= k <= num_tokens:
        raise ValueError(f"{WHERE}: filter_thres must leave 1 to all {num_tokens} tokens, "
                         f"got {filter_thres}, which leaves {k}")
    values, tokens = logits.topk(k, dim=-1)
    kept = torch.full_like(logits, -torch.inf).scatter(-1, tokens, values)
    return torch.multinomial(F.softmax(kept / temperature, dim=-1), 1)


def _fill_after(out: Tensor, eos_token: int, pad_value: int) -> Tensor:
    """out (b, n) with `pad_value` behind each row's first eos_token."""
    after = F.pad(out == eos_token, (1, -1)).cumsum(dim=-1) > 0
    return out.masked_fill(after, pad_value)


def split_labels(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (b, n) as the tokens that are read and those that follow them, (b, n - 1) each."""
    check_tensor(WHERE, "x", x, INTEGER)
    check_shape(WHERE, "x", x, "b n")
    if x.shape[0] < 1 or x.shape[1] < 2:
        raise ValueError(f"{WHERE}: x must hold at least 1 sequence of 2 tokens, "
                         f"got shape {tuple(x.shape)}")
    return x[:, :-1], x[:, 1:]
