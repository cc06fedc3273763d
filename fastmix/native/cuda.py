"""fft_conv on GPUs: the wrapper round its CUDA kernels, their limits and their shapes."""

import ctypes
import functools
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmix.native import library
from fastmix.ops._register import OPERATORS

LONGEST = 1 << 20  # steps


def run(name: str, forced: bool, *args: Any) -> Any:
    """A kernel; or the fallback, for what the kernels do not take."""
    operator, (x, _, skip) = name.removesuffix("_backward"), args[-3:]
    unusable = why_not_on(x.device)
    reason = unusable or why_not_for(x)
    if reason is None:
        dense = None if skip is None else skip.float().contiguous()
        outputs = getattr(torch.ops.fastmix_cuda, name)(*args[:-1], dense)
        if name == operator:
            return outputs
        *gradients, parts = outputs
        return *gradients, x.new_empty(0) if skip is None else parts.sum(0).to(skip.dtype)
    if unusable is not None and not forced:
        warnings.warn(f"fastmix runs its pure PyTorch fallback on {x.device}: {unusable}",
                      RuntimeWarning, stacklevel=2)
    return OPERATORS[operator].run_instead("native", reason, forced, name != operator, args)


@functools.cache
def why_not_on(device: torch.device) -> str | None:
    """Loads the library and tries it. Why it cannot be used on that device, or None.

    RuntimeError while a CUDA graph is captured: none of that can be part of one.
    """
    if library.why_not_gpu() is not None:
        return library.why_not_gpu()
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return library.too_old(*capability)
    with torch.cuda.device(device):
        captured = torch.cuda.is_current_stream_capturing()
    if captured and library.why_not("cuda") is None:
        raise RuntimeError(
            f"fft_conv: its CUDA kernels have not run on {device} yet, and cannot be compiled, "
            "loaded and tried while a CUDA graph is captured; call the operator once before the "
            "capture")
    try:
        library.load("cuda")
        for dtype in (torch.float32, torch.bfloat16):  # by transforms, and by products
            x = torch.ones(1, 2, 1, 1, dtype=dtype, device=device)
            out = torch.ops.fastmix_cuda.fft_conv(x, x[..., 0], None)
            if (out.flatten().cpu() - torch.tensor([1.0, 2.0])).abs().max() > 1e-5:
                return (f"its self-test failed: [1, 1] convolved with [1, 1] in {dtype} gave "
                        f"{out.flatten().tolist()}, expected [1, 2]")
    except RuntimeError as error:
        return str(error)
    return None


def why_not_for(x: Tensor) -> str | None:
    """Why the CUDA kernels of fft_conv cannot take x (b, n, h, d), or None."""
    if x.dtype == torch.float64:
        return "its CUDA kernels compute in float32, and x is float64: x.float() they take"
    if x.shape[1] > LONGEST:
        return f"its CUDA kernels take up to {LONGEST} steps, x has {x.shape[1]}"
    if x.shape[0] * x.shape[2] * x.shape[3] > 1 << 30:
        return ("its CUDA kernels take up to 2^30 channels of all samples, x has "
                f"{x.shape[0] * x.shape[2] * x.shape[3]}")
    return None


def fft_conv_shapes(shared: int, capability: int, path: Path | str | None = None
                    ) -> list[tuple[int, int, str, str, int, int, int]]:
    """The ways in which fft_conv's CUDA kernels cut their work, by the library at `path` (by
    default this one's), on GPUs of a compute capability (90 for 9.0) where blocks may have `shared`
    bytes.

    [(longest sequence, bytes of a number, "forward" or "backward", "transforms" or "products",
    threads of a block, its shared bytes, channels it takes at once)]. Products on tensor cores
    are for 64 channels or more, and kernels of 16 bits too; longer sequences go through scratch.
    """
    shape = ctypes.CDLL(str(path or library.load("cuda"))).fastmix_fft_conv_shape
    shape.argtypes = [ctypes.c_int64, ctypes.c_int64, *3 * [ctypes.c_int], ctypes.c_void_p]
    rows, block = [], (ctypes.c_int * 3)()
    for length in (256 << i for i in range(7)):
        for size, way, on in ((4, 1, 0), (2, 1, 0), (2, 2, capability)):
            for backward, name in enumerate(("forward", "backward")):
                if shape(length, shared, on, size, backward, block) == way:
                    rows.append((length, size, name, ("transforms", "products")[way - 1], *block))
    return rows
