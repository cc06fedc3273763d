"""What a compiler makes of the C++ kernels, without a run: instructions, and vectors spilled.

    python bench/cpu_static.py                 # for this machine's instruction set
    python bench/cpu_static.py avx2 --rows 20
    .ci/aarch64 python bench/cpu_static.py     # for NEON, compiled by a cross compiler

Of each file of csrc/cpu, and of the functions in it that spill most: its instructions, those on
vectors, and how many of these move a vector to or from the stack. A vector's way to and from an
array that a function holds on the stack counts too: it cannot be told apart.
"""

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tabulate import tabulate

from fastmix.native import build

VECTOR = re.compile(r"%[xyz]mm\d|\bv\d+\.|\bq\d+\b")
STACK = re.compile(r"\(%rsp|\[sp\b")
FRAME = re.compile(r"\(%rbp|\[x29\b")  # the stack too, in functions that keep it there
KEEPS_FRAME = re.compile(r"mov\s+(?:%rsp,%rbp|x29, sp)$", re.M)
MOVES = re.compile(r"v?mov[au]p[sd]|v?movdq[au]\d*|ldu?r|stu?r|ldp|stp")


def objdump() -> str:
    """The one beside the compiler: a cross compiler's has its prefix."""
    name = os.path.basename((build.compiler() or ["g++"])[0])
    beside = re.sub(r"(?:g\+\+|c\+\+|clang\+\+)[-\d.]*$", "objdump", name)
    return beside if shutil.which(beside) else "objdump"


def counts(made: Path) -> Iterator[tuple[str, int, int, int]]:
    """(function, instructions, those on vectors, moves of vectors to or from the stack)"""
    listing = subprocess.run([objdump(), "-dC", "--no-show-raw-insn", made], check=True,
                             capture_output=True, text=True).stdout
    for name, code in re.findall(r"^[0-9a-f]+ <(.*)>:\n((?:.+\n)+)", listing, re.M):
        lines = [line.split("\t", 1)[1] for line in code.splitlines() if "\t" in line]
        vectors = [line for line in lines if VECTOR.search(line)]
        framed = KEEPS_FRAME.search(code)
        moves = sum(1 + line.startswith(("ldp", "stp")) for line in vectors if MOVES.match(line)
                    and (STACK.search(line) or framed and FRAME.search(line)))
        yield short(name), len(lines), len(vectors), moves


def short(name: str) -> str:
    """A function without its namespaces and arguments."""
    name = re.sub(r"fastmix::|\w+::\(anonymous namespace\)::|^void |^bool ", "", name)
    depth = 0
    for at, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and not depth:
            return name[:at] + ("…" if "lambda" in name[at:] else "")
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description="instructions and spilled vectors of the kernels")
    parser.add_argument("set", nargs="?", choices=tuple(build.INSTRUCTION_SETS),
                        default=build.own_instruction_sets()[-1])
    parser.add_argument("--rows", type=int, default=8, help="functions shown that spill most")
    options = parser.parse_args()
    files, functions = [], []
    with tempfile.TemporaryDirectory() as name:
        jobs, _ = build._commands(Path(), build.cxxflags(), True, (), (options.set,))
        jobs = {made: command for made, command in jobs.items() if made != "registration.o"}
        folder = Path(name)
        build._run_all([[*command, "-o", str(folder / made)] for made, command in jobs.items()],
                       folder, build.show_progress)
        for made in jobs:
            rows = sorted(counts(folder / made), key=lambda row: -row[-1])
            file = made.split(".")[0]
            files.append((file, *(sum(row[i] for row in rows) for i in (1, 2, 3))))
            functions += [(file, *row) for row in rows]
    print(build.output_of([*(build.compiler() or []), "--version"]).splitlines()[0],
          options.set, sep=", ", end="\n\n")
    print(tabulate(sorted(files), ("file", "instructions", "on vectors", "to and from the stack"),
                   tablefmt="github"))
    functions.sort(key=lambda row: -row[-1])
    print("\n" + tabulate(functions[: options.rows], (
        "file", "function", "instructions", "on vectors", "to and from the stack"),
        tablefmt="github"))


if __name__ == "__main__":
    main()
