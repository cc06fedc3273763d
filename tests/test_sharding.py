"""DTensors over the batch, heads and channels: each rank's own part, and nothing sent."""

import pytest
import torch
import torch.distributed as dist
from metaformer_gpt import MetaformerGPT
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

import torch.testing._internal.distributed.fake_pg  # isort: skip  (ranks that are not there)

import fastmix
from cases import as_tuple, randn
from fastmix import ops


@pytest.fixture
def mesh():
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


# operator, and of what kind: {argument: (shape, sharded axis for each way of sharding)}; options
CALLS = {
    "decay_conv": ({"x": ((2, 5, 4, 6), (0, 2, 3)), "decay": ((4,), (None, 0, None)),
                    "gain": ((4,), (None, 0, None)), "initial_state": ((2, 4, 6), (0, 1, 2))},
                   {"return_state": True}),
    "gate_loop": ({"q": ((2, 5, 4, 3), (0, 2, None)), "k": ((2, 5, 4, 3), (0, 2, None)),
                   "v": ((2, 5, 4, 2), (0, 2, 3)), "gate_logits": ((2, 5, 4, 2), (0, 2, None))},
                  {}),
    "gate_loop-real": ({
        "q": ((2, 5, 4, 3), (0, 2, None)), "k": ((2, 5, 4, 3), (0, 2, None)),
        "v": ((2, 5, 4, 2), (0, 2, 3)), "gates": ((2, 5, 4), (0, 2, None)),
        "initial_state": ((2, 4, 3, 2), (0, 1, 3))}, {"return_state": True}),
    "gate_loop-decays": ({
        "q": ((2, 5, 4, 3), (0, 2, None)), "k": ((2, 5, 4, 3), (0, 2, None)),
        "v": ((2, 5, 4, 2), (0, 2, 3)), "gates": ((4,), (None, 0, None))}, {}),
    "linear_scan": ({"gates": ((2, 5, 4), (0, 2, None)), "inputs": ((2, 5, 4, 2), (0, 2, 3)),
                     "initial_state": ((2, 4, 2), (0, 1, 2))}, {}),
    "cumulative_mean": ({"x": ((2, 5, 4), (0, 2))}, {}),
    "fft_conv": ({"x": ((2, 5, 4, 6), (0, 2, 3)), "kernel": ((5, 4), (None, 1, None)),
                  "skip": ((4, 6), (None, 0, 1))}, {}),
    "windowed_sgu": ({"x": ((2, 5, 8), (0,)), "weight": ((2, 3, 6), (None,)),
                      "bias": ((2, 3), (None,)), "norm_weight": ((4,), (None,))}, {}),
    "causal_sgu": ({"x": ((2, 5, 8), (0,)), "weight": ((2, 5, 5), (None,)),
                    "bias": ((2, 5), (None,)), "gate_residual": ((2, 5, 4), (0,))}, {}),
}


def operator(name):
    return getattr(ops, name.partition("-")[0])


def own(tensor, axis):
    """The part of the first of two ranks."""
    return tensor if axis is None else tensor.chunk(2, axis)[0]


def differentiate(name, tensors, options):
    """The first output, and the gradients of its sum of squares."""
    out = as_tuple(operator(name)(**tensors, **options))[0]
    return out, torch.autograd.grad(out.square().sum(), list(tensors.values()))


@pytest.mark.parametrize("name, way", [
    (name, way) for name, (arguments, _) in CALLS.items()
    for way in range(len(next(iter(arguments.values()))[1]))])
def test_shards_run_by_themselves(mesh, name, way):
    arguments, options = CALLS[name]
    local, shards = {}, {}
    for argument, (shape, axes) in arguments.items():
        axis = axes[way]
        mine = own(randn(*shape, dtype=torch.float64), axis).contiguous()
        local[argument] = mine.clone().requires_grad_()
        placement = Replicate() if axis is None else Shard(axis)
        shards[argument] = DTensor.from_local(
            mine, mesh, [placement], run_check=False).requires_grad_()
    expected, grads = differentiate(name, local, options)
    with CommDebugMode() as sent:
        out = as_tuple(operator(name)(**shards, **options))[0]
        weight = DTensor.from_local(2 * expected.detach(), mesh, out.placements, run_check=False)
        gradients = torch.autograd.grad(out, list(shards.values()), weight)
    assert sent.get_total_counts() == 0
    assert torch.allclose(out.to_local(), expected)
    for grad, e, (_, axes) in zip(gradients, grads, arguments.values(), strict=True):
        assert grad.placements == ((Partial() if axes[way] is None else Shard(axes[way])),)
        assert torch.allclose(grad.to_local(), e)


@pytest.mark.parametrize("name", CALLS)
def test_a_shard_of_time_is_refused_in_words(mesh, name):
    arguments, options = CALLS[name]
    tensors = {argument: DTensor.from_local(torch.randn(shape), mesh, [Replicate()],
                                            run_check=False)
               for argument, (shape, _) in arguments.items()}
    first = next(iter(tensors))
    whole = tensors[first].to_local()
    tensors[first] = DTensor.from_local(whole.tensor_split(2, 1)[0], mesh, [Shard(1)],
                                        run_check=False, shape=whole.shape, stride=whole.stride())
    with pytest.raises(RuntimeError, match=f"{name.partition('-')[0]}: DTensors must not be "
                                           "sharded along time, got"):
        operator(name)(**tensors, **options)


@pytest.mark.parametrize("name, argument, axis, along", [
    ("windowed_sgu", "x", 2, r"c' of \(b, n, c'\)"), ("windowed_sgu", "weight", 0, "h of"),
    ("windowed_sgu", "weight", 2, "w' of"), ("windowed_sgu", "bias", 1, "w of"),
    ("windowed_sgu", "norm_weight", 0, "c of"), ("causal_sgu", "x", 2, "c' of"),
    ("causal_sgu", "weight", 0, "h of"), ("causal_sgu", "gate_residual", 2, "c of"),
    ("gate_loop", "k", 3, r"k of \(b, n, h, k\)"), ("gate_loop", "gate_logits", 3, "2 of"),
    ("gate_loop-real", "initial_state", 2, "k of"), ("fft_conv", "kernel", 0, "time")])
def test_what_would_be_gathered_is_refused_in_words(mesh, name, argument, axis, along):
    arguments, options = CALLS[name]
    tensors = {}
    for key, (shape, _) in arguments.items():
        whole = torch.randn(shape)
        mine = whole.tensor_split(2, axis)[0] if key == argument else whole
        tensors[key] = DTensor.from_local(
            mine, mesh, [Shard(axis) if key == argument else Replicate()], run_check=False,
            shape=whole.shape, stride=whole.stride())
    with pytest.raises(RuntimeError, match=f"{name.partition('-')[0]}: DTensors must not be "
                                           f"sharded along {along}.*redistribute"):
        operator(name)(**tensors, **options)


@pytest.mark.long
@pytest.mark.parametrize("wrap", [torch.nn.parallel.DistributedDataParallel, fully_shard])
def test_an_accelerated_model_is_wrapped_as_any_other(wrap):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = MetaformerGPT(num_tokens=9, dim=8, depth=1, heads=2, dim_head=4, max_seq_len=9)
        tokens = torch.randint(0, 9, (2, 7))
        expected = torch.autograd.grad(model(tokens).square().sum(), list(model.parameters()))
        assert fastmix.accelerate(model).replaced
        wrap(model)(tokens).square().sum().backward()
        for p, e in zip(model.parameters(), expected, strict=True):
            grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            assert torch.allclose(grad, e, atol=1e-4)
    finally:
        dist.destroy_process_group()
