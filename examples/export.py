"""Export a model to a .pt2 file that holds for every length, and load it again.

    python examples/export.py

Look for "outputs differ by 0": the loaded program is the same operators. It needs `import fastmix`
before it is loaded, which is what brings them.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from fastmix.nn import GateLoopTransformer

LOAD = """
import sys, torch, fastmix  # without fastmix it does not load
program, tokens, expected = sys.argv[1:]
model = torch.export.load(program).module()
out = model(torch.load(tokens))
print(f"loaded: {tuple(out.shape)}, "
      f"outputs differ by {(out - torch.load(expected)).abs().max():.0e}: look for 0")
"""

torch.manual_seed(0)
model = GateLoopTransformer(num_tokens=256, dim=32, depth=1).eval()
length = torch.export.Dim("length", min=2, max=4096)
program = torch.export.export(model, (torch.randint(0, 256, (1, 100)),),
                              dynamic_shapes=({1: length},))
nodes = [str(node.target) for node in program.graph.nodes if "fastmix" in str(node.target)]
print(f"exported: {', '.join(nodes)}")

with tempfile.TemporaryDirectory() as folder:
    files = [Path(folder) / name for name in ("model.pt2", "tokens.pt", "expected.pt")]
    torch.export.save(program, files[0])
    tokens = torch.randint(0, 256, (1, 300))  # another length than the one that was exported
    torch.save(tokens, files[1])
    with torch.no_grad():
        torch.save(model(tokens), files[2])
    subprocess.run([sys.executable, "-c", LOAD, *map(str, files)], check=True)
