"""A half type against float32: each operator in both, called in turns in one process.

    python bench/dtypes.py --seq 8192
"""

import argparse
import sys

import torch

import operators
import rows
from progress import Progress
from table import grid, name

SECONDS = 6  # for an operator, forward and again with backward


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", type=int, default=8192, help="time steps")
    parser.add_argument("--dim", type=int, default=512, help="width")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    dtypes = {name: getattr(torch, name) for name in ("float32", args.dtype)}
    makers = [make for of in operators.ROWS.values() for make in of]
    measured, progress = [], Progress(len(makers))
    for make in makers:
        steps = min(args.seq, operators.CAUSAL_STEPS) if make is operators.causal_sgu else args.seq
        case = make(1, steps, args.dim, args.heads)
        progress(case.row)
        if any(t.is_complex() for _, t in case.inputs.values()):
            continue  # complex64 in either
        contests = {name: rows.Contest(case, dtype, torch.device(args.device))
                    for name, dtype in dtypes.items()}
        ours = {name: contest.ours(None) for name, contest in contests.items()}
        for step in ours.values():  # compiles, the first time
            step.forward_backward()
        times = contests["float32"].times(ours, SECONDS)
        measured.append({"row": case.row, "times as fast": rows.ratios(*map(times.get, dtypes))} | {
            dtype: {mode: times[dtype][f"{mode}_ms"]["median"] for mode in rows.MODES}
            for dtype in dtypes})
    progress.close()
    print(grid(measured, [("operator", name), ("float32 ms, forward / fwd+bwd", pair("float32")),
                          (f"{args.dtype} ms", pair(args.dtype)),
                          ("times as fast", pair("times as fast"))], None, False))


def pair(key):
    """Forward and with backward, three digits of a short time too."""
    return lambda row, notes: " / ".join(f"{row[key][mode]:.3g}" for mode in rows.MODES)


if __name__ == "__main__":
    main(sys.argv[1:])
