"""The report: what is fast on this machine, beside torch's own copy and matmul, and how exact.

    python bench/run.py --seq 8192
    python bench/run.py --seq 1024 --check            # only whether results are right
    python bench/run.py --seq 8192 --ops gate_loop fft_conv --models none --plot out.png

Each operator runs beside the published code for the same step and beside torch.compile of
that; each model takes training steps on real text beside the published model, and writes text
beside it, token by token. A result that is wrong is red and carries no time. Ctrl-C ends the
measuring, and prints what there is.
"""

import argparse
import contextlib
import functools
import logging
import sys
import time
import warnings
from pathlib import Path

import timing  # noqa: F401 (before torch: it quiets torch's profiler)

# isort: split
import torch

import compare
import generation
import machine
import models
import operators
import rows
import steps
import table
from fastmix import env
from progress import Progress

DTYPES = ("float32", "bfloat16", "float16", "float64")
SECONDS = 1.5      # to time a row for, forward and again with backward
MODEL = 6          # as many times as much as an operator a model is given of the time,
LENGTH = 3         # and a length of the curves
INTERRUPTED = 130  # the exit status that shells know for Ctrl-C


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
    parser.add_argument("--generate", type=int, default=64, metavar="N", help="tokens that each "
                        "model writes, one at a time; 0 for none")
    parser.add_argument("--contexts", type=int, nargs="+", metavar="N", help="tokens that they are "
                        "written after, by 1 and by 16 sequences; by default 1024 and --seq, and "
                        "16 sequences only after the shorter")
    parser.add_argument("--impl", nargs="+", default=[], help="implementations, by name; by "
                        "default the one that runs here")
    parser.add_argument("--text", help="file whose bytes the models learn; by default the "
                        "sources of Python's standard library")
    parser.add_argument("--minutes", type=float, help="to end by then, time fewer calls, then "
                        "shorter originals, then one length less and no compiled originals; no "
                        "other row is left out, however few they are. By default 2.75, and more in "
                        "proportion beyond 8192 tokens or depth 1. Compiling comes before")
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--csv", metavar="PATH")
    parser.add_argument("--plot", metavar="PATH")
    parser.add_argument("--compare", metavar="PATH", help="the --json of another report, to stand "
                        "beside this one in a table of its own, and in the plot")
    parser.add_argument("--check", action="store_true", help="only whether results are right, "
                        "without times; exit status 1 if one is wrong or missing")
    options = parser.parse_args(argv)
    if options.dim % options.heads or options.dim % 4:
        parser.error(f"--dim must be divisible by --heads and by 4, got {options.dim} "
                     f"and {options.heads}")
    if min(*options.seq, options.batch, options.heads, options.depth) < 1:
        parser.error("--seq, --batch, --heads and --depth must be at least 1")
    if options.generate < 0:
        parser.error(f"--generate must be at least 0, got {options.generate}")
    if options.contexts and min(options.contexts) < 1:
        parser.error(f"--contexts must be at least 1, got {min(options.contexts)}")
    if options.plot and options.ops == ["none"]:
        parser.error("--plot draws operators: name some with --ops, or leave it out")
    if options.check and (options.plot or options.minutes or options.compare):
        parser.error("--check takes no times, so it can neither plot nor compare nor be given "
                     "minutes")
    if not options.device.startswith(("cpu", "cuda")):
        parser.error(f"--device must be cpu or cuda, got {options.device}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch finds no GPU here")
    if options.text and not Path(options.text).is_file():
        parser.error(f"--text: no file {options.text}")
    for flag in ("json", "csv", "plot"):
        reason = table.why_not_written(flag, getattr(options, flag))
        if reason:
            parser.error(f"--{flag}{reason}")
    if options.compare:
        try:
            compare.read(options.compare)
        except (OSError, ValueError) as error:
            parser.error(f"--compare: {error}")
    options.seq = sorted(set(options.seq))
    return options


class Schedule:
    """Announces each piece of work, and shares the time that is left among those to come."""

    def __init__(self, minutes, pieces, models, lengths, more=0):
        self.end = time.monotonic() + 60 * minutes
        self.left = pieces + MODEL * models + LENGTH * lengths
        self.progress = Progress(pieces + models + lengths + more)  # `more` may be left out
        self.refused, self.raised = [], []

    def share(self, what, pieces=1):
        """The seconds that the next piece may take, never 0: it is done, however few they are."""
        self.progress(what)
        seconds = max(1e-3, self.end - time.monotonic()) * pieces / self.left
        self.left -= pieces
        return seconds

    def allows(self, what, seconds):
        """Whether a piece that may be left out still ends in time."""
        if time.monotonic() + seconds > self.end:
            self.refused.append(what)
            return False
        self.progress(what)
        return True

    @contextlib.contextmanager
    def whatever_comes(self, what):
        """Around a piece: what it raises is kept for the report, and the next one begins."""
        try:
            yield
        except Exception as error:
            self.raised.append(f"{what}, which raised {type(error).__name__}: "
                               f"{rows.reason(error)}")


def chosen_cases(options):
    """[(name, make, n)]: make(n) is the case. The weight of causal_sgu is n × n, so it stays
    at 2048 steps unless it is asked for by name."""
    cases = {}
    for n in options.seq:
        for name in options.ops or operators.ROWS:
            for build in operators.ROWS.get(name, []):
                if build is operators.gate_loop and options.heads == options.dim:
                    continue  # the diagonal row already
                steps = n
                if name == "causal_sgu" and not options.ops:
                    steps = min(n, operators.CAUSAL_STEPS)
                cases[build, steps] = name, functools.partial(make_case, build, options), steps
    return list(cases.values())


def make_case(build, options, n):
    torch.manual_seed(n)
    return build(options.batch, n, options.dim, options.heads)


def shorter(n):
    """Lengths for the plot, below n: four, unless n is very short."""
    factor = 4 if n >= 1024 else 2
    return sorted({n // factor**i for i in (1, 2, 3, 4)} - {0, n})


def main(argv=None):
    options = arguments(argv)
    # What torch says while it tries to compile an original stands in that row's footnote.
    warnings.filterwarnings("ignore", module=r"torch\.")
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    other = compare.read(options.compare) if options.compare else None  # --json may replace it
    if device.type == "cuda":
        torch.cuda.set_device(device)
    seconds = 0 if options.check else SECONDS
    texts, left_out = generation.jobs(options, machine.room(device))
    minutes = options.minutes or options.depth * (
        2.75 * max(1, sum(options.seq) * options.batch / 8192)
        + generation.minutes(options, texts))
    cases = chosen_cases(options)
    courses = [models.Course(name, options.batch, n, options.dim, options.heads, options.depth,
                             options.text, dtype, device)
               for n in options.seq for name in options.models or models.MODELS if name != "none"]
    lengths = shorter(options.seq[0]) if options.plot else []
    # Where there is little to compute: on GPUs a host's time, which the operators' rows have.
    stepped = [] if options.check or device.type != "cpu" else [
        name for name in options.ops or operators.ROWS if name != "none"]
    compile_kernels({name for name, _, _ in cases} | {course.operator for course in courses},
                    options, dtype, device)
    schedule = Schedule(
        float("inf") if options.check else minutes,
        1 + bool(stepped) + len(cases) + len(texts), len(courses), len(lengths),
        0 if options.check else len(cases) + len(courses))
    schedule.share("measuring the machine")
    header = machine.header(device, dtype)
    report = {"header": header, "settings": table.settings(options), "operators": [],
              "steps": [], "models": [], "generation": [], "curve": [], "left_out": left_out}
    interrupted = False
    try:
        measure(report, cases, courses, texts, stepped, lengths, options, schedule, seconds)
    except KeyboardInterrupt:
        interrupted = True
        report["left_out"].append("what was not measured yet at Ctrl-C")
    schedule.progress.close()
    if not options.ops and max(options.seq) > operators.CAUSAL_STEPS:
        report["left_out"].append(
            f"causal_sgu beyond n={operators.CAUSAL_STEPS}, as its weight is n × n: "
            "--ops causal_sgu has it at any length")
    if schedule.refused:
        report["left_out"].append("for time, --minutes has more: " + "; ".join(schedule.refused))
    report["left_out"] += schedule.raised

    written = write_files(report, options, other)
    beside = compare.text(report, other) if other else ""
    env.show(table.text(report, sys.stdout.isatty(), beside))
    if interrupted:
        return INTERRUPTED
    statuses = {row["status"] for row in [
        *table.rows_of(report), *report["steps"], *report["curve"]]}
    wrong = statuses - {"ok"} if options.check else statuses & set(table.BAD)
    return int(bool(wrong or schedule.raised or not written))


def write_files(report, options, other):
    """Those that were asked for, before anything is printed. Whether all could be; what could not
    is said."""
    def draw(report, path):
        import plot  # and with it matplotlib
        if not report["operators"]:
            raise ValueError("no operator was measured, so there is nothing to draw")
        plot.draw(report, path, other)

    written = True
    for flag, write in ("json", table.write_json), ("csv", table.write_csv), ("plot", draw):
        path = getattr(options, flag)
        try:
            if path:
                write(report, path)
        except Exception as error:  # the report itself is still to be printed
            print(f"--{flag} {path}: {error}", file=sys.stderr)
            written = False
    return written


def compile_kernels(names, options, dtype, device):
    """Runs operators on a few steps: compiling their library takes no row's time. Triton's
    kernels, compiled one by one for their shapes, are left to the rows."""
    for name in names & {"fft_conv"} if device.type == "cuda" else names:
        for build in operators.ROWS[name]:
            rows.operator_rows(functools.partial(make_case, build, options), 16, options.impl,
                               dtype, device)


def measure(report, cases, courses, texts, stepped, lengths, options, schedule, seconds):
    """Fills the report's rows. Every operator and model has one; where time is short, fewer calls
    are timed, originals run at a shorter length, and the curves lack their longest."""
    header = report["header"]
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    compilations = []  # (seconds it may take, what, the work)
    for name, make, n in cases:
        what = f"{name} n={n}"
        share = schedule.share(what)
        row_seconds = min(seconds, share / 8)
        with schedule.whatever_comes(what):
            # Most originals take less than a share: two or three may take twice as much.
            shorter, why = rows.original_length(
                make, n, dtype, device, max(1, 2 * share)) if seconds else (n, None)
            measured = rows.operator_rows(make, n, options.impl, dtype, device, header,
                                          row_seconds, why)
            report["operators"] += measured
            compilations.append((
                make(1).compile_seconds, f"compiled original of {measured[0]['row']} n={n}",
                functools.partial(rows.add_compiled, make, measured, options.impl, dtype, device)))
            if why:
                rows.add_shorter_original(make, measured, shorter, why, options.impl, dtype,
                                          device, header, row_seconds)
    for course in courses:
        what = f"{course.name} n={course.n}"
        share = schedule.share(what, MODEL)
        with schedule.whatever_comes(what):
            measured = models.model_rows(course, options.impl, header["matmul_gflop_s"],
                                         min(2 * seconds, share / 4),
                                         max(1, share / 2) if seconds else None)
            report["models"] += measured
            compilations.append((
                models.COMPILE_SECONDS, f"compiled original of {what}",
                functools.partial(models.add_compiled, course, measured, options.impl)))
    for job in texts:
        name, batch, n = job
        what = f"text of {name}, batch {batch} n={n}"
        share = schedule.share(what)
        with schedule.whatever_comes(what):
            report["generation"] += generation.generation_rows(
                job, options, dtype, device, min(seconds, share / 4))
    if stepped:
        schedule.share("operators, one step at a time")
        with schedule.whatever_comes("operators, one step at a time"):
            report["steps"] = steps.step_rows(stepped, options, dtype)
    names = generation.TEXTS
    report["generation"].sort(key=lambda row: (names.index(row["model"]), row["batch"], row["n"]))
    add_curves(report, cases, lengths, options, schedule, seconds)
    for needed, what, work in sorted(compilations * bool(seconds), key=lambda job: job[0]):
        if schedule.allows(what, needed):
            with schedule.whatever_comes(what):
                work(seconds)


def add_curves(report, cases, lengths, options, schedule, seconds):
    """The operators at shorter lengths, for the plot; the longest only if there is time for it.
    Originals are not among them where they were too slow, or took too much memory, for more."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    slow = {row["row"]: row["original"] for row in report["operators"]
            if "shortened" in row.get("original", ())}
    spent = 0
    for i, length in enumerate(lengths):
        what = f"all operators at n={length}"
        if i == 3 and not schedule.allows(what, spent * length / lengths[i - 1]):
            break
        start = time.monotonic()
        if i < 3:
            schedule.share(what, LENGTH)
        for make, n in {make.args[0]: (make, n) for _, make, n in cases}.values():
            if length < n:
                with schedule.whatever_comes(f"{make.args[0].__name__} n={length}"):
                    original = slow.get(make(1).row)
                    why = original["shortened"] if original and length >= original["n"] else None
                    report["curve"] += map(table.point, rows.operator_rows(
                        make, length, options.impl, dtype, device, report["header"], seconds / 4,
                        why))
        spent = time.monotonic() - start


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
