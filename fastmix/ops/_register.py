"""Makes torch operators of fastmix's.

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
OPERATORS: dict[str, Operator] = {}

_first_use: dict[str, Callable[[], bool]] = {}  # device type: what on_first_use was given


_decomposed = False


@contextlib.contextmanager
def decompose() -> Iterator[None]:
    """Exports made within have torch's own operators in the place of fastmix's.

    For what knows no others: torch.onnx.export, converters, other runtimes.

    >>> model, x = fastmix.nn.MeanCenteringPool(8).eval(), torch.ones(1, 4, 8)
    >>> with fastmix.decompose():
    ...     program = torch.export.export(model, (x,)).run_decompositions()
    >>> [node for node in program.graph.nodes if "fastmix" in str(node.target)]
    []

    Programs hold for the sequence length they were exported with, and for inference: gradients
    are off within. They are larger and slower than those with operators.
    """
    global _decomposed
    before, _decomposed = _decomposed, True
    try:
        with torch.no_grad():
            yield
    finally:
        _decomposed = before


def on_first_use(device_type: str, load: Callable[[], bool]) -> None:
    """Has `load()` called once before an operator falls back on tensors of that device.

    It registers kernels and returns True, or returns False where there are none.
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
            LIBRARY.impl(op._schema.name, functools.partial(self._run_default, op, run),
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

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            args = _derivatives.physical(args)
            return self._run_decomposed(*args) if _decomposed else self.forward(*args)
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

    def _run_default(self, op: Any, fallback: Callable, *args: Any) -> Any:
        device_type = args[0].device.type
        load = _first_use.get(device_type)
        loaded = load is not None and load()
        _first_use.pop(device_type, None)
        return op(*args) if loaded else fallback(*args)

    def run_fallback(self, *args: Any) -> Any:
        with no_autocast(args):
            out = self.fallback.forward(*args)
        return tuple(map(_dense, out)) if isinstance(out, tuple) else _dense(out)

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
        """The fallback, for what `implementation` cannot take; RuntimeError if it was forced."""
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


def no_autocast(args: Sequence) -> contextlib.AbstractContextManager:
    device = next(a for a in args if isinstance(a, Tensor)).device.type
    if not autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)
