"""Every Triton kernel, in every configuration that the launchers choose, against float64.

    python bench/self_check.py --device cuda --long

Triton's compiler has made wrong code of gated chunk kernels before, silently: this runs
each operator on this machine at the shapes where its launcher changes its mind, and holds
values and gradients against the pure PyTorch fallback in float64. Exit status 1 if one is
off by more than twice what that fallback is in the same dtype (four times where there are
fewer than 64 numbers to judge by).
"""

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import os
import sys

import torch

import fastmix
import table
from fastmix import ops

EVERY = ("float32", "float64", "bfloat16", "float16")
TWO = ("float32", "bfloat16")
ACCURATE = ("float32", "float64")
HALF = ("bfloat16", "float16")


# Each makes (tensors by name, other arguments) in float64; draw(*shape) is normal.

def gates_of(draw, kind, *shape):
    size = 1 - torch.rand_like(draw(*shape)) ** 3
    return torch.polar(size, 6.3 * torch.rand_like(size)) if kind == "complex" else size


def normal_of(draw, kind, *shape):
    return torch.complex(draw(*shape), draw(*shape)) if kind == "complex" else draw(*shape)


def decay_conv(draw, b, n, h, d, gain=True, state=False):
    tensors = {"x": draw(b, n, h, d), "decay": gates_of(draw, "real", h)}
    if gain:
        tensors["gain"] = draw(h)
    if state:
        tensors["initial_state"] = draw(b, h, d)
    return tensors, {"return_state": state}


def cumulative_mean(draw, b, n, c):
    return {"x": draw(b, n, c)}, {}


def linear_scan(draw, b, n, h, d, gates="real", inputs="real", per_head=False, state=False,
                reverse=False):
    tensors = {"gates": gates_of(draw, gates, b, n, h, *([] if per_head else [d])),
               "inputs": normal_of(draw, inputs, b, n, h, d)}
    if state:
        tensors["initial_state"] = normal_of(
            draw, "complex" if "complex" in (gates, inputs) else "real", b, h, d)
    return tensors, {"reverse": reverse}


def gate_loop(draw, b, n, h, dk, dv, gates="logits", state=False):
    tensors = {"q": draw(b, n, h, dk), "k": draw(b, n, h, dk), "v": draw(b, n, h, dv)}
    real = gates in ("real", "decays", "real logits")
    if "logits" in gates:
        z = 4 * draw(b, n, h, *([] if real else [2]))
        tensors["gate_logits"] = z.mT.contiguous().mT if gates == "split logits" else z
    else:
        tensors["gates"] = gates_of(draw, gates, *((h,) if gates == "decays" else (b, n, h)))
    if state:
        tensors["initial_state"] = normal_of(draw, "real" if real else "complex", b, h, dk, dv)
    return tensors, {"return_state": state}


def windowed_sgu(draw, b, n, c, h, w, activation=None, norm=True, residual=False):
    tensors = {"x": draw(b, n, 2 * c), "weight": draw(h, w, 2 * w) / w ** 0.5,
               "bias": draw(h, w)}
    if norm:
        tensors |= {"norm_weight": draw(c), "norm_bias": draw(c)}
    if residual:
        tensors["gate_residual"] = draw(b, n, c)
    return tensors, {"activation": torch.cos if activation == "outside" else activation}


PARAMETERS = ("decay", "gain", "weight", "bias", "norm_weight", "norm_bias", "gates", "gate_logits")
COMPLEX = dict(gates="complex", inputs="complex", dtypes=ACCURATE)
TURNING = COMPLEX | dict(dtypes=("float32",))
WIDE = dict(wide=True, dtypes=HALF)
REAL = [dict(gates="real", state=True), dict(gates="decays"),
        dict(gates="real logits", sliced=True), WIDE | dict(gates="real")]
# What operators may be given: at a small size, on GPUs at a large one as well. `sliced` makes
# every tensor a slice of a wider one, `wide` keeps PARAMETERS in float32.
VARIANTS = [
    (decay_conv, (1, 260, 3, 5), (2, 2048, 8, 64), [
        {}, dict(gain=False), dict(state=True), dict(sliced=True), WIDE]),
    (cumulative_mean, (1, 260, 15), (2, 2048, 512), [{}, dict(sliced=True)]),
    (linear_scan, (1, 260, 3, 5), (2, 2048, 8, 64), [
        {}, dict(per_head=True), dict(state=True), dict(state=True, reverse=True),
        dict(sliced=True), COMPLEX, TURNING | dict(per_head=True, state=True, sliced=True),
        TURNING | dict(state=True, reverse=True),
        TURNING | dict(gates="real", per_head=True), TURNING | dict(inputs="real")]),
    (gate_loop, (1, 520, 3, 1, 1), (2, 2048, 512, 1, 1), [
        {}, dict(gates="complex", state=True), dict(sliced=True, state=True),
        dict(gates="complex", sliced=True), dict(gates="split logits"), WIDE, *REAL]),
    (gate_loop, (1, 40, 2, 3, 5), (2, 512, 8, 128, 64), [
        {}, dict(gates="complex", state=True), dict(sliced=True, state=True),
        dict(gates="split logits"), WIDE, *REAL]),
    (windowed_sgu, (1, 29, 20, 2, 5), (2, 2048, 512, 4, 128), [
        {}, dict(activation="tanh", residual=True), dict(activation="sigmoid"),
        dict(activation="silu", norm=False), dict(activation="outside", residual=True),
        dict(sliced=True, residual=True), WIDE | dict(activation="gelu", residual=True)]),
    (windowed_sgu, (1, 50, 6, 2, 40), (2, 2048, 256, 2, 256), [
        {}, dict(activation="gelu", residual=True), dict(activation="outside"),
        dict(activation="silu", sliced=True), WIDE | dict(activation="tanh", residual=True)]),
]
# Other shapes on both sides of a launcher's choices, and long ones.
SHAPES = [
    (decay_conv, {}, [(8, 2048, 16, 256), (1, 1 << 20, 2, 32)]),
    (cumulative_mean, {}, [(64, 512, 1024), (1, 1 << 20, 64)]),
    (linear_scan, {}, [(16, 512, 16, 256), (1, 1 << 20, 1, 64)]),
    (linear_scan, COMPLEX, [(16, 512, 16, 256), (1, 1 << 19, 1, 64)]),
    (gate_loop, {}, [(2, 129, 1, 1, 1), (2, 129, 2, 1, 1), (2, 129, 4, 1, 1), (2, 129, 15, 1, 1),
                     (4, 4096, 1024, 1, 1), (16, 512, 4096, 1, 1), (1, 1 << 19, 64, 1, 1)]),
    (gate_loop, {}, [(2, 512, 8, 16, 16), (2, 512, 8, 32, 32), (2, 2048, 16, 64, 64),
                     (2, 2048, 8, 128, 128), (1, 512, 2, 256, 256), (1, 512, 2, 200, 72),
                     (2, 512, 4, 24, 256), (1, 1 << 16, 2, 64, 64)]),
    (gate_loop, dict(gates="real"), [
        (4, 4096, 1024, 1, 1), (1, 1 << 19, 64, 1, 1), (2, 512, 8, 16, 16), (2, 2048, 16, 64, 64),
        (2, 2048, 8, 128, 128), (1, 512, 2, 256, 256), (2, 512, 4, 24, 256),
        (1, 1 << 16, 2, 64, 64)]),
    (windowed_sgu, {}, [(2, 1024, 128, 2, 16), (2, 1024, 128, 2, 32), (2, 1024, 64, 4, 64),
                        (2, 1024, 256, 4, 192), (1, 2048, 512, 4, 512), (1, 4096, 256, 2, 1024),
                        (1, 1 << 17, 512, 4, 128)]),
]


def chosen(long):
    """[(operator, shape, how, dtype)]: every dtype where only the shape is special."""
    cases = [(make, shape, how) for make, small, large, variants in VARIANTS
             for how in variants for shape in ((small, large) if long else (small,))]
    if long:
        cases += [(make, shape, how) for make, how, shapes in SHAPES for shape in shapes]
    # The interpreter truncates where hardware rounds to half precision.
    possible = ACCURATE if os.environ.get("TRITON_INTERPRET") == "1" else EVERY
    return [(make, shape, how, name) for make, shape, how in cases
            for name in how.get("dtypes", TWO if how else EVERY) if name in possible]


def arguments(make, shape, how, dtype, device):
    """(tensors rounded to dtype, other arguments)"""
    options = dict(how)
    options.pop("dtypes", None)
    wide, sliced = options.pop("wide", False), options.pop("sliced", False)
    tensors, others = make(lambda *shape: torch.randn(*shape, dtype=torch.float64, device=device),
                           *shape, **options)
    sums = torch.promote_types(dtype, torch.float32)
    for name, t in tensors.items():
        if t.is_complex():
            t = t.to(torch.promote_types(dtype, torch.complex64))
        elif (wide and name in PARAMETERS
              or name == "initial_state" and make in (decay_conv, gate_loop)):
            t = t.to(sums)
        else:
            t = t.to(dtype)
        if sliced and t.ndim > 2:
            t = torch.cat([t, t], dim=2)[:, :, t.shape[2]:]
        tensors[name] = t
    return tensors, others


def run(operator, tensors, others, weights=None):
    """(outputs and gradients, weights of the outputs)"""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    outputs = getattr(ops, operator)(**leaves, **others)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = weights or [torch.randn_like(o) for o in outputs]
    grads = torch.autograd.grad(outputs, leaves.values(),
                                [w.to(o.dtype) for w, o in zip(weights, outputs)])
    return [*(o.detach() for o in outputs), *grads], weights


def errors(make, shape, how, dtype, device):
    """[(error, limit)]: root mean squares against float64, of values and gradients."""
    rounded, others = arguments(make, shape, how, dtype, device)
    exact = {name: t.to(torch.complex128 if t.is_complex() else torch.float64)
             for name, t in rounded.items()}
    with fastmix.force("fallback"):
        plain, weights = run(make.__name__, rounded, others)
        defined, _ = run(make.__name__, exact, others, weights)
    with fastmix.force("triton"):
        ours, _ = run(make.__name__, rounded, others, weights)

    def rms(t):
        return t.abs().double().square().mean().sqrt().item()

    # Nothing is more exact than float64: it may differ by what sums of it do.
    floor = 1e-12 if dtype == torch.float64 else 0
    return [(rms(o - e), (rms(p - e) + max(floor, torch.finfo(o.dtype).eps / 4) * rms(e)) *
             (2 if o.numel() >= 64 else 4)) for o, p, e in zip(ours, plain, defined, strict=True)]


def check(case, device):
    """The row of one case, said as well."""
    make, shape, how, name = case
    row = {"operator": make.__name__, "shape": shape, "how": how, "dtype": name}
    torch.manual_seed(0)
    try:
        compared = errors(make, shape, how, getattr(torch, name), torch.device(device))
        # NaN compares as wrong.
        row |= {"errors": compared, "ok": all(error <= limit for error, limit in compared)}
    except Exception as error:  # the others are still to be seen
        row |= {"ok": False, "reason": f"{type(error).__name__}: {error}"}
    torch.cuda.empty_cache()  # the others want memory too
    said = row.get("reason") or ", ".join(
        f"{error / limit if limit else error:.2f}" for error, limit in row["errors"])
    options = " ".join(f"{key}={value}" for key, value in how.items() if key != "dtypes")
    print("ok   " if row["ok"] else "WRONG", make.__name__, *shape, name, options, said[:300],
          flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--long", action="store_true",
                        help="real sizes; without it, small shapes of every kernel")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count()),
                        help="processes: compiling is what takes time")
    parser.add_argument("--json", metavar="PATH")
    options = parser.parse_args()
    reason = table.why_not_written("json", options.json)
    if reason:
        parser.error(f"--json{reason}")
    with concurrent.futures.ProcessPoolExecutor(
            options.jobs, multiprocessing.get_context("spawn"), torch.set_num_threads,
            (1,)) as pool:
        rows = list(pool.map(functools.partial(check, device=options.device),
                             chosen(options.long)))
    wrong = sum(not row["ok"] for row in rows)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"torch": torch.__version__, "rows": rows}, file, indent=1)
    print(f"{len(rows)} configurations, {wrong} wrong")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
