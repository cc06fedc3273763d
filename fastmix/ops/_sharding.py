"""Tells DTensors which shards of an operator's tensors each rank works on by itself.

Over the batch, and over heads and channels where an operator keeps them apart, forward and
backward communicate nothing; gradients of what all ranks share are partial sums. Any other shard is
refused, because gathering it is expensive and so the caller's choice.
"""

import functools
from collections.abc import Sequence
from typing import Any

from fastmix.ops._late import when_imported
from fastmix.ops._register import OPERATORS, Operator

# By operator: the axes of its tensors, the axes of its outputs, those that may be sharded.
_GATING_UNIT = ("b n c'", "h w w'", "h w", "c", "c", "b n c"), ("b n c",), "b"
AXES = {
    "gate_loop": (("b n h k", "b n h k", "b n h v", "b n h", "b n h 2", "b h k v"),
                  ("b n h v", "b h k v", "b t h k v"), "b h v"),
    "decay_conv": (("b n h d", "h", "h", "b h d"), ("b n h d", "b h d", "b t h d"), "b h d"),
    "fft_conv": (("b n h d", "b m h", "h d"), ("b n h d",), "b h d"),
    "windowed_sgu": _GATING_UNIT,
    "causal_sgu": _GATING_UNIT,
}


def _axes(name: str, tensors: Sequence[Any]) -> tuple[list[list[str]], list[list[str]], list[str]]:
    """AXES of a call."""
    if name in AXES:
        inputs, outputs, letters = AXES[name]
        split = [axes.split() for axes in inputs]
        if name == "fft_conv" and tensors[1].ndim == 2:
            split[1] = ["m", "h"]
        return split, [axes.split() for axes in outputs], letters.split()
    x = tensors[1 if name == "linear_scan" else 0]
    rest = [f"c{i}" for i in range(2, x.ndim)]
    states, free = ["b", "n", *rest], ["b", *rest]
    if name == "cumulative_mean":
        return [states], [states], free
    gates = [axis if size == own else "1" for axis, size, own in zip(
        states, tensors[0].shape, x.shape)]
    return [gates, states, free], [states, ["b", "t", *rest]], free


def _refuse(name: str, axis: str, axes: list[str], tensor: Any) -> None:
    along, why = ("time", "a step needs all steps before it") if axis in ("n", "m") else (
        f"{axis} of ({', '.join(axes)})", "it takes the numbers of all")
    raise ValueError(
        f"{name}: DTensors must not be sharded along {along}, got one of shape "
        f"{tuple(tensor.shape)} with placements {tuple(tensor.placements)}: {why}; redistribute "
        "it, over the batch or, where an operator keeps them apart, heads")


def _rule(operator: Operator, backward: bool, *args: Any) -> list:
    """Pairs of the outputs' and the arguments' placements that need no communication."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    count = len(operator.outputs) if backward else 0  # of gradients and carries
    args = args[count:]
    tensors = [args[i] for i in operator.tensors]
    inputs, outputs, free = _axes(operator.name, tensors)
    for axes, tensor in zip(inputs, tensors):
        for placement in () if tensor is None else tensor.placements:
            if placement.is_shard() and axes[placement.dim] not in (*free, "1"):
                _refuse(operator.name, axes[placement.dim], axes, tensor)

    def placed(axes: list[str], axis: str | None) -> Any:
        return Shard(axes.index(axis)) if axis in axes else Replicate()

    rules = []
    for axis in (None, *free):
        given: list = [None] * len(args)
        for i, axes, tensor in zip(operator.tensors, inputs, tensors):
            given[i] = None if tensor is None else placed(axes, axis)
        results = [placed(axes, axis) for axes in outputs]
        if not backward:
            rules.append((results, given))
            continue
        gradients = [Partial() if tensor is not None and axis and axis not in axes
                     else given[i] or Replicate()
                     for i, axes, tensor in zip(operator.tensors, inputs, tensors)]
        rules.append((gradients, results + given))
    return rules


def _register(_: Any) -> None:
    from torch.distributed.tensor.experimental import register_sharding

    for operator in OPERATORS.values():
        for op, backward in ((operator.forward, False), (operator.backward, True)):
            register_sharding(op)(functools.partial(_rule, operator, backward))


when_imported("torch.distributed.tensor", _register)
