"""The C++ kernels: the library that setup.py built, or one compiled here on first use.

A compiled library lies in a cache directory of the user's own, named by a hash of its
sources; what others could have written there is not loaded.
"""

import ctypes
import os
import stat
import threading
import warnings
from pathlib import Path

import torch

from fastmix import _build
from fastmix.ops import _register
from fastmix.ops._register import OPERATORS

INSTRUCTION_SETS = ("portable", "avx2", "avx512")

_lock = threading.Lock()
_library = None  # the loaded library's path
_failure = None  # why there will be none in this process


def built_ahead():
    """Where setup.py puts the library for these very sources."""
    return Path(__file__).parent / f"_native-{_build.fingerprint()}.so"


def cache_folder():
    """$FASTMIX_CACHE, or fastmix in the user's cache directory."""
    named = os.environ.get("FASTMIX_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(base) / "fastmix"


def _distrusted(path):
    """Why `path` may not be executed from, or None: others must not be able to write to it."""
    found = os.stat(path)
    if hasattr(os, "getuid") and found.st_uid not in (os.getuid(), 0):
        return f"{path} belongs to another user"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} can be written to by others: chmod go-w it, or set FASTMIX_CACHE"
    return None


def _cached():
    """The library's place in the cache, there or not. RuntimeError if it is not safe."""
    folder = cache_folder()
    # Without a compiler: whatever one has compiled these sources before.
    name = _build.compiled_name()
    path = next(iter(sorted(folder.glob(name))), folder / name)
    for part in (folder, path):
        reason = _distrusted(part) if part.exists() else None
        if reason is not None:
            raise RuntimeError(reason)
    return path


def why_not():
    """Why this machine can have no library, or None. Builds nothing."""
    try:
        if _found() is not None:
            return None
    except RuntimeError as error:
        return str(error)
    if _build.compiler() is None:
        return "no C++ compiler was found (c++, g++ or $CXX) to build it with"
    folder = cache_folder()
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    if not os.access(nearest, os.W_OK):
        return f"the cache directory {folder} cannot be written to (set FASTMIX_CACHE)"
    return None


def status():
    """Where the library is, or will be, in a line."""
    if _library is not None:
        return f"{_library}, {INSTRUCTION_SETS[best_instruction_set()]} kernels"
    reason = _failure or why_not()
    return reason or f"to be compiled at the first call, with {_build.compiler()}"


def unavailable(operator, device_type):
    """None if the kernels of `operator` run on such tensors here, else the reason."""
    if device_type != "cpu":
        return f"the C++ kernels are for cpu, not for {device_type}"
    if operator not in KERNELS:
        return f"{operator} has no C++ kernel"
    return _failure or why_not()


def library():
    """The library's path, loaded; compiled before if need be. RuntimeError where it cannot."""
    global _library, _failure
    with _lock:
        if _library is None:
            if _failure is not None:
                raise RuntimeError(_failure)
            try:
                _library = _load(_found() or _compiled())
            except (RuntimeError, OSError) as error:
                _failure = f"the C++ kernels could not be built or loaded: {error}"
                raise RuntimeError(_failure) from error
    return _library


def _found():
    """A library that is there already, or None."""
    if built_ahead().exists():
        return built_ahead()
    path = _cached()
    return path if path.exists() else None


def _compiled():
    path = _cached()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _build.build(path, Path(torch.__file__).parent, _build.show_progress)
    path.chmod(0o700)
    return path


def _load(path):
    torch.ops.load_library(str(path))
    _register.late_kernels = None
    return path


def forced(operator, device_type):
    """Nothing is ever registered over the C++ kernels."""


def best_instruction_set():
    """The index in INSTRUCTION_SETS of the kernels that run by default."""
    return ctypes.CDLL(str(library())).fastmix_best_instruction_set()


def choose_instruction_set(name=None):
    """Run the kernels built for `name`, one of INSTRUCTION_SETS that this machine has.

    The best again if None. For tests and bug reports; holds for the whole process.
    """
    wanted = -1 if name is None else INSTRUCTION_SETS.index(name)
    found = ctypes.CDLL(str(library()))
    if wanted > best_instruction_set():
        raise RuntimeError(f"this machine has no {name}")
    found.fastmix_choose_instruction_set(wanted)


def _first_use(operator, device_type):
    """Compiles the library. True if torch now has kernels of it for the operator."""
    if device_type != "cpu" or operator not in KERNELS:
        return False
    try:
        library()
    except RuntimeError as error:
        _register.late_kernels = None
        warnings.warn(f"fastmix runs its pure PyTorch fallback on the CPU: {error}",
                      RuntimeWarning, stacklevel=2)
        return False
    return True


def register():
    """Registers the library's kernels if it is there already; else they come on first use."""
    try:
        if _found() is not None:
            library()
            return
    except RuntimeError:
        pass  # said on first use
    _register.late_kernels = _first_use


KERNELS = tuple(sorted(
    file.stem for file in _build.sources().glob("cpu/*.cpp") if file.stem in OPERATORS))
register()
