"""Triton kernels for GPUs, one file per operator, imported when an operator is first called.

Installed as fastmix._triton. A file has `forward` and `backward` with the arguments and
results of the fallback's, and may have `refuses(*args)`: why its kernels cannot take these
arguments, or None. With TRITON_INTERPRET=1 the kernels run on CPU tensors, for tests.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
from pathlib import Path

import torch

from fastmix._triton import trial
from fastmix.ops._register import LIBRARY, OPERATORS

KERNELS = tuple(sorted(
    file.stem for file in Path(__file__).parent.glob("*.py") if file.stem in OPERATORS))

# ROCm devices call themselves cuda.
DEVICES = {"cuda": "CUDA", "xpu": "XPU"}


def interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(operator, device_type):
    """None if the kernels of `operator` run on such tensors here, else the reason."""
    if operator not in KERNELS:
        return f"{operator} has no Triton kernel"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if device_type == "cpu":
        if not interpreted():
            return ("Triton kernels run on GPUs; on the CPU only to be tested, with "
                    "TRITON_INTERPRET=1")
    elif _no_device(device_type) is not None:
        return _no_device(device_type)
    return trial.failures.get((operator, device_type))


@functools.cache
def _no_device(device_type):
    """Why no device of that type can run the kernels here, or None."""
    if device_type not in DEVICES:
        return f"the Triton kernels are for {' and '.join(DEVICES)}, not for {device_type}"
    if not getattr(torch, device_type).is_available():
        return f"torch finds no {device_type} device here"
    if device_type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            return f"the kernels need compute capability 8.0, this device has {major}.{minor}"
    return None


def library():
    """Nothing to get ready: Triton compiles each kernel at its first launch."""


def forced(operator, device_type):
    """(forward, backward) to lay over what is registered for `device_type`."""
    return tuple(functools.partial(_run, operator, direction, True)
                 for direction in ("forward", "backward"))


def _run(operator, direction, forced, *args):
    kernels = importlib.import_module(f"{__name__}.{operator}")
    given = args[len(args) - len(OPERATORS[operator].forward._schema.arguments):]
    kind = args[0].device.type
    with _current(args[0].device):
        reason = _no_device(kind) if kind in DEVICES else None
        if reason is None and hasattr(kernels, "refuses"):
            reason = kernels.refuses(*given)
        if reason is None:
            reason = trial.failure(operator, direction, kernels, *given)
        if reason is not None:
            return OPERATORS[operator].run_instead("triton", reason, forced,
                                                   direction == "backward", args)
        out = getattr(kernels, direction)(*args)
    if not isinstance(out, tuple):
        return out
    # A schema returns tensors only: nothing stands for no gradient.
    return tuple(args[0].new_empty(0) if o is None else o for o in out)


def _current(device):
    """Triton launches on the current device."""
    if device.type not in DEVICES:
        return contextlib.nullcontext()
    return getattr(torch, device.type).device(device)


def register():
    """For the devices that there may be: looking for them would initialise CUDA at import."""
    if importlib.util.find_spec("triton") is None:
        return
    for key in DEVICES.values():
        for operator in KERNELS:
            for suffix, direction in (("", "forward"), ("_backward", "backward")):
                LIBRARY.impl(f"{operator}{suffix}",
                             functools.partial(_run, operator, direction, False), key)


register()
