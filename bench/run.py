"""The report: what is fast on this machine, how close to its limit, and how exact.

    python bench/run.py --seq 8192
    python bench/run.py --seq 1024 --check            # only whether results are right
    python bench/run.py --seq 8192 --ops gate_loop fft_conv --models none --plot out.png

Each operator runs beside the published code for the same step and beside torch.compile of
that; each model takes training steps on real text beside the published model. A result that
is wrong is red and carries no time.
"""

import argparse
import functools
import importlib.util
import logging
import sys
import time
import warnings
from pathlib import Path

import timing  # before torch: it quiets torch's profiler
import torch

import machine
import models
import operators
import rows
import table
from progress import Progress

DTYPES = ("float32", "bfloat16", "float16", "float64")
CAUSAL_STEPS = 2048
SECONDS = 1.5      # to time a row for, forward and again with backward
ROW_SECONDS = 10   # that a row may take in all


def arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", type=int, nargs="+", default=[8192], help="time steps")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dim", type=int, default=512, help="width")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--depth", type=int, default=1, help="layers of the models")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ops", nargs="+", choices=[*operators.ROWS, "none"],
                        help="operators to report on; all of them by default")
    parser.add_argument("--models", nargs="+", choices=[*models.MODELS, "none"])
    parser.add_argument("--impl", nargs="+", default=[], help="implementations, by name; by "
                        "default the one that runs here")
    parser.add_argument("--text", help="file whose bytes the models learn; by default the "
                        "sources of Python's standard library")
    parser.add_argument("--minutes", type=float, help="leave out what would not end by then; "
                        "by default 2.75, and more in proportion beyond 8192 tokens or depth 1")
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--csv", metavar="PATH")
    parser.add_argument("--plot", metavar="PATH")
    parser.add_argument("--check", action="store_true", help="only whether results are right, "
                        "without times; exit status 1 if one is wrong or missing")
    options = parser.parse_args(argv)
    if options.dim % options.heads or options.dim % 4:
        parser.error(f"--dim must be divisible by --heads and by 4, got {options.dim} "
                     f"and {options.heads}")
    if min(*options.seq, options.batch, options.heads, options.depth) < 1:
        parser.error("--seq, --batch, --heads and --depth must be at least 1")
    if options.check and (options.plot or options.minutes):
        parser.error("--check takes no times, so it can neither plot nor be given minutes")
    if not options.device.startswith(("cpu", "cuda")):
        parser.error(f"--device must be cpu or cuda, got {options.device}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch finds no GPU here")
    if options.text and not Path(options.text).is_file():
        parser.error(f"--text: no file {options.text}")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    options.seq = sorted(set(options.seq))
    return options


class Schedule:
    """Announces each piece of work, and refuses what would not end in time."""

    def __init__(self, minutes):
        self.end = time.monotonic() + 60 * minutes
        self.progress = Progress()
        self.refused = []

    def allows(self, what, seconds):
        if time.monotonic() + seconds > self.end:
            self.refused.append(what)
            return False
        self.progress(what)
        return True


def chosen_cases(options):
    """[(name, make, n)]: make(n) is the case. The weight of causal_sgu is n × n, so it stays
    at 2048 steps unless it is asked for by name."""
    cases = {}
    for n in options.seq:
        for name in options.ops or operators.ROWS:
            for build in operators.ROWS.get(name, []):
                if build is operators.gate_loop and options.heads == options.dim:
                    continue  # the diagonal row already
                steps = min(n, CAUSAL_STEPS) if name == "causal_sgu" and not options.ops else n
                cases[build, steps] = name, functools.partial(make_case, build, options), steps
    return list(cases.values())


def make_case(build, options, n):
    torch.manual_seed(n)
    return build(options.batch, n, options.dim, options.heads)


def shorter(n):
    """The lengths that the plot shows below n."""
    return [n // part for part in (256, 64, 16, 4) if n // part >= 16]


def main(argv=None):
    options = arguments(argv)
    # What torch says while it tries to compile an original stands in that row's footnote.
    warnings.filterwarnings("ignore", module=r"torch\.")
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    seconds = 0 if options.check else SECONDS
    minutes = options.minutes or 2.75 * max(
        1, sum(options.seq) * options.batch / 8192) * options.depth
    cases = chosen_cases(options)
    courses = [models.Course(name, options.batch, n, options.dim, options.heads, options.depth,
                             options.text, dtype, device)
               for n in options.seq for name in options.models or models.MODELS if name != "none"]
    lengths = shorter(options.seq[0]) if options.plot and len(options.seq) == 1 else []
    schedule = Schedule(float("inf") if options.check else minutes)
    schedule.progress.total = 1 + (len(cases) + len(courses)) * (1 if options.check else 2) + (
        len(cases) if lengths else 0)

    schedule.progress("measuring the machine")
    header = machine.header(device, dtype)
    report = {"header": header, "settings": vars(options), "operators": [], "models": [],
              "curve": [], "left_out": []}
    compilations = []  # (seconds it may take, what, the work)
    for name, make, n in cases:
        if schedule.allows(f"{name} n={n}", ROW_SECONDS):
            found = rows.operator_rows(make, n, options.impl, dtype, device, header, seconds)
            report["operators"] += found
            compilations.append((
                make(1).compile_seconds, f"compiled original of {found[0]['row']} n={n}",
                functools.partial(rows.add_compiled, make, found, options.impl, dtype, device)))
    for course in courses:
        if schedule.allows(f"{course.name} n={course.n}",
                           models.ROW_SECONDS * options.depth):
            found = models.model_rows(course, options.impl, header["matmul_gflop_s"],
                                      2 * seconds)
            report["models"] += found
            compilations.append((
                models.COMPILE_SECONDS, f"compiled original of {course.name} n={course.n}",
                functools.partial(models.add_compiled, course, found, options.impl)))
    for name, make, n in cases if lengths else []:
        if schedule.allows(f"{name} at shorter lengths", ROW_SECONDS):
            for length in lengths:
                if length < n:
                    report["curve"] += rows.operator_rows(
                        make, length, options.impl, dtype, device, header, seconds / 4,
                        shorten=False)
    for needed, what, work in [] if options.check else sorted(compilations, key=lambda job: job[0]):
        if schedule.allows(what, needed):
            work(seconds)
    schedule.progress.end()
    if not options.ops and max(options.seq) > CAUSAL_STEPS:
        report["left_out"].append(f"causal_sgu beyond n={CAUSAL_STEPS}, as its weight is n × n: "
                                  "--ops causal_sgu has it at any length")
    if schedule.refused:
        report["left_out"].append("for time, --minutes has more: " + "; ".join(schedule.refused))

    print(table.text(report, sys.stdout.isatty()))
    if options.json:
        table.write_json(report, options.json)
    if options.csv:
        table.write_csv(report, options.csv)
    if options.plot:
        import plot  # and with it matplotlib
        plot.draw(report, options.plot)
    results = report["operators"] + report["models"]
    return int(options.check and any(row["status"] != "ok" for row in results))


if __name__ == "__main__":
    sys.exit(main())
