"""A long convolution as in Hyena: an implicit kernel as long as the sequence, one per channel.

    python examples/long_conv.py

With a kernel for every channel, h is the width and d is 1. Look for no gradient in later steps, to
rounding: the layer is causal.
"""

import torch
from torch import nn

from fastmix import ops


class LongConv(nn.Module):
    def __init__(self, dim, hidden=16):
        super().__init__()
        self.kernel_of_time = nn.Sequential(
            nn.Linear(3, hidden), nn.SiLU(), nn.Linear(hidden, dim))
        self.decay = nn.Parameter(torch.linspace(1.0, 8.0, dim))
        self.skip = nn.Parameter(torch.randn(dim, 1))
        self.to_gate, self.to_out = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x):  # (b, n, dim)
        n = x.shape[1]
        t = torch.linspace(0, 1, n, device=x.device)[:, None]
        kernel = self.kernel_of_time(torch.cat([t, (6.28 * t).sin(), (6.28 * t).cos()], -1))
        kernel = kernel * (-self.decay * t).exp() / n                   # (n, dim)
        mixed = ops.fft_conv(x.unsqueeze(-1), kernel, self.skip)        # (b, n, dim, 1)
        return self.to_out(self.to_gate(x).sigmoid() * mixed.squeeze(-1))


torch.manual_seed(0)
layer = LongConv(dim=32)
x = torch.randn(2, 500, 32, requires_grad=True)
y = layer(x)
print(f"{tuple(x.shape)} -> {tuple(y.shape)}")
# Causal: what comes out at step 250 has no gradient in later inputs.
(grad,) = torch.autograd.grad(y[:, 250].sum(), x)
later, before = grad[:, 251:].abs().max(), grad[:, :251].abs().max()
print(f"the largest gradient in steps after 250 is {later:.1e}, before {before:.1e}: "
      "look for nearly none after, the layer is causal")
assert later < 1e-5 < before
