"""Let a model that examples/train_text.py has trained write, byte by byte as it comes.

    python examples/sample_text.py text-model/checkpoint.pt --prompt "Once upon" --bytes 500
"""

import argparse

import torch
from train_text import build, write

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("checkpoint", nargs="?", default="text-model/checkpoint.pt")
parser.add_argument("--prompt", default="The ")
parser.add_argument("--bytes", type=int, default=200)
parser.add_argument("--temperature", type=float, default=0.8)
parser.add_argument("--top-k", type=int)
parser.add_argument("--top-p", type=float)
parser.add_argument("--min-p", type=float)
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()

saved = torch.load(options.checkpoint, map_location="cpu")
model = build(saved["sizes"])
model.load_state_dict(saved["weights"])
write(model, options.prompt.encode(), options.bytes, temperature=options.temperature,
      top_k=options.top_k, top_p=options.top_p, min_p=options.min_p,
      generator=torch.Generator().manual_seed(options.seed))
