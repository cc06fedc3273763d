"""Speed up a published model: change its import, load its checkpoint, get the same numbers.

    python examples/drop_in.py

Needs gateloop-transformer, the published package, for the comparison; a warning about use_reentrant
is its own. Look for two losses that are the same, and for gradients that are, to rounding.
"""

import torch
from gateloop_transformer.gateloop_transformer import Transformer as Published

from fastmix.nn.gateloop_transformer import Transformer

torch.manual_seed(0)
published = Published(64, num_tokens=256, depth=2)
model = Transformer(64, num_tokens=256, depth=2)
model.load_state_dict(published.state_dict())

tokens = torch.randint(0, 256, (2, 512))
losses = []
for each in (published, model):
    loss = each(tokens, return_loss=True)
    loss.backward()
    losses.append(loss.item())
print(f"loss of the published model {losses[0]:.6f}, of this one {losses[1]:.6f}")

gradients = [torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None])
             for each in (published, model)]
off = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
print(f"gradients differ by {off:.1e} of their norm: look for less than 1e-4")
assert abs(losses[1] - losses[0]) < 1e-4 * losses[0] and off < 1e-4
