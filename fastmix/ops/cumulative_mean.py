"""The running mean, the pooling mixer of causal PoolFormers."""

from fastmix.checks import check_length, check_tensor
from fastmix.fallback import cumulative_mean as fallback
from fastmix.ops._register import Operator

_operator = Operator(
    "cumulative_mean", "Tensor x", outputs="out", fallback=fallback,
    fake=lambda x: x.new_empty(x.shape), batched={"x": None})


def cumulative_mean(x):
    """y_t = mean of x_0 … x_t

    Args:
        x: (b, n, …), real, any strides; time is axis 1

    Returns:
        The shape and dtype of x; sums are kept in float32 at least.

    Differentiable to any order. Raises TypeError and ValueError for arguments that do not
    fit. The causal pooling of metaformer-gpt, after MetaFormer (arXiv:2111.11418).
    """
    where = "cumulative_mean"
    check_tensor(where, "x", x)
    if x.ndim < 2:
        raise ValueError(f"{where}: x must have shape (b, n, …), got {tuple(x.shape)}")
    check_length(where, "x", x.shape[1])
    return _operator(x)
