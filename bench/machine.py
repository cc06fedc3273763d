"""What the report was measured on: the machine, the software, and the machine's limits."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from timing import stopwatch

FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16",
         "asimd", "bf16", "sve", "sve2")


def header(device, dtype):
    copy_gb_s, matmul_gflop_s = limits(device, dtype)
    model, flags = processor()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else model,
        "device_type": device.type,
        "cpu": model,
        "cpu_flags": flags,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "compiler": first_line([os.environ.get("CXX") or "c++", "--version"]),
        "fastmix": version("fastmix"),
        "commit": first_line(["git", "-C", str(Path(__file__).parent), "describe",
                              "--always", "--dirty"]),
        "copy_gb_s": copy_gb_s,
        "matmul_gflop_s": matmul_gflop_s,
        "matmul_dtype": str(dtype).removeprefix("torch."),
    }


def processor():
    """(name, the flags of FLAGS that it has), as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    fields = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    present = (fields.get("flags") or fields.get("Features") or "").split()
    return name, [flag for flag in FLAGS if flag in present]


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def first_line(command):
    if shutil.which(command[0]) is None:
        return "none"
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.partition("\n")[0] if done.returncode == 0 else "none"


def limits(device, dtype):
    """(GB/s of a copy far larger than the caches, read and write counted; GFLOP/s of a
    square matmul in `dtype`): the best of a few."""
    size = (1024 if device.type == "cuda" else 256) << 20
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(size, size, device=device).to(dtype)
    copy = min(stopwatch(lambda: target.copy_(source), device) for _ in range(7))
    matmul = min(stopwatch(lambda: matrix @ matrix, device) for _ in range(7))
    return 2 * source.numel() / copy / 1e6, 2 * size**3 / matmul / 1e6
