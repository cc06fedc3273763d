"""`fastmix.accelerate`: the fast forward for modules of the published packages, in place."""

import functools
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastmix.nn._published import REPLACEMENTS, VERSIONS


@dataclass
class Report:
    """The account of what `accelerate` did; it prints as a table.

    replaced: (name of the module in the model, its class, what it runs on now)
    left: (name, class, why it was left alone)
    """

    replaced: list[tuple[str, str, str]] = field(default_factory=list)
    left: list[tuple[str, str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.replaced and not self.left:
            return "nothing to accelerate: no module is of a class that fastmix knows"
        lines = [f"{len(self.replaced)} accelerated, {len(self.left)} left alone"]
        rows = [(name, kind, f"→ {runs}") for name, kind, runs in self.replaced]
        rows += [(name, kind, f"left alone: {reason}") for name, kind, reason in self.left]
        names, kinds = (max(len(row[i]) for row in rows) for i in (0, 1))
        lines += [f"  {name:{names}}  {kind:{kinds}}  {what}" for name, kind, what in rows]
        return "\n".join(lines)

    __repr__ = __str__


def accelerate(model: nn.Module) -> Report:
    """Gives every module of the published packages within `model` its fast forward, in place.

    Nothing else changes: parameters, buffers, hooks, names, state_dict, what optimisers refer
    to and the class of every module stay, and so does what a forward computes, to rounding. It
    may come before or after `.to()`, `torch.compile` and wrapping by DDP or FSDP2; an accelerated
    model can be copied and pickled. A second call changes nothing.
    `fastmix.restore(model)` undoes it.

    Left alone, and named in the report, is what does not do what the published class does:
    a subclass with a forward of its own, an instance whose forward was replaced, another
    version of the package. Blocks that only call their parts need no replacement and are not
    mentioned. No package is imported that is not imported yet.

    Returns:
        The report, to be printed.

    >>> from metaformer_gpt import MetaformerGPT
    >>> model = MetaformerGPT(num_tokens=256, dim=32, depth=1)
    >>> print(fastmix.accelerate(model))
    2 accelerated, 0 left alone
      layers.0.0  MultiheadExponentialTimeDecay  → ops.decay_conv
      layers.0.1  MeanCenteringPool              → ops.cumulative_mean
    """
    report = Report()
    for name, module in model.named_modules():
        published = _published_class(type(module))
        if published is None:
            continue
        kind = type(module).__name__
        replacement = REPLACEMENTS[published.__module__, published.__qualname__]
        reason = _why_not(module, published)
        if reason is None:
            _install(module, replacement.forward)
            report.replaced.append((name or "(model)", kind, replacement.runs))
        else:
            report.left.append((name or "(model)", kind, reason))
    return report


def restore(model: nn.Module) -> nn.Module:
    """Takes back what `fastmix.accelerate` did to `model`, which it returns.

    >>> from metaformer_gpt import MetaformerGPT
    >>> model = MetaformerGPT(num_tokens=256, dim=32, depth=1)
    >>> report = fastmix.accelerate(model)
    >>> fastmix.restore(model) is model
    True
    """
    for module in model.modules():
        if _is_accelerated(module):
            del module.forward, module._replicate_for_data_parallel
    return model


def _published_class(kind: type) -> type | None:
    """The class among the bases of `kind` whose forward can be replaced."""
    return next((c for c in kind.__mro__ if (c.__module__, c.__qualname__) in REPLACEMENTS), None)


def _why_not(module: nn.Module, published: Any) -> str | None:
    """The reason why this module's forward is to stay, or None."""
    if _is_accelerated(module):
        return "accelerated before"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if type(module).forward is not published.forward:
        return f"a subclass of {published.__name__} with a forward of its own"
    package, version = VERSIONS[published.__module__.partition(".")[0]]
    try:
        installed = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{package} has no version: fastmix knows {version}"
    if installed != version:
        return f"of {package} {installed}: fastmix knows {version}"
    return None


def _is_accelerated(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    return isinstance(forward, functools.partial) and any(
        forward.func is replacement.forward for replacement in REPLACEMENTS.values())


def _install(module: nn.Module, forward: Callable) -> None:
    # Partials, unlike closures and methods, can be copied and pickled together with the module.
    module.forward = functools.partial(forward, module)
    module._replicate_for_data_parallel = functools.partial(  # type: ignore[method-assign]
        _replicate, module)


def _replicate(module: Any) -> nn.Module:
    """DataParallel's copy of a module, whose forward is to be the copy's."""
    replica = type(module)._replicate_for_data_parallel(module)
    _install(replica, module.forward.func)
    return replica
