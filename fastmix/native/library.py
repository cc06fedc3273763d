"""The compiled library: the one that setup.py built, or one in the user's cache.

There is one for CPUs and one for GPUs ("cpu" and "cuda" below). In the cache a library is named
by a hash of its sources and compilers; a file that others could have written, or that does not
match its checksum, is not loaded.
"""

import contextlib
import ctypes
import functools
import os
import shlex
import shutil
import stat
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from fastmix.native import build

INSTRUCTION_SETS = build.CHOICES  # what can run, in this order

_lock = threading.Lock()
_loaded: dict[str, Path] = {}   # by device type
_failures: dict[str, str] = {}  # by device type: why there will be no library in this process
_chosen: str | None = None      # of INSTRUCTION_SETS, to run instead of the best one


# ---- where it is


def cache_folder() -> Path:
    """$FASTMIX_CACHE, or fastmix in the user's cache directory."""
    named = os.environ.get("FASTMIX_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(named or Path(base or Path.home() / ".cache") / "fastmix")
    except RuntimeError as error:
        raise RuntimeError("this user has no home directory to keep compiled kernels in: set "
                           "FASTMIX_CACHE to a directory") from error
    # The working directory may be another one by the time the library is opened again.
    return folder.absolute()


def existing(device_type: str) -> Path | None:
    """A whole library that is there already, or None. RuntimeError if it may not be loaded."""
    paths = candidates(device_type)
    return next((path for path in paths if build.why_not_whole(path) is None), None)


def candidates(device_type: str) -> Iterator[Path]:
    """Libraries of these very sources, whole or damaged: those built ahead, then the cache's.

    RuntimeError if the cache cannot be read or others could have written to it.
    """
    kinds = [True] if device_type == "cuda" else [False, True]
    ahead = (Path(__file__).parent / build.name_built_ahead(cuda) for cuda in kinds)
    yield from filter(Path.exists, ahead)
    folder = cache_folder()
    try:
        # Without a compiler: whatever one has compiled these sources before.
        paths = [path for name in _names_in_cache(device_type)
                 for path in sorted(folder.glob(name))]
        reasons = [why_not_trusted(path) for path in (folder, *paths) if path.exists()]
    except OSError as error:
        raise RuntimeError(f"the cache directory cannot be used: {error} (set FASTMIX_CACHE to "
                           "another)") from error
    for reason in filter(None, reasons):
        raise RuntimeError(reason)
    yield from paths


def _names_in_cache(device_type: str) -> list[str]:
    """Names of what is compiled here, and for CPUs of libraries of more sets, which do too."""
    if device_type == "cuda":
        return [build.compiled_name("cuda", _gpu_code())]
    own, every = build.own_instruction_sets(), tuple(build.INSTRUCTION_SETS)
    more = [every[:count] for count in range(every.index(own[-1]) + 1, len(every) + 1)]
    return list(dict.fromkeys(build.compiled_name(sets=sets) for sets in (own, *more)))


def why_not_trusted(path: Path) -> str | None:
    """Why nothing may be loaded from `path`, or None: others must not be able to write to it."""
    if os.name == "nt":  # there os.stat knows no other users: a home has its own access list
        return None
    status = os.stat(path)
    if hasattr(os, "getuid") and status.st_uid not in (os.getuid(), 0):
        return f"{path} belongs to another user: set FASTMIX_CACHE to a directory of your own"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} can be written to by others: chmod go-w it, or set FASTMIX_CACHE"
    return None


def _gpu_code() -> list[str]:
    """nvcc's flags for the GPUs that are here."""
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return build.cuda_code(sorted(f"{major}{minor}" for major, minor in capabilities if major >= 8),
                           ptx=False)


# ---- whether there can be one


@functools.cache
def why_not_gpu() -> str | None:
    """Why no GPU can run the CUDA kernels, or None."""
    if torch.version.hip:
        return "the CUDA kernels are not for ROCm: there the fallback runs"
    if not torch.cuda.is_available():
        return ("torch finds no CUDA device here: python -m torch.utils.collect_env tells what "
                "torch is built for, and what is there")
    try:
        best = max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    except RuntimeError as error:  # in a process that was forked when CUDA was in use
        return f"CUDA cannot be used: {error}; where a process was forked, spawn it instead"
    return too_old(*best) if best < (8, 0) else None


def too_old(major: int, minor: int) -> str:
    """The reason why a GPU of that compute capability has no kernels."""
    return ("the kernels need a GPU of compute capability 8.0 or newer, this one has "
            f"{major}.{minor}")


def why_not(device_type: str = "cpu") -> str | None:
    """Why this machine can have no library, or None. Builds nothing."""
    if device_type == "cuda" and why_not_gpu() is not None:
        return why_not_gpu()
    return _failures.get(device_type) or _why_not_built(device_type)


def _why_not_built(device_type: str) -> str | None:
    """Why there is no library and none can be built, or None."""
    try:
        if device_type in _loaded or existing(device_type) is not None:
            return None
    except RuntimeError as error:
        return str(error)
    damaged = [f"{build.why_not_whole(path)}, and " for path in candidates(device_type)]
    reason = build.why_not_compiled(device_type == "cuda")
    folder = cache_folder()
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    if reason is None and not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        reason = (f"the cache directory {folder} cannot be written to (set FASTMIX_CACHE to "
                  "another)")
    return reason and "".join(damaged) + reason


def ready(device_type: str) -> bool:
    """Whether there is a library already: nothing has to be compiled."""
    try:
        return ((device_type == "cpu" or why_not_gpu() is None)
                and existing(device_type) is not None)
    except RuntimeError:
        return False


def status(device_type: str = "cpu") -> str:
    """Where the library is, or will be, in a line."""
    if device_type in _loaded:
        return f"{_loaded[device_type]}" + (
            f", {instruction_set()} kernels" if device_type == "cpu" else "")
    reason = why_not(device_type)
    command = build.compiler() if device_type == "cpu" else build.cuda_compiler()
    return reason or f"to be compiled at the first call, with {shlex.join(command or [])}"


# ---- loading it


def load(device_type: str = "cpu") -> Path:
    """The library's path, loaded; compiled before if need be. RuntimeError where it cannot."""
    with _lock:
        if device_type not in _loaded:
            if device_type in _failures:
                raise RuntimeError(_failures[device_type])
            try:
                if device_type == "cpu":
                    build.own_instruction_sets()  # refuses a wrong name before kernels are there
                path = existing(device_type) or _compiled(device_type)
                if path not in _loaded.values():
                    torch.ops.load_library(str(path))
                if device_type == "cpu":
                    _choose(path, build.named_instruction_set())
                _loaded[device_type] = path
            except (RuntimeError, OSError) as error:
                cause = error.__cause__ if isinstance(error, OSError) else None  # torch's hides it
                _failures[device_type] = ("the C++ kernels could not be built or loaded: "
                                          f"{error}{f': {cause}' if cause else ''}")
                raise RuntimeError(_failures[device_type]) from error
    return _loaded[device_type]


def _compiled(device_type: str) -> Path:
    reason = _why_not_built(device_type)
    if reason is not None:
        raise RuntimeError(reason)
    path = cache_folder() / _names_in_cache(device_type)[0]
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeError(f"the cache directory {path.parent} cannot be made: {error} (set "
                           "FASTMIX_CACHE to another)") from error
    with build_lock(path.parent) as locked:
        there = existing(device_type) if locked else None  # another process may have compiled it
        if there is not None:
            return there
        for damaged in candidates(device_type):
            warnings.warn(f"fastmix compiles its kernels again: {build.why_not_whole(damaged)}",
                          RuntimeWarning, stacklevel=2)
        for killed in path.parent.glob(".building-*") if locked else ():
            shutil.rmtree(killed, ignore_errors=True)
        build.build(path, Path(torch.__file__).parent, build.show_progress,
                    cpu=device_type == "cpu",
                    cuda=_gpu_code() if device_type == "cuda" else (),
                    sets=build.own_instruction_sets())
        path.chmod(0o700)
    return path


@contextlib.contextmanager
def build_lock(folder: Path) -> Iterator[bool]:
    """Waits until no other process builds in `folder`. Yields False where file locks are
    unsupported; then the last build wins."""
    with open(folder / ".lock", "w") as file:
        try:
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("fastmix: another process is compiling the kernels, this one waits",
                      file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)  # the system frees that of a killed one
            locked = True
        except (ImportError, OSError):  # not on Windows, nor on every file system
            locked = False
        yield locked


# ---- its instruction sets


def best_instruction_set() -> int:
    """The index in INSTRUCTION_SETS of the kernels that run by default."""
    return ctypes.CDLL(str(load())).fastmix_best_instruction_set()


def available_instruction_sets() -> tuple[str, ...]:
    """The INSTRUCTION_SETS that the library has and this machine runs, the best one last."""
    least = ctypes.CDLL(str(load())).fastmix_least_instruction_set()
    return INSTRUCTION_SETS[least : best_instruction_set() + 1]


def choose_instruction_set(name: str | None = None) -> None:
    """Run the kernels built for `name`, one of INSTRUCTION_SETS that this machine has.

    If None those again that ran at first: the best, or what FASTMIX_INSTRUCTION_SETS names. For
    tests and bug reports; holds for the whole process. A library compiled on first use has one
    alone, unless FASTMIX_INSTRUCTION_SETS is "all".
    """
    _choose(load(), name or build.named_instruction_set())


def _choose(library: Path, name: str | None) -> None:
    global _chosen
    kernels = ctypes.CDLL(str(library))
    index = -1
    if name is not None:
        has = INSTRUCTION_SETS[: kernels.fastmix_best_instruction_set() + 1]
        if name not in has:
            raise RuntimeError(f"this machine has no {name}: choose one of {', '.join(has)}")
        index = has.index(name)
    if name is not None and index < kernels.fastmix_least_instruction_set():
        raise RuntimeError(f"the kernels for {name} have not been compiled: set "
                           "FASTMIX_INSTRUCTION_SETS=all before the first call")
    if not kernels.fastmix_choose_instruction_set(index):
        raise RuntimeError(f"Linux lets this process use no {name}: a signal stack of its threads "
                           "is too small for the unit's registers")
    _chosen = name


def instruction_set() -> str | None:
    """The one of INSTRUCTION_SETS whose kernels run; None while no library is loaded."""
    if "cpu" not in _loaded:
        return None
    return _chosen or INSTRUCTION_SETS[best_instruction_set()]
