"""How an operator becomes a torch operator with derivatives of every order.

An `Operator` registers `fastmix::<name>` and `fastmix::<name>_backward`. PyTorch's
dispatcher picks their implementation by device; the fallback serves where nothing
faster is registered. First-order gradients run the backward operator. Whatever
differentiates further (create_graph, torch.func, forward mode) goes through the
fallback's `forward`, which is plain differentiable PyTorch.
"""

import functools
import inspect
import re

import torch

LIBRARY = torch.library.Library("fastmix", "DEF")
OPERATORS = {}

# Where kernels are compiled on first use: called with an operator's name and a device type
# before the fallback runs there for want of anything else. True if there are kernels now.
late_kernels = None


class Operator:
    """One operator: calling it runs the registered implementation, differentiably.

    name        `fastmix::<name>`, and `fastmix::<name>_backward` for its gradient
    arguments   the schema's arguments
    outputs     names of the outputs; "carries", the last if it is there, has no gradient
                and is handed to backward after the gradients of the others
    fallback    a module with `forward` (of the arguments) and `backward`
    fake        shapes and dtypes of the outputs, from the arguments
    batched     argument → rank at which its axis 0 is the batch (None: any rank)
    """

    def __init__(self, name, arguments, outputs, fallback, fake, batched):
        self.name = name
        self.outputs = outputs.split()
        self.carries = self.outputs[-1] == "carries"
        self.differentiable = len(self.outputs) - self.carries
        self.fallback = fallback
        names = [re.split(r"[ =]", a.strip())[1] for a in arguments.split(",")]
        self.tensors = [i for i, a in enumerate(arguments.split(",")) if "Tensor" in a]
        self.batched = {names.index(argument): rank for argument, rank in batched.items()}
        OPERATORS[name] = self

        def returns(count):
            return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"

        handed = [f"grad_{o}" for o in self.outputs[: self.differentiable]]
        handed += ["carries"] * self.carries
        LIBRARY.define(f"{name}({arguments}) -> {returns(len(self.outputs))}")
        LIBRARY.define(f"{name}_backward({', '.join(f'Tensor {h}' for h in handed)}, {arguments})"
                       f" -> {returns(len(self.tensors))}")
        self.forward = getattr(torch.ops.fastmix, name).default
        self.backward = getattr(torch.ops.fastmix, f"{name}_backward").default
        for op, fallback in ((self.forward, self.run_fallback),
                             (self.backward, self.run_fallback_backward)):
            LIBRARY.impl(op._schema.name, functools.partial(self._run_default, op, fallback),
                         "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastmix::{name}", fake, lib=LIBRARY)
        torch.library.register_fake(f"fastmix::{name}_backward", self._fake_backward, lib=LIBRARY)
        torch.library.register_autograd(
            f"fastmix::{name}", self._backward, setup_context=self._setup_context, lib=LIBRARY)
        torch.library.register_vmap(
            f"fastmix::{name}", functools.partial(self._vmap, self.forward), lib=LIBRARY)
        torch.library.register_vmap(
            f"fastmix::{name}_backward", self._vmap_backward, lib=LIBRARY)

    def __call__(self, *args):
        args = _physical(args)
        # The registered autograd rule knows neither forward mode nor torch.func; the
        # autograd.Function does, but costs more and cannot be compiled once it has a jvp.
        if torch.compiler.is_compiling() or not _transformed():
            return self.forward(*args)
        return _Apply.apply(self, *args)

    # ---- the fallback as an implementation

    def _run_default(self, op, fallback, *args):
        if late_kernels is not None and late_kernels(self.name, args[0].device.type):
            return op(*args)
        return fallback(*args)

    def run_fallback(self, *args):
        with _no_autocast(args):
            out = self.fallback.forward(*args)
        return tuple(map(_dense, out)) if isinstance(out, tuple) else _dense(out)

    def run_fallback_backward(self, *args):
        with _no_autocast(args), torch.no_grad():
            grads = self.fallback.backward(*args)
        # A schema returns tensors only: nothing stands for no gradient.
        grads = grads if isinstance(grads, tuple) else (grads,)
        grads = tuple(args[0].new_empty(0) if g is None else _dense(g) for g in grads)
        return grads if len(grads) > 1 else grads[0]

    def run_instead(self, implementation, reason, forced, backward, args):
        """The fallback, for what `implementation` cannot take; RuntimeError if it was forced."""
        if forced:
            raise RuntimeError(f"{self.name} was asked to run on {implementation!r}, which "
                               f"cannot: {reason}")
        return (self.run_fallback_backward if backward else self.run_fallback)(*args)

    def _fake_backward(self, *args):
        inputs = args[len(self.outputs) :]
        grads = tuple(
            args[0].new_empty(0) if inputs[i] is None
            else torch.empty_like(inputs[i], memory_format=torch.contiguous_format)
            for i in self.tensors)
        return grads if len(grads) > 1 else grads[0]

    # ---- derivatives

    def _setup_context(self, ctx, inputs, output):
        outputs = output if isinstance(output, tuple) else (output,)
        tensors = [inputs[i] for i in self.tensors]
        carries = outputs[self.differentiable :]
        ctx.save_for_backward(*tensors, *carries)
        ctx.others = [None if i in self.tensors else a for i, a in enumerate(inputs)]
        ctx.mark_non_differentiable(*carries)
        # Zeros in place of the gradients that do not come would be as large as the carries.
        ctx.set_materialize_grads(False)
        ctx.sizes = [(o.shape, o.dtype) for o in outputs[: self.differentiable]]

    def _restore(self, ctx, tensors):
        args = list(ctx.others)
        for i, tensor in zip(self.tensors, tensors):
            args[i] = tensor
        return args

    def _backward(self, ctx, *grads):
        """Gradients of the arguments, None for those that are no tensors."""
        stored = ctx.saved_tensors
        args = self._restore(ctx, stored)
        grads = tuple(stored[0].new_zeros((), dtype=dtype).expand(size) if g is None else g
                      for g, (size, dtype) in zip(grads, ctx.sizes))
        if torch.is_grad_enabled():
            return self._pull(args)[1](grads)
        carries = stored[len(self.tensors) :]
        if carries and carries[0].shape[1] == 0:
            raise RuntimeError(f"fastmix::{self.name} kept no carries for a gradient: it was "
                               "called with carry_every=0")
        found = self.backward(*_physical(grads), *carries, *args)
        found = iter(found if isinstance(found, (tuple, list)) else (found,))
        grads = [next(found) if i in self.tensors else None for i in range(len(args))]
        return tuple(None if a is None else g for a, g in zip(args, grads))

    def _pull(self, args):
        """The differentiable outputs, and the function from their gradients to the arguments'."""
        present = [i for i in self.tensors if args[i] is not None]

        def run(*tensors):
            full = list(args)
            for i, tensor in zip(present, tensors):
                full[i] = tensor
            out = self.run_fallback(*full)
            return out[: self.differentiable] if isinstance(out, tuple) else (out,)

        outputs, pull = torch.func.vjp(run, *(args[i] for i in present))

        def gradients(grads):
            found = dict(zip(present, pull(tuple(grads))))
            return tuple(found.get(i) for i in range(len(args)))

        return outputs, gradients

    def _jvp(self, ctx, *tangents):
        """Forward mode as the transpose of the transpose: it needs no rule of its own."""
        args = self._restore(ctx, ctx.saved_tensors)
        present = [i for i in self.tensors if args[i] is not None]
        outputs, gradients = self._pull(args)
        _, push = torch.func.vjp(
            lambda *grads: tuple(gradients(grads)[i] for i in present),
            *(torch.zeros_like(o) for o in outputs))
        moved = push(tuple(
            torch.zeros_like(args[i]) if tangents[i] is None else tangents[i] for i in present))
        moved = moved + (None,) * (len(self.outputs) - len(moved))
        return moved if len(moved) > 1 else moved[0]

    # ---- vmap

    def _vmap(self, call, info, in_dims, *args):
        """One call with the mapped axis folded into the batch, where only batches are mapped."""
        args = [a if dim is None else a.movedim(dim, 0) for a, dim in zip(args, in_dims)]
        mapped = [dim is not None for dim in in_dims]

        def is_batch(i):
            rank = self.batched.get(i, -1)
            return rank is None or args[i].ndim - mapped[i] == rank

        if not all(is_batch(i) for i, m in enumerate(mapped) if m):
            return _loop(call, info.batch_size, mapped, args)
        for i in self.tensors:
            if args[i] is not None and is_batch(i):
                whole = args[i] if mapped[i] else args[i].expand(info.batch_size, *args[i].shape)
                args[i] = whole.flatten(0, 1)
        out = call(*args)
        if isinstance(out, torch.Tensor):
            return out.unflatten(0, (info.batch_size, -1)), 0
        return tuple(o.unflatten(0, (info.batch_size, -1)) for o in out), (0,) * len(out)

    def _vmap_backward(self, info, in_dims, *args):
        args = [a if dim is None else a.movedim(dim, 0) for a, dim in zip(args, in_dims)]
        return _loop(self.backward, info.batch_size, [d is not None for d in in_dims], args)


def _loop(call, size, mapped, args):
    runs = [call(*(a[i] if m else a for a, m in zip(args, mapped))) for i in range(size)]
    if isinstance(runs[0], torch.Tensor):
        return torch.stack(runs), 0
    return tuple(torch.stack(o) for o in zip(*runs)), (0,) * len(runs[0])


def _physical(args):
    """Conjugation and negation carried out.

    Compiled programs hand an operator tensors whose lazy conjugation the dispatcher no
    longer sees to.
    """
    return tuple(a.resolve_conj().resolve_neg() if isinstance(a, torch.Tensor) else a
                 for a in args)


def _transformed():
    """Whether torch.func or forward mode is at work."""
    return (torch._C._are_functorch_transforms_active()
            or torch.autograd.forward_ad._current_level >= 0)


def _dense(x):
    """x with a fresh tensor's strides, as the fakes promise: `contiguous` alone leaves what
    strides axes of size 1 have."""
    strides, step = [], 1
    for size in reversed(x.shape):
        strides.insert(0, step)
        step *= max(size, 1)
    return x if x.stride() == tuple(strides) else x.clone(memory_format=torch.contiguous_format)


def _no_autocast(args):
    device = next(a for a in args if isinstance(a, torch.Tensor)).device.type
    return torch.autocast(device, enabled=False)


class _Apply(torch.autograd.Function):
    """An operator under torch.func and in forward mode."""

    @staticmethod
    def forward(operator, *args):
        return operator.forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.operator, *args = inputs
        ctx.operator._setup_context(ctx, args, output)
        ctx.save_for_forward(*(args[i] for i in ctx.operator.tensors))

    @staticmethod
    def backward(ctx, *grads):
        return None, *ctx.operator._backward(ctx, *grads)

    @staticmethod
    def jvp(ctx, _, *tangents):
        return ctx.operator._jvp(ctx, *tangents)

    @staticmethod
    def vmap(info, in_dims, operator, *args):
        return operator._vmap(operator, info, in_dims[1:], *args)


# Function.apply binds its arguments to this on every call: looked up, it costs a third.
_Apply.forward.__signature__ = inspect.signature(_Apply.forward)


# Backward starts again from every 64th state. Those of heads are large: on devices whose
# kernels walk along time anyway, fewer are kept.
CARRY_EVERY = 64
HEADS_CARRY_EVERY = {"cpu": 512}


def carry_count(n, carry_every):
    """The states kept for backward: that before every carry_every-th step, and the last one.

    At least two, so that a compiled program holds for sequences of one chunk and of many:
    torch specialises on sizes of one.
    """
    return (n + carry_every - 1) // carry_every + 1 if carry_every else 0


def needs_gradient(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
