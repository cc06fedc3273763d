"""What Triton's compiler makes of every kernel, without a GPU: registers, spills, loads.

`record` runs launchers on meta tensors with a driver that compiles for a given target and
launches nothing, so what is compiled is what a launcher would launch on such tensors.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
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
    arguments: str  # their types
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
def recording(target, skip):
    """Compile for `target`, a name in TARGETS; yields a dict of what was launched, by what it
    is made from: a hash of source, types, constants and options. Not compiled if `skip` of that.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1: kernels are interpreted, not compiled")
    found, made_from = {}, None
    run = JITFunction.run

    def look(*, key, fn, **_):
        nonlocal made_from
        made_from = hashlib.sha256(
            repr((target, fn.jit_function.cache_key, key)).encode()).hexdigest()[:16]
        return skip(made_from)

    def compile_only(self, *args, grid, warmup, **options):
        nonlocal made_from
        made_from = None  # stays so if it is in memory
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel is not None and made_from is not None:
            found[made_from] = self, kernel
        return kernel

    active = driver._active  # reading driver.active would look for a GPU
    driver.set_active(_Driver(TARGETS[target]))
    JITFunction.run = compile_only
    triton.knobs.runtime.jit_cache_hook = look
    try:
        yield found
    finally:
        triton.knobs.runtime.jit_cache_hook = None
        JITFunction.run = run
        driver._active = active


def examine(function, kernel):
    """A Compiled of what `recording` found."""
    source = kernel.src
    constants = ", ".join(
        f"{function.arg_names[key[0]]}={value}" for key, value in sorted(source.constants.items())
        if isinstance(value, (int, bool, str)) and function.arg_names[key[0]].isupper())
    meta = kernel.metadata
    types = " ".join(str(kind) for kind in source.signature.values() if kind != "constexpr")
    common = dict(name=function.__name__, constants=constants, arguments=types,
                  shared=meta.shared, warps=meta.num_warps)
    if meta.target.backend == "hip":
        text = kernel.asm["amdgcn"]

        def number(key):
            return sum(map(int, re.findall(rf"\.{key}:\s+(\d+)", text)))

        return Compiled(**common, registers=number("vgpr_count"),
                        spills=number("vgpr_spill_count"),
                        stack=number("private_segment_fixed_size"), loads={}, stores={},
                        matrix=len(re.findall(r"\bv_mfma", text)), text=text)
    cubin = Path(kernel.metadata_group[f"{function.__name__}.cubin"])
    usage = subprocess.run([TOOLS / "cuobjdump", "--dump-resource-usage", cubin],
                           capture_output=True, text=True, check=True).stdout
    text = subprocess.run([TOOLS / "nvdisasm", "-c", "-ndf", cubin],
                          capture_output=True, text=True, check=True).stdout

    def used(key):
        return int(re.search(rf"{key}:(\d+)", usage).group(1))

    def widths(instruction):
        found = {}
        # LDGSTS is an asynchronous copy to shared memory.
        for modifiers in re.findall(rf"\b{instruction}\b((?:\.\w+)*)", text):
            bits = 128 if ".128" in modifiers else 64 if ".64" in modifiers else (
                16 if re.search(r"\.[US]16", modifiers) else
                8 if re.search(r"\.[US]8", modifiers) else 32)
            found[bits] = found.get(bits, 0) + 1
        return found

    local = len(re.findall(r"\b(?:STL|LDL)\b", text))
    return Compiled(**common, registers=used("REG"), spills=local, stack=used("STACK"),
                    loads=widths("LDG(?:STS)?"), stores=widths("STG"), text=text,
                    matrix=len(re.findall(r"\b(?:HMMA|DMMA|HGMMA|UTCHMMA|UTCQMMA)\b", text)))


# ---- the table: python bench/triton_static.py [--check] [--targets sm90 …]

RESULTS = Path(__file__).parent / "results"
DTYPES = ("bfloat16", "float16", "float32", "float64")
SAMPLE = 16  # of so many kernels that have not changed, one is compiled again all the same


def table_path():
    """The table of this version of Triton, there or not yet."""
    for path in RESULTS.glob("triton-static*.json"):
        if json.loads(path.read_text())["triton"] == triton.__version__:
            return path
    return RESULTS / f"triton-static-{triton.__version__}.json"


def _launches(dtypes):
    """(operator, shape, dtype, function that launches its forward and backward)."""

    def empty(*shape, dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def both(operator, grads, *args):
        def run():
            kernels = importlib.import_module(f"fastmix._triton.{operator}")
            out = kernels.forward(*args)
            out = out if isinstance(out, tuple) else (out,)
            kernels.backward(*out[:grads], *out[grads:], *args)

        return run

    for dtype in (getattr(torch, name) for name in dtypes):
        for b, n, h, d in ((8, 8192, 8, 64), (1, 65536, 8, 64), (32, 4096, 16, 256)):
            x, decay = empty(b, n, h, d, dtype=dtype), empty(h, dtype=torch.float32)
            yield ("decay_conv", (b, n, h, d), dtype,
                   both("decay_conv", 2, x, decay, decay, None, 64))
        for b, n, c in ((8, 8192, 512), (1, 65536, 512)):
            x = empty(b, n, c, dtype=dtype)
            yield "cumulative_mean", (b, n, c), dtype, both(
                "cumulative_mean", 1, x)
        for b, n, c in ((8, 4096, 1024), (1, 65536, 1024)):
            for gates in (dtype, torch.promote_types(dtype, torch.complex64)):
                inputs = empty(b, n, c, dtype=gates)
                yield "linear_scan", (b, n, c), gates, both(
                    "linear_scan", 1, inputs, inputs, None, False, 64)
        for b, n, h, dk, *dv in ((8, 4096, 1024, 1), (1, 65536, 1024, 1), (8, 4096, 64, 16),
                                 (8, 4096, 16, 64), (8, 4096, 8, 128), (2, 4096, 4, 256),
                                 (2, 4096, 8, 64, 128), (2, 4096, 8, 16, 256)):
            q, logits = empty(b, n, h, dk, dtype=dtype), empty(b, n, h, 2, dtype=dtype)
            v = empty(b, n, h, *dv or [dk], dtype=dtype)
            yield "gate_loop", (b, n, h, dk, *dv), dtype, both(
                "gate_loop", 2, q, q, v, None, logits, None, 64)
        for w, h in ((16, 4), (128, 4), (128, 1), (512, 4), (1024, 4)):
            b, n, c = 8, 8192, 512
            x = empty(b, n, 2 * c, dtype=dtype)
            weight, bias = empty(h, w, 2 * w, dtype=dtype), empty(h, w, dtype=dtype)
            norm = empty(c, dtype=dtype)
            yield "windowed_sgu", (b, n, c, h, w), dtype, both(
                "windowed_sgu", 1, x, weight, bias, norm, norm, 1e-5,
                None, "identity")


def measure(targets, dtypes, progress, skip):
    """One row per compiled kernel and target; `skip` as for `recording`."""
    rows = []
    for target in targets:
        with recording(target, skip) as found:
            for operator, shape, dtype, launch in _launches(dtypes):
                if (operator == "gate_loop" and shape[3] > 1 and dtype == torch.float64
                        and target == "gfx942"):
                    continue  # Triton fails to compile its products
                progress(f"{target} {operator} {shape} {dtype}")
                before = set(found)
                launch()
                for key in set(found) - before:
                    made = examine(*found[key])
                    row = {k: v for k, v in asdict(made).items() if k != "text"}
                    rows.append(dict(operator=operator, target=target, shape=list(shape),
                                     dtype=str(dtype).removeprefix("torch."), made_from=key, **row))
    return sorted(rows, key=lambda r: tuple(str(r[k]) for k in KEY))


KEY = ("operator", "target", "dtype", "shape", "name", "constants", "arguments")


def _narrow(widths, most):
    """How many of the loads or stores move at most so many bits."""
    return sum(count for bits, count in widths.items() if int(bits) <= most)


def worse(rows, table):
    """Lines that say where `rows` are worse than the committed table."""
    known = {tuple(str(r[k]) for k in KEY): r for r in table}
    lines = []
    for row in rows:
        name = " ".join(str(row[k]) for k in KEY)
        before = known.get(tuple(str(row[k]) for k in KEY))
        if before is None:
            lines.append(f"{name}: not in the table, write it again")
            continue
        for count in ("spills", "stack", "registers", "shared"):
            if row[count] > before[count]:
                lines.append(f"{name}: {count} {before[count]} -> {row[count]}")
        if row["matrix"] < before["matrix"] or (row["matrix"] == 0) != (before["matrix"] == 0):
            lines.append(f"{name}: tensor-core instructions {before['matrix']} -> {row['matrix']}")
        for moved in ("loads", "stores"):
            if any(_narrow(row[moved], bits) > _narrow(before[moved], bits)
                   for bits in (8, 16, 32, 64)):
                lines.append(f"{name}: {moved} {before[moved]} -> {row[moved]}")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true",
                        help="compare with the committed table instead of writing it: kernels "
                        f"made from anything else than its own, and one in {SAMPLE} of the others")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    options = parser.parse_args()
    known = json.loads(table_path().read_text())["kernels"] if options.check else []
    unchanged = {row.get("made_from") for row in known}
    rows = measure(options.targets, options.dtypes,
                   lambda text: print(text, file=sys.stderr, flush=True),
                   functools.cache(lambda made_from: made_from in unchanged
                                   and random.randrange(SAMPLE)))
    if options.check:
        lines = worse(rows, known)
        print("\n".join(lines) or f"{len(rows)} kernels compiled: none worse than the table")
        return bool(lines)
    table = {"triton": triton.__version__, "kernels": rows}
    table_path().write_text(json.dumps(table, indent=0) + "\n")
    for row in rows:
        print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
