"""Decayed linear attention: the core of Mamba-2 as a block, on `ops.gate_loop` with real gates.

    python examples/decayed_attention.py

Look for a loss that falls, and for a generated step that equals the whole sequence's.
"""

import torch
import torch.nn.functional as F
from torch import nn

from fastmix import ops


class Mixer(nn.Module):
    """Per head a state that decays by exp(Δ A), with a step size Δ that the data choose."""

    def __init__(self, dim, heads, dim_state):
        super().__init__()
        self.sizes = dim, dim_state, dim_state, heads
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.to_parts = nn.Linear(dim, sum(self.sizes))
        self.log_rate = nn.Parameter(torch.zeros(heads))
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x, state=None):  # (b, n, dim)
        values, keys, queries, size = self.to_parts(self.norm(x)).split(self.sizes, dim=-1)
        # All heads share queries and keys: they are expanded, not copied.
        keys, queries = (t.unsqueeze(2).expand(-1, -1, self.heads, -1) for t in (keys, queries))
        size = F.softplus(size)
        values = size.unsqueeze(-1) * values.unflatten(-1, (self.heads, -1))
        gates = (-size * self.log_rate.exp()).exp()
        out, state = ops.gate_loop(queries, keys, values, gates, initial_state=state,
                                   return_state=True)
        return x + self.to_out(out.flatten(-2)), state


torch.manual_seed(0)
embed, mixer, to_logits = nn.Embedding(8, 32), Mixer(32, 4, 16), nn.Linear(32, 8)
model = nn.ModuleList([embed, mixer, to_logits])
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
losses = []
for step in range(60):
    tokens = torch.randint(0, 8, (16, 32))
    logits = to_logits(mixer(embed(tokens))[0])
    loss = F.cross_entropy(logits[:, 1:].transpose(1, 2), tokens[:, :-1])  # the token before
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    if step % 20 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
print(f"the end: loss {losses[-1]:.3f}; guessing is {torch.tensor(8.0).log():.3f}: "
      "look for less")
assert losses[-1] < losses[0]

with torch.no_grad():
    x = embed(tokens)
    whole, _ = mixer(x)
    _, state = mixer(x[:, :-1])
    last, _ = mixer(x[:, -1:], state)
    print(f"one step from the state: off by {(last - whole[:, -1:]).abs().max():.1e}: "
          "look for less than 1e-5")
    assert torch.allclose(last, whole[:, -1:], atol=1e-5)
