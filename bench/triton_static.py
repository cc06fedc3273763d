"""What Triton's compiler makes of every kernel, without a GPU: registers, spills, loads.

`record` runs launchers on meta tensors with a driver that compiles for a given target and
launches nothing, so what is compiled is what a launcher would launch on such tensors.
"""

import contextlib
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32), "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32), "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _Driver:
    """A device that compiles and never launches."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target  # kernels keep what they compiled by device

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return "meta"


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel: counts per thread of registers and spilled bytes, bytes shared."""

    name: str
    constants: str
    registers: int
    spills: int
    shared: int
    warps: int
    loads: dict  # bits of a global load → how many in the code; empty for AMD
    stores: dict
    matrix: int  # tensor-core instructions
    stack: int
    text: str  # SASS or AMD assembly


@contextlib.contextmanager
def recording(target):
    """Compile for `target`, a name in TARGETS; yields the list of what was launched."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1: kernels are interpreted, not compiled")
    found = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found[kernel.hash] = (self, kernel)
        return kernel

    active = driver._active  # reading driver.active would look for a GPU
    driver.set_active(_Driver(TARGETS[target]))
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = run
        driver._active = active


def examine(function, kernel):
    """A Compiled of what `recording` found."""
    source = kernel.src
    constants = ", ".join(
        f"{function.arg_names[key[0]]}={value}" for key, value in sorted(source.constants.items())
        if isinstance(value, (int, bool, str)) and function.arg_names[key[0]].isupper())
    meta = kernel.metadata
    common = dict(name=function.__name__, constants=constants, shared=meta.shared,
                  warps=meta.num_warps)
    if meta.target.backend == "hip":
        text = kernel.asm["amdgcn"]

        def number(key):
            return sum(map(int, re.findall(rf"\.{key}:\s+(\d+)", text)))

        return Compiled(**common, registers=number("vgpr_count"),
                        spills=number("vgpr_spill_count"), stack=number("private_segment_fixed_size"),
                        loads={}, stores={}, matrix=len(re.findall(r"\bv_mfma", text)))
    cubin = Path(kernel.metadata_group[f"{function.__name__}.cubin"])
    usage = subprocess.run([TOOLS / "cuobjdump", "--dump-resource-usage", cubin],
                           capture_output=True, text=True, check=True).stdout
    text = subprocess.run([TOOLS / "nvdisasm", "-c", cubin],
                          capture_output=True, text=True, check=True).stdout

    def used(key):
        return int(re.search(rf"{key}:(\d+)", usage).group(1))

    def widths(instruction):
        found = {}
        # LDGSTS is an asynchronous copy to shared memory.
        for modifiers in re.findall(rf"\b{instruction}((?:\.\w+)*)", text):
            bits = 128 if ".128" in modifiers else 64 if ".64" in modifiers else (
                16 if re.search(r"\.[US]16", modifiers) else
                8 if re.search(r"\.[US]8", modifiers) else 32)
            found[bits] = found.get(bits, 0) + 1
        return found

    local = len(re.findall(r"\b(?:STL|LDL)\b", text))
    return Compiled(**common, registers=used("REG"), spills=local, stack=used("STACK"),
                    loads=widths("LDG(?:STS)?"), stores=widths("STG"), text=text,
                    matrix=len(re.findall(r"\b(?:HMMA|DMMA|HGMMA|UTCHMMA|UTCQMMA)\b", text)))
