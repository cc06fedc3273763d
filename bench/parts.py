"""Where the time of a model's training step goes: products, mixing, and all that lies beside them.

    python bench/parts.py --seq 8192

Of torch's profile of a step, the time that each operator takes itself, in milliseconds. Products
are those with weights, of Linear layers and of the loss's logits; mixing is fastmix's operators.
"""

import argparse
import sys

import torch

import models
from progress import Progress
from table import grid, name, rate

STEPS = 3  # that are profiled, after two that are not
# Parts by what an operator's name holds; the first that fits. Adam's are known by their caller.
PARTS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "mixing": ("fastmix",),
    "norms": ("norm",),
    "activations": ("gelu", "silu", "sigmoid", "softplus", "tanh", "relu"),
    "loss, embedding": ("softmax", "nll_loss", "embedding", "index", "cross_entropy"),
    "copies": ("copy_", "clone", "cat", "fill_", "zero_", "pad", "contiguous"),
    "sums, products of tensors": ("add", "mul", "sub", "div", "sum", "neg", "where", "cumsum"),
}
NAMES = [*PARTS, "Adam", "others"]


def part_of(event):
    above = event
    while above is not None:
        if above.name.startswith("Optimizer.step"):
            return "Adam"
        above = above.cpu_parent
    return next((part for part, marks in PARTS.items()
                 if any(mark in event.name for mark in marks)), "others")


def milliseconds(step):
    """{part: of a step's time}."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(STEPS):
            step()
    spent = dict.fromkeys(NAMES, 0.0)
    for event in profile.events():
        spent[part_of(event)] += event.self_cpu_time_total / 1e3 / STEPS
    return spent


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", type=int, default=8192, help="time steps")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dim", type=int, default=512, help="width")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--models", nargs="+", choices=list(models.MODELS), metavar="MODEL",
                        default=list(models.MODELS))
    args = parser.parse_args(argv)
    pieces = models.read_bytes(None, 4 * args.batch * (args.seq + 1)).view(4, args.batch, -1)
    measured, progress = [], Progress(len(args.models))
    for model_name in args.models:
        progress(model_name)
        file, _, class_name, _, arguments = models.model_arguments(
            model_name, args.seq, args.dim, args.heads, depth=1)
        model = models.build(f"fastmix.nn.{file}", class_name, arguments)
        trainer = models.Trainer(model, pieces, torch.float32)
        trainer.step()
        trainer.step()
        spent = milliseconds(trainer.step)
        measured.append({"model": model_name, "step ms": sum(spent.values()), **spent})
    progress.close()
    print(grid(measured, [("model", name), *((part, rate(part)) for part in ("step ms", *NAMES))],
               None, False))


if __name__ == "__main__":
    main(sys.argv[1:])
