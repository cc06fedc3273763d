"""What Triton's compiler makes of every kernel, without a GPU: registers, shared memory, loads.

`recording` runs launchers on meta tensors and notes what they would launch. `python
bench/triton_static.py` compiles that for each target and writes bench/expected/triton.csv, a row
per kernel and a group of columns per version of Triton; --check compares with that table. A kernel
whose Triton IR is in the table already is not compiled again: renaming, helper functions and
comments change no machine code. Nothing in the table spills: a kernel that does is an error.
"""

import argparse
import contextlib
import csv
import hashlib
import importlib
import itertools
import multiprocessing
import os
import random
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32), "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32), "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Options of a target that are not in Triton's IR of these kernels, which have no fp8.
BY_TARGET = ("arch", "extern_libs", "maxnreg", "supported_fp8_dtypes",
             "deprecated_fp8_dot_operand_dtypes", "max_num_imprecise_acc_default")
SAMPLE = 16  # one in so many of what is taken to be the same is made all the same

_texts: dict[tuple, str] = {}  # kernels in Triton's IR, by all that they are made from


# ---- kernels: what is launched, and what becomes of it

class _Driver:
    """A device that launches nothing."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target  # Triton keeps kernels by device

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return "meta"


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel: counts per thread of registers and spilled words, bytes shared."""

    registers: int
    spills: int
    stack: int
    shared: int
    warps: int
    loads: dict  # bits of a global load → how many in the code; empty for AMD
    stores: dict
    matrix: int  # tensor-core instructions
    text: str  # SASS or AMD assembly


@dataclass(frozen=True)
class Launch:
    """A kernel that a launcher wants, with the types, constants and options it is compiled for."""

    function: JITFunction
    source: ASTSource
    options: object
    target: str  # a name in TARGETS

    def description(self):
        """Its name, constants ("BACKWARD" is True, what is False is left out), and the types that
        its pointers point to."""
        constants = []
        for (index, *_), value in sorted(self.source.constants.items()):
            name = self.function.arg_names[index]
            # UNTURNED is for some versions of Triton: its kernels stand beside the others'.
            if (name.isupper() and name != "UNTURNED" and isinstance(value, (int, str))
                    and value is not False):
                constants.append(name if value is True else f"{name}={value}")
        pointers = re.findall(r"\*(\w+)", " ".join(map(str, self.source.signature.values())))
        return dict(name=self.function.__name__, constants=" ".join(constants),
                    pointers=" ".join(f"{len(list(alike))}*{kind}"
                                      for kind, alike in itertools.groupby(pointers)))

    def ir(self):
        """A hash of the target, the options and the kernel in Triton's IR: of all that the machine
        code depends on.
        """
        # extern_libs is where a library lies on this machine.
        options = sorted((k, v) for k, v in vars(self.options).items() if k != "extern_libs")
        return hashlib.sha256(repr((self.target, options, self._text())).encode()).hexdigest()[:8]

    def _text(self):
        """The kernel in Triton's IR, without locations and names. NVIDIA's targets share it, since
        making it takes longest; one in SAMPLE is made again and must be the same.
        """
        options = sorted((k, v) for k, v in vars(self.options).items() if k not in BY_TARGET)
        key = TARGETS[self.target].backend, self.source.hash(), repr(options)
        if key not in _texts:
            _texts[key] = self._made_text()
        elif random.randrange(SAMPLE) == 0:
            assert self._made_text() == _texts[key], (self.target, self.description())
        return _texts[key]

    def _made_text(self):
        backend, context = make_backend(TARGETS[self.target]), ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        module = self.source.make_ir(
            TARGETS[self.target], self.options, backend.get_codegen_implementation(self.options),
            backend.get_module_map(), context)
        stages = {}
        backend.add_stages(stages, self.options, self.source.language)
        return stages["ttir"](module, {}).str_nodebug()

    def compiled(self):
        kernel = triton.compile(self.source, target=TARGETS[self.target],
                                options=vars(self.options))
        common = dict(shared=kernel.metadata.shared, warps=kernel.metadata.num_warps)
        if TARGETS[self.target].backend == "hip":
            return Compiled(**common, **_amd_counts(kernel.asm["amdgcn"]))
        return Compiled(**common, **_nvidia_counts(
            Path(kernel.metadata_group[f"{self.function.__name__}.cubin"])))


def _amd_counts(text):
    def number(key):
        return sum(map(int, re.findall(rf"\.{key}:\s+(\d+)", text)))

    return dict(registers=number("vgpr_count"), spills=number("vgpr_spill_count"),
                stack=number("private_segment_fixed_size"), loads={}, stores={},
                matrix=len(re.findall(r"\bv_mfma", text)), text=text)


def _nvidia_counts(cubin):
    def run(*command):
        return subprocess.run([TOOLS / command[0], *command[1:], cubin], capture_output=True,
                              text=True, check=True).stdout

    usage, text = run("cuobjdump", "--dump-resource-usage"), run("nvdisasm", "-c", "-ndf")

    def used(key):
        return int(re.search(rf"{key}:(\d+)", usage).group(1))

    def widths(instruction):
        def bits(modifiers):
            if ".128" in modifiers:
                return 128
            if ".64" in modifiers:
                return 64
            narrow = re.search(r"\.[US](8|16)", modifiers)
            return int(narrow.group(1)) if narrow else 32

        return dict(Counter(map(bits, re.findall(rf"\b{instruction}\b((?:\.\w+)*)", text))))

    return dict(
        registers=used("REG"), stack=used("STACK"),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", text)),
        loads=widths("LDG(?:STS)?"),  # LDGSTS is an asynchronous copy to shared memory
        stores=widths("STG"), text=text,
        matrix=len(re.findall(r"\b(?:HMMA|DMMA|HGMMA|UTCHMMA|UTCQMMA)\b", text)))


@contextlib.contextmanager
def recording(target):
    """Launchers launch nothing; yields a dict of a Launch for `target`, a name in TARGETS, for
    each kernel that Triton would have to compile, in order.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1: kernels are interpreted, not compiled")
    launches = {}

    def note(self, key, signature, device, constants, options, attrs, warmup):
        launches.setdefault((self.__module__, self.__name__, key), Launch(
            self, ASTSource(self, signature, constants, attrs), options, target))

    active, do_compile = driver._active, JITFunction._do_compile
    driver.set_active(_Driver(TARGETS[target]))  # reading driver.active would look for a GPU
    JITFunction._do_compile = note
    try:
        yield launches
    finally:
        JITFunction._do_compile = do_compile
        driver._active = active


# ---- the kernels that the table is of

DTYPES = ("bfloat16", "float16", "float32", "float64")
OPERATORS = ("decay_conv", "cumulative_mean", "linear_scan", "gate_loop", "windowed_sgu")


def _calls(operator, dtype):
    """(shape, dtype, number of gradients that arrive, arguments of forward)"""

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    if operator == "decay_conv":
        for b, n, h, d in ((8, 8192, 8, 64), (1, 65536, 8, 64), (32, 4096, 16, 256)):
            decay = empty(h, dtype=torch.float32)
            yield (b, n, h, d), dtype, 2, (empty(b, n, h, d), decay, decay, None, 64)
    elif operator == "cumulative_mean":
        for b, n, c in ((8, 8192, 512), (1, 65536, 512)):
            yield (b, n, c), dtype, 1, (empty(b, n, c),)
    elif operator == "linear_scan":
        for b, n, c in ((8, 4096, 1024), (1, 65536, 1024)):
            for gates in (dtype, torch.promote_types(dtype, torch.complex64)):
                inputs = empty(b, n, c, dtype=gates)
                yield (b, n, c), gates, 1, (inputs, inputs, None, False, 64)
    elif operator == "gate_loop":
        for b, n, h, dk, *dv in ((8, 4096, 1024, 1), (1, 65536, 1024, 1), (8, 4096, 64, 16),
                                 (8, 4096, 16, 64), (8, 4096, 8, 128), (2, 4096, 4, 256),
                                 (2, 4096, 8, 64, 128), (2, 4096, 8, 16, 256)):
            q, v = empty(b, n, h, dk), empty(b, n, h, *dv or [dk])
            yield (b, n, h, dk, *dv), dtype, 2, (q, q, v, None, empty(b, n, h, 2), None, 64)
        # Of real gates those that are trained with most, and one call of each class of head dims.
        real = {torch.bfloat16: ((8, 4096, 8, 64), (1, 65536, 1024, 1), (8, 4096, 8, 128),
                                 (2, 4096, 8, 16, 256)),
                torch.float32: ((8, 4096, 8, 64),)}
        for b, n, h, dk, *dv in real.get(dtype, ()):
            q, v = empty(b, n, h, dk), empty(b, n, h, *dv or [dk])
            gates = empty(b, n, h, dtype=torch.float32)
            yield (b, n, h, dk, *dv), dtype, 2, (q, q, v, gates, None, None, 64)
    else:
        for w, h in ((16, 4), (128, 4), (128, 1), (512, 4), (1024, 4)):
            b, n, c = 8, 8192, 512
            yield (b, n, c, h, w), dtype, 1, (
                empty(b, n, 2 * c), empty(h, w, 2 * w), empty(h, w), empty(c), empty(c), 1e-5,
                None, "identity")


def launches_of(target, dtype, operator):
    """(key, row without counts, Launch) of each kernel of the operator's forward and backward."""
    kernels = importlib.import_module(f"fastmix._triton.{operator}")
    with recording(target) as launches:
        for shape, inputs, grads, args in _calls(operator, getattr(torch, dtype)):
            if (operator == "gate_loop" and shape[3] > 1 and dtype == "float64"
                    and target == "gfx942"):
                continue  # Triton fails to compile its products
            before = set(launches)
            out = kernels.forward(*args)
            out = out if isinstance(out, tuple) else (out,)
            kernels.backward(*out[:grads], *out[grads:], *args)
            for key, launch in launches.items():
                if key not in before:
                    yield key, dict(operator=operator, target=target,
                                    shape="x".join(map(str, shape)),
                                    dtype=str(inputs).removeprefix("torch."),
                                    **launch.description()), launch


def _measure_targets(targets, dtype, operator, known):
    """One after another: they share IR."""
    return [_measure_part((target, dtype, operator), known) for target in targets]


def _measure_part(part, known):
    """launches_of(*part), each with its IR and, unless that is in `known`, what it compiles to."""
    results = []
    for key, row, launch in launches_of(*part):
        row["ir"] = launch.ir()
        compiled = None if row["ir"] in known else vars(launch.compiled())
        if compiled:
            row |= {name: compiled[name] for name in (*COUNTS, "spills", "stack")}
        results.append((key, row))
    return part, results


def measure(targets, dtypes, known, jobs):
    """A row for each kernel. Those whose IR is in `known` are not compiled: they have no counts."""
    rows = {}
    # Forked processes would share the parent's LLVM.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(_measure_targets, targets, dtype, operator, known)
                   for dtype in dtypes for operator in OPERATORS]
        for future in running:
            for part, results in future.result():
                print(*part, f"{sum('registers' in row for _, row in results)} compiled",
                      file=sys.stderr, flush=True)
                for key, row in results:
                    rows.setdefault((part[0], key), row)
    return sorted(rows.values(), key=_key)


# ---- the table

# A blank cell is short for another: in ABOVE for the one above it, in a version's columns for that
# of the version before. What is not there, a kind of load or a version's whole kernel, is "-".
TABLE = Path(__file__).parent / "expected" / "triton.csv"
ABOVE = ("operator", "target", "dtype", "shape")
KEY = (*ABOVE, "name", "constants", "pointers")
COUNTS = ("warps", "registers", "shared", "loads", "stores", "matrix")
COLUMNS = ("ir", *COUNTS)  # of a version of Triton
NOTHING = "-"


def _key(row):
    return tuple(row[name] for name in KEY)


def versions_in_table():
    with TABLE.open(newline="") as file:
        header = next(csv.reader(file))
    return [column.split()[0] for column in header if column.endswith(" ir")]


def _cells_before(versions):
    """(a version's column, that of the version before)"""
    return [(f"{version} {name}", f"{before} {name}")
            for before, version in itertools.pairwise(versions) for name in COLUMNS]


def _lines():
    """The table's lines, with no blank cells."""
    pairs, above = _cells_before(versions_in_table()), {}
    with TABLE.open(newline="") as file:
        for line in csv.DictReader(file):
            line |= {name: above[name] for name in ABOVE if not line[name]}
            for cell, before in pairs:
                line[cell] = line[cell] or line[before]
            above = line
            yield line


def read_table(version):
    """The rows of one version of Triton."""

    def parsed(name, text):
        if name in ("loads", "stores"):  # "128:8 32:1"
            return {int(bits): int(count) for bits, _, count in
                    (entry.partition(":") for entry in text.split() if text != NOTHING)}
        return text if name == "ir" else int(text)

    return [{name: line[name] for name in KEY}
            | {name: parsed(name, line[f"{version} {name}"]) for name in COLUMNS}
            for line in _lines() if line.get(f"{version} ir", NOTHING) != NOTHING]


def write_table(version, rows):
    """Put `rows` in the place of that version's; a kernel that no version has any more is gone."""

    def text(value):
        if isinstance(value, dict):
            return " ".join(f"{bits}:{count}" for bits, count in sorted(value.items())) or NOTHING
        return str(value)

    versions = sorted({*(versions_in_table() if TABLE.exists() else ()), version})
    columns = [f"{group} {name}" for group in versions for name in COLUMNS]
    lines = {}
    for group in versions:
        for row in rows if group == version else read_table(group):
            line = lines.setdefault(_key(row), dict.fromkeys(columns, NOTHING) | {
                name: row[name] for name in KEY})
            line.update({f"{group} {name}": text(row[name]) for name in COLUMNS})
    above, pairs = {}, _cells_before(versions)
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*KEY, *columns], lineterminator="\n")
        writer.writeheader()
        for _, line in sorted(lines.items()):
            alike = [name for name in ABOVE if line[name] == above.get(name)]
            alike += [cell for cell, before in pairs if line[cell] == line[before]]
            writer.writerow(line | dict.fromkeys(alike, ""))
            above = line


def _narrow(widths, most):
    """How many of the loads or stores move at most so many bits."""
    return sum(count for bits, count in widths.items() if bits <= most)


def worse(rows, table):
    """Lines that say where `rows` are worse than the committed table."""
    known = {_key(row): row for row in table}
    lines = []
    for row in rows:
        name = " ".join(_key(row))
        for count in ("spills", "stack"):
            if row[count]:
                lines.append(f"{name}: {count} 0 -> {row[count]}")
        before = known.get(_key(row))
        if before is None:
            lines.append(f"{name}: not in the table, write it again")
            continue
        for count in ("registers", "shared"):
            if row[count] > before[count]:
                lines.append(f"{name}: {count} {before[count]} -> {row[count]}")
        if row["matrix"] < before["matrix"] or (row["matrix"] == 0) != (before["matrix"] == 0):
            lines.append(f"{name}: tensor-core instructions {before['matrix']} -> {row['matrix']}")
        for moved in ("loads", "stores"):
            if any(_narrow(row[moved], bits) > _narrow(before[moved], bits)
                   for bits in (8, 16, 32, 64)):
                lines.append(f"{name}: {moved} {before[moved]} -> {row[moved]}")
    return lines


def _check(table, targets, dtypes, jobs):
    known = {row["ir"] for row in table}
    again = set(random.sample(sorted(known), len(known) // SAMPLE))
    rows = measure(targets, dtypes, known - again, jobs)
    compiled = [row for row in rows if "registers" in row]
    lines = worse(compiled, table)
    print("\n".join(lines) or f"{len(compiled)} of {len(rows)} kernels compiled, "
          f"{len(known & {row['ir'] for row in rows})} unchanged: none worse than the table")
    return bool(lines)


def _record(table, jobs):
    counts = {row["ir"]: row for row in table}
    rows = measure(TARGETS, DTYPES, set(counts), jobs)
    compiled = [row for row in rows if "registers" in row]
    spilling = [row for row in compiled if row["spills"] or row["stack"]]
    if spilling:
        print("These kernels spill, and the table is not written:", *spilling, sep="\n")
        return True
    write_table(triton.__version__, [
        row if "registers" in row else {name: counts[row["ir"]][name] for name in COUNTS} | row
        for row in rows])
    print(f"{len(compiled)} of {len(rows)} kernels compiled, the others were in the table")
    return False


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true",
                        help="compare with the table instead of writing it: kernels that are not "
                        f"in it, and one in {SAMPLE} of the others")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS),
                        help="those to check")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES,
                        help="those to check")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)),
                        help="processes that compile at once")
    options = parser.parse_args()
    table = read_table(triton.__version__)
    if options.check:
        return _check(table, options.targets, options.dtypes, options.jobs)
    return _record(table, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
