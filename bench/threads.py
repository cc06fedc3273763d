"""How well operators use the cores of a CPU: 1, 2, 4 … threads, called in turns in one process.

    python bench/threads.py --plot threads.png

Efficiency is the time of one thread over that of k, divided by k. Batches share the steps: a batch
of 16 has a sixteenth of them, and as many tokens. Small calls, of a few steps, are timed with 64
threads as well, which may not cost more than one does.
"""

import argparse
import contextlib
import os
import sys

import torch

import operators
import rows
from progress import Progress
from table import grid, name, rate, significant, why_not_written
from timing import elapsed, side_by_side, summary

SECONDS = 0.8  # for a row, forward and again with backward
SMALL = (1, 128)  # steps of small calls
SMALL_CALLS = 300
MANY = 64  # threads, more than there are cores
CPU = torch.device("cpu")


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def counts(cores):
    """1, 2, 4 … and all of them."""
    return [2**i for i in range(cores.bit_length()) if 2**i < cores] + [cores]


def times(step, mode, counts):
    """Milliseconds of a step by the number of threads."""
    functions = {count: (lambda count=count: threads(count), getattr(step, mode))
                 for count in counts}
    timings = side_by_side(functions, SECONDS, CPU)
    return {count: timing["median"] for count, timing in timings.items()}


def small_times(step, counts):
    """The same of a forward call whose numbers are in the caches."""
    ms = {}
    for count in counts:
        with threads(count):
            calls = [elapsed(step.forward, CPU) for _ in range(SMALL_CALLS)]
        ms[count] = summary(calls[SMALL_CALLS // 10:])["median"]
    return ms


def makers(names):
    return [make for operator, of in operators.ROWS.items() if not names or operator in names
            for make in of]


def case_of(make, batch, steps, dim, heads):
    most = operators.CAUSAL_STEPS if make is operators.causal_sgu else steps
    return make(batch, min(steps, most), dim, heads)


def shaped_cases(batches, steps, dim, heads, names):
    """(batch, heads, case) for every combination; heads are "any" where a case knows none."""
    for make in makers(names):
        shapes = {tuple(tuple(t.shape) for _, t in make(1, 2, dim, count).inputs.values())
                  for count in heads}
        alike = len(heads) > 1 and len(shapes) == 1
        for count in heads[:1] if alike else heads:
            for batch in batches:
                yield batch, "any" if alike else count, case_of(
                    make, batch, max(1, steps // batch), dim, count)


def step_of(case):
    return rows.Contest(case, torch.float32, CPU).ours(None)


def measure(batch, heads, case, tried, curves):
    """A row of the table: milliseconds by the number of threads. Efficiencies go into `curves`."""
    step = step_of(case)
    step.forward_backward()  # compiles, the first time
    ms = {mode: times(step, mode, tried) for mode in rows.MODES}
    label = case.row if heads == "any" or "×" in case.row else f"{case.row}, {heads} heads"
    for mode, of in ms.items():
        curves[mode][batch, label] = {count: of[1] / of[count] / count for count in tried}
    return {"row": case.row, "batch": batch, "heads": heads} | {
        count: {mode: of[count] for mode, of in ms.items()} for count in tried} | {
        "efficiency": {mode: 100 * curves[mode][batch, label][tried[-1]] for mode in ms}}


def microseconds(n):
    return lambda row, notes: " / ".join(significant(1e3 * ms) for ms in row[n].values())


def draw(curves, path):
    """Efficiency against threads, of {row: {threads: efficiency}} by mode, in a panel for each mode
    and batch."""
    from matplotlib.figure import Figure

    batches = list(dict.fromkeys(batch for of_mode in curves.values() for batch, _ in of_mode))
    figure = Figure((10, 4 * len(batches)), layout="constrained")
    panels = figure.subplots(len(batches), len(curves), sharey=True, squeeze=False)
    colours = {}
    for batch, line in zip(batches, panels, strict=True):
        for panel, (mode, of_mode) in zip(line, curves.items(), strict=True):
            for (of_batch, row), efficiency in of_mode.items():
                if of_batch == batch:
                    colour = colours.setdefault(row, f"C{len(colours) % 10}")
                    panel.plot(list(efficiency), [100 * e for e in efficiency.values()],
                               color=colour, marker="os^"[len(colours) // 11 % 3], label=row)
            panel.set_title(f"{mode.replace('_', ' and ')}, batch {batch}")
            panel.set_xlabel("threads")
            panel.set_ylim(0, 110)
        line[0].set_ylabel("efficiency, %")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=120)


def main(argv):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", type=int, default=8192, help="time steps of one sequence alone")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dim", type=int, default=512, help="width")
    parser.add_argument("--heads", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--ops", nargs="+", choices=list(operators.ROWS), metavar="OPERATOR")
    parser.add_argument("--plot", metavar="PATH")
    args = parser.parse_args(argv)
    if refusal := why_not_written("plot", args.plot):
        parser.error(f"--plot{refusal}")
    tried, few = counts(cores), sorted({1, cores, MANY})
    curves = {mode: {} for mode in rows.MODES}
    count_of_rows = sum(1 for _ in shaped_cases(args.batch, 1, args.dim, args.heads, args.ops))
    large, small, progress = [], [], Progress(count_of_rows + len(makers(args.ops)))
    for batch, heads, case in shaped_cases(
            args.batch, args.seq, args.dim, args.heads, args.ops):
        progress(f"{case.row}, batch {batch}")
        large.append(measure(batch, heads, case, tried, curves))
    for make in makers(args.ops):
        of_row = [case_of(make, 1, n, args.dim, args.heads[-1]) for n in SMALL]
        progress(f"{of_row[0].row}, small calls")
        small.append({"row": of_row[0].row} | {
            n: small_times(step_of(case), few) for n, case in zip(SMALL, of_row, strict=True)})
    progress.close()
    print(grid(large, [
        ("operator, forward / fwd+bwd", name), ("batch", lambda row, notes: str(row["batch"])),
        ("heads", lambda row, notes: str(row["heads"])),
        *((f"{count} thread{'s' * (count > 1)}, ms", rate(count)) for count in tried),
        ("efficiency %", rate("efficiency"))], None, False), end="\n\n")
    print(grid(small, [("small calls, forward", name), *(
        (f"{n} step{'s' * (n > 1)}, µs on {' / '.join(map(str, few))} threads", microseconds(n))
        for n in SMALL)], None, False))
    if args.plot:
        draw(curves, args.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
