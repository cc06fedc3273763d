"""The spatial gating unit of gMLP, causal, over a window and the one before it."""

from collections.abc import Callable
from typing import Literal, overload

from torch import Tensor

from fastmix.fallback import _sgu_state
from fastmix.fallback import windowed_sgu as fallback
from fastmix.ops._register import Operator
from fastmix.ops._sgu import ARGUMENTS, BATCHED, checked_call, fake
from fastmix.states import WindowedSGUState

_operator = Operator("windowed_sgu", ARGUMENTS, outputs="out", fallback=fallback, fake=fake,
                     batched=BATCHED)


@overload
def windowed_sgu(
        x: Tensor, weight: Tensor, bias: Tensor, *, norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None, eps: float = 1e-5, gate_residual: Tensor | None = None,
        activation: str | Callable[[Tensor], Tensor] | None = None,
        initial_state: WindowedSGUState | None = None, return_state: Literal[False] = False,
        in_place: bool = False) -> Tensor: ...


@overload
def windowed_sgu(
        x: Tensor, weight: Tensor, bias: Tensor, *, norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None, eps: float = 1e-5, gate_residual: Tensor | None = None,
        activation: str | Callable[[Tensor], Tensor] | None = None,
        initial_state: WindowedSGUState | None = None, return_state: Literal[True],
        in_place: bool = False) -> tuple[Tensor, WindowedSGUState]: ...


@overload
def windowed_sgu(
        x: Tensor, weight: Tensor, bias: Tensor, *, norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None, eps: float = 1e-5, gate_residual: Tensor | None = None,
        activation: str | Callable[[Tensor], Tensor] | None = None,
        initial_state: WindowedSGUState | None = None, return_state: bool = False,
        in_place: bool = False) -> Tensor | tuple[Tensor, WindowedSGUState]: ...


def windowed_sgu(
        x: Tensor, weight: Tensor, bias: Tensor, *, norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None, eps: float = 1e-5, gate_residual: Tensor | None = None,
        activation: str | Callable[[Tensor], Tensor] | None = None,
        initial_state: WindowedSGUState | None = None, return_state: bool = False,
        in_place: bool = False) -> Tensor | tuple[Tensor, WindowedSGUState]:
    """Gates a sequence by a learned mixture of its last steps, the gating unit of local gMLPs.

    out = activation(mix(norm(gate)) + bias + gate_residual) · res, with x = [res, gate]

    Time is cut into windows of w steps. Row r of a window mixes the 2w gate vectors of the
    window before it and its own by weight[:, r], up to its own time step (j ≤ r + w). norm is a
    layer norm over the c channels. O(n · w) time; no doubled gate and no padded copy is made.

    Args:
        x: (b, n, 2c), float64, float32, bfloat16 or float16, any strides
        weight: (h, w, 2w) with h dividing c; its entries beyond j = r + w have no effect
        bias: (h, w)
        norm_weight, norm_bias: (c,), the affine part of the layer norm; none if None
        eps: of the layer norm
        gate_residual: (b, n, c), the dtype of x
        activation: None or "identity", "tanh", "sigmoid", "gelu", "silu", or any callable,
            which is then applied outside the operator
        initial_state: the WindowedSGUState that the steps before x left; none if None
        return_state: also return the state after x
        in_place: write into initial_state instead of copying its rows; without gradients

    Parameters have the dtype of x, or float32 where x has 16 bits.

    Returns:
        (b, n, c) in the dtype of x, or (that, state) with return_state; sums are kept in
        float32 at least.

    Differentiable in every tensor, to any order. Raises TypeError and ValueError for arguments
    that do not fit.

    CausalLocalSGU of g-mlp-gpt, after gMLP (arXiv:2105.08050).

    >>> x = torch.randn(2, 10, 8)
    >>> weight, bias = torch.zeros(2, 4, 8), torch.ones(2, 4)
    >>> out = windowed_sgu(x, weight, bias)
    >>> out.shape
    torch.Size([2, 10, 4])
    >>> bool((out == x[..., :4]).all())
    True

    A sequence in pieces, each entered from the state after the one before:

    >>> first, state = windowed_sgu(x[:, :7], weight, bias, return_state=True)
    >>> torch.equal(windowed_sgu(x[:, 7:], weight, bias, initial_state=state), out[:, 7:])
    True
    """
    return checked_call("windowed_sgu", _operator, "w", x, weight, bias, norm_weight, norm_bias,
                        eps, gate_residual, activation, initial_state, return_state, in_place,
                        WindowedSGUState, _sgu_state.windowed)
