"""How well operators use the cores of a CPU: 1, 2, 4 … threads, called in turns in one process.

    python bench/threads.py --seq 8192
    python bench/threads.py --seq 8192 --batch 16 --plot threads.png

Efficiency is the time of one thread over that of k, divided by k. Small calls, of a few steps, are
timed with 64 threads as well, which may not cost more than one does.
"""

import argparse
import contextlib
import os
import sys

import torch

import operators
import rows
from table import why_not_written
from timing import elapsed, side_by_side, summary

SECONDS = 4  # for an operator, forward and again with backward
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


def cases(batch, steps, dim, heads, names):
    for operator, makers in operators.ROWS.items():
        for make in makers if not names or operator in names else ():
            n = min(steps, operators.CAUSAL_STEPS) if make is operators.causal_sgu else steps
            yield make(batch, n, dim, heads)


def step_of(case):
    return rows.Contest(case, torch.float32, CPU).ours(None)


def draw(curves, path):
    """Efficiency against threads, of {row: {threads: efficiency}} by mode."""
    from matplotlib.figure import Figure

    figure = Figure((9, 4), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True)
    for panel, (mode, of_mode) in zip(panels, curves.items(), strict=True):
        for row, efficiency in of_mode.items():
            panel.plot(list(efficiency), [100 * e for e in efficiency.values()], marker="o",
                       label=row)
        panel.set_title(mode.replace("_", " and "))
        panel.set_xlabel("threads")
        panel.set_ylim(0, 110)
    panels[0].set_ylabel("efficiency, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=120)


def main(argv):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", type=int, default=8192, help="time steps")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dim", type=int, default=512, help="width")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--ops", nargs="+", choices=list(operators.ROWS), metavar="OPERATOR")
    parser.add_argument("--plot", metavar="PATH")
    args = parser.parse_args(argv)
    if refusal := why_not_written("plot", args.plot):
        parser.error(f"--plot{refusal}")
    tried = counts(cores)
    curves = {mode: {} for mode in rows.MODES}
    heads = " | ".join(f"{count} thread{'s' * (count > 1)}" for count in tried)
    print(f"| operator, forward / fwd+bwd | {heads} | efficiency |\n|---|"
          + "---:|" * (len(tried) + 1))
    for case in cases(args.batch, args.seq, args.dim, args.heads, args.ops):
        step = step_of(case)
        step.forward_backward()  # compiles, the first time
        ms = {mode: times(step, mode, tried) for mode in rows.MODES}
        for mode, of in ms.items():
            curves[mode][case.row] = {count: of[1] / of[count] / count for count in tried}
        columns = [" / ".join(f"{of[count]:.3g} ms" for of in ms.values()) for count in tried]
        columns.append(" / ".join(f"{curves[mode][case.row][cores]:.0%}" for mode in rows.MODES))
        print(f"| {case.row} | " + " | ".join(columns) + " |", flush=True)

    print(f"\n| small calls, forward | {' | '.join(f'{n} steps' for n in SMALL)} |\n|---|"
          + "---:|" * len(SMALL))
    small = [list(cases(1, n, args.dim, args.heads, args.ops)) for n in SMALL]
    for of_row in zip(*small, strict=True):
        columns = []
        for case in of_row:
            ms = small_times(step_of(case), sorted({1, cores, MANY}))
            columns.append(", ".join(f"{1e3 * t:.0f} µs on {count}" for count, t in ms.items()))
        print(f"| {of_row[0].row} | " + " | ".join(columns) + " |", flush=True)
    if args.plot:
        draw(curves, args.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
