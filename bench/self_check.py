"""Every Triton kernel, in every configuration that the launchers choose, against float64.

    python bench/self_check.py --device cuda --long

Triton's compiler has made wrong code of gated chunk kernels before, silently: this runs
each operator on this machine at the shapes where its launcher changes its mind, and holds
values and gradients against the pure PyTorch fallback in float64. Exit status 1 if one is
off by more than twice what that fallback is in the same dtype (four times where there are
fewer than 64 numbers to judge by).
"""

import argparse
import json
import os
import sys

import torch

import fastmix
from fastmix import ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def draw(device, *shape):
    return torch.randn(*shape, dtype=torch.float64, device=device)


def decay_conv(device, b, n, h, d):
    decay = 1 - torch.rand(h, dtype=torch.float64, device=device) ** 3
    return (lambda x, decay, gain: ops.decay_conv(x, decay, gain),
            [draw(device, b, n, h, d), decay, draw(device, h)])


def cumulative_mean(device, b, n, c):
    return ops.cumulative_mean, [draw(device, b, n, c)]


def linear_scan(device, b, n, c):
    size = 1 - torch.rand(b, n, c, dtype=torch.float64, device=device) ** 3
    return ops.linear_scan, [size, draw(device, b, n, c)]


def linear_scan_complex(device, b, n, c):
    size = 1 - torch.rand(b, n, c, dtype=torch.float64, device=device) ** 3
    gates = torch.polar(size, 6.3 * torch.rand_like(size))
    return ops.linear_scan, [gates, torch.complex(draw(device, b, n, c), draw(device, b, n, c))]


def gate_loop(device, b, n, h, d):
    return (lambda q, k, v, z: ops.gate_loop(q, k, v, gate_logits=z),
            [*(draw(device, b, n, h, d) for _ in range(3)), 4 * draw(device, b, n, h, 2)])


def windowed_sgu(device, b, n, c, h, w):
    return (lambda x, weight, bias, scale, shift: ops.windowed_sgu(
                x, weight, bias, norm_weight=scale, norm_bias=shift),
            [draw(device, b, n, 2 * c), draw(device, h, w, 2 * w) / w ** 0.5, draw(device, h, w),
             draw(device, c), draw(device, c)])


# Shapes on both sides of every choice that a launcher makes; the last of each is a long one.
SHAPES = {
    decay_conv: [(2, 129, 3, 5), (2, 2048, 8, 64), (8, 2048, 16, 256), (1, 1 << 20, 2, 32)],
    cumulative_mean: [(2, 129, 15), (2, 2048, 512), (64, 512, 1024), (1, 1 << 20, 64)],
    linear_scan: [(2, 129, 15), (2, 2048, 512), (16, 512, 4096), (1, 1 << 20, 64)],
    linear_scan_complex: [(2, 129, 15), (2, 2048, 512), (16, 512, 4096), (1, 1 << 19, 64)],
    gate_loop: [(2, 129, 15, 1), (2, 2048, 512, 1), (8, 1024, 1024, 1), (16, 512, 4096, 1),
                (2, 129, 3, 3), (2, 512, 8, 16), (2, 512, 8, 32), (2, 512, 4, 64),
                (2, 512, 4, 128), (1, 512, 2, 256), (1, 1 << 19, 64, 1)],
    windowed_sgu: [(2, 129, 20, 2, 5), (2, 1024, 128, 2, 16), (2, 1024, 128, 2, 64),
                   (2, 2048, 512, 4, 128), (1, 2048, 512, 4, 512), (1, 4096, 256, 2, 1024),
                   (1, 1 << 17, 512, 4, 128)],
}
TINY = {make: [shapes[0]] for make, shapes in SHAPES.items()}


def run(function, tensors, weight):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    found = torch.autograd.grad(out, leaves, weight.to(out.dtype))
    return [out.detach(), *found]


def errors(make, shape, dtype, device):
    """[(error, limit)]: root mean squares against float64, of values and gradients."""
    function, exact = make(device, *shape)
    rounded = [t.to(torch.complex64 if t.is_complex() else dtype) for t in exact]
    exact = [t.to(torch.complex128 if t.is_complex() else torch.float64) for t in rounded]
    with fastmix.force("fallback"):
        with torch.no_grad():
            weight = torch.randn_like(function(*rounded))
        defined = run(function, exact, weight)
        plain = run(function, rounded, weight)
    with fastmix.force("triton"):
        ours = run(function, rounded, weight)

    def rms(t):
        return t.abs().double().square().mean().sqrt().item()

    return [(rms(o - e), (rms(p - e) + torch.finfo(o.dtype).eps / 4 * rms(e)) *
             (2 if o.numel() >= 64 else 4)) for o, p, e in zip(ours, plain, defined)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--long", action="store_true",
                        help="real sizes; without it, one small shape of each operator")
    parser.add_argument("--json", metavar="PATH")
    options = parser.parse_args()
    rows, wrong = [], 0
    for make, shapes in (SHAPES if options.long else TINY).items():
        for shape in shapes:
            for name, dtype in DTYPES.items():
                # The interpreter truncates where hardware rounds to half precision.
                interpreted = os.environ.get("TRITON_INTERPRET") == "1"
                if name != "float32" and (interpreted or make is linear_scan_complex):
                    continue
                torch.manual_seed(0)
                row = {"operator": make.__name__, "shape": shape, "dtype": name}
                try:
                    found = errors(make, shape, dtype, torch.device(options.device))
                    # NaN compares as wrong.
                    row |= {"errors": found, "ok": all(error <= limit for error, limit in found)}
                except Exception as error:  # the others are still to be seen
                    row |= {"ok": False, "reason": f"{type(error).__name__}: {error}"}
                wrong += not row["ok"]
                rows.append(row)
                said = row.get("reason") or ", ".join(
                    f"{error / limit if limit else error:.2f}" for error, limit in row["errors"])
                print("ok   " if row["ok"] else "WRONG", make.__name__, *shape, name, said[:300],
                      flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"torch": torch.__version__, "rows": rows}, file, indent=1)
    print(f"{len(rows)} configurations, {wrong} wrong")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
