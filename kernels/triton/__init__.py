"""Triton kernels for GPUs, one file per operator, imported when an operator is first called.

Installed as fastmix._triton. A file has `forward` and `backward` with the arguments and
results of the fallback's, and may have `why_not(*args)`: why its kernels cannot take these
arguments, or None. With TRITON_INTERPRET=1 the kernels run on CPU tensors, for tests.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastmix._triton import plans, trial
from fastmix.ops._register import LIBRARY, OPERATORS

KERNELS = tuple(sorted(
    file.stem for file in Path(__file__).parent.glob("*.py") if file.stem in OPERATORS))

# ROCm devices call themselves cuda.
DEVICES = {"cuda": "CUDA", "xpu": "XPU"}


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(operator: str, device_type: str) -> str | None:
    """None if the kernels of `operator` run on such tensors here, else the reason."""
    if operator not in KERNELS:
        return f"{operator} has no Triton kernel"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if device_type == "cpu":
        if not interpreted():
            return ("Triton kernels run on GPUs; on the CPU only to be tested, with "
                    "TRITON_INTERPRET=1")
    elif _why_not_on(device_type) is not None:
        return _why_not_on(device_type)
    return trial.failures.get((operator, device_type))


@functools.cache
def _why_not_on(device_type: str, index: int | None = None) -> str | None:
    """Why the device of that type and index, or the current one, cannot run the kernels here."""
    if device_type not in DEVICES:
        return (f"the Triton kernels are for {' and '.join(DEVICES)}, not for {device_type}: "
                "move the tensors to one of these")
    if not getattr(torch, device_type).is_available():
        return (f"torch finds no {device_type} device here: python -m torch.utils.collect_env "
                "tells what torch is built for, and what is there")
    if device_type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(index)
        if major < 8:
            return ("the kernels need a GPU of compute capability 8.0 or newer, this one has "
                    f"{major}.{minor}")
    return None


def prepare() -> None:
    """Nothing to prepare: Triton compiles each kernel at its first launch."""


def forced(operator: str, device_type: str) -> tuple[Callable[..., Any], ...]:
    """(forward, backward) to lay over what is registered for `device_type`."""
    return tuple(functools.partial(_run, operator, direction, True)
                 for direction in ("forward", "backward"))


def _run(operator: str, direction: str, forced: bool, *args: Any) -> Any:
    kind_of_call = plans.kind_of(operator, direction, args)
    plan = plans.plans.get(kind_of_call)
    if plan is not None and (operator, args[0].device.type) not in trial.failures:
        results = plan.run(args)
        if results is not None:
            return results
    kernels = importlib.import_module(f"{__name__}.{operator}")
    forward_args = args[len(args) - len(OPERATORS[operator].forward._schema.arguments):]
    kind = args[0].device.type
    with _current(args[0].device):
        reason = _why_not_on(kind, args[0].device.index) if kind in DEVICES else None
        if reason is None and hasattr(kernels, "why_not"):
            reason = kernels.why_not(*forward_args)
        if reason is None:
            reason = trial.why_not(operator, direction, kernels, *forward_args)
        if reason is not None:
            return OPERATORS[operator].run_instead("triton", reason, forced,
                                                   direction == "backward", args)
        with trial.no_compilation_in_capture(operator, args[0].device):
            return plans.noted(kind_of_call, args, functools.partial(
                _launched, getattr(kernels, direction)))


def _launched(launcher: Callable[..., Any], *args: Any) -> Any:
    out = launcher(*args)
    if not isinstance(out, tuple):
        return out
    # A schema returns tensors only: nothing stands for no gradient.
    return tuple(args[0].new_empty(0) if o is None else o for o in out)


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type not in DEVICES:
        return contextlib.nullcontext()
    return getattr(torch, device.type).device(device)


def register() -> None:
    """For the devices that there may be: looking for them would initialise CUDA at import."""
    if importlib.util.find_spec("triton") is None:
        return
    for key in DEVICES.values():
        for operator in KERNELS:
            for suffix, direction in (("", "forward"), ("_backward", "backward")):
                LIBRARY.impl(f"{operator}{suffix}",
                             functools.partial(_run, operator, direction, False), key)


register()
