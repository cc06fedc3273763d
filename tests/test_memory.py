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
    (operators.linear_scan, 8192, 1 / 2),
    pytest.param(operators.gate_loop_diagonal, 8192, 0.36, marks=pytest.mark.long),
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


def test_attention_holds_no_scores_of_all_pairs():
    module, x = fastmix.nn.Attention(8, 8, 8), torch.randn(1, 4096, 8)
    peak = timing.peak_bytes(lambda: module(x).sum().backward(), CPU)
    assert peak < 4096 * 4096


def test_kernels_of_state_spaces_hold_no_powers_of_all_steps():
    """Of slow rates, whose powers are there to the end."""
    module = fastmix.nn.DSS(dim=8, kernel_N=512)
    module.Lambda_real.data.sub_(9)
    x = torch.randn(1, 32768, 8)
    peak = timing.peak_bytes(lambda: module(x).sum().backward(), CPU)
    assert peak < 0.25 * 512 * 32768 * 8  # of complex numbers, of which the original has several


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


STEP_BY_STEP = """
import torch
from fastmix import ops

def kilobytes(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if what in line)

def held(q, k, v, gates):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = kilobytes("VmRSS")
    torch.autograd.grad(ops.gate_loop(q, k, v, gates).sum(), (q, k, v, gates))
    return kilobytes("VmHWM") - before

def tensors(value):
    q, k, v = torch.randn(3, 1, 70, 1, 256).unbind(0)
    k[0, 5, 0, 3] = value
    gates = torch.polar(torch.rand(1, 70, 1), torch.rand(1, 70, 1))
    return [t.requires_grad_() for t in (q, k, v, gates)]

held(*tensors(0.0))
print(held(*tensors(0.0)), held(*tensors(float("nan"))))
"""


@pytest.mark.long
@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peaks are Linux's")
def test_a_head_that_goes_step_by_step_holds_no_state_of_every_step():
    """One of them is half a megabyte, and there are 64 in a chunk."""
    ran = subprocess.run([sys.executable, "-c", STEP_BY_STEP], capture_output=True, text=True, env={
        **os.environ, "FASTMIX_IMPLEMENTATION": "native", "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "131072"})
    assert ran.returncode == 0, ran.stderr
    clean, stepwise = map(int, ran.stdout.split())
    assert stepwise < clean + 2048


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
