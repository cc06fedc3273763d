"""Text from a language model, one token after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmix.checks import INTEGER, check_length, check_number, check_shape, check_tensor
from fastmix.dtypes import wide
from fastmix.states import can_join, concatenate, in_place


def generate(
        model: nn.Module, prompt: Tensor, max_new_tokens: int, *, temperature: float = 1.0,
        top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
        eos_token: int | None = None, prompt_lengths: Tensor | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        stream: Callable[[Tensor], Any] | None = None) -> Tensor:
    """Continues each row of a prompt by `max_new_tokens` tokens.

    Args:
        model: a language model of `fastmix.nn`, or any that is called in the same way:
            logits, cache = model(tokens, cache=cache, return_cache=True). It runs as in eval().
        prompt: (b, n) token ids, int64 or int32
        max_new_tokens: at least 1. A model with a max_seq_len reads at most so many tokens: the
            prompt and all new ones but the last.
        temperature: divides the logits; 0 takes the likeliest token and draws nothing
        top_k: draw from the likeliest top_k tokens
        top_p: draw from the likeliest tokens whose probabilities make up top_p, in (0, 1]
        min_p: draw from tokens that are at least min_p times as probable as the likeliest
        eos_token: ends its row, which holds it from there on
        prompt_lengths: (b,), how many tokens at the start of each row of prompt count, at least 1;
            all n if None. Each row is continued as if it were alone.
        generator: draws the tokens; torch's own if None
        stream: called with the tokens (b,) of each step

    Returns:
        (b, n + max_new_tokens): the prompt as it was handed in, followed by the new tokens.

    Raises TypeError and ValueError for arguments that do not fit.

    >>> model = fastmix.nn.GateLoopTransformer(32, num_tokens=256, depth=2)
    >>> fastmix.generate(model, torch.tensor([[72, 105]]), 5).shape
    torch.Size([1, 7])
    """
    steps = _steps("generate", model, prompt, max_new_tokens, temperature, top_k, top_p, min_p,
                   eos_token, prompt_lengths, generator)
    new = []
    with _eval_mode(model):
        for tokens in steps:
            if stream is not None:
                stream(tokens)
            new.append(tokens)
    if eos_token is not None:
        new += [torch.full_like(tokens, eos_token)] * (max_new_tokens - len(new))
    return torch.cat((prompt, torch.stack(new, dim=1)), dim=1)


def stream(
        model: nn.Module, prompt: Tensor, max_new_tokens: int, *, temperature: float = 1.0,
        top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
        eos_token: int | None = None, prompt_lengths: Tensor | Sequence[int] | None = None,
        generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """Does what `generate` does one step at a time: an iterator over the tokens (b,) of each step,
    which ends when all rows have ended.

    >>> model = fastmix.nn.GateLoopTransformer(32, num_tokens=256, depth=2)
    >>> for tokens in fastmix.stream(model, torch.tensor([[72, 105]]), 2):
    ...     print(tokens.shape)
    torch.Size([1])
    torch.Size([1])
    """
    return _steps("stream", model, prompt, max_new_tokens, temperature, top_k, top_p, min_p,
                  eos_token, prompt_lengths, generator)


def _steps(
        where: str, model: nn.Module, prompt: Tensor, max_new_tokens: int, temperature: float,
        top_k: int | None, top_p: float | None, min_p: float | None, eos_token: int | None,
        prompt_lengths: Tensor | Sequence[int] | None, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Checks what can be checked before the model has run."""
    check_tensor(where, "prompt", prompt, INTEGER)
    sizes = check_shape(where, "prompt", prompt, "b n")
    check_length(where, "prompt", sizes["n"])
    if sizes["b"] < 1:
        raise ValueError(f"{where}: prompt must have at least one row, got shape "
                         f"{tuple(prompt.shape)}")
    _check_integer(where, "max_new_tokens", max_new_tokens, 1)
    check_number(where, "temperature", temperature)
    if not temperature >= 0:
        raise ValueError(f"{where}: temperature must be at least 0, got {temperature}")
    if top_k is not None:
        _check_integer(where, "top_k", top_k, 1)
    for name, share in (("top_p", top_p), ("min_p", min_p)):
        if share is not None:
            check_number(where, name, share)
            if not 0 < share <= 1:
                raise ValueError(f"{where}: {name} must be above 0 and at most 1, got {share}")
    if eos_token is not None:
        _check_integer(where, "eos_token", eos_token, 0)
    lengths = _lengths(where, prompt_lengths, sizes["b"], sizes["n"])
    longest, limit = max(lengths) + max_new_tokens - 1, getattr(model, "max_seq_len", None)
    if limit is not None and longest > limit:
        raise ValueError(
            f"{where}: prompt and max_new_tokens, less the last one, must be at most the model's "
            f"max_seq_len = {limit} together, got {max(lengths)} and {max_new_tokens}: ask for "
            "fewer, or cut the prompt's beginning off")

    def pick(logits: Tensor) -> Tensor:
        return _pick(logits, temperature, top_k, top_p, min_p, generator)

    def check_vocabulary(count: int) -> None:
        for name, value, most in (("top_k", top_k, count), ("eos_token", eos_token, count - 1)):
            if value is not None and value > most:
                raise ValueError(f"{where}: {name} must be at most {most}, as the model has "
                                 f"{count} tokens, got {value}")

    count = _vocabulary(model)
    if count is not None:
        check_vocabulary(count)
    return _run(model, prompt, lengths, max_new_tokens, pick, eos_token, check_vocabulary)


def _vocabulary(model: nn.Module) -> int | None:
    """The number of tokens, where the model's last layer tells it before it runs."""
    last = getattr(model, "to_logits", None)
    last = last[-1] if isinstance(last, nn.Sequential) and len(last) else last
    return getattr(last, "out_features", None)


@torch.no_grad()
def _run(
        model: nn.Module, prompt: Tensor, lengths: list[int], max_new_tokens: int,
        pick: Callable[[Tensor], Tensor], eos_token: int | None,
        check_vocabulary: Callable[[int], None]) -> Iterator[Tensor]:
    rows = _RowsOfModel(_in_eval(model), lengths)
    logits = rows.begin(prompt)
    check_vocabulary(logits.shape[-1])
    ended = torch.zeros_like(prompt[:, 0], dtype=torch.bool)
    for left in reversed(range(max_new_tokens)):
        tokens = pick(logits).to(prompt.dtype)
        if eos_token is not None:
            tokens = tokens.masked_fill(ended, eos_token)
            ended = tokens == eos_token
        yield tokens
        if left == 0 or (eos_token is not None and bool(ended.all())):
            return
        logits = rows.go_on(tokens)


def _in_eval(model: nn.Module) -> Callable:
    """model, called in eval mode; between calls it is as it was."""
    def step(*args: Any, **kwargs: Any) -> Any:
        with _eval_mode(model):
            return model(*args, **kwargs)

    return step


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Within it, model is in eval mode. Put it around many calls rather than around each: it goes
    through all modules, unless model is in eval mode already."""
    training = [module for module in model.modules() if module.training] if model.training else []
    try:
        if training:
            model.eval()
        yield
    finally:
        for module in training:
            module.training = True


class _RowsOfModel:
    """A model that continues rows of different lengths: those of one length together, and all
    together once their caches can be joined.

    Within, rows are in the order of their lengths.
    """

    def __init__(self, step: Callable, lengths: list[int]) -> None:
        self.step = step
        self.lengths = sorted(set(lengths))
        self.sizes = [lengths.count(length) for length in self.lengths]
        self.order = torch.tensor(lengths).argsort(stable=True)
        self.back = self.order.argsort()

    def begin(self, prompt: Tensor) -> Tensor:
        """The logits (b, num_tokens) after each row's own last token."""
        self.order, self.back = self.order.to(prompt.device), self.back.to(prompt.device)
        parts = prompt[self.order].split(self.sizes)
        runs = [self.step(part[:, :length], return_cache=True)
                for part, length in zip(parts, self.lengths)]
        self.caches = [cache for _, cache in runs]
        if len(runs) > 1 and can_join(self.caches):
            self.caches = [concatenate(self.caches, self.sizes)]
            self.sizes = [len(prompt)]
        return self._in_callers_order([logits[:, -1] for logits, _ in runs])

    def go_on(self, tokens: Tensor) -> Tensor:
        """The logits after one token (b,) more."""
        if len(self.lengths) == 1:
            parts: Sequence[Tensor] = (tokens[:, None],)
        else:
            parts = tokens[self.order, None].split(self.sizes)
        with in_place():  # no one else knows these caches
            runs = [self.step(part, cache=cache, return_cache=True)
                    for part, cache in zip(parts, self.caches)]
        self.caches = [cache for _, cache in runs]
        return self._in_callers_order([logits[:, -1] for logits, _ in runs])

    def _in_callers_order(self, parts: list[Tensor]) -> Tensor:
        if len(self.lengths) == 1:
            return parts[0]
        return torch.cat(parts).index_select(0, self.back)


def _pick(
        logits: Tensor, temperature: float, top_k: int | None, top_p: float | None,
        min_p: float | None, generator: torch.Generator | None) -> Tensor:
    """One token (b,) of each row of logits (b, num_tokens)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.to(wide(logits.dtype)) / temperature
    if top_k is not None:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if top_p is not None:
        falling, tokens = probabilities.sort(dim=-1, descending=True)
        before = falling.cumsum(dim=-1) - falling
        falling = falling.masked_fill(before >= top_p, 0)
        probabilities = torch.zeros_like(falling).scatter(-1, tokens, falling)
    if min_p is not None:
        most = probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < min_p * most, 0)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _check_integer(where: str, name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where}: {name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{where}: {name} must be at least {least}, got {value}")


def _lengths(
        where: str, prompt_lengths: Tensor | Sequence[int] | None, b: int, n: int) -> list[int]:
    if prompt_lengths is None:
        return [n] * b
    values = torch.as_tensor(prompt_lengths)
    check_tensor(where, "prompt_lengths", values, INTEGER)
    check_shape(where, "prompt_lengths", values, "b", {"b": b})
    lengths = values.tolist()
    if min(lengths) < 1 or max(lengths) > n:
        raise ValueError(f"{where}: prompt_lengths must be from 1 to n={n}, got {lengths}")
    return lengths
