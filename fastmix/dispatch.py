"""Which implementation an operator runs on, and how to force one.

PyTorch's dispatcher chooses: an implementation registered for the tensors' device runs
before the fallback, which is registered for all. This file only reports that choice and
overrides it on request.
"""

import contextlib
import importlib
import importlib.util
import warnings

import torch

from fastmix.ops._register import OPERATORS

# The devices whose kernels `force` overrides.
DEVICE_KEYS = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU", "mps": "MPS"}

# Modules that bring kernels. Importing one registers its kernels, for devices that the
# others leave to it. It has unavailable(operator, device_type), None or the reason why it
# cannot run there; library(), which makes sure that its kernels are ready; and
# forced(operator, device_type), (forward, backward) to run where others are registered, or
# None where its own are.
SOURCES = {"native": "fastmix._native", "triton": "fastmix._triton"}


def _present(source):
    return importlib.util.find_spec(SOURCES[source]) is not None


def load():
    """Import, and so register, whatever kernels this installation has."""
    for source in SOURCES:
        if _present(source):
            importlib.import_module(SOURCES[source])


def implementations(operator, device_type="cpu"):
    """{implementation: None if it can run here, else the reason}; the first that can, runs."""
    if operator not in OPERATORS:
        raise ValueError(f"operator must be one of {sorted(OPERATORS)}, got {operator!r}")
    found = {}
    for source in SOURCES:
        if _present(source):
            module = importlib.import_module(SOURCES[source])
            found[source] = module.unavailable(operator, device_type)
        else:
            found[source] = f"this version of fastmix has no {source} kernels"
    found["fallback"] = None
    return found


@contextlib.contextmanager
def force(implementation):
    """Run every operator on `implementation`: "fallback", "native" or "triton".

    For tests, benchmarks and bug reports. Holds for the whole process, compiled programs
    included; of two that are nested the inner one holds. An operator that it cannot run
    raises RuntimeError with the reason when called; if it can run none at all, that is
    raised at once.
    """
    known = [*SOURCES, "fallback"]
    if implementation not in known:
        raise ValueError(f"implementation must be one of {known}, got {implementation!r}")
    reasons = {(name, device): implementations(name, device)[implementation]
               for name in OPERATORS for device in DEVICE_KEYS}
    if all(reason is not None for reason in reasons.values()):
        raise RuntimeError(f"no operator can run on {implementation!r}: "
                           f"{next(iter(reasons.values()))}")
    if implementation != "fallback":
        importlib.import_module(SOURCES[implementation]).library()
    if _forced:
        _forced[-1].lift()
    _forced.append(_Force(implementation, reasons))
    try:
        yield
    finally:
        _forced.pop().lift()
        if _forced:
            _forced[-1].lay()


_forced = []


class _Force:
    """Kernels laid over those that would run otherwise, until they are lifted off again."""

    def __init__(self, implementation, reasons):
        self.implementation, self.reasons = implementation, reasons
        self.lay()

    def lay(self):
        self.library = torch.library.Library("fastmix", "IMPL")
        with warnings.catch_warnings():
            # Torch remarks on every kernel that is laid over another: that is the point here.
            warnings.simplefilter("ignore", UserWarning)
            for (name, device), reason in self.reasons.items():
                if reason is not None:
                    run = run_backward = _refusal(name, self.implementation, device, reason)
                elif self.implementation == "fallback":
                    run, run_backward = (OPERATORS[name].run_fallback,
                                         OPERATORS[name].run_fallback_backward)
                else:
                    source = importlib.import_module(SOURCES[self.implementation])
                    found = source.forced(name, device)
                    if found is None:
                        continue
                    run, run_backward = found
                for op, kernel in ((name, run), (f"{name}_backward", run_backward)):
                    # Later torch allows this by default, 2.10 does not.
                    self.library.impl(op, kernel, DEVICE_KEYS[device], allow_override=True)

    def lift(self):
        self.library._destroy()


def _refusal(operator, implementation, device, reason):
    def refuse(*args):
        raise RuntimeError(f"{operator} was asked to run on {implementation!r}, which cannot "
                           f"on {device}: {reason}")

    return refuse
