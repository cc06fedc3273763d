"""The rows of the operators: checked, then timed beside the published original.

A row is a dict of plain values. Its `status` is "ok", "wrong" (it carries no time then) or
"failed"; a baseline inside it has a `status` of its own: "ok" or why there is no time.
"""

import contextlib
import functools
import math
import re

import torch

import fastmix
import machine
from exactness import Exam, within
from fastmix import ops
from timing import peak_bytes, side_by_side, spread, stopwatch

MODES = ("forward", "forward_backward")
HALF = (torch.bfloat16, torch.float16)
ORIGINAL_CALLS = 7  # forward and backward, that checking and timing an original take at least

# Inductor's cache on disk does not know ATEN_CPU_CAPABILITY: a loop for AVX2 from there would be
# compiled for AVX-512 in the next report, and write past the ends of tensors.
torch.compiler.config.force_disable_caches = True


def implementations(operator, device, names):
    """[(name, None or why it cannot run here)]: those asked for, or else the one that runs."""
    known = fastmix.implementations(operator, device.type)
    if not names:
        return [(next(name for name, missing in known.items() if missing is None), None)]
    return [(name, known.get(name, f"fastmix has no implementation {name}")) for name in names]


def reason(error):
    """The first sentence of an error, or of the explanation that torch.compile gives for it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line.removeprefix("Explanation: ") for line in lines
             if line.startswith("Explanation: ")] or lines or [type(error).__name__]
    first = re.split(r"(?<=[.`]) (?=[A-Z])", lines[0])[0][:200]
    usual = isinstance(error, (RuntimeError, ImportError, ValueError, TypeError))
    return first if usual or first == type(error).__name__ else f"{type(error).__name__}: {first}"


def forced(name):
    """A maker of surroundings in which implementation `name` runs; None changes nothing."""
    return functools.partial(fastmix.force, name) if name else contextlib.nullcontext


class Step:
    """A function with its arguments, to run forward, or forward and backward."""

    def __init__(self, function, arguments, leaves, incoming, force=None):
        self.function, self.arguments = function, arguments
        self.leaves, self.incoming = leaves, incoming
        self.surroundings = forced(force)

    def run(self, incoming):
        out = self.function(*self.arguments)
        return out.detach(), torch.autograd.grad(out, self.leaves, incoming)

    def forward(self):
        with torch.no_grad():
            self.function(*self.arguments)

    def forward_backward(self):
        self.run(self.incoming)


class Contest:
    """The steps of one case, all on the same inputs."""

    def __init__(self, case, dtype, device):
        self.case, self.device = case, device
        self.inputs = case.tensors(dtype, device)
        self.incoming = torch.randn(case.output_shape(), dtype=self.inputs[0].dtype, device=device)

    def ours(self, force):
        return Step(lambda *inputs: self.case.call(ops, *inputs), self.inputs, self.inputs,
                    self.incoming, force)

    def original(self, dtype):
        leaves, incoming = self.inputs, self.incoming
        if leaves[0].dtype in HALF and dtype == torch.float32:
            leaves = [t.detach().float().requires_grad_() for t in leaves]
            incoming = incoming.float()
        function, arguments = self.case.original(*leaves)
        return Step(function, arguments, leaves, incoming)

    def times(self, steps, seconds):
        """{name: {mode_ms: timing}} of steps run in turns."""
        timings = {name: {} for name in steps}
        for mode in MODES:
            functions = {name: (step.surroundings, getattr(step, mode))
                         for name, step in steps.items()}
            for name, timing in side_by_side(functions, seconds, self.device).items():
                timings[name][f"{mode}_ms"] = timing
        return timings


def operator_rows(make, n, names, dtype, device, rates=None, seconds=0, why_shorter=None):
    """A row for each implementation of the case make(n); checked only, if `seconds` is 0.

    The original is left out where `why_shorter` stands against it (see original_length), and where
    it needs too much memory.
    """
    case = make(n)
    contest = Contest(case, dtype, device)
    exam = Exam(case, contest.inputs)
    rows, steps = {}, {}
    for name, missing in implementations(case.operator, device, names):
        rows[name] = row = {
            "operator": case.operator, "row": case.row, "n": n, "implementation": name,
            "shapes": {key: list(t.shape) for key, (_, t) in case.inputs.items()},
            "limits": exam.limits, "steps": exam.steps, "status": "failed", "reason": missing}
        if missing is not None:
            continue
        step = contest.ours(name if names else None)
        try:
            with step.surroundings():
                row["errors"] = exam.errors(step)
        except Exception as error:  # said in the row; the others are still to be seen
            row["reason"] = reason(error)
            continue
        row["status"] = "ok" if within(row["errors"], exam.limits) else "wrong"
        if row["status"] == "ok":
            steps[name] = step
    if seconds and steps:
        original, step = judge_original(contest, exam, dtype, why_shorter)
        add_times(contest, rows, steps, original, step, seconds)
        for name in steps:
            tokens = contest.incoming.shape[0] * n
            add_rates(rows[name], case.necessary(contest.inputs), tokens, rates)
    return list(rows.values())


def add_shorter_original(make, rows, n, why, names, dtype, device, rates, seconds):
    """The original beside the rows' implementations at n steps, fewer than theirs."""
    timed = {row["implementation"]: row for row in rows if row["status"] == "ok"}
    for short in operator_rows(make, n, names, dtype, device, rates, seconds) if timed else ():
        if short["status"] == "ok" and short["implementation"] in timed:
            row = timed[short["implementation"]]
            row["original"] = short["original"] | {"shortened": why}
            for key in "ratio_original", "ratio_original_spread":
                if key in short:
                    row[key] = short[key]


def add_times(contest, rows, steps, original, original_step, seconds):
    """Times the steps in turns, with the original's if there is one, and measures memory."""
    if original_step is not None:
        steps = steps | {"original": original_step}
    for name, timing in contest.times(steps, seconds).items():
        with steps[name].surroundings():
            timing["peak_bytes"] = peak_bytes(steps[name].forward_backward, contest.device)
        (original if name == "original" else rows[name]).update(timing)
    for row in rows.values():
        if row["status"] == "ok":
            row["original"] = original
            if original_step is not None:
                add_ratios(row, "original", original, row)


def original_length(make, n, dtype, device, seconds):
    """(the n to run the original at, what stands against more of it or None)."""
    needed, room = make(1).original_bytes * n, machine.room(device)
    longest, why = n, None
    if needed > room:
        longest = 1 << max(0, (n * room // 4 // needed).bit_length() - 1)
        why = f"needs about {needed / 1e9:.0f} GB"
    whole = make(longest)
    for part in 16, 4:  # a short call is mostly overhead, which does not grow with n
        small = make(max(1, longest // part))
        try:
            step = Contest(small, dtype, device).original(dtype)
            taken = min(stopwatch(step.forward_backward, device) for _ in range(2)) / 1e3
        except Exception:
            return longest, why  # judge_original says what came
        calls = ORIGINAL_CALLS * taken
        taken *= max(longest / small.steps(), whole.flops / small.flops if small.flops else 0)
        if ORIGINAL_CALLS * taken <= seconds or 4 * calls > seconds:
            break
    shorter, slow = halved(longest, ORIGINAL_CALLS, taken, seconds)
    return shorter, why or slow


def halved(n, calls, taken, seconds, at_once=1):
    """(n, halved four times at most, `at_once` or more, so that `calls` calls, each of `taken`
    seconds at n, take `seconds`; what stands against n itself or None)."""
    halvings = 0
    while halvings < 4 and n >> halvings > 1 and calls * taken / 2**halvings > seconds:
        halvings += at_once
    return n >> halvings, f"takes about {taken:.1f} s a call" if halvings else None


def judge_original(contest, exam, dtype, why_shorter):
    """(the original's part of a row, its step or None). Half types it cannot run become
    float32."""
    case = contest.case
    baseline = {"package": case.package, "n": case.steps(), "status": "fails"}
    if why_shorter or case.original_bytes > machine.room(contest.device):
        return baseline | {"status": "left out", "reason": why_shorter}, None
    for attempt in (dtype, torch.float32) if dtype in HALF else (dtype,):
        try:
            step = contest.original(attempt)
            baseline |= {"errors": exam.errors(step), "dtype": name_of(attempt), "status": "ok"}
            return baseline, step
        except ImportError as error:
            return baseline | {"status": "not installed", "reason": str(error)}, None
        except Exception as error:  # whatever published code may raise
            baseline["reason"] = f"fails in {name_of(attempt)}: {reason(error)}"
    return baseline, None


def add_compiled(make, rows, names, dtype, device, seconds):
    """Times torch.compile of the original beside the rows' implementations."""
    rows = [row for row in rows if row["status"] == "ok"]
    if not rows or rows[0]["original"]["status"] != "ok":
        return
    original = rows[0]["original"]
    contest = Contest(make(original["n"]), dtype, device)
    step = contest.original(getattr(torch, original["dtype"]))
    baseline = {"n": original["n"], "status": "ok"}
    try:
        compile_function(step, [step.forward_backward, step.forward], baseline)
    except Exception as error:  # whatever torch.compile makes of published code
        baseline |= {"status": "fails to compile", "reason": reason(error)}
    steps = {row["implementation"]: contest.ours(names and row["implementation"]) for row in rows}
    if baseline["status"] == "ok":
        timing = contest.times(steps | {"compiled": step}, seconds)
        baseline |= timing["compiled"]
        for row in rows:
            add_ratios(row, "compiled", baseline, timing[row["implementation"]])
    for row in rows:
        row["compiled"] = baseline


def compile_function(owner, runs, baseline):
    """Compiles owner.function by running `runs`: whole, or else with graph breaks, remarked."""
    eager = owner.function
    for whole in (True, False):
        torch.compiler.reset()
        owner.function = torch.compile(eager, fullgraph=whole)
        try:
            for run in runs:
                run()
            return
        except Exception as error:
            if not whole:
                raise
            baseline["reason"] = f"compiled with graph breaks: {reason(error)}"


def both_shorter(row):
    """What to say of a row whose original ran at fewer steps."""
    return (f"both sides at n={row['original']['n']}, because the original "
            f"{row['original']['shortened']} at n={row['n']}")


def ratios(baseline, ours):
    return {mode: baseline[f"{mode}_ms"]["median"] / ours[f"{mode}_ms"]["median"]
            for mode in MODES}


def add_ratios(row, name, baseline, ours):
    """How many times as long the baseline takes, and the spread of that in parts of it."""
    row[f"ratio_{name}"] = ratios(baseline, ours)
    row[f"ratio_{name}_spread"] = {
        mode: math.hypot(spread(baseline[f"{mode}_ms"]), spread(ours[f"{mode}_ms"]))
        for mode in MODES}


def add_rates(row, necessary, tokens, rates):
    """Tokens per second, bytes per second, and the time that torch's own copy of as many bytes
    would take, in percent of the row's; or its matmul of as many products, if that is longer."""
    for rate in ("tokens_per_s", "gb_per_s", "percent_of_torch", "bound"):
        row[rate] = {}
    for mode, (moved, flops) in necessary.items():
        seconds = row[f"{mode}_ms"]["median"] / 1e3
        floor, bound = max((moved / rates["copy_gb_s"] / 1e9, "copy"),
                           (flops / rates["matmul_gflop_s"] / 1e9, "matmul"))
        row["tokens_per_s"][mode] = tokens / seconds
        row["gb_per_s"][mode] = moved / seconds / 1e9
        row["percent_of_torch"][mode] = 100 * floor / seconds
        row["bound"][mode] = bound


def name_of(dtype):
    return str(dtype).removeprefix("torch.")
