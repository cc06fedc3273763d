"""The running mean, the pooling mixer of causal PoolFormers."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastmix.checks import Passed, check_flag, check_length, check_tensor
from fastmix.dtypes import wide
from fastmix.fallback import cumulative_mean as fallback
from fastmix.ops._carries import needs_gradient
from fastmix.ops._register import Operator
from fastmix.ops._states import check_state
from fastmix.ops.linear_scan import linear_scan
from fastmix.states import CumulativeMeanState

_operator = Operator(
    "cumulative_mean", "Tensor x", outputs="out", fallback=fallback,
    fake=lambda x: x.new_empty(x.shape), batched={"x": None})
_passed = Passed()


@overload
def cumulative_mean(x: Tensor, *, initial_state: CumulativeMeanState | None = None,
                    return_state: Literal[False] = False) -> Tensor: ...


@overload
def cumulative_mean(x: Tensor, *, initial_state: CumulativeMeanState | None = None,
                    return_state: Literal[True]) -> tuple[Tensor, CumulativeMeanState]: ...


@overload
def cumulative_mean(
        x: Tensor, *, initial_state: CumulativeMeanState | None = None,
        return_state: bool = False) -> Tensor | tuple[Tensor, CumulativeMeanState]: ...


def cumulative_mean(
        x: Tensor, *, initial_state: CumulativeMeanState | None = None,
        return_state: bool = False) -> Tensor | tuple[Tensor, CumulativeMeanState]:
    """Mixes a sequence by the mean of all its steps so far.

    y_t = mean of x_0 … x_t

    Linear in n.

    Args:
        x: (b, n, …), float64, float32, bfloat16 or float16, any strides; time is axis 1
        initial_state: the CumulativeMeanState that the steps before x left; none if None
        return_state: also return the state after x

    Returns:
        The shape and dtype of x, or (that, state) with return_state; sums are kept in float32
        at least.

    Differentiable to any order. Raises TypeError and ValueError for arguments that do not fit.

    The causal pooling of metaformer-gpt, after MetaFormer (arXiv:2111.11418).

    >>> x = torch.tensor([[1.0, 3.0, 8.0]])
    >>> cumulative_mean(x)
    tensor([[1., 2., 4.]])

    A sequence in pieces, each entered from the state after the one before:

    >>> first, state = cumulative_mean(x[:, :2], return_state=True)
    >>> cumulative_mean(x[:, 2:], initial_state=state)
    tensor([[4.]])
    """
    where = "cumulative_mean"
    key = None
    if initial_state is None or type(initial_state) is CumulativeMeanState:
        key = _passed.key(x, *(initial_state or ()))
    if not _passed.has(key):
        _check(where, x, initial_state)
        _passed.add(key)
    check_flag(where, "return_state", return_state)
    if initial_state is None:
        if not return_state:
            return _operator(x)
        # Converted once: autograd would add up the gradients of outputs and state in 16 bits.
        inputs = x.to(wide(x.dtype)) if needs_gradient(x) else x
        means = _operator(inputs)
        return means.to(x.dtype), _state_after(inputs, means)
    b, n, *rest = x.shape
    total, steps = initial_state
    inputs = x.to(wide(x.dtype))
    after = steps + n
    if n == 1:
        sums, count = total.unsqueeze(1) + inputs, after
    else:
        sums = linear_scan(inputs.new_ones(1, 1).expand(b, n), inputs, total)
        count = steps[:, None] + torch.arange(1, n + 1, device=x.device)
    out = (sums / count.view(b, n, *(1,) * len(rest))).to(x.dtype)
    if not return_state:
        return out
    return out, CumulativeMeanState(sums[:, -1].clone() if n > 1 else sums.squeeze(1), after)


def _check(where: str, x: Any, initial_state: Any) -> None:
    check_tensor(where, "x", x)
    if x.ndim < 2:
        raise ValueError(f"{where}: x must have shape (b, n, …), got {tuple(x.shape)}: "
                         "x[None] has a batch")
    check_length(where, "x", x.shape[1])
    if initial_state is not None:
        sizes = {"b": x.shape[0], **{f"c{i}": size for i, size in enumerate(x.shape[2:])}}
        check_state(where, initial_state, CumulativeMeanState, x, {"sum": " ".join(sizes)},
                    wide(x.dtype), sizes)


def _state_after(x: Tensor, means: Tensor) -> CumulativeMeanState:
    n = x.shape[1]
    total = means[:, -1] * n if x.dtype == wide(x.dtype) else x.sum(1, dtype=wide(x.dtype))
    count = torch.full(x.shape[:1], n, dtype=torch.int64, device=x.device)
    return CumulativeMeanState(total, count)
