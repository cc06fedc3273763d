"""One step at a time: operators called with n = 1 from a state, beside an addition of as many
numbers, and models' tokens beside their Linear layers alone.

    python bench/steps.py
    python bench/steps.py --seq 1024 8192 --depth 4 --models GateLoopTransformer

What a step costs is checks, dispatch and allocation, where there is little to compute. CPUs only.
The report has the operators' rows too; this prints both, and measures nothing else.
"""

import argparse
import time

import timing  # noqa: F401 (before torch: it quiets torch's profiler)

# isort: split
import torch

import generation
import models
import operators
import table
from exactness import relative, within
from fastmix import ops
from rows import forced, implementations, reason

CONTEXT = 1024  # steps that the state knows
CALLS = 256     # each from the state that the one before returned
KEYWORDS = {"fft_conv": {"revealed": True}, "windowed_sgu": {"in_place": True},
            "causal_sgu": {"in_place": True}}  # as the models call them


class Continued:
    """Stands for fastmix.ops in a case's call: each call goes on from the state of the last."""

    state = None

    def __getattr__(self, operator):
        def call(*arguments, **keywords):
            out, self.state = getattr(ops, operator)(
                *arguments, **keywords, **KEYWORDS.get(operator, {}), initial_state=self.state,
                return_state=True)
            return out
        return call


def step_rows(names, options, dtype):
    """A row for each operator of `names` and each implementation."""
    rows = []
    for build in (build for name in names for build in operators.ROWS.get(name, [])):
        if build is operators.gate_loop and options.heads == options.dim:
            continue  # the diagonal row already
        torch.manual_seed(CONTEXT)
        case = build(1, CONTEXT + CALLS + 2, options.dim, options.heads)
        for impl, missing in implementations(case.operator, torch.device("cpu"), options.impl):
            row = {"row": case.row, "n": 1, "context": CONTEXT, "implementation": impl,
                   "limits": {"values": models.TOLERANCE[dtype][1]}, "status": "failed",
                   "reason": missing}
            rows.append(row)
            if missing is not None:
                continue
            with forced(impl if options.impl else None)(), torch.no_grad():
                try:
                    add_times(row, case, dtype, options.dim)
                except Exception as error:  # said in the row; the others are still to be seen
                    row["reason"] = reason(error)
    return rows


def add_times(row, case, dtype, dim):
    inputs = [t.detach() for t in case.tensors(dtype, "cpu")]
    timed = [axes.startswith("b n") for axes, _ in case.inputs.values()]

    def piece(begin, end):
        return [t[:, begin:end].contiguous() if of_steps else t
                for t, of_steps in zip(inputs, timed)]

    continued = Continued()
    truth = case.call(ops, *inputs)[:, CONTEXT]
    case.call(continued, *piece(0, CONTEXT))
    step = piece(CONTEXT, CONTEXT + 1)
    row["errors"] = {"values": relative([case.call(continued, *step)[:, 0]], [truth])}
    row["status"] = "ok" if within(row["errors"], row["limits"]) else "wrong"
    if row["status"] == "wrong":
        return
    x = torch.ones(1, 1, dim, dtype=dtype)
    steps, additions = [], []
    for _ in range(CALLS):
        steps.append(microseconds(lambda: case.call(continued, *step)))
        additions.append(microseconds(lambda: x + x))
    row["step_us"], row["addition_us"] = timing.summary(steps), timing.summary(additions)
    row["worst_us"] = max(steps)
    row["ratio_addition"] = row["step_us"]["median"] / row["addition_us"]["median"]


def microseconds(function):
    began = time.perf_counter()
    function()
    return (time.perf_counter() - began) * 1e6


def token_rows(options, dtype):
    """The report's rows of text at batch 1, without the published models."""
    rows = []
    for name in options.models or generation.TEXTS:
        for context in options.seq:
            if generation.fits(name, context):
                rows += generation.generation_rows(
                    (name, 1, context), options, dtype, torch.device("cpu"), options.seconds,
                    with_original=False)
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", type=int, nargs="+", default=[1024, 8192], help="contexts")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--generate", type=int, default=64, metavar="N", help="tokens")
    parser.add_argument("--seconds", type=float, default=4, help="to time a prompt for")
    parser.add_argument("--ops", nargs="+", default=list(operators.ROWS))
    parser.add_argument("--models", nargs="+", choices=[*generation.TEXTS, "none"])
    options = parser.parse_args(argv)
    options.impl = []
    notes = table.Notes()
    rows = step_rows(options.ops, options, torch.float32)
    print(table.grid(rows, table.STEPS, notes, False), "", sep="\n")
    if options.models != ["none"]:
        texts = token_rows(options, torch.float32)
        print(table.grid(texts, table.WRITING[:-1], notes, False), "", sep="\n")
        rows += texts
    print(notes.lines() if notes.texts else "", f"{torch.get_num_threads()} threads, depth "
          f"{options.depth}, width {options.dim}", sep="\n")
    return rows


if __name__ == "__main__":
    main()
