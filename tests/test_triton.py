"""The Triton kernels' own tests, tests/triton/, in a process of their own.

Without a GPU they run in Triton's interpreter, which has to be chosen before kernels are
imported.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

FOLDER = Path(__file__).parent / "triton"
BENCH = Path(__file__).parent.parent / "bench"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                                  reason="Triton is not installed: there are no wheels for it here")


def run_tests_of(file, *flags):
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(
        [str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]))
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *flags, file]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    none = 5 if "--long" in flags else 0  # where a run without it leaves out none
    assert ran.returncode in (0, none), ran.stdout + ran.stderr


every_file = pytest.mark.parametrize(
    "file", sorted(FOLDER.glob("test_*.py")), ids=lambda file: file.stem)


@needs_triton
def test_kernels(request):
    """In one process: nearly all of a short one's time goes by before the first test."""
    run_tests_of(FOLDER, "--seed", str(request.config.option.seed))


@pytest.mark.long
@needs_triton
@every_file
def test_the_other_cases_of_the_kernels(file, request):
    run_tests_of(file, "--long", "--seed", str(request.config.option.seed))


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def gate_loop(b, n, h, d):
    q = empty(b, n, h, d)
    return q, q, q, None, empty(b, n, h, 2), empty(b, h, d, d, dtype=torch.complex64), 64


def real_gate_loop(b, n, h, d):
    q = empty(b, n, h, d)
    return (q, q, q, empty(b, n, h, dtype=torch.float32), None,
            empty(b, h, d, d, dtype=torch.float32), 64)


def windowed_sgu(b, n, w, c=512, residual=False):
    return (empty(b, n, 2 * c), empty(2, w, 2 * w), empty(2, w), empty(c), empty(c), 1e-5,
            empty(b, n, c) if residual else None, "gelu")


# Name → operator, and what its forward takes for b sequences of n steps. Of "odd" widths, and of
# gates for few heads, it depends on n whether a sequence begins at a multiple of 16 elements.
LAUNCHES = {
    "decay_conv": ("decay_conv", lambda b, n: (
        empty(b, n, 8, 64), empty(8), empty(8), empty(b, 8, 64, dtype=torch.float32), 64)),
    "cumulative_mean": ("cumulative_mean", lambda b, n: (empty(b, n, 512),)),
    "linear_scan": ("linear_scan", lambda b, n: (
        empty(b, n, 512), empty(b, n, 512), empty(b, 512), False, 64)),
    "gate_loop-channels": ("gate_loop", lambda b, n: gate_loop(b, n, 512, 1)),
    "gate_loop-heads": ("gate_loop", lambda b, n: gate_loop(b, n, 8, 64)),
    "windowed_sgu-walk": ("windowed_sgu", lambda b, n: windowed_sgu(b, n, 128)),
    "windowed_sgu-tiles": ("windowed_sgu", lambda b, n: windowed_sgu(b, n, 512)),
    "decay_conv-odd": ("decay_conv", lambda b, n: (
        empty(b, n, 5, 13), empty(5), empty(5), empty(b, 5, 13, dtype=torch.float32), 64)),
    "cumulative_mean-odd": ("cumulative_mean", lambda b, n: (empty(b, n, 65),)),
    "linear_scan-odd": ("linear_scan", lambda b, n: (
        empty(b, n, 5, 13), empty(b, n, 5, 13), empty(b, 5, 13), False, 64)),
    "linear_scan-one-gate": ("linear_scan", lambda b, n: (
        empty(b, n, 1), empty(b, n, 512), None, False, 64)),
    "linear_scan-gate-per-head": ("linear_scan", lambda b, n: (
        empty(b, n, 4, 1), empty(b, n, 4, 128), None, True, 64)),
    "gate_loop-channels-odd": ("gate_loop", lambda b, n: gate_loop(b, n, 300, 1)),
    "gate_loop-channels-real": ("gate_loop", lambda b, n: real_gate_loop(b, n, 300, 1)),
    "gate_loop-heads-real": ("gate_loop", lambda b, n: real_gate_loop(b, n, 5, 20)),
    "gate_loop-few-heads": ("gate_loop", lambda b, n: gate_loop(b, n, 3, 64)),
    "gate_loop-heads-odd": ("gate_loop", lambda b, n: gate_loop(b, n, 5, 20)),
    "windowed_sgu-walk-odd": ("windowed_sgu", lambda b, n: windowed_sgu(b, n, 64, 650, True)),
    "windowed_sgu-tiles-odd": ("windowed_sgu", lambda b, n: windowed_sgu(b, n, 300, 650, True)),
}


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted")
@pytest.mark.parametrize("sizes", [[(64, 4096), (67, 5003)], [(1, 65536), (2, 50003)]],
                         ids=["many-sequences", "long-sequences"])
@pytest.mark.parametrize("name", LAUNCHES)
def test_kernels_are_the_same_for_all_lengths_and_batches(name, sizes, monkeypatch):
    """Launched on tensors without memory for a GPU that is not there; nothing is compiled."""
    monkeypatch.syspath_prepend(BENCH)
    import triton_static

    operator, arguments = LAUNCHES[name]
    kernels = importlib.import_module(f"fastmix._triton.{operator}")
    compiled = []
    for b, n in sizes:
        args = arguments(b, n)
        with triton_static.recording("sm90") as launches:
            out = kernels.forward(*args)
            out = out if isinstance(out, tuple) else (out,)
            kernels.backward(*out, *args)
        assert len(launches) > 1
        # What Triton keeps compiled kernels by: it must be able to follow their sources.
        assert all(launch.function.cache_key for launch in launches.values())
        compiled.append(set(launches))
    assert compiled[0] == compiled[1]


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted")
@pytest.mark.parametrize("name", [
    "decay_conv", "linear_scan", "gate_loop-channels", "gate_loop-heads", "gate_loop-channels-real",
    "gate_loop-heads-real"])
def test_a_step_is_launched_like_a_sequence(name, monkeypatch):
    """With the same compiled kernels, and without a tensor's numbers on the host, of which meta
    tensors have none: a CUDA graph can hold a step.
    """
    monkeypatch.syspath_prepend(BENCH)
    import triton_static

    operator, arguments = LAUNCHES[name]
    kernels = importlib.import_module(f"fastmix._triton.{operator}")
    compiled = []
    for n in (4096, 1):
        with triton_static.recording("sm90") as launches:
            kernels.forward(*arguments(64, n)[:-1], 0)
        compiled.append(set(launches))
    assert compiled[0] == compiled[1] and compiled[0]


class Launches(TorchDispatchMode):
    """Notes the kernels that run while it is active: Triton's, which `counting` tells, and torch's,
    of operators that are more than views and memory.
    """

    def __init__(self):
        super().__init__()
        self.kernels = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if (isinstance(out, torch.Tensor) and not function.is_view
                and "empty" not in function.__name__):
            self.kernels.append(function.__name__)
        return out


# Name in LAUNCHES → kernels of forward, and of backward, of one long sequence, which is cut in
# time. Of linear_scan's backward one converts the initial state's gradient.
STEPS = {"decay_conv": (2, 3), "cumulative_mean": (2, 2), "linear_scan": (2, 3),
         "gate_loop-channels": (3, 3), "gate_loop-heads": (2, 3), "windowed_sgu-walk": (2, 14),
         "windowed_sgu-tiles": (2, 14)}


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted")
@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_takes_few_launches(name, monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import triton_static

    operator, arguments = LAUNCHES[name]
    kernels = importlib.import_module(f"fastmix._triton.{operator}")
    args = arguments(1, 65536)
    launched, run = Launches(), triton_static.JITFunction.run

    def counting(kernel, *args, **options):
        launched.kernels.append(kernel.__name__)
        return run(kernel, *args, **options)

    monkeypatch.setattr(triton_static.JITFunction, "run", counting)
    with triton_static.recording("sm90"), launched:
        out = kernels.forward(*args)
        forward = len(launched.kernels)
        kernels.backward(*(out if isinstance(out, tuple) else (out,)), *args)
    assert (forward, len(launched.kernels) - forward) == STEPS[name], launched.kernels


SWITCHES = """
import os, torch
from fastmix._triton.target import float32_precision
for switch, expected in [
        ("pass", "ieee"), ("torch.backends.cuda.matmul.allow_tf32 = True", "tf32"),
        ("torch.set_float32_matmul_precision('high')", "tf32"),
        ("torch.backends.fp32_precision = 'tf32'", "tf32"),
        ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", "ieee")]:
    child = os.fork()  # for no switch takes back all that another did
    if child == 0:
        exec(switch)
        os._exit(float32_precision() != expected)
    assert os.waitpid(child, 0)[1] == 0, switch
"""


@needs_triton
def test_every_switch_of_torch_for_tf32_is_honoured():
    ran = subprocess.run([sys.executable, "-c", SWITCHES], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted")
def test_a_kernel_is_not_compiled_while_a_graph_is_captured(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import triton

    import triton_static
    from fastmix._triton import cumulative_mean, trial

    driver = triton_static.driver
    monkeypatch.setattr(driver, "_active", triton_static._Driver(triton_static.TARGETS["sm80"]))
    monkeypatch.setattr(trial, "_captures", lambda device: True)
    x, hook = empty(1, 5, 3), triton.knobs.runtime.jit_cache_hook
    message = "cumulative_mean: its Triton kernel _sums has not run on meta .* before the capture"
    with pytest.raises(RuntimeError, match=message), \
            trial.no_compilation_in_capture("cumulative_mean", x.device):
        cumulative_mean.forward(x)
    assert triton.knobs.runtime.jit_cache_hook is hook
