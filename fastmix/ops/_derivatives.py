"""Derivatives of an operator, of every order, from its backward and its fallback's forward.

The first gradient runs the backward operator. Whatever differentiates further (create_graph,
torch.func, forward mode) goes through the fallback's `forward`, which is plain differentiable
PyTorch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastmix.ops import _vmap

if TYPE_CHECKING:
    from fastmix.ops._register import Operator


def physical(args: Sequence) -> tuple:
    """The arguments with conjugation and negation carried out.

    Compiled programs pass operators tensors whose lazy conjugation the dispatcher no longer
    resolves.
    """
    return tuple(a.resolve_conj().resolve_neg() if isinstance(a, Tensor) else a for a in args)


def setup_context(operator: Operator, ctx: Any, inputs: tuple, output: Any) -> None:
    outputs = output if isinstance(output, tuple) else (output,)
    tensors = [inputs[i] for i in operator.tensors]
    carries = outputs[operator.differentiable :]
    ctx.save_for_backward(*tensors, *carries)
    ctx.others = [None if i in operator.tensors else a for i, a in enumerate(inputs)]
    ctx.mark_non_differentiable(*carries)
    # Zeros in place of absent gradients would be as large as the carries.
    ctx.set_materialize_grads(False)
    ctx.sizes = [(o.shape, o.dtype) for o in outputs[: operator.differentiable]]


def backward(operator: Operator, ctx: Any, *grads: Tensor | None) -> tuple:
    """Gradients of the arguments, None for those that are no tensors."""
    saved = ctx.saved_tensors
    args = _arguments(operator, ctx, saved)
    grads = tuple(saved[0].new_zeros((), dtype=dtype).expand(size) if g is None else g
                  for g, (size, dtype) in zip(grads, ctx.sizes))
    if torch.is_grad_enabled():
        return _pullback(operator, args)[1](grads)
    carries = saved[len(operator.tensors) :]
    if carries and carries[0].shape[1] == 0:
        raise RuntimeError(
            f"fastmix::{operator.name} kept no carries for a gradient: it was called with "
            "carry_every=0; call fastmix.ops instead, which chooses carry_every")
    out = operator.backward(*physical(grads), *carries, *args)
    gradients = iter(out if isinstance(out, (tuple, list)) else (out,))
    by_argument = [next(gradients) if i in operator.tensors else None for i in range(len(args))]
    return tuple(None if a is None else g for a, g in zip(args, by_argument))


def jvp(operator: Operator, ctx: Any, *tangents: Tensor | None) -> Any:
    """Forward mode as the transpose of the transpose: it needs no rule of its own."""
    # Saved are dual tensors, whose tangents would be carried along once more.
    primals = [t if t is None else forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors]
    args = _arguments(operator, ctx, primals)
    present = [i for i in operator.tensors if args[i] is not None]
    outputs, gradients = _pullback(operator, args)

    def of_present(*grads: Tensor) -> tuple:
        pulled = gradients(grads)
        return tuple(pulled[i] for i in present)

    _, push = torch.func.vjp(  # type: ignore[misc]
        of_present, *(torch.zeros_like(o) for o in outputs))
    moved = push(tuple(
        torch.zeros_like(args[i]) if tangents[i] is None else tangents[i] for i in present))
    moved = moved + (None,) * (len(operator.outputs) - len(moved))
    return moved if len(moved) > 1 else moved[0]


class Transformed(torch.autograd.Function):
    """An operator under torch.func and in forward mode.

    The registered autograd rule knows neither. This does, but costs more per call and, having a
    jvp, cannot be compiled.
    """

    @staticmethod
    def forward(operator: Operator, *args: Any) -> Any:
        out = operator.forward(*args)
        # Torch wants the tangent of a view laid out as the view is, and lays out others itself.
        return tuple(map(_owned, out)) if isinstance(out, tuple) else _owned(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.operator, args = inputs[0], inputs[1:]
        setup_context(ctx.operator, ctx, args, output)
        ctx.save_for_forward(*(args[i] for i in ctx.operator.tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        return None, *backward(ctx.operator, ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, _: Operator, *tangents: Tensor | None) -> Any:
        return jvp(ctx.operator, ctx, *tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, operator: Operator, *args: Any) -> Any:
        return _vmap.vmap(operator, operator, info, in_dims[1:], *args)


def _owned(out: Tensor) -> Tensor:
    return out.clone() if out._is_view() else out


# Function.apply binds its arguments to this signature on every call; looking it up anew each time
# makes a third of the call's cost.
Transformed.forward.__signature__ = inspect.signature(Transformed.forward)  # type: ignore


def _arguments(operator: Operator, ctx: Any, tensors: Sequence[Tensor | None]) -> list:
    args = list(ctx.others)
    for i, tensor in zip(operator.tensors, tensors):
        args[i] = tensor
    return args


def _pullback(operator: Operator, args: list) -> tuple[tuple, Callable]:
    """The differentiable outputs, and the function from their gradients to the arguments'."""
    present = [i for i in operator.tensors if args[i] is not None]

    def run(*tensors: Tensor) -> tuple:
        full = list(args)
        for i, tensor in zip(present, tensors):
            full[i] = tensor
        out = operator.run_fallback(*full)
        return out[: operator.differentiable] if isinstance(out, tuple) else (out,)

    outputs, pull = torch.func.vjp(run, *(args[i] for i in present))  # type: ignore[misc]

    def gradients(grads: Sequence[Tensor]) -> tuple:
        pulled = dict(zip(present, pull(tuple(grads))))
        return tuple(pulled.get(i) for i in range(len(args)))

    return outputs, gradients
