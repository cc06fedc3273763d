"""Triton's kernels as CUDA programs use them: in graphs, on side streams, on the second GPU."""

import pytest
import torch

import fastmix
from cases import CASES

pytestmark = pytest.mark.gpu
TRITON = ("linear_scan", "gate_loop", "decay_conv", "windowed_sgu", "cumulative_mean")
every_case = pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.operator in TRITON])
N = 150


def arguments(name, device="cuda"):
    return {key: t.to(device) for key, t in CASES[name].make(N, torch.float32).items()}


def results(name, tensors):
    """Outputs and gradients."""
    leaves = {key: t.detach().requires_grad_() for key, t in tensors.items()}
    outputs = CASES[name].run(leaves)
    return [t.detach() for t in (*outputs, *torch.autograd.grad(
        outputs, list(leaves.values()), [torch.ones_like(o) for o in outputs]))]


def assert_alike(actual, expected):
    for ours, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), exact.cpu(), rtol=1e-4, atol=1e-4)


@every_case
def test_a_step_in_a_cuda_graph(name):
    tensors = arguments(name)
    with fastmix.force("triton"):
        results(name, tensors)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = results(name, tensors)
        fresh = arguments(name)
        for key, t in tensors.items():
            t.copy_(fresh[key])
        graph.replay()
        assert_alike(kept, results(name, fresh))


def test_a_kernel_that_has_not_run_is_refused_in_a_capture():
    q = torch.randn(1, 70, 3, 24, device="cuda", dtype=torch.float16)
    z = torch.randn(1, 70, 3, 2, device="cuda", dtype=torch.float16)
    graph = torch.cuda.CUDAGraph()
    with fastmix.force("triton"):
        with pytest.raises(RuntimeError, match="cannot be compiled while a CUDA graph is captured"):
            with torch.cuda.graph(graph):
                fastmix.ops.gate_loop(q, q, q, gate_logits=z)
        first = fastmix.ops.gate_loop(q, q, q, gate_logits=z)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            fastmix.ops.gate_loop(q, q, q, gate_logits=z)
    assert first.isfinite().all()


@every_case
def test_on_a_side_stream(name):
    """Whose inputs are there only after a while, as the current stream's work would be."""
    tensors = arguments(name)
    late = {key: torch.zeros_like(t) for key, t in tensors.items()}
    stream = torch.cuda.Stream()
    with fastmix.force("triton"):
        expected = results(name, tensors)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            for key, t in tensors.items():
                late[key].copy_(t)
            actual = results(name, late)
        stream.synchronize()
    assert_alike(actual, expected)


@every_case
def test_a_call_that_is_launched_from_a_plan(name):
    """The third of a kind (kernels/triton/plans.py), of other tensors than the first."""
    from fastmix._triton import plans
    plans.forget()
    tensors = arguments(name)
    with fastmix.force("triton"):
        first = results(name, tensors)
        results(name, tensors)
        assert plans.why_not() or any(plans.plans.values())
        third = results(name, {key: t.clone() for key, t in tensors.items()})
    for ours, its in zip(third, first, strict=True):
        assert torch.equal(ours, its)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")
@every_case
def test_on_another_gpu_than_the_current_one(name):
    tensors = arguments(name)
    with fastmix.force("triton"), torch.cuda.device(0):
        there = results(name, {key: t.to("cuda:1") for key, t in tensors.items()})
        assert torch.cuda.current_device() == 0
        assert all(t.device.index == 1 for t in there)
        assert_alike(there, results(name, tensors))
