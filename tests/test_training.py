"""An original's training script needs a changed import and nothing else.

Each script below takes the module it imports its model from, and is run twice: with the
published module and with its fastmix twin. Both must see the same losses at every step.
"""

import argparse
import importlib
import inspect

import pytest
import torch
import torch.nn.functional as F

STEPS, BATCH, SEQ = 30, 2, 64
TEXT = torch.tensor(list(inspect.getsource(argparse).encode()))


def next_token_loss(model, batch):
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), batch[:, 1:])


def loss_of_labels(model, batch):
    return model(batch[:, :-1], labels=batch[:, 1:])


def metaformer_gpt(module, dtype):
    model = module.MetaformerGPT(
        num_tokens=256, dim=32, depth=2, heads=4, dim_head=8, max_seq_len=SEQ)
    return train(model.to(dtype), next_token_loss)


def mhesa(module, dtype):
    model = module.GatedExponentialSmoothingLM(
        num_tokens=256, dim=32, depth=2, heads=4, dim_mhesa=32)
    return train(model.to(dtype), loss_of_labels)


def dsconv(module, dtype):
    model = module.GatedDsConvLM(
        num_tokens=256, dim=32, depth=2, heads=4, dim_dsconv=32, max_seq_len=SEQ)
    return train(model.to(dtype), loss_of_labels)


def g_mlp_gpt(module, dtype):
    model = module.gMLPGPT(num_tokens=256, dim=32, depth=2, seq_len=SEQ, window=(16, 32))
    return train(model.to(dtype), next_token_loss)


def gateloop_transformer(module, dtype):
    model = module.Transformer(32, num_tokens=256, depth=2, gate_loop_heads=4)
    return train(model.to(dtype), lambda model, batch: model(batch, return_loss=True))


def train(model, loss_of):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(STEPS):
        starts = torch.randint(len(TEXT) - SEQ, (BATCH,))
        batch = torch.stack([TEXT[start : start + SEQ + 1] for start in starts])
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:.*use_reentrant")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-7), (torch.float32, 2e-4)],
                         ids=["f64", "f32"])
@pytest.mark.parametrize("script, package", [
    (metaformer_gpt, "metaformer_gpt"),
    (mhesa, "gated_state_spaces_pytorch"),
    (dsconv, "gated_state_spaces_pytorch"),
    (g_mlp_gpt, "g_mlp_gpt"),
    (gateloop_transformer, "gateloop_transformer"),
], ids=["metaformer_gpt", "mhesa", "dsconv", "g_mlp_gpt", "gateloop_transformer"])
def test_training_finds_the_losses_of_the_original(script, package, dtype, tolerance):
    runs = []
    for home in (package, "fastmix.nn"):
        torch.manual_seed(1)
        runs.append(script(importlib.import_module(f"{home}.{script.__name__}"), dtype))
    theirs, mine = runs
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=0)
    assert mine[-5:].mean() < 0.8 * mine[:5].mean()
