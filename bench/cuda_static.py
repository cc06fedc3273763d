"""What nvcc makes of every CUDA kernel, without a GPU: registers, spills, shared memory.

    python bench/cuda_static.py            # builds the library and writes the table
    python bench/cuda_static.py --check    # compares with it; --check LIBRARY: one that is built
"""

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from fastmix.native import build
from triton_static import TOOLS

TABLE = Path(__file__).parent / "expected" / "cuda.csv"
KEY = ("target", "kernel", "shape")
COUNTS = ("registers", "stack")


def compiler() -> str:
    """nvcc's version."""
    version = build.output_of([*build.cuda_compiler(), "--version"])
    return re.search(r"release \S+, V(\S+)", version).group(1)


def read_table() -> tuple[str, list[dict]]:
    """nvcc's version and the rows of `measure`, from the table: a row per kernel there, and a
    column for each version, target and count."""
    rows, version = [], ""
    with open(TABLE, newline="") as file:
        for line in csv.DictReader(file):
            kernel = {"kernel": line.pop("kernel"), "shape": line.pop("shape")}
            targets = {}
            for name, value in line.items():
                version, target, count = name.split()
                if value:
                    targets.setdefault(target, {})[count] = int(value)
            rows += [{"target": target, **kernel, **counts} for target, counts in targets.items()]
    return version, rows


def write_table(version: str, rows: list[dict]) -> None:
    lines = {}
    for row in rows:
        line = lines.setdefault((row["kernel"], row["shape"]),
                                {"kernel": row["kernel"], "shape": row["shape"]})
        line |= {f"{version} {row['target']} {count}": row[count] for count in COUNTS}
    names = dict.fromkeys(name for line in lines.values() for name in line)
    with open(TABLE, "w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(line for _, line in sorted(lines.items()))


def measure(library: Path | str) -> list[dict]:
    """A row per kernel and target: registers of a thread, bytes of its stack (spills are there),
    instructions that reach it."""
    used = subprocess.run([TOOLS / "cuobjdump", "--dump-resource-usage", library],
                          capture_output=True, text=True, check=True).stdout
    rows, target = [], None
    for line in used.splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            target = match.group(1)
        if match := re.search(r"Function (\S+):", line):
            name = match.group(1)
        if match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            kernel = re.search(r"\d+([A-Z][A-Za-z]+?)(?:IL?NS|ES\d)", name)
            numbers = re.findall(r"L(?:[ib]|NS0_4TypeE)(\d+)E", name)
            rows.append({"target": target, "kernel": kernel.group(1) if kernel else name,
                         "shape": " ".join(numbers), "registers": int(match.group(1)),
                         "stack": int(match.group(2))})
    return sorted(rows, key=lambda row: tuple(row[k] for k in KEY))


def worse(rows: list[dict], table: list[dict]) -> list[str]:
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
                  for count in COUNTS if row[count] > before[count]]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", nargs="?", const="", metavar="LIBRARY",
                        help="compare with the committed table instead of writing it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        library = options.check
        if not library:
            library = Path(folder) / "library.so"
            build.build(library, Path(torch.__file__).parent, build.show_progress, cpu=False,
                         cuda=build.cuda_code())
        rows = measure(library)
    if options.check is None:
        write_table(compiler(), rows)
        for row in rows:
            print(row)
        return 0
    version, table = read_table()
    if version != compiler():
        print("what is worse cannot be told: the table is of nvcc "
              f"{version}, this is {compiler()}")
        return 0
    lines = worse(rows, table)
    print("\n".join(lines) or f"{len(rows)} kernels: none worse than the table")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
