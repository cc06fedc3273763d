"""Every name of torch's that is not public, in one place: what to look at for a new torch."""

import sys
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode as FunctionalTensorMode
from torch.nn.modules import module as _modules


def transforms_active() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, …) is at work."""
    return torch._C._are_functorch_transforms_active()


def forward_mode_active() -> bool:
    return torch.autograd.forward_ad._current_level >= 0


def traced_or_autocast() -> bool:
    """Whether torch.jit traces what is done, or autocast is on for any device."""
    return torch._C._get_tracing_state() is not None or torch._C._is_any_autocast_enabled()


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a transform of torch.func has wrapped the tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def requires_grad_anywhere(tensor: Tensor) -> bool:
    """Whether the tensor, or one that transforms have wrapped in it, requires a gradient.

    Inside vmap and jvp `requires_grad` is False even for a leaf of the autograd outside.
    """
    while not tensor.requires_grad and is_wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def is_hidden(tensor: Tensor) -> bool:
    """Whether vmap has wrapped the tensor, at any depth: its values cannot be read."""
    while is_wrapped(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def legacy_vmap_active() -> bool:
    """Whether the vmap of `is_grads_batched` and gradcheck, which is not torch.func's, is at work.

    It takes no autograd.Function apart.
    """
    return torch._C._dispatch_tls_is_dispatch_key_included("VmapMode")


def innermost(tensor: Tensor) -> Tensor:
    """The tensor that transforms have wrapped."""
    while is_wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def below_autograd() -> AbstractContextManager:
    """Within it, operators run without torch's autograd, which for one that Python registered
    takes longer than a step's arithmetic.
    """
    return torch._C._AutoDispatchBelowAutograd()


def is_decomposed_by_table(op: torch._ops.OpOverload) -> bool:
    """Whether run_decompositions is at work, with a table that has `op`, a composite operator
    without arguments.

    While it is, each composite operator has a kernel from the table, or one that gives
    NotImplemented if the table leaves it alone; at other times `op` has none in Python.
    """
    overridden = torch._C.DispatchKey.CompositeImplicitAutograd in op.py_kernels
    return overridden and op.decompose() is not NotImplemented


def has_global_hooks() -> bool:
    """Whether hooks are set that run in every module, besides those of a ModuleTracker.

    Those change nothing: by them FlopCounterMode knows in which module an operator runs.
    """
    if not _modules._has_any_global_hook():
        return False
    trackers = sys.modules.get("torch.utils.module_tracker")
    if trackers is None or (
            _modules._global_backward_pre_hooks or _modules._global_backward_hooks
            or _modules._global_forward_hooks_always_called
            or _modules._global_forward_hooks_with_kwargs):
        return True
    hooks = (*_modules._global_forward_pre_hooks.values(),
             *_modules._global_forward_hooks.values())
    return not all(isinstance(getattr(hook, "__self__", None), trackers.ModuleTracker)
                   for hook in hooks)
