"""What nvcc makes of every CUDA kernel, without a GPU: registers, spills, shared memory.

    python bench/cuda_static.py            # builds the library and writes the table
    python bench/cuda_static.py --check    # compares with it; --check LIBRARY: one that is built
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from triton_static import TOOLS

from fastmix import _build, _native

TABLE = Path(__file__).parent / "results" / "cuda-static.json"
# What a block may have, and compute capabilities: Hopper, A100, consumer cards.
DEVICES = {227 << 10: 90, 163 << 10: 80, 99 << 10: 89}
KEY = ("target", "kernel", "shape")


def compiler():
    """nvcc's version."""
    said = subprocess.run([_build.cuda_compiler(), "--version"], capture_output=True, text=True)
    return re.search(r"release \S+, (\S+)", said.stdout).group(1)


def measure(library):
    """A row per kernel and target: registers of a thread, bytes of its stack (spills are there),
    instructions that reach it."""
    used = subprocess.run([TOOLS / "cuobjdump", "--dump-resource-usage", library],
                          capture_output=True, text=True, check=True).stdout
    rows, target = [], None
    for line in used.splitlines():
        if found := re.search(r"arch = (sm_\d+)", line):
            target = found.group(1)
        if found := re.search(r"Function (\S+):", line):
            name = found.group(1)
        if found := re.search(r"REG:(\d+) STACK:(\d+)", line):
            kernel = re.search(r"\d+([A-Z][A-Za-z]+?)(?:IL?NS|ES\d)", name)
            numbers = re.findall(r"L(?:[ib]|NS0_4TypeE)(\d+)E", name)
            rows.append({"target": target, "kernel": kernel.group(1) if kernel else name,
                         "shape": " ".join(numbers), "registers": int(found.group(1)),
                         "stack": int(found.group(2))})
    return sorted(rows, key=lambda row: tuple(row[k] for k in KEY))


def worse(rows, table):
    """Lines that say where `rows` are worse than the committed table."""
    known = {tuple(row[k] for k in KEY): row for row in table}
    lines = [f"{' '.join(key)}: is in the table, but not in the library"
             for key in known.keys() - {tuple(row[k] for k in KEY) for row in rows}]
    for row in rows:
        name = " ".join(row[k] for k in KEY)
        before = known.get(tuple(row[k] for k in KEY))
        if before is None:
            lines.append(f"{name}: not in the table, write it again")
            continue
        lines += [f"{name}: {count} {before[count]} -> {row[count]}"
                  for count in ("registers", "stack") if row[count] > before[count]]
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", nargs="?", const="", metavar="LIBRARY",
                        help="compare with the committed table instead of writing it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        library = options.check
        if not library:
            library = Path(folder) / "library.so"
            _build.build(library, Path(torch.__file__).parent, _build.show_progress, cpu=False,
                         cuda=_build.cuda_code())
        rows = measure(library)
        blocks = {shared >> 10: _native.fft_conv_shapes(shared, capability, library)
                  for shared, capability in DEVICES.items()}
    if options.check is None:
        TABLE.write_text(json.dumps(
            {"nvcc": compiler(), "fft_conv blocks by KB of shared memory": blocks,
             "kernels": rows}, indent=0) + "\n")
        for row in rows:
            print(row)
        return 0
    table = json.loads(TABLE.read_text())
    if table["nvcc"] != compiler():
        print("what is worse cannot be told: the table is of nvcc "
              f"{table['nvcc']}, this is {compiler()}")
        return 0
    lines = worse(rows, table["kernels"])
    print("\n".join(lines) or f"{len(rows)} kernels: none worse than the table")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
