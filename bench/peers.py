"""Other packages' kernels for the same functions, timed beside fastmix on a GPU.

    python bench/peers.py --batch 8 --seq 4096 --dim 1024 --heads 16 --dtype bfloat16

accelerated-scan has the scan, with time innermost; flash-linear-attention has scans and
chunks with gates that are real and given as logarithms. Each gets its inputs in its own
layout, made beforehand. What is not installed, fails, or gives another result is printed as
such and has no time; of one whose gradients alone fail the forward has.
"""

import argparse
import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import timing  # before torch: it quiets torch's profiler

# isort: split
import torch

import table
from fastmix import ops
from rows import MODES, Step, reason

SECONDS = 1.5
# Largest difference / largest value: some keep what they sum in the data's precision.
AGREE = {torch.float32: 0.01, torch.float16: 0.02, torch.bfloat16: 0.1}


@dataclass
class Peer:
    function: str      # module.name
    operator: str      # what it stands beside, as the table calls it
    draw: Callable     # draw(b, n, dim, heads) → fastmix's inputs
    call: Callable     # call(*inputs)
    convert: Callable  # convert(*inputs) → the peer's, the last of them the same thing
    run: Callable      # run(function, *converted) → its result
    back: Callable = lambda t: t  # its result, or its last input, in fastmix's layout


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def real_scan(b, n, dim, heads):
    return torch.empty(b, n, dim, dtype=torch.float64).uniform_(0.9, 1), normal(b, n, dim)


def complex_scan(b, n, dim, heads):
    size, x = real_scan(b, n, dim, heads)
    angle = torch.empty_like(size).uniform_(-math.pi, math.pi)
    return torch.polar(size, angle), torch.complex(x, normal(b, n, dim))


def convolution(b, n, dim, heads):
    """Decays that all dtypes have."""
    decay = (1 - torch.logspace(-0.5, -2, heads)).bfloat16()
    return decay.double(), normal(b, n, heads, dim // heads)


def attention(b, n, dim, heads):
    """Logits of real gates."""
    logits = 1 + 3 * torch.rand(b, n, heads, dtype=torch.float64)
    return logits, *(normal(b, n, heads, dim // heads) for _ in range(3))


def turning(b, n, dim, heads):
    """Complex gates, of the same sizes."""
    logits, *others = attention(b, n, dim, heads)
    angle = 2 * math.pi * torch.rand(b, n, heads, dtype=torch.float64)
    return torch.view_as_real(torch.polar(logits, angle)), *others


def doubled(logits, q, k, v):
    """Real gates for the same result: queries and keys turned by all angles so far, and twice
    as wide."""
    z = torch.view_as_complex(logits.double())
    angle = z.angle().cumsum(1)[..., None]

    def turned(t):
        return torch.cat([t * angle.cos(), t * angle.sin()], dim=-1).to(t.dtype)

    return torch.nn.functional.logsigmoid(z.abs()).to(q.dtype), turned(q), turned(k), v


def retention(b, n, dim, heads):
    """The decays that chunk_retention has built in."""
    decays = 1 - 2.0 ** (-5 - torch.arange(heads, dtype=torch.float64))
    return decays, *attention(b, n, dim, heads)[1:]


def in_dtype(t, dtype):
    """Decays of heads in float32: bfloat16 has none of those next to 1."""
    return t.to(torch.complex64 if t.is_complex() else torch.float32 if t.ndim == 1 else dtype)


def innermost(*tensors):
    return [t.mT.contiguous() for t in tensors]


def repeated(decay, x):
    """A gate for every element, (b, n, h·d)."""
    return decay[:, None].expand(x.shape).flatten(2).to(x.dtype), x.flatten(2)


def scan(gates, x):
    return ops.linear_scan(gates, x)


def gate_loop(logits, q, k, v):
    return ops.gate_loop(q, k, v, gate_logits=logits)


def plainly(function, *inputs):
    return function(*inputs)


def gated(function, log_gates, q, k, v):
    return function(q, k, v, g=log_gates, scale=1.0)[0]


def swapped(function, log_gates, x):
    return function(x, log_gates)[0]


SCALAR, HGRN = "accelerated_scan.scalar.scan", "fla.ops.hgrn.chunk_hgrn"
GLA = "fla.ops.simple_gla.chunk_simple_gla"
PEERS = [
    Peer(SCALAR, "linear_scan real", real_scan, scan, innermost, plainly, lambda y: y.mT),
    Peer(HGRN, "linear_scan real", real_scan, scan, lambda gates, x: (gates.log(), x), swapped),
    Peer("accelerated_scan.complex.scan", "linear_scan complex", complex_scan, scan, innermost,
         plainly, lambda y: y.mT),
    Peer(SCALAR, "decay_conv", convolution, lambda decay, x: ops.decay_conv(x, decay),
         lambda decay, x: innermost(*repeated(decay, x)), plainly, lambda y: y.mT),
    Peer(HGRN, "decay_conv", convolution, lambda decay, x: ops.decay_conv(x, decay),
         lambda decay, x: repeated(decay.double().log(), x),
         swapped),
    Peer(GLA, "gate_loop, real gates", attention, gate_loop,
         lambda logits, q, k, v: (torch.nn.functional.logsigmoid(logits), q, k, v), gated),
    Peer(GLA, "gate_loop, complex gates", turning, gate_loop, doubled, gated),
    Peer("fla.ops.retention.chunk_retention", "gate_loop, constant gates", retention,
         lambda decays, q, k, v: ops.gate_loop(q, k, v, decays),
         lambda decays, q, k, v: (q, k, v),
         lambda function, q, k, v: function(q, k, v, scale=1.0)[0]),
]


def step(function, tensors, device, incoming=None):
    leaves = [t.detach().to(device).requires_grad_() for t in tensors]
    if incoming is None:
        with torch.no_grad():
            incoming = torch.randn_like(function(*leaves))
    return Step(function, leaves, leaves, incoming)


def compare(peer, batch, n, dim, heads, dtype, device, seconds):
    """The row of one peer."""
    row = {"row": peer.operator, "n": n, "implementation": peer.function, "status": "failed",
           "reason": None}
    module, _, name = peer.function.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except ImportError as error:
        return row | {"status": "not installed", "reason": str(error)}
    torch.manual_seed(n)
    inputs = [in_dtype(t, dtype) for t in peer.draw(batch, n, dim, heads)]
    ours = step(peer.call, inputs, device)
    incoming = ours.incoming
    try:
        converted = peer.convert(*inputs)
        shape = peer.back(converted[-1]).shape
        theirs = step(lambda *leaves: peer.run(function, *leaves), converted, device,
                      peer.back(incoming.reshape(shape)).contiguous())
    except Exception as error:  # whatever a foreign kernel may raise, here and below
        return row | {"reason": reason(error)}
    row |= {"off": 0.0, "ratio": {}}
    for mode in MODES:
        try:
            apart = off(*(result(one, mode) for one in (ours, theirs)), peer, shape)
            row["off"] = max(row["off"], apart)
            status, why = (("ok", None) if apart <= AGREE[dtype]
                           else ("disagrees", f"differs by {apart:.1e}"))
        except Exception as error:
            status, why = "failed", reason(error)
        if status != "ok" and mode != "forward":
            return row | {"status": "forward only", "reason": f"its gradients: {why}"}
        if status != "ok":
            return row | {"status": status, "reason": why}
        if seconds:
            add_times(row, mode, ours, theirs, device, seconds)
    return row | {"status": "ok"}


def result(step, mode):
    """What is compared: the output, or the gradient of the last input."""
    if mode == "forward":
        with torch.no_grad():
            return step.function(*step.arguments)
    return step.run(step.incoming)[1][-1]


def add_times(row, mode, ours, theirs, device, seconds):
    times = timing.side_by_side(
        {who: (one.surroundings, getattr(one, mode))
         for who, one in (("ours", ours), ("theirs", theirs))}, seconds, device)
    row[f"{mode}_ms"], row[f"peer_{mode}_ms"] = times["ours"], times["theirs"]
    row["ratio"][mode] = times["theirs"]["median"] / times["ours"]["median"]


def off(mine, other, peer, shape):
    """How far apart the two are, in parts of the largest number."""
    return ((mine.reshape(shape) - peer.back(other)).abs().max() / mine.abs().max()).item()


def verdict(row, notes):
    return row["status"] + (f": {row['reason']}" if row["reason"] else "")


def medians(prefix):
    return lambda row, notes: table.number(
        {mode: row.get(f"{prefix}{mode}_ms", {}).get("median") for mode in MODES})


COLUMNS = [("operator", table.name), ("beside", lambda row, notes: row["implementation"]),
           ("fastmix ms", medians("")), ("its ms", medians("peer_")),
           ("× as fast", table.rate("ratio")), ("result", verdict)]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (("--batch", 8), ("--seq", 4096), ("--dim", 1024), ("--heads", 16)):
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16", choices=[str(d)[6:] for d in AGREE])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", metavar="PATH")
    options = parser.parse_args(argv)
    reason = table.why_not_written("json", options.json)
    if reason:
        parser.error(f"--json{reason}")
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    compared = [compare(peer, options.batch, options.seq, options.dim, options.heads, dtype, device,
                        SECONDS) for peer in PEERS]
    print(table.grid(compared, COLUMNS, None, False))
    print("\nForward / forward and backward.")
    if options.json:
        table.write_json({"settings": table.settings(options), "rows": compared}, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
