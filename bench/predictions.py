"""What the headline rows are expected to take on an H200, written down before any GPU ran them.

    python bench/predictions.py                         # writes expected/predictions.csv
    python bench/predictions.py --beside REPORT.json …  # beside what bench/run.py measured there

Of each kernel the longest of three counts: b, the bytes that it moves (results/triton-dry.json), at
the share of a copy's bandwidth that its warps reach; p, its matrix products; i, the cycles of its
instructions, where their schedule in sm_90's machine code was modelled. How many warps a
multiprocessor holds follows from registers and shared memory (expected/triton.csv, Triton 3.6.0).
Kernels run one after another, with a gap at each launch beyond the first. "_forward 147 i8" is a
kernel, its µs, what they come from, and those warps.
"""

import argparse
import contextlib
import csv
import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from triton.runtime.jit import JITFunction

import ahead
import operators
import rows
import table
import triton_static

HERE = Path(__file__).parent
TABLE = HERE / "expected" / "predictions.csv"
VERSION, TARGET = "3.6.0", "sm90"
SIZES = {(8, 4096): (1024, 16), (1, 65536): (1024, 1024), (8, 8192): (512, 8)}  # width, heads

COPY, MATMUL, CLOCK = 4300, 790e3, 1.98  # GB/s, GFLOP/s in bfloat16, GHz
PROCESSORS, REGISTERS, SHARED, WARPS = 132, 65536, 227 << 10, 64  # what each of them shares out
HALF = 5  # warps of a multiprocessor whose loads reach half of the bandwidth; eight reach 62 %
AHEAD = 0.85  # of it, of kernels that load whole tiles, 32 KB a multiprocessor, before their use
LOADS_AHEAD = {("decay_conv", "_forward"), ("decay_conv", "_backward"),
               ("cumulative_mean", "_sums")}
# Cycles of a program for 1024 elements of the result, in a model of its instructions' schedule.
CYCLES = {
    ("gate_loop 1024×1", "_forward"): 4550, ("gate_loop 1024×1", "_backward"): 12800,
    ("gate_loop 1024×1", "_totals"): 8500, ("gate_loop 16×64", "_walk_states"): 2860,
    ("gate_loop 16×64", "_walk_adjoints"): 3750, ("gate_loop 16×64", "_outputs"): 2500,
    ("gate_loop 16×64", "_gradients"): 4500, ("gate_loop 16×64", "_gate_gradients"): 7000,
}
GAP = 3  # µs: the last programs of a kernel, and the first of the next one
COLUMNS = ("row", "batch", "n", "mode", "us", "floor_us", "launches", "reason")


@contextlib.contextmanager
def launched():
    """Yields a list of the Launch of every kernel, as often as it is launched."""
    launches = []
    with triton_static.recording(TARGET) as known, ahead.launchers_on_meta():
        note = JITFunction._do_compile

        def each(self, key, *rest):
            note(self, key, *rest)
            launches.append(known[self.__module__, self.__name__, key])

        with patch.object(JITFunction, "_do_compile", each):
            yield launches


def launches_of(row):
    """The kernels that a row of the dry counts launches, in order."""
    meta = torch.device("meta")
    for build in (build for builds in operators.ROWS.values() for build in builds):
        with meta:
            case = build(row["batch"], row["n"], *SIZES[row["batch"], row["n"]])
            if case.row != row["row"]:
                continue
            step = rows.Contest(case, getattr(torch, row["dtype"]), meta).ours(None)
        with launched() as launches:
            getattr(step, row["mode"])()
        return launches
    raise LookupError(f"no case of bench/operators.py is {row['row']}")


def warps_of(launch, operator, compiled, programs):
    """How many a multiprocessor holds, and a program has. The table has kernels as training
    launches them: where forward alone launches another, its like stands for it."""
    described = launch.description() | {"operator": operator}
    kinds = (("operator", "name", "constants", "pointers"), ("operator", "name", "constants"),
             ("operator", "name"))
    alike = next(filter(None, ([row for row in compiled
                                if all(row[key] == described[key] for key in kind)]
                               for kind in kinds)))
    fits = []
    for kernel in alike:
        granted = -(-kernel["registers"] // 8) * 8 * 32 * kernel["warps"]
        fit = min(REGISTERS // granted, SHARED // (kernel["shared"] + 1024),
                  WARPS // kernel["warps"], -(-programs // PROCESSORS))
        fits.append((fit * kernel["warps"], kernel["warps"]))
    return min(fits)


def kernel_time(row, name, work, launches, compiled):
    """(µs, what they come from and a multiprocessor's warps) of all launches of one kernel."""
    us = (work["read"] + work["written"]) / COPY / 1e3
    if name.startswith("torch."):
        return us / AHEAD, "b"
    programs = work["programs"] // len(launches)
    operator = row["row"].split()[0]
    warps, own = min(warps_of(launch, operator, compiled, programs) for launch in launches)
    share = AHEAD if (operator, name) in LOADS_AHEAD else warps / (warps + HALF)
    rounds = max(1, programs * own / warps / PROCESSORS)
    cycles = CYCLES.get((row["row"], name), 0) * row["elements"] / programs / 1024 * rounds
    found = max((us / share, "b"), (work["flops"] / MATMUL / 1e3, "p"),
                (len(launches) * cycles / CLOCK / 1e3, "i"))
    return found[0], f"{found[1]}{warps}"


def predicted():
    """A row for each row and mode of the dry counts at headline shapes."""
    compiled = [row for row in triton_static.read_table(VERSION)
                if row["target"] == TARGET and row["dtype"] in ("bfloat16", "complex64")]
    counted = json.loads((HERE / "results" / "triton-dry.json").read_text())["rows"]
    found = []
    for row in counted:
        if (row["batch"], row["n"]) not in SIZES:
            continue
        launches, parts = launches_of(row), []
        for name, work in row["work"].items():
            own = [launch for launch in launches if launch.function.__name__ == name]
            parts.append((name, *kernel_time(row, name, work, own, compiled)))
        count = len(launches) + sum(work["programs"] for name, work in row["work"].items()
                                    if name.startswith("torch."))
        us = sum(part for _, part, _ in parts) + GAP * (count - 1)
        floor = max(row["floor_bytes"] / COPY, row["floor_flops"] / MATMUL) / 1e3
        values = (row["row"], row["batch"], row["n"], row["mode"], round(us), round(floor), count,
                  "; ".join(f"{name} {part:.0f} {why}" for name, part, why in parts if part >= 0.5))
        found.append(dict(zip(COLUMNS, values, strict=True)))
    return found


def read():
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path=TABLE):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(predicted())


# ---- beside what was measured


def beside(reports):
    """The table's rows, with what the reports measured of them."""
    measured = {(row["row"], str(report["settings"]["batch"]), str(row["n"])): row
                for report in reports for row in report["operators"]}
    lines = []
    for line in read():
        row = measured.get((line["row"], line["batch"], line["n"]), {"status": "not measured"})
        timing = row.get(f"{line['mode']}_ms")
        ratio = row.get("ratio_original", {}).get(line["mode"])
        host = timing and timing.get("host")
        lines.append(line | {
            "status": row["status"], "measured": timing and 1e3 * timing["median"],
            "host": host and 1e3 * host, "ratio": ratio})
    return lines


def shown(value):
    return "–" if value is None else table.significant(value)


BESIDE = [
    ("operator", table.name), ("shape", lambda line, _: f"{line['batch']}×{line['n']}"),
    ("", lambda line, _: {"forward": "fwd"}.get(line["mode"], "fwd+bwd")),
    ("floor µs", lambda line, _: line["floor_us"]), ("expected", lambda line, _: line["us"]),
    ("measured", lambda line, _: shown(line["measured"]) if line["status"] == "ok"
        else line["status"]),
    ("× expected", lambda line, _: shown(line["measured"] and line["measured"] / int(line["us"]))),
    ("host µs", lambda line, _: shown(line["host"])),
    ("× original", lambda line, _: shown(line["ratio"])),
    ("expected from", lambda line, _: line["reason"])]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", nargs="+", metavar="REPORT.json", type=Path)
    options = parser.parse_args(argv)
    if not options.beside:
        write()
        return 0
    reports = [json.loads(path.read_text()) for path in options.beside if path.exists()]
    print(table.grid(beside(reports), BESIDE, None, False))
    rates = [report["header"] for report in reports if "header" in report]
    for header in rates[:1]:
        print(f"\n{header['device']}: copy {header['copy_gb_s']:.0f} GB/s, matmul "
              f"{header['matmul_gflop_s'] / 1e3:.0f} TFLOP/s; expected at {COPY} and "
              f"{MATMUL / 1e3:.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
