"""What is available here, and what is not and why: `python -m fastmix.env`."""

import importlib.metadata
import importlib.util
import platform
import subprocess

import torch

import fastmix
from fastmix import _build, _native
from fastmix.ops._register import OPERATORS


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def compiler():
    """The C++ compiler's version line, or 'none found'."""
    command = _build.compiler()
    if command is None:
        return "none found"
    asked = subprocess.run([command, "--version"], capture_output=True, text=True)
    return asked.stdout.splitlines()[0] if asked.returncode == 0 else f"{command} does not run"


def devices():
    """(type, description) of every device torch can use here."""
    found = [("cpu", f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
                     f"{torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        found.append(("cuda", ", ".join(torch.cuda.get_device_name(i)
                                        for i in range(torch.cuda.device_count()))))
    for kind in ("xpu", "mps"):
        if getattr(torch, kind).is_available():
            found.append((kind, platform.processor() or kind))
    return found


def fft_conv_lines():
    """How fft_conv's CUDA kernels work at sequences here."""
    shared = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    major, minor = torch.cuda.get_device_capability(0)
    shapes = _native.fft_conv_shapes(shared, 10 * major + minor)
    return ["  fft_conv, steps up to: threads of a block, its shared memory, channels at once;",
            "  products on tensor cores: of 64 channels, kernels of 16 bits too"] + [
        f"  {length:>7} {'float32' if size == 4 else '16 bits'} {direction:<9}{way:<10}"
        f"{threads:>5}{used / 1024:>8.1f} KB{channels:>4}"
        for length, size, direction, way, threads, used, channels in shapes]


def report():
    """What `python -m fastmix.env` prints, line by line."""
    lines = [f"fastmix {fastmix.__version__}", f"python  {platform.python_version()} on "
             f"{platform.system()} {platform.machine()}"]
    for package in ("torch", "einops", "triton", "scipy", "rotary-embedding-torch", "matplotlib"):
        lines.append(f"{package:<24}{_version(package)}")
    lines.append(f"{'C++ compiler':<24}{compiler()}")
    lines.append(f"{'C++ kernels':<24}{_native.status()}")
    lines.append(f"{'nvcc':<24}{_build.cuda_compiler() or 'none found'}")
    lines.append(f"{'CUDA kernels':<24}{_native.status('cuda')}")
    for device, description in devices():
        lines += ["", f"{device}: {description}"]
        if device == "cuda" and _native.ready("cuda"):
            lines += fft_conv_lines()
        missing = {}
        for operator in sorted(OPERATORS):
            found = fastmix.implementations(operator, device)
            runs = next(name for name, reason in found.items() if reason is None)
            lines.append(f"  {operator:<22}{runs}")
            for name, reason in found.items():
                if reason is not None:
                    missing.setdefault(f"not {name}: {reason}", []).append(operator)
        for reason, operators in missing.items():
            which = "all" if len(operators) == len(OPERATORS) else ", ".join(operators)
            lines.append(f"  {reason} ({which})")
    return lines


if __name__ == "__main__":
    print("\n".join(report()))
