"""Attention-free sequence mixers, fast: `fastmix.nn`, `fastmix.ops`, `python -m fastmix.env`."""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

import torch

# Operators can be registered once in a process. An import after sys.modules was cleared gets the
# modules of the first one, which torch keeps here.
_modules = vars(torch.ops.fastmix).setdefault("fastmix_modules", {})
if _modules and _modules["fastmix"].__file__ != __file__:
    raise ImportError(f"fastmix was imported from {_modules['fastmix'].__file__} before, and its "
                      f"operators cannot be registered twice: import {__file__} in a new process")
sys.modules.update(_modules)

from fastmix import ops  # noqa: E402
from fastmix.dispatch import force, implementations, load  # noqa: E402
from fastmix.generation import generate, stream  # noqa: E402
from fastmix.ops._register import decompose  # noqa: E402
from fastmix.states import select_rows  # noqa: E402

if TYPE_CHECKING:
    from fastmix import nn
    from fastmix._accelerate import accelerate, restore

__version__ = "0.1.0"
__all__ = ["accelerate", "decompose", "force", "generate", "implementations", "nn", "ops",
           "restore", "select_rows", "stream"]

_NEEDS_NN = {"accelerate": "fastmix._accelerate", "restore": "fastmix._accelerate"}  # name: file


def __getattr__(name: str) -> Any:
    """`fastmix.nn` and what needs it, imported when first asked for: importing stays quick."""
    if name == "nn":
        return importlib.import_module("fastmix.nn")
    if name in _NEEDS_NN:
        return getattr(importlib.import_module(_NEEDS_NN[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_refused: str | None = None  # why FASTMIX_IMPLEMENTATION could not be forced

if not _modules:
    load()
    if os.environ.get("FASTMIX_IMPLEMENTATION"):
        # Never left: it holds for the life of the process.
        try:
            force(os.environ["FASTMIX_IMPLEMENTATION"]).__enter__()
        except (ValueError, RuntimeError) as error:
            _refused = f"FASTMIX_IMPLEMENTATION in the environment: {error}"
            if "fastmix.env" not in sys.orig_argv:  # python -m fastmix.env, which says so itself
                raise type(error)(_refused) from None
    _modules.update((name, module) for name, module in sys.modules.items()
                    if name.partition(".")[0] == "fastmix")
