"""What the report was measured on: the machine, the software, and how fast torch itself is."""

import functools
import os
import platform
import re
from pathlib import Path

import torch

import fastmix
from fastmix import env
from fastmix.native import library
from timing import stopwatch

COPIED = {"cpu": (128 << 20, 256 << 20), "cuda": (512 << 20, 1 << 30)}  # bytes
SIDES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}                  # of square matrices
SLOW_MS = 500  # of a product: it is not done again, nor a larger one
UNKNOWN = 8 << 30  # bytes that are taken to be free where the system does not tell


def room(device, meminfo=Path("/proc/meminfo"), group=Path("/sys/fs/cgroup")):
    """Bytes that an original, or a prompt, may take: half of the memory that is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    available = re.search(r"MemAvailable:\s*(\d+) kB", _text(meminfo))
    free = int(available[1]) << 10 if available else UNKNOWN
    most, used = group / "memory.max", group / "memory.current"  # of a container
    if most.exists() and used.exists() and most.read_text().strip() != "max":
        files = re.search(r"^inactive_file (\d+)", _text(group / "memory.stat"), re.M)
        held = int(used.read_text()) - (int(files[1]) if files else 0)  # files' pages can be let go
        free = min(free, max(0, int(most.read_text()) - held))
    return free // 2


def _text(path):
    return path.read_text() if path.exists() else ""


def header(device, dtype):
    copy_gb_s, matmul_gflop_s = rates(device, dtype)
    model, flags = env.processor()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else model,
        "device_type": device.type,
        "cpu": model,
        "cpu_flags": flags,
        "instruction_set": library.instruction_set(),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": env.version("triton"),
        "compiler": env.compiler(),
        "fastmix": fastmix.__version__,
        "commit": env.commit(),
        "copy_gb_s": copy_gb_s,
        "matmul_gflop_s": matmul_gflop_s,
        "matmul_dtype": str(dtype).removeprefix("torch."),
    }


def rates(device, dtype):
    """(GB/s of torch's copy far beyond the caches, read and write counted; GFLOP/s of torch's
    square matmul in `dtype`): the best of several sizes and calls."""
    copied, multiplied = [], []
    for size in COPIED[device.type]:
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        ms = min(stopwatch(functools.partial(target.copy_, source), device) for _ in range(5))
        copied.append(2 * size / ms / 1e6)
    for size in SIDES[device.type]:
        matrix = torch.randn(size, size, device=device).to(dtype)
        calls = [stopwatch(functools.partial(torch.mm, matrix, matrix), device)]
        while len(calls) < 5 and calls[0] < SLOW_MS:
            calls.append(stopwatch(functools.partial(torch.mm, matrix, matrix), device))
        multiplied.append(2 * size**3 / min(calls) / 1e6)
        if calls[0] > SLOW_MS:  # half types without instructions of their own: seconds a call
            break
    return max(copied), max(multiplied)
