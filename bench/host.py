"""What launching the headline rows takes on the host, without a GPU.

    python bench/host.py

Operators run on tensors without memory, through torch's dispatcher and autograd and the launchers
in Python. Triton finds the kernel of each launch as ever, but in place of compiled ones there are
stand-ins that do nothing: what CUDA's driver takes for a launch, 2 to 5 µs, comes on top.
"""

import sys
import types
from unittest.mock import patch

import timing  # before torch: it quiets torch's profiler

# isort: split
import torch
from triton.runtime.jit import JITFunction

import ahead
import operators
import predictions
import rows
import table
import triton_static

ROUNDS = 300


def measure(build, batch, n):
    """The µs of a row's calls, forward and with backward, and their launches."""
    meta, launches = torch.device("meta"), [0]

    def launch(*_):
        launches[0] += 1

    def stand_in(self, key, signature, device, *_):
        kernel = types.SimpleNamespace(run=launch, launch_metadata=lambda *_: None, function=None,
                                       packed_metadata=None)
        self.device_caches[device][0][key] = kernel
        return kernel

    with meta:
        case = build(batch, n, *predictions.SIZES[batch, n])
        step = rows.Contest(case, torch.bfloat16, meta).ours(None)
    row = {"row": case.row, "batch": batch, "n": n, "us": {}, "launches": {}}
    with triton_static.recording(predictions.TARGET), ahead.launchers_on_meta(), \
            patch.object(JITFunction, "_do_compile", stand_in):
        for mode in rows.MODES:
            call = getattr(step, mode)
            call()
            launches[0] = 0
            call()
            row["launches"][mode] = launches[0]
            row["us"][mode] = 1e3 * timing.summary(
                [timing.elapsed(call, torch.device("cpu")) for _ in range(ROUNDS)])["median"]
    return row


COLUMNS = [("operator", table.name), ("shape", lambda row, _: f"{row['batch']}×{row['n']}"),
           ("host µs", lambda row, _: table.number(row["us"])),
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
