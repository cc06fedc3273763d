"""Peak memory: the fallback's beside the originals', the C++ kernels' beside what they return."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastmix
from fastmix import ops
from fastmix.native import build

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import operators  # noqa: E402
import timing  # noqa: E402

CPU = torch.device("cpu")


def training(case, call, inputs):
    weight = torch.randn(case.output_shape(), dtype=inputs[-1].dtype)
    return lambda: torch.autograd.grad(call(), inputs, weight)


# With single channels for heads, gate_loop's output and gradients alone are 0.30 of the original's.
@pytest.mark.parametrize("build, n, most", [
    (operators.linear_scan, 8192, 1 / 2), (operators.gate_loop_diagonal, 8192, 0.36),
    (operators.gate_loop, 512, 1 / 4), (operators.decay_conv, 8192, 1 / 2),
    (operators.fft_conv, 8192, 1 / 2), (operators.windowed_sgu, 8192, 1 / 2),
    (operators.causal_sgu, 2048, 1 / 2), (operators.cumulative_mean, 8192, 1 / 2)],
    ids=lambda x: getattr(x, "__name__", None))
def test_the_fallback_holds_a_part_of_what_the_originals_do(build, n, most):
    case = build(1, n, 512, 8)
    inputs = case.tensors(torch.float32, CPU)
    function, arguments = case.original(*inputs)
    original = timing.peak_bytes(training(case, lambda: function(*arguments), inputs), CPU)
    with fastmix.force("fallback"):
        ours = timing.peak_bytes(training(case, lambda: case.call(ops, *inputs), inputs), CPU)
    assert ours <= most * original


HELD = """
import sys
sys.path.insert(0, sys.argv[1])
import operators, torch
from fastmix import ops

def kilobytes(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if what in line)

def bytes_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)

def measure(build, longest=16384, heads=8, **options):
    for n in 300, longest:  # at first all that is loaded on first use
        case = build(1, n, 512, heads, **options)
        inputs = case.tensors(torch.float32, torch.device("cpu"))
        weight = torch.ones(case.output_shape(), dtype=inputs[-1].dtype)
        case.inputs.clear()
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the highest so far is forgotten
        before = kilobytes("VmRSS")
        out = case.call(ops, *inputs)
        results = [out, *torch.autograd.grad(out, inputs, weight)]
        held = 1024 * (kilobytes("VmHWM") - before)
        del out
    print(build.__name__, held - bytes_of(results), bytes_of([*results, *inputs, weight]))

for name, builds in operators.ROWS.items():
    for build in builds:
        measure(build, 2048 if name == "causal_sgu" else 16384)
measure(operators.gate_loop, heads=4)
measure(operators.fft_conv, heads=512)
measure(operators.windowed_sgu, 2048, window=2048)
"""


@pytest.mark.long
@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peaks are Linux's")
def test_kernels_hold_a_tenth_more_than_inputs_outputs_and_gradients():
    """By the system's count. The allocator returns at once what is freed."""
    ran = subprocess.run([sys.executable, "-c", HELD, BENCH], capture_output=True, text=True, env={
        **os.environ, "FASTMIX_IMPLEMENTATION": "native", "OMP_NUM_THREADS": "2",
        "MALLOC_MMAP_THRESHOLD_": "131072"})
    lines = [line.split() for line in ran.stdout.splitlines()]
    assert len(lines) == 12, ran.stderr
    for name, more, needed in lines:
        assert int(more) <= 0.1 * int(needed), name
