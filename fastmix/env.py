"""`python -m fastmix.env` says what is available here, and what is not and why.

Made to be pasted into a bug report. `--quick` leaves the self-test out, `--json` prints the same
for a program.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastmix
from fastmix import ops
from fastmix.dispatch import forced
from fastmix.native import build, cuda, library
from fastmix.ops._register import OPERATORS

PACKAGES = ("torch", "einops", "triton", "scipy", "rotary-embedding-torch", "matplotlib")
# The instruction sets that matter to the kernels, or to torch's products beside them.
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16",
             "asimd", "bf16", "sve", "sve2")


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor() -> tuple[str, list[str]]:
    """(name, the flags of CPU_FLAGS that it has), as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    present = (fields.get("flags") or fields.get("Features") or "").split()
    return name, [flag for flag in CPU_FLAGS if flag in present]


def commit() -> str:
    """The commit of the checkout that fastmix is imported from, or 'no checkout'."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return "no checkout"
    described = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"],
                               capture_output=True, text=True)
    return described.stdout.strip() if described.returncode == 0 else "unknown to git"


def compiler() -> str:
    """The C++ compiler's version line, or why there is none."""
    command = build.compiler()
    if command is None:
        return str(build.why_not_compiled())
    lines = build.output_of([*command, "--version"]).splitlines()
    return lines[0] if lines else f"{shlex.join(command)} does not run"


def devices() -> dict[str, str]:
    """Descriptions of the devices that torch can use here, by their type."""
    described = {"cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
                        f"{torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        described["cuda"] = ", ".join(torch.cuda.get_device_name(i)
                                      for i in range(torch.cuda.device_count()))
    for kind in ("xpu", "mps"):
        if getattr(torch, kind).is_available():
            described[kind] = platform.processor() or kind
    return described


def runs(reasons: dict[str, str | None]) -> str:
    """The implementation that an operator runs on, from what `fastmix.implementations` says."""
    chosen = forced()
    if chosen is None:
        return next(name for name, reason in reasons.items() if reason is None)
    return f"{chosen}, forced" if reasons[chosen] is None else f"raises: {chosen} is forced"


def fft_conv_lines() -> list[str]:
    """Lines that say how fft_conv's CUDA kernels cut their work on the first GPU."""
    properties: Any = torch.cuda.get_device_properties(0)
    major, minor = torch.cuda.get_device_capability(0)
    shapes = cuda.fft_conv_shapes(properties.shared_memory_per_block_optin, 10 * major + minor)
    return ["  fft_conv, steps up to: threads of a block, its shared memory, channels at once;",
            "  products on tensor cores: of 64 channels, kernels of 16 bits too"] + [
        f"  {length:>7} {'float32' if size == 4 else '16 bits'} {direction:<9}{way:<10}"
        f"{threads:>5}{used / 1024:>8.1f} KB{channels:>4}"
        for length, size, direction, way, threads, used, channels in shapes]


def triton_lines(reasons: dict[str, str | None]) -> list[str]:
    """A line that says why Triton's kernels are launched slowly, if they run and are."""
    if reasons.get("triton", "not there") is not None:
        return []
    from fastmix._triton import plans

    return [f"  {reason}" for reason in [plans.why_not()] if reason]


# ---- the self-test

STEPS = 9
LARGEST_ERROR = 1e-4  # of the largest number; a kernel that is right stays below 1e-5 in float32


def _cases() -> list[tuple[str, dict[str, Tensor]]]:
    """Every operator with its arguments, float64; gate_loop with real gates as well."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    x = draw(2, STEPS, 2, 4)
    gating = {"x": draw(2, STEPS, 16), "bias": draw(2, STEPS)}
    attention = {"q": x, "k": draw(*x.shape), "v": draw(*x.shape)}
    return [
        ("linear_scan", {"gates": draw(2, STEPS, 4).sigmoid(), "inputs": draw(2, STEPS, 4)}),
        ("gate_loop", attention | {"gate_logits": draw(2, STEPS, 2, 2)}),
        ("gate_loop", attention | {"gates": draw(2, STEPS, 2).sigmoid()}),
        ("decay_conv", {"x": x, "decay": draw(2).sigmoid(), "gain": draw(2)}),
        ("fft_conv", {"x": x, "kernel": draw(2, STEPS, 2)}),
        ("windowed_sgu", gating | {"weight": draw(2, 4, 8), "bias": draw(2, 4)}),
        ("causal_sgu", gating | {"weight": draw(2, STEPS, STEPS)}),
        ("cumulative_mean", {"x": x[:, :, 0]}),
    ]


def _results(module: Any, operator: str, arguments: dict[str, Tensor]) -> list[Tensor]:
    """The operator's output and the gradients of its arguments, on the CPU in float64."""
    leaves = {name: value.detach().requires_grad_() for name, value in arguments.items()}
    out = getattr(module, operator)(**leaves)
    # Weights that differ from step to step: a gradient that mixes steps up shows.
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(out).view_as(out)
    gradients = torch.autograd.grad((out * weights).sum(), list(leaves.values()))
    return [t.detach().to("cpu", torch.float64) for t in (out, *gradients)]


def self_test(device: str) -> dict[str, dict[str, str]]:
    """operator → implementation that can run → "ok", or what is wrong: values and gradients of
    a tiny case in float32 against the operator's definition in float64."""
    from fastmix import reference

    outcomes: dict[str, dict[str, str]] = {}
    for operator, arguments in _cases():
        exact = _results(reference, operator, arguments)
        single = {name: value.to(device, torch.float32) for name, value in arguments.items()}
        of_operator = outcomes.setdefault(operator, {})
        for name, reason in fastmix.implementations(operator, device).items():
            if reason is not None or of_operator.get(name, "ok") != "ok":
                continue
            try:
                with fastmix.force(name):
                    results = _results(ops, operator, single)
            except Exception as failure:  # whatever it is, it is the outcome
                of_operator[name] = f"{type(failure).__name__}: {failure}"
                continue
            error = max(float((r - e).abs().max() / e.abs().max())
                        for r, e in zip(results, exact, strict=True))
            of_operator[name] = ("ok" if error <= LARGEST_ERROR else
                                 f"wrong: {error:.1e} away from the definition")
    return outcomes


# ---- the report


def report(quick: bool = False) -> dict[str, Any]:
    """All of it. The self-test comes first: it compiles what is not compiled yet."""
    described = devices()
    tests = {} if quick else {device: self_test(device) for device in described}
    model, flags = processor()
    return {
        "fastmix": fastmix.__version__, "commit": commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()).strip() or "unknown",
        "cpu": f"{model}, {os.cpu_count()} cores" + "".join(f" {flag}" for flag in flags),
        "packages": {package: version(package) for package in PACKAGES},
        "compiler": compiler(), "native_cpu": library.status(),
        "nvcc": shlex.join(build.cuda_compiler() or ["none found"]),
        "native_cuda": library.status("cuda"),
        "FASTMIX_IMPLEMENTATION": os.environ.get("FASTMIX_IMPLEMENTATION"),
        "refused": fastmix._refused,
        "devices": {device: {
            "description": description,
            "operators": {operator: {"runs": runs(reasons), "reasons": reasons,
                                     "self_test": tests.get(device, {}).get(operator, {})}
                          for operator in sorted(OPERATORS)
                          for reasons in [fastmix.implementations(operator, device)]},
        } for device, description in described.items()},
    }


def lines(all_facts: dict[str, Any]) -> list[str]:
    """A report in words."""
    text = [f"fastmix {all_facts['fastmix']}, commit: {all_facts['commit']}",
            f"python  {all_facts['python']} on {all_facts['system']}, {all_facts['libc']}",
            f"CPU     {all_facts['cpu']}"]
    rows = {**all_facts["packages"], "C++ compiler": all_facts["compiler"],
            "C++ kernels": all_facts["native_cpu"], "nvcc": all_facts["nvcc"],
            "CUDA kernels": all_facts["native_cuda"]}
    named = all_facts["FASTMIX_IMPLEMENTATION"]
    if named:
        refused = all_facts["refused"]
        rows["FASTMIX_IMPLEMENTATION"] = f"{named}: " + (
            f"refused. {refused}" if refused else "forced for all calls")
    text += [f"{name:<24}{value}" for name, value in rows.items()]
    for device, facts in all_facts["devices"].items():
        text += ["", f"{device}: {facts['description']}"]
        if device == "cuda" and library.ready("cuda"):
            text += fft_conv_lines()
        if device == "cuda":
            text += triton_lines(facts["operators"]["linear_scan"]["reasons"])
        missing: dict[str, list[str]] = {}
        for operator, states in facts["operators"].items():
            tested = ", ".join(f"{name}: {outcome}"
                               for name, outcome in states["self_test"].items())
            text.append(f"  {operator:<22}{states['runs']}{f'  ({tested})' if tested else ''}")
            for name, reason in states["reasons"].items():
                if reason is not None:
                    missing.setdefault(f"not {name}: {reason}", []).append(operator)
        for reason, operators in missing.items():
            which = "all" if len(operators) == len(OPERATORS) else ", ".join(operators)
            text.append(f"  {reason} ({which})")
    return text


def show(text: str) -> None:
    """Prints text, unless nobody reads any more, as after `| head`; then Python's own flush at
    exit has nobody to complain to either."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastmix.env", description=(
        "What is available here, and what is not and why; each operator is tried on each "
        "implementation. The exit status is 1 if one of them is wrong, or "
        "if FASTMIX_IMPLEMENTATION cannot be forced."))
    parser.add_argument("--quick", action="store_true", help="leave the trials out")
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    options = parser.parse_args()
    all_facts = report(options.quick)
    show(json.dumps(all_facts, indent=1) if options.json else "\n".join(lines(all_facts)))
    return fastmix._refused is not None or any(
        outcome != "ok" for facts in all_facts["devices"].values()
        for states in facts["operators"].values() for outcome in states["self_test"].values())


if __name__ == "__main__":
    sys.exit(main())
