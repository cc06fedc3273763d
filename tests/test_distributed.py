"""Two gloo processes on this machine against one process: the same losses and weights."""

import itertools
import socket

import g_mlp_gpt
import gated_state_spaces_pytorch
import gateloop_transformer
import metaformer_gpt
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastmix
from fastmix import nn

pytestmark = pytest.mark.long

MODELS = {
    "MetaformerGPT": lambda: nn.MetaformerGPT(
        num_tokens=32, dim=8, depth=1, heads=2, dim_head=4, max_seq_len=20),
    "GatedExponentialSmoothingLM": lambda: nn.GatedExponentialSmoothingLM(
        num_tokens=32, dim=8, depth=1, heads=2, dim_mhesa=8),
    "GatedDsConvLM": lambda: nn.GatedDsConvLM(
        num_tokens=32, dim=8, depth=1, heads=2, dim_dsconv=8),
    "gMLPGPT": lambda: nn.gMLPGPT(num_tokens=32, dim=8, depth=2, seq_len=20, window=(4, 20)),
    "reversible gMLPGPT": lambda: nn.gMLPGPT(
        num_tokens=32, dim=8, depth=2, seq_len=20, window=(4, 20), reversible=True),
    "GateLoopTransformer": lambda: nn.GateLoopTransformer(
        num_tokens=32, dim=8, depth=1, gate_loop_heads=2),
    "GateLoopTransformer with attention": lambda: nn.GateLoopTransformer(
        num_tokens=32, dim=8, depth=1, use_gate_looped_attn=False, dim_head=4, heads=2),
    "GatedStateSpacesLM": lambda: nn.GatedStateSpacesLM(
        num_tokens=32, dim=8, depth=1, dss_kernel_N=4, dss_kernel_H=6),
}


def build(name, models=MODELS):
    torch.manual_seed(3)
    model = models[name]().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def shard(model):
    """Embeddings, blocks and the root, each on its own."""
    for child in model.children():
        if isinstance(child, torch.nn.Embedding):
            fully_shard(child)
    for child in model.modules():
        if isinstance(child, nn.DSS):  # what is in a block may be sharded alone, too
            fully_shard(child)
    if isinstance(model, nn.gMLPGPT):
        blocks = [m for m in model.modules()
                  if isinstance(m, (nn.gMLPBlock, nn.g_mlp_gpt.FeedForward))]
    else:
        blocks = [m for layer in model.layers for m in (
            layer if isinstance(layer, torch.nn.ModuleList) else [layer])]
    for block in blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def train(model, batch, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(batch[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def compare(name, rank, folder):
    torch.manual_seed(4)
    batch = torch.randint(0, 32, (4, 13))
    alone = build(name)
    expected = train(alone, batch)
    weights = alone.state_dict()
    mine = batch[2 * rank: 2 * rank + 2]
    for kind in ("DDP", "FSDP2"):
        model = build(name)
        wrapped = DistributedDataParallel(model) if kind == "DDP" else shard(model)
        losses = train(wrapped, mine)
        dist.all_reduce(losses)
        assert torch.allclose(losses / 2, expected, rtol=1e-10), (name, kind, losses / 2, expected)
        for key, p in model.named_parameters():
            whole = p.full_tensor() if hasattr(p, "full_tensor") else p
            assert torch.allclose(whole, weights[key], rtol=1e-9, atol=1e-12), (name, kind, key)
    checkpoint.save({"model": get_model_state_dict(model)}, checkpoint_id=f"{folder}/{name}")
    state = {"model": get_model_state_dict(model)}  # trained, and now as it was saved by one
    checkpoint.load(state, checkpoint_id=f"{folder}/{name} of one")
    set_model_state_dict(model, state["model"])
    for key, p in build(name).named_parameters():
        assert torch.equal(model.get_parameter(key).full_tensor(), p), (name, key)


PUBLISHED = {
    "MetaformerGPT": lambda: metaformer_gpt.MetaformerGPT(
        num_tokens=32, dim=8, depth=1, heads=2, dim_head=4, max_seq_len=20),
    "reversible gMLPGPT": lambda: g_mlp_gpt.gMLPGPT(
        num_tokens=32, dim=8, depth=2, seq_len=20, window=(4, 20), reversible=True),
    "GateLoopTransformer": lambda: gateloop_transformer.Transformer(
        8, num_tokens=32, depth=1, gate_loop_heads=2),
    "GatedStateSpacesLM": lambda: gated_state_spaces_pytorch.GatedStateSpacesLM(
        num_tokens=32, dim=8, depth=1, dss_kernel_N=4, dss_kernel_H=6),
}


def compare_accelerated(name, rank):
    """A published model that is wrapped before it is accelerated, or after."""
    torch.manual_seed(4)
    batch = torch.randint(0, 32, (4, 13))
    expected = train(build(name, PUBLISHED), batch)
    for kind, wrapped_first in itertools.product(("DDP", "FSDP2"), (False, True)):
        model = build(name, PUBLISHED)
        known = [model.get_submodule(path) for path, *_ in fastmix.accelerate(model).replaced]
        if wrapped_first:
            fastmix.restore(model)
        if kind == "DDP":
            wrapped = DistributedDataParallel(model)
        else:
            for module in reversed(known):  # children first
                fully_shard(module)
            wrapped = fully_shard(model)
        if wrapped_first:
            assert len(fastmix.accelerate(wrapped).replaced) == len(known) > 0
        losses = train(wrapped, batch[2 * rank: 2 * rank + 2])
        dist.all_reduce(losses)
        assert torch.allclose(losses / 2, expected, rtol=1e-10), (name, kind, losses / 2, expected)


def work(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name in MODELS:
        compare(name, rank, folder)
    for name in PUBLISHED:
        compare_accelerated(name, rank)
    dist.destroy_process_group()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_two_processes_train_like_one_and_each_loads_the_others_checkpoints(tmp_path):
    """DDP and FSDP2; `work` compares."""
    for name in MODELS:
        checkpoint.save({"model": build(name).state_dict()},
                        checkpoint_id=f"{tmp_path}/{name} of one")
    mp.spawn(work, (free_port(), str(tmp_path)), nprocs=2)
    for name in MODELS:
        torch.manual_seed(4)
        batch = torch.randint(0, 32, (4, 13))
        expected = build(name)
        train(expected, batch)
        model = build(name)
        state = {"model": model.state_dict()}
        checkpoint.load(state, checkpoint_id=f"{tmp_path}/{name}")
        set_model_state_dict(model, state["model"])
        for key, p in expected.named_parameters():
            loaded = model.get_parameter(key)
            assert torch.allclose(loaded, p, rtol=1e-9, atol=1e-12), (name, key)
