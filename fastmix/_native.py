"""The C++ and CUDA kernels: the library that setup.py built, or ones compiled on first use.

A compiled library, for CPUs or for GPUs, lies in a cache directory of the user's own, named by
a hash of its sources; what others could have written there is not loaded.
"""

import contextlib
import ctypes
import functools
import os
import shutil
import stat
import sys
import threading
import warnings
from pathlib import Path

import torch

from fastmix import _build
from fastmix.ops import _register
from fastmix.ops._register import LIBRARY, OPERATORS

INSTRUCTION_SETS = ("portable", "avx2", "avx512")

_lock = threading.Lock()
_loaded = {}    # part, "cpu" or "cuda": the library's path
_failures = {}  # part: why there will be none in this process


def built_ahead(part="cpu"):
    """The library that setup.py made of these very sources, or None."""
    names = ["_native-cuda"] if part == "cuda" else ["_native", "_native-cuda"]
    paths = (Path(__file__).parent / f"{name}-{_build.fingerprint()}.so" for name in names)
    return next(filter(Path.exists, paths), None)


def cache_folder():
    """$FASTMIX_CACHE, or fastmix in the user's cache directory."""
    named = os.environ.get("FASTMIX_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    # The working directory may be another one by the time the library is opened again.
    return (Path(named) if named else Path(base) / "fastmix").absolute()


def _distrusted(path):
    """Why `path` may not be executed from, or None: others must not be able to write to it."""
    found = os.stat(path)
    if hasattr(os, "getuid") and found.st_uid not in (os.getuid(), 0):
        return f"{path} belongs to another user"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} can be written to by others: chmod go-w it, or set FASTMIX_CACHE"
    return None


def _gpu_code():
    """nvcc's flags for the GPUs that are here."""
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return _build.cuda_code(sorted(f"{major}{minor}" for major, minor in found if major >= 8),
                            ptx=False)


def _cached(part):
    """The library's place in the cache, there or not. RuntimeError if it cannot be looked at or
    is not safe."""
    folder = cache_folder()
    # Without a compiler: whatever one has compiled these sources before.
    name = _build.compiled_name(part, _gpu_code() if part == "cuda" else ())
    try:
        path = next(iter(sorted(folder.glob(name))), folder / name)
        reasons = [_distrusted(place) for place in (folder, path) if place.exists()]
    except OSError as error:
        raise RuntimeError(f"the cache directory cannot be used: {error} (set FASTMIX_CACHE)")
    for reason in filter(None, reasons):
        raise RuntimeError(reason)
    return path


def why_not(part="cpu"):
    """Why this machine can have no library, or None. Builds nothing."""
    try:
        if part in _loaded or _found(part) is not None:
            return None
    except RuntimeError as error:
        return str(error)
    if part == "cuda" and _build.cuda_compiler() is None:
        return "no nvcc was found (PATH, /usr/local/cuda or $CUDACXX) to build it with"
    if _build.compiler() is None:
        return "no C++ compiler was found (c++, g++ or $CXX) to build it with"
    folder = cache_folder()
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    if not os.access(nearest, os.W_OK):
        return f"the cache directory {folder} cannot be written to (set FASTMIX_CACHE)"
    return None


def status(part="cpu"):
    """Where the library is, or will be, in a line."""
    if part == "cuda" and _no_gpu() is not None:
        return _no_gpu()
    if part in _loaded:
        return f"{_loaded[part]}" + (
            f", {INSTRUCTION_SETS[best_instruction_set()]} kernels" if part == "cpu" else "")
    compiler = _build.compiler() if part == "cpu" else _build.cuda_compiler()
    return _failures.get(part) or why_not(part) or (
        f"to be compiled at the first call, with {compiler}")


def ready(part):
    """Whether there is a library already: nothing has to be compiled."""
    try:
        return (part == "cpu" or _no_gpu() is None) and _found(part) is not None
    except RuntimeError:
        return False


def unavailable(operator, device_type):
    """None if the kernels of `operator` run on such tensors here, else the reason."""
    if device_type not in KERNELS:
        return f"the C++ kernels are for cpu and cuda, not for {device_type}"
    if operator not in KERNELS[device_type]:
        return f"{operator} has no {'CUDA ' if device_type == 'cuda' else ''}C++ kernel"
    no_gpu = _no_gpu() if device_type == "cuda" else None
    return no_gpu or _failures.get(device_type) or why_not(device_type)


@functools.cache
def _no_gpu():
    """Why no GPU can run the kernels, or None."""
    if torch.version.hip:
        return "the CUDA kernels are not for ROCm"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device here"
    try:
        found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    except RuntimeError as error:  # in a process that was forked when CUDA was in use
        return f"CUDA cannot be used: {error}"
    if max(found) < (8, 0):
        return "the kernels need compute capability 8.0, here is {}.{}".format(*max(found))
    return None


def library(part="cpu"):
    """The library's path, loaded; compiled before if need be. RuntimeError where it cannot."""
    with _lock:
        if part not in _loaded:
            if part in _failures:
                raise RuntimeError(_failures[part])
            try:
                _load(_found(part) or _compiled(part), part)
            except (RuntimeError, OSError) as error:
                _failures[part] = f"the C++ kernels could not be built or loaded: {error}"
                raise RuntimeError(_failures[part]) from error
    return _loaded[part]


def _found(part):
    """A library that is there already, or None."""
    if built_ahead(part) is not None:
        return built_ahead(part)
    path = _cached(part)
    return path if path.exists() else None


def _compiled(part):
    path = _cached(part)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    code = _gpu_code() if part == "cuda" else ()
    with _alone(path.parent) as alone:
        if alone and path.exists():  # by now
            return path
        for killed in path.parent.glob(".building-*") if alone else ():
            shutil.rmtree(killed, ignore_errors=True)
        _build.build(path, Path(torch.__file__).parent, _build.show_progress, cpu=part == "cpu",
                     cuda=code)
        path.chmod(0o700)
    return path


@contextlib.contextmanager
def _alone(folder):
    """Waits till no other process builds in `folder`; False where that cannot be known, and
    the last one that builds is right."""
    with open(folder / ".lock", "w") as file:
        try:
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("fastmix: another process is compiling the kernels, this one waits",
                      file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)  # the system frees that of a killed one
            alone = True
        except (ImportError, OSError):  # not on Windows, nor on every file system
            alone = False
        yield alone


def _load(path, part):
    if path not in _loaded.values():
        torch.ops.load_library(str(path))
    _loaded[part] = path
    if part == "cpu":
        _register.late_kernels = None


def forced(operator, device_type):
    """(forward, backward) for GPUs; nothing is ever registered over the kernels for CPUs."""
    if device_type == "cpu":
        return None
    return tuple(functools.partial(_run_on_cuda, f"{operator}{suffix}", True)
                 for suffix in ("", "_backward"))


def _run_on_cuda(name, forced, *args):
    """A kernel; or the fallback, for what the kernels do not take."""
    operator, (x, _, skip) = name.removesuffix("_backward"), args[-3:]
    unusable = _cuda_unusable(x.device)
    reason = unusable or _refusal(x)
    if reason is None:
        dense = None if skip is None else skip.float().contiguous()
        found = getattr(torch.ops.fastmix_cuda, name)(*args[:-1], dense)
        if name == operator:
            return found
        *found, parts = found
        return *found, x.new_empty(0) if skip is None else parts.sum(0).to(skip.dtype)
    if unusable is not None and not forced:
        warnings.warn(f"fastmix runs its pure PyTorch fallback on {x.device}: {unusable}",
                      RuntimeWarning, stacklevel=2)
    return OPERATORS[operator].run_instead("native", reason, forced, name != operator, args)


@functools.cache
def _cuda_unusable(device):
    """Loads the library and tries it. Why it cannot be used on that device, or None."""
    if _no_gpu() is not None:
        return _no_gpu()
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need compute capability 8.0"
    try:
        library("cuda")
        for dtype in (torch.float32, torch.bfloat16):  # by transforms, and by products
            x = torch.ones(1, 2, 1, 1, dtype=dtype, device=device)
            found = torch.ops.fastmix_cuda.fft_conv(x, x[..., 0], None)
            if torch.cuda.is_current_stream_capturing():
                continue  # nothing can be read now
            if (found.flatten().cpu() - torch.tensor([1.0, 2.0])).abs().max() > 1e-5:
                return f"1 * 1 came out as {found.flatten().tolist()}"
    except RuntimeError as error:
        return str(error)
    return None


def _refusal(x):
    """Why the CUDA kernels of fft_conv cannot take x (b, n, h, d), or None."""
    if x.dtype == torch.float64:
        return "it computes in float32, and float64 is wanted"
    if x.shape[1] > LONGEST:
        return f"it is for up to {LONGEST} steps, here are {x.shape[1]}"
    if x.shape[0] * x.shape[2] * x.shape[3] > 1 << 30:
        return "it is for up to 2^30 channels of all samples"
    return None


def fft_conv_shapes(shared, capability, found=None):
    """How the CUDA kernels of fft_conv cut their work on GPUs of a compute capability (90 for
    9.0) where blocks may have `shared` bytes.

    [(longest sequence, bytes of a number, "forward" or "backward", "transforms" or "products",
    threads of a block, its shared bytes, channels it takes at once)]. Products on tensor cores
    are for 64 channels or more, and kernels of 16 bits too; longer sequences go through scratch.
    """
    shape = ctypes.CDLL(str(found or library("cuda"))).fastmix_fft_conv_shape
    shape.argtypes = [ctypes.c_int64, ctypes.c_int64, *3 * [ctypes.c_int], ctypes.c_void_p]
    rows, told = [], (ctypes.c_int * 3)()
    for length in (256 << i for i in range(7)):
        for size, way, on in ((4, 1, 0), (2, 1, 0), (2, 2, capability)):
            for backward, name in enumerate(("forward", "backward")):
                if shape(length, shared, on, size, backward, told) == way:
                    rows.append((length, size, name, ("transforms", "products")[way - 1], *told))
    return rows


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
    if device_type != "cpu" or operator not in KERNELS["cpu"]:
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
    """Registers the kernels that are there already; others come on first use."""
    # Without a look at the devices: that is for first use.
    if torch.backends.cuda.is_built() and torch.version.hip is None:
        for operator in KERNELS["cuda"]:
            for name in (operator, f"{operator}_backward"):
                LIBRARY.impl(name, functools.partial(_run_on_cuda, name, False), "CUDA")
    try:
        if _found("cpu") is not None:
            library()
            return
    except RuntimeError:
        pass  # said on first use
    _register.late_kernels = _first_use


# By device: the operators that have a file of their name.
KERNELS = {device: tuple(sorted({file.stem for file in _build.sources().glob(f"{device}/*.cpp")}
                                & set(OPERATORS)))
           for device in ("cpu", "cuda")}
LONGEST = 1 << 20  # steps, on GPUs
register()
