"""The rows of the models: training steps on real text, beside the published model's own.

A step is forward, backward and Adam. Both models start from the same seed and see the same
text; they must find the same losses and the same first gradients, or the row is wrong.
"""

import importlib
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F

from exactness import within
from rows import (
    HALF,
    both_shorter,
    compile_function,
    forced,
    halved,
    implementations,
    name_of,
    reason,
)
from timing import elapsed, peak_bytes, side_by_side, spread

COMPILE_SECONDS = 25  # that a cold torch.compile of an original takes with its timing, two cores
VOCABULARY = 256      # bytes
ORIGINAL_STEPS = 4    # that checking and timing an original take at least
# Of losses and of gradients; a half type may also be twice as far from float32 as the original
# is in that type. Some gradients are small differences of large terms.
TOLERANCE = {torch.float64: (1e-8, 1e-8), torch.float32: (2e-4, 2e-4),
             torch.float16: (2e-3, 5e-2), torch.bfloat16: (2e-2, 2e-1)}

# name: (file of fastmix.nn, published module, class, operator, its other arguments)
MODELS = {
    "MetaformerGPT": (
        "metaformer_gpt", "metaformer_gpt.metaformer_gpt", "MetaformerGPT", "decay_conv",
        lambda n, dim, heads: {"heads": heads, "dim_head": dim // heads, "max_seq_len": n}),
    "GatedExponentialSmoothingLM": (
        "mhesa", "gated_state_spaces_pytorch.mhesa", "GatedExponentialSmoothingLM", "decay_conv",
        lambda n, dim, heads: {"heads": heads, "dim_mhesa": dim}),
    "GatedDsConvLM": (
        "dsconv", "gated_state_spaces_pytorch.dsconv", "GatedDsConvLM", "fft_conv",
        lambda n, dim, heads: {"heads": heads, "dim_dsconv": dim, "max_seq_len": n}),
    "GatedStateSpacesLM": (
        "gss", "gated_state_spaces_pytorch.gss", "GatedStateSpacesLM", "fft_conv",
        lambda n, dim, heads: {"dss_kernel_H": dim}),
    "gMLPGPT": (
        "g_mlp_gpt", "g_mlp_gpt.g_mlp_gpt", "gMLPGPT", "windowed_sgu",
        lambda n, dim, heads: {"heads": heads, "seq_len": n, "window": 128}),
    "GateLoopTransformer": (
        "gateloop_transformer", "gateloop_transformer.gateloop_transformer", "Transformer",
        "gate_loop", lambda n, dim, heads: {}),
}


def model_arguments(name, n, dim, heads, depth):
    """(file, published module, class, operator, arguments of the class) of a model for n steps."""
    file, published, class_name, operator, more = MODELS[name]
    return file, published, class_name, operator, {
        "num_tokens": VOCABULARY, "dim": dim, "depth": depth, **more(n, dim, heads)}


def build(module, class_name, arguments):
    torch.manual_seed(0)
    return getattr(importlib.import_module(module), class_name)(**arguments)


def read_bytes(path, count):
    """`count` bytes of a file, repeated if it is shorter; by default of Python's own sources."""
    files = [Path(path)] if path else sorted(Path(os.__file__).parent.glob("*.py"))
    text = b""
    for file in files:
        text += file.read_bytes()
        if len(text) >= count:
            break
    if not text:
        raise ValueError(f"--text: {path} must hold text, but is empty")
    text = text * (count // len(text) + 1)
    return torch.frombuffer(bytearray(text[:count]), dtype=torch.uint8).long()


class Trainer:
    """A model in training on consecutive pieces of a text; in a half type under autocast."""

    def __init__(self, model, pieces, dtype, force=None):
        half = dtype in HALF
        device = pieces.device
        self.model = self.function = model.to(device, torch.float32 if half else dtype)
        self.autocast = torch.autocast(device.type, dtype if half else None, enabled=half)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        self.pieces, self.surroundings = pieces, forced(force)
        self.losses = []

    def step(self):
        tokens = self.pieces[len(self.losses) % len(self.pieces)]
        self.optimizer.zero_grad()
        with self.autocast:
            logits = self.function(tokens[:, :-1])
        logits = logits.float() if logits.dtype in HALF else logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.detach())

    def first_two_steps(self):
        """(gradients of the first, peak bytes of the second)."""
        with self.surroundings():
            self.step()
            gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()
                         if p.grad is not None}
            self.optimizer.zero_grad()
            return gradients, peak_bytes(self.step, self.pieces.device)


def linear_flops(model, tokens):
    """Of a step's products with the weights of Linear layers: forward, and two in backward."""
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    return 6 * weights * tokens


def mixing_percent(trainer):
    """The part of a step that goes by in fastmix's operators and their gradients."""
    cuda = trainer.pieces.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] * cuda
    with trainer.surroundings(), torch.profiler.profile(activities=kinds) as profile:
        with torch.profiler.record_function("whole step"):
            trainer.step()
    time = "device_time_total" if cuda else "cpu_time_total"
    spent = {e.key: getattr(e, time) for e in profile.key_averages()}
    mixing = sum(us for key, us in spent.items() if key.startswith("fastmix::"))
    return 100 * mixing / spent["whole step"]


class Course:
    """One model at one size, with the text it learns."""

    def __init__(self, name, b, n, dim, heads, depth, text, dtype, device):
        self.name, self.dtype = name, dtype
        (self.file, self.published, self.class_name, self.operator,
         self.arguments) = model_arguments(name, n, dim, heads, depth)
        self.pieces = read_bytes(text, 16 * b * (n + 1)).view(16, b, n + 1).to(device)
        self.n, self.tokens = n, b * n
        self.at = lambda n: Course(name, b, n, dim, heads, depth, text, dtype, device)

    def trainer(self, module, dtype, force=None):
        model = build(module, self.class_name, self.arguments)
        return Trainer(model, self.pieces, dtype, force)

    def ours(self, force=None):
        return self.trainer(f"fastmix.nn.{self.file}", self.dtype, force)

    def original(self):
        """(its part of a row, the truth, the trainer to time).

        The truth is (losses, gradients), of float32 for half types; the original is timed in
        float32 too where it cannot run in them. Neither exists if it cannot run at all.
        """
        baseline = {"package": self.published.partition(".")[0]}
        half = self.dtype in HALF
        try:
            trainer = self.trainer(self.published, torch.float32 if half else self.dtype)
            gradients, peak = trainer.first_two_steps()
        except ImportError as error:
            return baseline | {"status": "not installed", "reason": str(error)}, None, None
        except Exception as error:  # whatever published code may raise
            return baseline | {"status": "fails", "reason": reason(error)}, None, None
        baseline |= {"status": "ok", "dtype": name_of(self.dtype), "peak_bytes": peak}
        truth = list(trainer.losses), gradients
        if half:
            try:
                rival = self.trainer(self.published, self.dtype)
                gradients, baseline["peak_bytes"] = rival.first_two_steps()
                baseline["errors"] = errors(rival.losses, gradients, truth)
                trainer = rival
            except Exception as error:
                baseline |= {"dtype": "float32",
                             "reason": f"fails in {name_of(self.dtype)}: {reason(error)}"}
        return baseline, truth, trainer

    def original_length(self, seconds):
        """(the n to run the original at, what stands against more of it or None)."""
        small = self.at(max(1, self.n // 16))
        try:
            trainer = small.trainer(self.published, torch.float32)
            trainer.step()
            step = elapsed(trainer.step, self.pieces.device) / 1e3
            adam = elapsed(trainer.optimizer.step, self.pieces.device) / 1e3  # at any n
        except Exception:
            return self.n, None  # original() says why
        # Half of n would save nothing: fastmix's model runs at both lengths.
        return halved(self.n, ORIGINAL_STEPS, adam + max(0, step - adam) * self.n / small.n,
                      seconds, at_once=2)


def model_rows(course, names, matmul_gflop_s, seconds=0, original_seconds=None):
    """A row for each implementation of a course; checked only, if `seconds` is 0. An original
    that would take longer than `original_seconds` runs at a shorter length, beside the same."""
    n, why = (course.n, None) if original_seconds is None else course.original_length(
        original_seconds)
    if why:
        short = model_rows(course.at(n), names, matmul_gflop_s, seconds / 2)
        return [at_full_length(row, course, names, matmul_gflop_s, seconds / 2, why)
                for row in short]
    original, truth, rival = course.original()
    limits = dict(zip(("losses", "gradients"), TOLERANCE[course.dtype]))
    for name, error in original.get("errors", {}).items():
        limits[name] += 2 * error
    rows, trainers = {}, {}
    for name, missing in implementations(course.operator, course.pieces.device, names):
        rows[name] = row = {
            "model": course.name, "implementation": name, "n": course.n, "limits": limits,
            "arguments": course.arguments, "original": original, "status": "failed",
            "reason": missing}
        if missing is not None:
            continue
        try:
            ours = course.ours(name if names else None)
            gradients, peak = ours.first_two_steps()
        except Exception as error:  # said in the row; the others are still to be seen
            row["reason"] = reason(error)
            continue
        if truth is None:
            row |= {"status": "unchecked", "reason": f"no original: {original['reason']}"}
        else:
            row["errors"] = errors(ours.losses, gradients, truth)
            row["status"] = "ok" if within(row["errors"], limits) else "wrong"
        if row["status"] != "wrong":
            row["peak_bytes"] = peak
            trainers[name] = ours
    if seconds and trainers:
        timing = in_turns(trainers | ({"original": rival} if rival else {}), seconds)
        if rival:
            original["step_ms"] = timing["original"]
        for name in trainers:
            add_times(rows[name], trainers[name], timing[name], course, matmul_gflop_s)
            if rival:
                add_ratio(rows[name], "original", original["step_ms"], timing[name])
    return list(rows.values())


def add_times(row, trainer, timing, course, matmul_gflop_s):
    row["step_ms"] = timing
    row["tokens_per_s"] = 1e3 * course.tokens / timing["median"]
    row["mixing_percent"] = mixing_percent(trainer)
    row["linear_floor_ms"] = linear_flops(trainer.model, course.tokens) / matmul_gflop_s / 1e6


def at_full_length(short, course, names, matmul_gflop_s, seconds, why):
    """The row of a course from that of a shorter one, where its original ran beside it."""
    row = short | {"n": course.n, "arguments": course.arguments,
                   "original": short["original"] | {"n": short["n"], "shortened": why}}
    if short["status"] != "ok":
        return row
    row["reason"] = short["reason"] or both_shorter(row)
    name = short["implementation"]
    try:
        trainer = course.ours(name if names else None)
        _, row["peak_bytes"] = trainer.first_two_steps()
    except Exception as error:
        return row | {"status": "failed", "reason": reason(error)}
    add_times(row, trainer, in_turns({name: trainer}, seconds)[name], course, matmul_gflop_s)
    return row


def add_compiled(course, rows, names, seconds):
    """Times torch.compile of the original beside the rows' implementations."""
    rows = [row for row in rows if row["status"] == "ok"]
    if not rows:
        return
    course = course.at(rows[0]["original"].get("n", course.n))
    trainer = course.trainer(course.published, getattr(torch, rows[0]["original"]["dtype"]))
    baseline = {"status": "ok", "n": course.n}
    try:
        compile_function(trainer, [trainer.step], baseline)
    except Exception as error:  # whatever torch.compile makes of published code
        baseline |= {"status": "fails to compile", "reason": reason(error)}
    trainers = {row["implementation"]: course.ours(names and row["implementation"]) for row in rows}
    if baseline["status"] == "ok":
        timing = in_turns(trainers | {"compiled": trainer}, seconds)
        baseline["step_ms"] = timing["compiled"]
        for row in rows:
            add_ratio(row, "compiled", baseline["step_ms"], timing[row["implementation"]])
    for row in rows:
        row["compiled"] = baseline


def in_turns(trainers, seconds):
    device = next(iter(trainers.values())).pieces.device
    steps = {key: (trainer.surroundings, trainer.step) for key, trainer in trainers.items()}
    return side_by_side(steps, seconds, device, least=2)


def add_ratio(row, name, baseline, ours):
    row[f"ratio_{name}"] = baseline["median"] / ours["median"]
    row[f"ratio_{name}_spread"] = math.hypot(spread(baseline), spread(ours))


def errors(losses, gradients, truth):
    """Relative: the worst loss; the worst gradient of a parameter, by norm, where one that
    hardly has a gradient counts beside all of them."""
    true_losses, true_gradients = truth
    whole = torch.stack([g.double().norm() for g in true_gradients.values()]).norm()
    off = []
    for name, true in true_gradients.items():
        difference = gradients.get(name, torch.zeros_like(true)).double() - true.double()
        off.append(difference.norm() / torch.maximum(true.double().norm(), 1e-3 * whole))
    losses, true_losses = torch.stack(losses).double(), torch.stack(true_losses).double()
    return {"losses": ((losses - true_losses) / true_losses).abs().max().item(),
            "gradients": torch.stack(off).max().item()}
