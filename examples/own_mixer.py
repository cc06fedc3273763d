"""Use one operator in a block of your own: linear attention with gates, `ops.gate_loop`.

    python examples/own_mixer.py

Look for a loss that falls: the task is to remember the token of four steps ago.
"""

import torch
import torch.nn.functional as F
from torch import nn

from fastmix import ops


class Mixer(nn.Module):
    """Linear attention whose state decays and turns by gates that the data choose."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_gate_logits = nn.Linear(dim, 2 * heads)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x):  # (b, n, dim)
        normed = self.norm(x)
        # Slices of one projection: the operator reads them where they lie.
        q, k, v = self.to_qkv(normed).unflatten(-1, (3, self.heads, -1)).unbind(2)
        gate_logits = self.to_gate_logits(normed).unflatten(-1, (self.heads, 2))
        return x + self.to_out(ops.gate_loop(q, k, v, gate_logits=gate_logits).flatten(-2))


torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(8, 32), Mixer(32, 4), Mixer(32, 4), nn.Linear(32, 8))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
losses = []
for step in range(60):
    tokens = torch.randint(0, 8, (16, 32))
    loss = F.cross_entropy(model(tokens)[:, 4:].transpose(1, 2), tokens[:, :-4])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    if step % 20 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
print(f"the end: loss {losses[-1]:.3f}; guessing is {torch.tensor(8.0).log():.3f}: "
      "look for less")
assert losses[-1] < losses[0]
