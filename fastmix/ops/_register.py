"""Registers fastmix's operators with torch.

An `Operator` registers `fastmix::<name>` and `fastmix::<name>_backward`. PyTorch's dispatcher
picks their implementation by device; the fallback serves where nothing faster is registered.
Derivatives are in _derivatives.py, torch.vmap in _vmap.py.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastmix import _torch_private
from fastmix.dtypes import autocast_enabled
from fastmix.ops import _derivatives, _vmap

TWICE = ("fastmix cannot be reloaded file by file: its operators can be registered once in a "
         "process. Start a new process")
if "LIBRARY" in globals():  # of the module that is reloaded
    raise ImportError(TWICE)
LIBRARY = torch.library.Library("fastmix", "DEF")
# No program has this operator. What it is for is its entry in torch.export's default table of
# decompositions: run_decompositions with such a table decomposes all of fastmix's.
LIBRARY.define("decompose() -> ()")
LIBRARY.impl("decompose", lambda: None, "CompositeImplicitAutograd")
OPERATORS: dict[str, Operator] = {}

STEPS: dict[str, Callable] = {}  # by name, of what `step_operator` registered: the fallback

_first_use: dict[str, Callable[[], bool]] = {}  # device type: what on_first_use was given


_decomposed = False


@contextlib.contextmanager
def decompose() -> Iterator[None]:
    """Within it, exports have torch's own operators in the place of fastmix's.

    Use it for tools that know no other operators: torch.onnx.export, converters, other runtimes.

    >>> model, x = fastmix.nn.MeanCenteringPool(8).eval(), torch.ones(1, 4, 8)
    >>> with fastmix.decompose():
    ...     program = torch.export.export(model, (x,)).run_decompositions()
    >>> [node for node in program.graph.nodes if "fastmix" in str(node.target)]
    []

    Such a program holds for the sequence length it was exported with, and for inference, because
    gradients are off within. It is larger and slower than one with fastmix's operators.
    """
    global _decomposed
    before, _decomposed = _decomposed, True
    try:
        with torch.no_grad():
            yield
    finally:
        _decomposed = before


def decomposing() -> bool:
    """Whether a program is made that is to have no complex numbers and no operators but torch's."""
    return _decomposed and torch.compiler.is_compiling()


def on_first_use(device_type: str, load: Callable[[], bool]) -> None:
    """Arranges that `load()` is called once, before an operator first runs its fallback on a
    tensor of that device.

    `load` registers kernels and returns True, or returns False where there are none.
    """
    _first_use[device_type] = load


class Operator:
    """One operator: calling it runs the registered implementation, differentiably.

    name        `fastmix::<name>`, and `fastmix::<name>_backward` for its gradient
    arguments   the schema's arguments
    outputs     names of the outputs; "carries", the last if it is there, has no gradient
                and is passed to backward after the gradients of the others
    fallback    a module with `forward` (of the arguments) and `backward`
    fake        shapes and dtypes of the outputs, from the arguments
    batched     argument → rank at which its axis 0 is the batch (None: any rank)
    """

    def __init__(self, name: str, arguments: str, outputs: str, fallback: ModuleType,
                 fake: Callable, batched: dict[str, int | None]) -> None:
        if name in OPERATORS:
            raise ImportError(TWICE)
        self.name = name
        self.outputs = outputs.split()
        with_carries = self.outputs[-1] == "carries"
        self.differentiable = len(self.outputs) - with_carries
        self.fallback = fallback
        names = [re.split(r"[ =]", a.strip())[1] for a in arguments.split(",")]
        self.tensors = [i for i, a in enumerate(arguments.split(",")) if "Tensor" in a]
        self.batched = {names.index(argument): rank for argument, rank in batched.items()}
        OPERATORS[name] = self

        backward_arguments = [f"Tensor grad_{o}" for o in self.outputs[: self.differentiable]]
        backward_arguments += ["Tensor carries"] * with_carries + [arguments]
        LIBRARY.define(f"{name}({arguments}) -> {_tensors(len(self.outputs))}")
        LIBRARY.define(f"{name}_backward({', '.join(backward_arguments)})"
                       f" -> {_tensors(len(self.tensors))}")
        self.forward = getattr(torch.ops.fastmix, name).default
        self.backward = getattr(torch.ops.fastmix, f"{name}_backward").default
        self._register(fake)

    def _register(self, fake: Callable) -> None:
        for op, run in ((self.forward, self.run_fallback),
                        (self.backward, self.run_fallback_backward)):
            LIBRARY.impl(op._schema.name, functools.partial(_run_default, op, run),
                         "CompositeExplicitAutograd")
        forward, backward = f"fastmix::{self.name}", f"fastmix::{self.name}_backward"
        torch.library.register_fake(forward, fake, lib=LIBRARY)
        torch.library.register_fake(backward, self._fake_backward, lib=LIBRARY)
        torch.library.register_autograd(
            forward, functools.partial(_derivatives.backward, self),
            setup_context=functools.partial(_derivatives.setup_context, self), lib=LIBRARY)
        torch.library.register_vmap(
            forward, functools.partial(_vmap.vmap, self, self.forward), lib=LIBRARY)
        torch.library.register_vmap(
            backward, functools.partial(_vmap.vmap_backward, self), lib=LIBRARY)
        torch.library.register_torch_dispatch(
            forward, _torch_private.FunctionalTensorMode, self._run_traced, lib=LIBRARY)

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            args = _derivatives.physical(args)
            return self._run_decomposed(*args) if decomposing() else self.forward(*args)
        lazy = differentiated = False
        for i in self.tensors:
            if (t := args[i]) is not None:
                lazy = lazy or t.is_conj() or t.is_neg()
                differentiated = differentiated or t.requires_grad
        if lazy:
            args = _derivatives.physical(args)
        if _torch_private.transforms_active() or _torch_private.forward_mode_active():
            return _derivatives.Transformed.apply(self, *args)
        if differentiated and torch.is_grad_enabled():
            return self.forward(*args)
        with _torch_private.below_autograd():
            return self.forward(*args)

    def _run_traced(self, mode: Any, op: Any, types: Any, args: Sequence, kwargs: Any) -> Any:
        """What becomes of `op` where a program is traced below autograd: one node of it, or nodes
        of torch's own operators if run_decompositions was asked for these and shapes are fixed.
        """
        sizes = [size for t in args if isinstance(t, Tensor) for size in t.shape]
        asked = _torch_private.is_decomposed_by_table(torch.ops.fastmix.decompose.default)
        if asked and not any(isinstance(size, torch.SymInt) for size in sizes):
            with mode:
                return _all_dense(self._run_decomposed(*args))
        return mode.__torch_dispatch__(op, types, args, kwargs)

    def run_fallback(self, *args: Any) -> Any:
        with no_autocast(args):
            return _all_dense(self.fallback.forward(*args))

    def _run_decomposed(self, *args: Any) -> Any:
        with no_autocast(args):
            return getattr(self.fallback, "decomposed", self.fallback.forward)(*args)

    def run_fallback_backward(self, *args: Any) -> Any:
        with no_autocast(args), torch.no_grad():
            grads = self.fallback.backward(*args)
        # A schema returns tensors only: an empty one stands for no gradient.
        grads = grads if isinstance(grads, tuple) else (grads,)
        grads = tuple(args[0].new_empty(0) if g is None else _dense(g) for g in grads)
        return grads if len(grads) > 1 else grads[0]

    def run_instead(self, implementation: str, reason: str, forced: bool, backward: bool,
                    args: Sequence) -> Any:
        """Runs the fallback, because `implementation` cannot take these arguments. RuntimeError if
    that was forced."""
        if forced:
            raise RuntimeError(f"{self.name} was asked to run on {implementation!r}, which "
                               f"cannot: {reason} (without fastmix.force and "
                               "FASTMIX_IMPLEMENTATION another implementation runs)")
        return (self.run_fallback_backward if backward else self.run_fallback)(*args)

    def _fake_backward(self, *args: Any) -> Any:
        inputs = args[len(self.outputs) :]
        grads = tuple(
            args[0].new_empty(0) if inputs[i] is None
            else torch.empty_like(inputs[i], memory_format=torch.contiguous_format)
            for i in self.tensors)
        return grads if len(grads) > 1 else grads[0]


def step_operator(name: str, arguments: str, fallback: Callable, outputs: int = 1) -> Callable:
    """Registers `fastmix::<name>`, one step from a state on, and returns what calls it. Kernels are
    chosen for it as they are for operators. It writes into its first argument, if this is a
    "Tensor(a!)".

    Only for calls that `may_step` lets pass; all others go another way.
    """
    LIBRARY.define(f"{name}({arguments}) -> {_tensors(outputs)}")
    op = getattr(torch.ops.fastmix, name).default
    LIBRARY.impl(name, functools.partial(_run_default, op, fallback), "CompositeExplicitAutograd")
    STEPS[name] = fallback

    def call(*args: Any) -> Any:
        with _torch_private.below_autograd():
            return op(*args)

    def call_in_place(state: Tensor, *args: Any) -> Any:
        out = call(state, *args)
        torch.autograd.graph.increment_version(state)  # so that a backward which needs it sees it
        return out

    return call_in_place if arguments.startswith("Tensor(a!)") else call


def may_step(key: tuple | None, *tensors: Tensor | None) -> bool:
    """Whether nothing differentiates, transforms or traces a call of these tensors, whose
    `Passed.key` is `key`, and all are stored as they read."""
    if (key is None or _torch_private.transforms_active()
            or _torch_private.forward_mode_active()):
        return False
    wanted = torch.is_grad_enabled()
    for t in tensors:
        if t is not None and (wanted and t.requires_grad or t.is_conj() or t.is_neg()):
            return False
    return True


def _run_default(op: Any, fallback: Callable, *args: Any) -> Any:
    device_type = args[0].device.type
    load = _first_use.get(device_type)
    loaded = load is not None and load()
    _first_use.pop(device_type, None)
    return op(*args) if loaded else fallback(*args)


def _tensors(count: int) -> str:
    """The return type of a schema that returns `count` tensors."""
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _dense(x: Tensor) -> Tensor:
    """x contiguous with canonical strides, as the fakes promise.

    `contiguous` does not reset the strides of axes of size 1.
    """
    strides: list[int] = []
    step = 1
    for size in reversed(x.shape):
        strides.insert(0, step)
        step *= max(size, 1)
    return x if x.stride() == tuple(strides) else x.clone(memory_format=torch.contiguous_format)


def _all_dense(out: Any) -> Any:
    return tuple(map(_dense, out)) if isinstance(out, tuple) else _dense(out)


def no_autocast(args: Sequence) -> contextlib.AbstractContextManager:
    device = next(a for a in args if isinstance(a, Tensor)).device.type
    if not autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)
