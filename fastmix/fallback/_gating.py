"""The parts that the two spatial gating units share: layer norm, activation, product."""

from typing import Any

import torch
from torch import Tensor

from fastmix import _torch_private
from fastmix.activations import ACTIVATIONS, OUTSIDE
from fastmix.fallback._values import all_finite, is_anything, is_readable

BLOCK = 64  # the fewest rows of a block of the triangle


def row_blocks(n: int, factor: Tensor, *others: Tensor | None) -> list[tuple[int, int]]:
    """(first row, end) of the blocks in which a lower triangle of n rows is multiplied by `factor`.

    Up to eight, of at least BLOCK rows: what they save must outweigh the extra calls. A block
    multiplies steps that come after its rows by zeros: NaN and infinity go row by row. So does what
    vmap hides, because the gradients that come back to it are not seen; and where a product is
    differentiated again, what makes them NaN or infinite if one of the `others` is.
    """
    factors: list[Tensor | None] = [factor]
    if not torch.compiler.is_compiling() and _torch_private.is_wrapped(factor):
        factors += others
    step = max(BLOCK, -(-n // 8)) if all_finite(*factors) and not is_anything(factor) else 1
    return [(i, min(i + step, n)) for i in range(0, n, step)]


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else cast_tensor(tensor, dtype)


def cast_tensor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor.to(dtype), at less cost where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def cast_like(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None or gradient is None else gradient.to(parameter.dtype)


def normalize(gate: Tensor, weight: Tensor | None, bias: Tensor | None,
              eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """gate (b, n, c), weight and bias (c,) or None → normed, mean, inverse deviation."""
    if not _torch_private.transforms_active():
        statistics = torch.native_layer_norm(gate, gate.shape[-1:], cast(weight, gate.dtype),
                                             cast(bias, gate.dtype), eps)
        if not _overflowed(statistics[2]):
            return statistics
    return normalize_plain(gate, weight, bias, eps)


def normalize_plain(gate: Tensor, weight: Tensor | None, bias: Tensor | None,
                    eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`normalize`, of squares that overflow, and to be differentiated: PyTorch's third
    derivatives of its layer norm are wrong, and so are tangents of a bias without a weight.
    """
    weight, bias = cast(weight, gate.dtype), cast(bias, gate.dtype)
    normed, mean, inverse_deviation = _normalize(gate, eps, 1)
    if _overflowed(inverse_deviation):
        factor = _factor(gate)
        normed, mean, inverse_deviation = _normalize(gate * factor, eps, factor)
        mean, inverse_deviation = mean / factor, inverse_deviation * factor
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias, mean, inverse_deviation


def _normalize(gate: Tensor, eps: float, factor: Any) -> tuple[Tensor, Tensor, Tensor]:
    """→ normed, mean, inverse deviation of rows that were multiplied by `factor`."""
    mean = gate.mean(dim=-1, keepdim=True)
    centred = gate - mean
    squared = centred.square().mean(dim=-1, keepdim=True) + eps * factor**2
    if isinstance(factor, Tensor) and eps > 0:  # which may be 0 by then, beside equal numbers
        squared = squared.clamp(min=torch.finfo(squared.dtype).tiny)
    inverse_deviation = squared.rsqrt()
    return centred * inverse_deviation, mean, inverse_deviation


def _overflowed(inverse_deviation: Tensor) -> bool:
    """Whether squares of a row's numbers did, or may have, or one of them is not finite."""
    if not is_readable(inverse_deviation):
        return is_anything(inverse_deviation)
    if inverse_deviation.numel() > 1:
        inverse_deviation = inverse_deviation.detach().amin()
    return inverse_deviation.numel() > 0 and not inverse_deviation.item() > 0


def _factor(gate: Tensor) -> Tensor:
    """Powers of two (b, n, 1) that bring every row's largest number below 4."""
    largest = gate.detach().abs().amax(-1, keepdim=True)
    return torch.where(largest > 1, 4 * torch.frexp(largest).mantissa / largest, 1)


def normalize_backward(grad: Tensor, gate: Tensor, mean: Tensor, weight: Tensor | None,
                       bias: Tensor | None, eps: float) -> Any:
    """→ gradients for gate, in the memory of `grad`, for weight and bias, None where there is none.

    Written out: PyTorch's own takes its sums over a gate that is not centred, which loses most
    digits of the difference that is left where channels are few. The mean is rounded: what is
    left of it in the centred gate is taken out once more.
    """
    centred = gate - mean
    centred -= centred.mean(dim=-1, keepdim=True)
    deviation = centred.square().mean(dim=-1, keepdim=True).add_(eps).sqrt_()
    if is_readable(deviation) and not bool((deviation < torch.inf).all()):
        factor = _factor(gate)
        centred = gate * factor - mean * factor
        centred -= centred.mean(dim=-1, keepdim=True)
        spread = centred.square().mean(dim=-1, keepdim=True).sqrt_().div_(factor)
        deviation = torch.hypot(spread, spread.new_tensor(eps).sqrt())
        normed = centred.div_(deviation * factor)
    else:
        normed = centred.div_(deviation)
    over_steps = tuple(range(grad.ndim - 1))
    grad_bias = None if bias is None else grad.sum(over_steps)
    product = grad * normed
    grad_weight = None
    if weight is not None:
        grad_weight = product.sum(over_steps)
        product.mul_(weight.to(gate.dtype))
        grad *= weight.to(gate.dtype)
    along = product.mean(dim=-1, keepdim=True)
    del product
    grad -= grad.mean(dim=-1, keepdim=True)
    return grad.sub_(normed.mul_(along)).div_(deviation), grad_weight, grad_bias


def finish(mixed: Tensor, res: Tensor, activation: str) -> Tensor:
    """The unit's output from the mixed gate; that itself for an activation outside."""
    return mixed if activation == OUTSIDE else ACTIVATIONS[activation].forward(mixed) * res


def finish_backward(grad: Tensor, mixed: Any, res: Tensor, activation: str, dmixed: Tensor,
                    dres: Tensor) -> None:
    """Writes the gradients for mixed and res to dmixed and dres. One outside needs no mixed."""
    if activation == OUTSIDE:
        dmixed.copy_(grad)
        dres.zero_()
        return
    forward, backward = ACTIVATIONS[activation]
    activated = forward(mixed)
    torch.mul(grad, activated, out=dres)
    torch.mul(grad, res, out=dmixed)
    backward(dmixed, mixed, activated)
