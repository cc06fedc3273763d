"""The spatial gating unit of gMLP, causal, over the whole sequence."""

from fastmix.fallback import causal_sgu as fallback
from fastmix.ops._register import Operator
from fastmix.ops.windowed_sgu import ARGUMENTS, fake, gate

_operator = Operator("causal_sgu", ARGUMENTS, outputs="out", fallback=fallback, fake=fake,
                     batched={"x": 3, "gate_residual": 3})


def causal_sgu(x, weight, bias, *, norm_weight=None, norm_bias=None, eps=1e-5,
               gate_residual=None, activation=None):
    """windowed_sgu with one window, as long as the sequence

    Step t mixes the gate vectors of steps j ≤ t by weight[:, t, j]. O(n²) time.

    Args:
        x: (b, n, 2c), real, any strides
        weight: (h, s, s) with h dividing c and s ≥ n; entries above the diagonal, and rows
            and columns from n on, have no effect
        bias: (h, s)
        norm_weight, norm_bias, eps, gate_residual, activation: as for windowed_sgu

    Returns:
        (b, n, c) in the dtype of x; sums are kept in float32 at least.

    Differentiable in every tensor, to any order. Raises TypeError and ValueError for
    arguments that do not fit.

    CausalSGU of g-mlp-gpt, after gMLP (arXiv:2105.08050).
    """
    return gate("causal_sgu", _operator, "s", x, weight, bias, norm_weight, norm_bias, eps,
                gate_residual, activation)
