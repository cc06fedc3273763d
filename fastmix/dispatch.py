"""Reports which implementation an operator runs on, and forces one.

PyTorch's dispatcher chooses: an implementation registered for the tensors' device runs
before the fallback, which is registered for all. This file only reports that choice and
overrides it on request.
"""

import contextlib
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TypeVar

import torch

from fastmix.ops._register import OPERATORS, STEPS

Function = TypeVar("Function", bound=Callable[..., Any])

# The devices whose kernels `force` overrides.
DEVICE_KEYS = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU", "mps": "MPS"}

# Modules that bring kernels. Importing one registers its kernels, for devices that the
# others leave to it. It has why_not(operator, device_type), None or the reason why it cannot
# run there; prepare(), which compiles and loads what can be compiled before a call; and
# forced(operator, device_type), (forward, backward) to run where others are registered, or
# None where its own are.
SOURCES = {"native": "fastmix.native", "triton": "fastmix._triton"}
_modules: dict[str, ModuleType] = {}  # by implementation


def load() -> None:
    """Imports, and so registers, the kernels of this installation."""
    for source, name in SOURCES.items():
        try:
            _modules[source] = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise


def _why_not_found(source: str) -> str:
    folder = Path(__file__).parent / SOURCES[source].removeprefix("fastmix.")
    return (f"its kernels are not at {folder}: install fastmix again; in a checkout that folder "
            f"is a symbolic link, and git makes links where core.symlinks is true")


def implementations(operator: str, device_type: str = "cpu") -> dict[str, str | None]:
    """{implementation: None if it can run here, else the reason}; the first that can, runs.

    >>> list(fastmix.implementations("gate_loop"))
    ['native', 'triton', 'fallback']
    """
    if operator not in OPERATORS:
        raise ValueError(f"operator must be one of {sorted(OPERATORS)}, got {operator!r}")
    reasons = {source: _modules[source].why_not(operator, device_type)
               if source in _modules else _why_not_found(source) for source in SOURCES}
    return {**reasons, "fallback": None}


class force(contextlib.ContextDecorator):
    """Runs every operator on `implementation`: "fallback", "native" or "triton".

    >>> x = torch.tensor([[[1.0], [3.0]]])
    >>> with fastmix.force("fallback"):
    ...     fastmix.ops.cumulative_mean(x).flatten().tolist()
    [1.0, 2.0]

    It is for tests, benchmarks and bug reports. It holds for the whole process, compiled programs
    included; of two that are nested the inner one holds. An operator that `implementation` cannot
    run raises RuntimeError with the reason when it is called; if it can run none at all, `with`
    itself raises that. Without `with`, or use as a decorator, it has no effect, and warns.
    """

    def __init__(self, implementation: str) -> None:
        self._used = True  # nothing to warn of where the next line raises
        known = [*SOURCES, "fallback"]
        if implementation not in known:
            raise ValueError(f"implementation must be one of {known}, got {implementation!r}")
        self.implementation = implementation
        self._used = False

    def __call__(self, function: Function) -> Function:
        self._used = True
        return super().__call__(function)

    def __enter__(self) -> None:
        self._used = True
        reasons = {(name, device): implementations(name, device)[self.implementation]
                   for name in OPERATORS for device in DEVICE_KEYS}
        if all(reason is not None for reason in reasons.values()):
            different = dict.fromkeys(map(str, reasons.values()))
            raise RuntimeError(f"no operator can run on {self.implementation!r}: "
                               f"{'; '.join(different)}")
        if self.implementation != "fallback":
            _modules[self.implementation].prepare()
        if _forced:
            _forced[-1].remove()
        _forced.append(_Override(self.implementation, reasons))

    def __exit__(self, *exception: object) -> None:
        _forced.pop().remove()
        if _forced:
            _forced[-1].install()

    def __del__(self) -> None:
        if not self._used:
            warnings.warn(f"fastmix.force({self.implementation!r}) had no effect: write "
                          f"`with fastmix.force({self.implementation!r}):` around the calls",
                          RuntimeWarning, stacklevel=2)


def forced() -> str | None:
    """The implementation that is forced now."""
    return _forced[-1].implementation if _forced else None


class _Override:
    """Kernels registered over those that would run otherwise, until they are removed."""

    def __init__(self, implementation: str,
                 reasons: dict[tuple[str, str], str | None]) -> None:
        self.implementation, self.reasons = implementation, reasons
        self.install()

    def install(self) -> None:
        self.library = torch.library.Library("fastmix", "IMPL")
        with warnings.catch_warnings():
            # Torch warns of every kernel that replaces another: that is the point here.
            warnings.simplefilter("ignore", UserWarning)
            for (name, device), reason in self.reasons.items():
                if reason is not None:
                    run = run_backward = _raising(name, self.implementation, device, reason)
                elif self.implementation == "fallback":
                    run, run_backward = (OPERATORS[name].run_fallback,
                                         OPERATORS[name].run_fallback_backward)
                else:
                    kernels = _modules[self.implementation].forced(name, device)
                    if kernels is None:
                        continue
                    run, run_backward = kernels
                for op, kernel in ((name, run), (f"{name}_backward", run_backward)):
                    # Later torch allows this by default, 2.10 does not.
                    self.library.impl(op, kernel, DEVICE_KEYS[device], allow_override=True)
            for name, run in STEPS.items() if self.implementation == "fallback" else ():
                self.library.impl(name, run, "CPU", allow_override=True)

    def remove(self) -> None:
        self.library._destroy()


_forced: list[_Override] = []


def _raising(operator: str, implementation: str, device: str,
             reason: str) -> Callable[..., NoReturn]:
    """A kernel that raises the reason why there is none."""
    def kernel(*args: object) -> NoReturn:
        raise RuntimeError(f"{operator} was asked to run on {implementation!r}, which cannot "
                           f"on {device}: {reason} (without fastmix.force and "
                           "FASTMIX_IMPLEMENTATION another implementation runs)")

    return kernel
