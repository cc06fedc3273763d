"""Every Triton kernel, in every configuration that the launchers choose, against float64.

    python bench/self_check.py --long            # all; --headline: the shapes of the report
    python bench/self_check.py --only "gate_loop 8x4096 bfloat16"

Triton's compiler has made wrong code of gated chunk kernels before, silently: this runs
each operator on this machine at the shapes where its launcher changes its mind, and holds
values and gradients against the pure PyTorch fallback in float64. Exit status 1 if one is
off by more than twice what that fallback is in the same dtype (four times where there are
fewer than 64 numbers to judge by). What is most in doubt comes first, each row is written as
it comes, and a process whose GPU has failed is replaced.
"""

import argparse
import concurrent.futures
import functools
import json
import math
import multiprocessing
import os
import sys
import threading
import time

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


# The shapes that the report is of.
HEADLINES = [
    (linear_scan, (8, 4096, 16, 64), dict(dtypes=("bfloat16",))),
    (linear_scan, (8, 4096, 16, 64), TURNING),
    *((gate_loop, shape, dict(dtypes=("bfloat16",)) | how) for shape, how in (
        ((8, 4096, 1024, 1, 1), {}), ((8, 4096, 16, 64, 64), {}),
        ((8, 4096, 16, 64, 64), dict(gates="real")), ((8, 8192, 8, 128, 128), {}),
        ((1, 65536, 1024, 1, 1), {}), ((1, 65536, 1024, 1, 1), dict(gates="real")))),
    (decay_conv, (8, 8192, 8, 64), dict(dtypes=("bfloat16",))),
    (windowed_sgu, (8, 8192, 512, 4, 128), dict(dtypes=("bfloat16",))),
    (cumulative_mean, (8, 8192, 512), dict(dtypes=("bfloat16",))),
]


def chosen(long, headline=False, only=""):
    """[(operator, shape, how, dtype)]: every dtype where only the shape is special; of those whose
    label has all words of `only`. Backward of linear_scan comes first, whose scans across warps
    nothing has proven; then the headlines, then what has most numbers.
    """
    cases = [] if headline else [
        (make, shape, how) for make, small, large, variants in VARIANTS
        for how in variants for shape in ((small, large) if long else (small,))]
    if long:
        cases += [(make, shape, how) for make, how, shapes in SHAPES for shape in shapes]
    if long or headline:
        cases += HEADLINES
    # The interpreter truncates where hardware rounds to half precision.
    possible = ACCURATE if os.environ.get("TRITON_INTERPRET") == "1" else EVERY
    cases = [(make, shape, how, name) for make, shape, how in cases
             for name in how.get("dtypes", TWO if how else EVERY) if name in possible]
    cases.sort(key=lambda case: (case[0] is not linear_scan, case[:3] not in HEADLINES,
                                 -math.prod(case[1])))
    return [case for case in cases if all(word in label(case).split() for word in only.split())]


def label(case):
    make, shape, how, dtype = case
    options = [f"{key}={value}".replace(" ", "-") for key, value in how.items() if key != "dtypes"]
    return " ".join([make.__name__, "x".join(map(str, shape)), dtype, *options])


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
    """({name: output or gradient}, weights of the outputs)"""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    outputs = getattr(ops, operator)(**leaves, **others)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = weights or [torch.randn_like(o) for o in outputs]
    grads = torch.autograd.grad(outputs, leaves.values(),
                                [w.to(o.dtype) for w, o in zip(weights, outputs)])
    names = [*("output", "state")[: len(outputs)], *(f"gradient of {name}" for name in leaves)]
    return dict(zip(names, [*(o.detach() for o in outputs), *grads], strict=True)), weights


class Truth:
    """What a case's results are held against: float64, and twice what the fallback is off."""

    def __init__(self, make, shape, how, dtype, device):
        rounded, others = arguments(make, shape, how, dtype, device)
        exact = {name: t.to(torch.complex128 if t.is_complex() else torch.float64)
                 for name, t in rounded.items()}
        with fastmix.force("fallback"):
            plain, weights = run(make.__name__, rounded, others)
            self.exact, _ = run(make.__name__, exact, others, weights)
        self.call = make.__name__, rounded, others, weights
        self.calls = 3 if device.type == "cuda" else 1  # the third is launched from a plan
        # Nothing is more exact than float64: it may differ by what sums of it do.
        floor = 1e-12 if dtype == torch.float64 else 0
        self.limits = {
            name: (rms(o - self.exact[name])
                   + max(floor, torch.finfo(o.dtype).eps / 4) * rms(self.exact[name]))
            * (2 if o.numel() >= 64 else 4) for name, o in plain.items()}

    def judged(self):
        """{name: {error, limit}} of Triton's kernels: root mean squares of values and gradients.
        Of what is beyond its limit also where it is furthest off."""
        with fastmix.force("triton"):
            for _ in range(self.calls):
                ours, _ = run(*self.call)
        found = {}
        for name, o in ours.items():
            limit = self.limits[name]
            found[name] = {"error": rms(o - self.exact[name]), "limit": limit}
            if not found[name]["error"] <= limit:  # NaN compares as wrong
                found[name] |= furthest(o, self.exact[name], limit)
        return found


def rms(t):
    return t.abs().double().square().mean().sqrt().item()


def furthest(ours, exact, limit):
    """Where a result is furthest off, of which shape; the part of it that is off by ten limits."""
    apart = (ours - exact).abs().double().nan_to_num(nan=math.inf)
    at = tuple(int(i) for i in torch.unravel_index(apart.argmax(), apart.shape))
    return {"shape": list(ours.shape), "at": list(at), "is": str(ours[at].item()),
            "should_be": str(exact[at].item()),
            "far_off": (apart > 10 * limit).double().mean().item()}


def check(case, device):
    """Runs one case and returns its row."""
    make, shape, how, name = case
    row = {"case": label(case), "ok": False, "results": {}}
    torch.manual_seed(0)
    began = time.perf_counter()
    try:
        row["results"] = Truth(
            make, shape, how, getattr(torch, name), torch.device(device)).judged()
        row["ok"] = not any("at" in result for result in row["results"].values())
        if device.startswith("cuda"):
            torch.cuda.empty_cache()  # the others want memory too
    except Exception as error:  # the others are still to be seen
        row |= {"reason": f"{type(error).__name__}: {error}",
                "ends": isinstance(error, torch.AcceleratorError)}
    return row | {"seconds": round(time.perf_counter() - began, 2)}


def explained(row, device):
    """A wrong row in lines that can be acted on."""
    lines = [f"WRONG {row['case']}"]
    if "reason" in row:
        lines += row["reason"].splitlines()[:6]
    for name, result in row["results"].items():
        times = result["error"] / result["limit"] if result["limit"] else math.inf
        lines.append(f"  {name}: off by {result['error']:.1e}, {times:.3g} × what is allowed")
        if "at" in result:
            lines[-1] += (f"; {100 * result['far_off']:.3g} % of {result['shape']} far off, most "
                          f"at {result['at']}: {result['is']}, not {result['should_be']}")
    again = f"python3 bench/self_check.py --device {device} --long --only \"{row['case']}\""
    return "\n".join([*lines[:9], f"  again: {again}"])


# ---- processes that may die


PATIENCE = 300  # seconds for one case, in which kernels are compiled


def work(pipe, function):
    """Runs function on what comes until None does, or a result says that this process `ends`."""
    torch.set_num_threads(1)
    try:
        while (case := pipe.recv()) is not None:
            result = function(case)
            pipe.send(result)
            if result.get("ends"):  # after an error of the GPU every call in the process fails
                return
    except EOFError:  # whoever wanted the results is gone
        return


class Worker:
    """A process for one case after another; a new one after one that died, hung or has to end."""

    def __init__(self, function):
        self.function, self.process = function, None

    def __call__(self, case):
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=work, args=(theirs, self.function), daemon=True)
            self.process.start()
            theirs.close()
        try:
            self.pipe.send(case)
            result = self.pipe.recv() if self.pipe.poll(PATIENCE) else {
                "reason": f"no result within {PATIENCE} s", "ends": True}
        except (EOFError, OSError):
            self.process.join()
            result = {"reason": f"its process died, exit status {self.process.exitcode}",
                      "ends": True}
        if result.get("ends"):
            self.stop()
        return result

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def hand_out(function, cases, jobs, seconds, each):
    """each(case, function(case)) in the order in which results come; the cases for which there was
    no time."""
    end = time.monotonic() + seconds
    lock, waiting = threading.Lock(), list(reversed(cases))

    def serve():
        worker = Worker(function)
        try:
            while time.monotonic() < end:
                with lock:
                    if not waiting:
                        break
                    case = waiting.pop()
                result = worker(case)
                with lock:
                    each(case, result)
        finally:
            worker.stop()

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for served in [pool.submit(serve) for _ in range(jobs)]:
            served.result()
    return waiting[::-1]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--long", action="store_true",
                        help="real sizes; without it, small shapes of every kernel")
    parser.add_argument("--headline", action="store_true", help="only the shapes of the report")
    parser.add_argument("--only", default="", metavar="WORDS",
                        help="cases that have all of these words in their line")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count()),
                        help="processes: compiling is what takes time")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no case after these")
    parser.add_argument("--json", metavar="PATH", help="a line for each case, as it comes")
    options = parser.parse_args()
    reason = table.why_not_written("json", options.json)
    if reason:
        parser.error(f"--json{reason}")
    cases = chosen(options.long, options.headline, options.only)
    file = open(options.json, "w", buffering=1) if options.json else None
    wrong, short_of_memory = [], []

    def each(case, row):
        row = {"case": label(case), "ok": False, "results": {}} | row
        if row.get("reason", "").startswith("OutOfMemoryError") and case not in short_of_memory:
            short_of_memory.append(case)  # again when it is alone
            return
        if not row["ok"]:
            wrong.append(row)
        if file:
            print(json.dumps(table.plain(row)), file=file)
        said = ", ".join(f"{result['error'] / result['limit'] if result['limit'] else 0:.2f}"
                         for result in row["results"].values())
        print(f"ok    {row['case']}: {said}" if row["ok"] else explained(row, options.device),
              flush=True)

    end = time.monotonic() + 60 * options.minutes
    function = functools.partial(check, device=options.device)
    left = hand_out(function, cases, options.jobs, 60 * options.minutes, each)
    left += hand_out(function, list(short_of_memory), 1, end - time.monotonic(), each)
    print(f"{len(cases) - len(left)} configurations, {len(wrong)} wrong"
          + (f"; no time for {len(left)}, first {label(left[0])}" if left else ""))
    if wrong:
        print("\nThe first:", explained(wrong[0], options.device), sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
