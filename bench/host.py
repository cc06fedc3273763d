"""What launching the headline rows takes on the host, without a GPU.

    python bench/host.py

Operators run on tensors without memory, through torch's dispatcher and autograd and the launchers
in Python: on the long way, which the first calls of a kind take, and from plans
(kernels/triton/plans.py), in turns. Triton finds the kernel of each launch as ever, but in place of
compiled ones there are stand-ins that do nothing: what CUDA's driver takes for a launch, 2 to 5 µs,
comes on top.
"""

import contextlib
import functools
import sys
import time
from unittest.mock import patch

import timing  # before torch: it quiets torch's profiler

# isort: split
import torch
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

import ahead
import operators
import predictions
import rows
import table
import triton_static
from fastmix import _triton
from fastmix._triton import plans

ROUNDS = 300


class StandIn(CompiledKernel):
    """A kernel as if it were compiled and loaded; its launches call `launch`."""

    def __init__(self, source, key, launch):
        self.src, self.key, self._run = source, key, functools.partial(launch, self)
        self.function = self.packed_metadata = self.metadata = None
        self.module, self.name = "loaded", source.fn.__name__

    def __del__(self):
        """Unloads nothing."""


@contextlib.contextmanager
def stand_ins(launch):
    """Kernels are not compiled, and in the place of each launch launch(kernel, three sizes of the
    grid, stream, three things of Triton's, its two hooks, arguments …) is called.
    """
    made = []

    def stand_in(self, key, signature, device, constants, options, attrs, *_):
        kernel = StandIn(self.ASTSource(self, signature, constants, attrs), key, launch)
        self.device_caches[device][0][key] = kernel
        made.append((self.device_caches[device][0], key))
        return kernel

    with triton_static.recording(predictions.TARGET), \
            patch.object(JITFunction, "_do_compile", stand_in):
        plans.forget()
        try:
            yield
        finally:
            plans.forget()
            for kernels, key in made:
                del kernels[key]


@contextlib.contextmanager
def long_way():
    """Calls are launched as if each were the first of its kind."""
    with patch.object(plans, "plans", {}), patch.object(plans, "_may_note", lambda device: False):
        yield


WAYS = {"long": long_way, "planned": contextlib.nullcontext}


def measure(build, batch, n):
    """The µs of a row's calls and of the launchers in them, and their launches."""
    meta, launches, spent = torch.device("meta"), [0], [0]
    run = _triton._run

    def launch(*_):
        launches[0] += 1

    def timed(*args):
        began = time.perf_counter()
        results = run(*args)
        spent[0] += time.perf_counter() - began
        return results

    with meta:
        case = build(batch, n, *predictions.SIZES[batch, n])
        step = rows.Contest(case, torch.bfloat16, meta).ours(None)
    row = {"row": case.row, "batch": batch, "n": n, "launches": {}}
    row |= {way: {} for way in (*WAYS, "launchers long", "launchers planned")}
    with stand_ins(launch), patch.object(_triton, "_run", timed), ahead.launchers_on_meta():
        for mode in rows.MODES:
            call, times = getattr(step, mode), {way: ([], []) for way in WAYS}
            for _ in range(3):
                call()  # compiled, seen, noted
            for _ in range(ROUNDS):
                for way, how in WAYS.items():
                    with how():
                        launches[0] = spent[0] = 0
                        times[way][0].append(timing.elapsed(call, torch.device("cpu")))
                        times[way][1].append(1e3 * spent[0])
            row["launches"][mode] = launches[0]
            for way in WAYS:
                for name, found in zip((way, f"launchers {way}"), times[way]):
                    row[name][mode] = 1e3 * timing.summary(found)["median"]
    return row


def column(title, name):
    return title, lambda row, _: table.number(row[name])


COLUMNS = [("operator", table.name), ("shape", lambda row, _: f"{row['batch']}×{row['n']}"),
           column("long way µs", "long"), column("its launchers", "launchers long"),
           column("planned µs", "planned"), column("its launchers", "launchers planned"),
           ("launches", lambda row, _: " / ".join(map(str, row["launches"].values())))]


def main():
    builds = {(8, 4096): ("gate_loop", "linear_scan"), (1, 65536): ("gate_loop",),
              (8, 8192): ("decay_conv", "windowed_sgu", "cumulative_mean")}
    measured = [measure(build, *shape) for shape, names in builds.items()
                for name in names for build in operators.ROWS[name]
                if (shape, build) != ((1, 65536), operators.gate_loop)]
    print(table.grid(measured, COLUMNS, None, False))
    print("\nMedians: forward / forward and backward.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
