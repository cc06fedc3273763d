"""The spatial gating unit of gMLP, causal, over the whole sequence."""

from collections.abc import Callable
from typing import Literal, overload

from torch import Tensor

from fastmix.fallback import _sgu_state
from fastmix.fallback import causal_sgu as fallback
from fastmix.ops._register import Operator
from fastmix.ops._sgu import ARGUMENTS, BATCHED, checked_call, fake
from fastmix.states import CausalSGUState

_operator = Operator("causal_sgu", ARGUMENTS, outputs="out", fallback=fallback, fake=fake,
                     batched=BATCHED)


@overload
def causal_sgu(
        x: Tensor, weight: Tensor, bias: Tensor, *, norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None, eps: float = 1e-5, gate_residual: Tensor | None = None,
        activation: str | Callable[[Tensor], Tensor] | None = None,
        initial_state: CausalSGUState | None = None, return_state: Literal[False] = False,
        in_place: bool = False) -> Tensor: ...


@overload
def causal_sgu(
        x: Tensor, weight: Tensor, bias: Tensor, *, norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None, eps: float = 1e-5, gate_residual: Tensor | None = None,
        activation: str | Callable[[Tensor], Tensor] | None = None,
        initial_state: CausalSGUState | None = None, return_state: Literal[True],
        in_place: bool = False) -> tuple[Tensor, CausalSGUState]: ...


@overload
def causal_sgu(
        x: Tensor, weight: Tensor, bias: Tensor, *, norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None, eps: float = 1e-5, gate_residual: Tensor | None = None,
        activation: str | Callable[[Tensor], Tensor] | None = None,
        initial_state: CausalSGUState | None = None, return_state: bool = False,
        in_place: bool = False) -> Tensor | tuple[Tensor, CausalSGUState]: ...


def causal_sgu(
        x: Tensor, weight: Tensor, bias: Tensor, *, norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None, eps: float = 1e-5, gate_residual: Tensor | None = None,
        activation: str | Callable[[Tensor], Tensor] | None = None,
        initial_state: CausalSGUState | None = None, return_state: bool = False,
        in_place: bool = False) -> Tensor | tuple[Tensor, CausalSGUState]:
    """Gates a sequence by a learned mixture of all its steps so far, the gating unit of gMLPs.

    out = activation(mix(norm(gate)) + bias + gate_residual) · res, with x = [res, gate]

    Step t mixes the gate vectors of steps j ≤ t by weight[:, t, j]: windowed_sgu with one window,
    as long as the sequence. O(n²) time; no masked copy of the weight is made.

    Args:
        x: (b, n, 2c), float64, float32, bfloat16 or float16, any strides
        weight: (h, s, s) with h dividing c and s ≥ n; entries above the diagonal, and rows
            and columns from n on, have no effect
        bias: (h, s)
        norm_weight, norm_bias, eps, gate_residual, activation: as for windowed_sgu
        initial_state: the CausalSGUState that the steps before x left; none if None
        return_state: also return the state after x
        in_place: write into initial_state instead of copying its rows; without gradients

    Parameters have the dtype of x, or float32 where x has 16 bits.

    Returns:
        (b, n, c) in the dtype of x, or (that, state) with return_state; sums are kept in
        float32 at least.

    Differentiable in every tensor, to any order. Raises TypeError and ValueError for arguments
    that do not fit.

    CausalSGU of g-mlp-gpt, after gMLP (arXiv:2105.08050).

    >>> x = torch.randn(2, 10, 8)
    >>> weight, bias = torch.zeros(2, 16, 16), torch.ones(2, 16)
    >>> out = causal_sgu(x, weight, bias, activation="tanh")
    >>> out.shape
    torch.Size([2, 10, 4])
    >>> torch.allclose(out, bias.new_tensor(1.0).tanh() * x[..., :4])
    True

    A sequence in pieces, each entered from the state after the one before:

    >>> first, state = causal_sgu(x[:, :7], weight, bias, return_state=True)
    >>> causal_sgu(x[:, 7:], weight, bias, initial_state=state).shape
    torch.Size([2, 3, 4])
    """
    return checked_call("causal_sgu", _operator, "s", x, weight, bias, norm_weight, norm_bias,
                        eps, gate_residual, activation, initial_state, return_state, in_place,
                        CausalSGUState, _sgu_state.causal)
