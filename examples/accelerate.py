"""Speed up a published model that is built already, without a change to the code that built it.

    python examples/accelerate.py

Needs metaformer-gpt, the published package. Look for layers that were replaced, and for logits that
are the same to rounding. examples/drop_in.py changes the import instead.
"""

import torch
from metaformer_gpt import MetaformerGPT

import fastmix

torch.manual_seed(0)
model = MetaformerGPT(num_tokens=256, dim=64, depth=2).eval()
tokens = torch.randint(0, 256, (2, 512))
with torch.no_grad():
    before = model(tokens)
    report = fastmix.accelerate(model)
    after = model(tokens)
print(report)
off = (after - before).abs().max() / before.abs().max()
print(f"logits differ by {off:.1e} of the largest: look for less than 1e-4")
assert report.replaced and off < 1e-4
fastmix.restore(model)
