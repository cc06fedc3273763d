"""Random calls of the modules of fastmix.nn for tests/campaign.py, beside their originals."""

import copy
import inspect
import io
import math
import random
import re
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from campaign_calls import DTYPES, F64, REFUSALS, bits, restride, size, storage
from campaign_judge import MOVES, move
from test_models import (
    FEATURE_MODULES,
    LANGUAGE_MODELS,
    OTHER_MODULES,
    PUBLISHED,
    SEQUENCE_MODULES,
    name_of,
)

MODULES = [(file, make) for table in (SEQUENCE_MODULES, FEATURE_MODULES, OTHER_MODULES)
           for file, makers in table.items() for make in makers]
MODELS = [(file, make) for file, makers in LANGUAGE_MODELS.items() for make in makers]
WRAPPERS = ("Residual", "SequentialSequence", "ReversibleSequence")  # of any children
MODES = ("plain",) * 6 + ("no_grad", "hooks", "functional_call", "deepcopy", "saved and loaded",
                          "checkpoint", "meta", "autocast")


@dataclass
class ModuleCall:
    """A module of ours and the published one with the same weights, and what they are given."""

    operator: str
    ours: torch.nn.Module
    theirs: torch.nn.Module
    x: object
    dtype: torch.dtype
    mode: str = "plain"
    wrong: str | None = None

    def __str__(self):
        x = self.x
        about = f"{x.dtype}{list(x.shape)}/{list(x.stride())}" if isinstance(
            x, torch.Tensor) and x.layout == torch.strided and not x.is_nested else repr(x)[:60]
        return f"{name_of(self.ours)} of {self.dtype}: {about} {self.mode} {self.wrong or ''}"

    def perform(self):
        x, kept = self.x, None
        if isinstance(x, torch.Tensor) and x.layout == torch.strided and not (
                x.is_nested or x.is_meta or x.is_quantized):
            kept = storage(x).clone()
        before = {name: bits(p).clone() for name, p in self.ours.state_dict().items()
                  if not p.is_meta}
        try:
            if self.wrong:
                with torch.no_grad():
                    return {"output": self.ours(x)}
            return results(self.ours, x, self.mode)
        except REFUSALS as error:
            return error
        finally:
            assert kept is None or torch.equal(storage(x), kept), "x was modified"
            for name, b in before.items():
                assert torch.equal(bits(self.ours.state_dict()[name]), b), f"{name} was modified"

    def define(self):
        """The original's results: in float64, and in the precision of the call."""
        if self.wrong:
            with torch.no_grad():
                return {"output": self.theirs.to(F64)(floating(self.x, F64))}, None
        made = []
        for dtype in (F64, self.dtype, torch.float32):
            try:
                made.append(results(self.theirs.to(dtype), floating(self.x, dtype), self.mode))
            except Exception:  # most originals are for float32 alone
                if len(made) == 0:
                    return None
        return made[:2]

    def moved(self):
        """The original's in float64, of weights and an input that are a rounding of the call's
        precision away."""
        module, x, info = copy.deepcopy(self.theirs).to(F64), floating(self.x, F64), torch.finfo(
            self.dtype)
        module.load_state_dict(self.ours.state_dict())  # other dtypes have rounded the original's
        with torch.no_grad():
            for k, p in enumerate(module.parameters()):
                p.copy_(move(p, info, k + 1))
        return results(module, move(x, info, 0) if x.is_floating_point() else x, self.mode)

    def clear(self, error):
        """Whether a refusal names the module, an argument, what was expected and what came."""
        if self.wrong in ("numbers", "large numbers") and isinstance(error, IndexError):
            return True  # the embedding's own
        if isinstance(self.x, torch.Tensor) and self.x.is_meta:
            return "meta" in str(error)  # devices are torch's: a hook may move things
        if isinstance(self.x, torch.Tensor) and self.x.dtype != self.dtype and re.search(
                r"dtype|scalar type|must be \w+( or \w+)? (for|like)", str(error)):
            return True  # and so are dtypes of children: a hook may convert
        if name_of(self.ours) in WRAPPERS and self.wrong == "shape" and re.search(
                "linear|shapes cannot be multiplied", str(error)):
            return True  # the child's own
        text, arguments = str(error), ["x", *inspect.signature(self.ours.forward).parameters]
        names = {name_of(m) for m in self.ours.modules()}
        return (text.split(":")[0] in names and any(
            re.search(rf"\b{name}\b", text) for name in arguments)
            and re.search(r"\b(must|expected)\b", text) is not None and "got" in text)

    def excused(self):
        """Whether the original cannot do this valid call either, in the same dtype."""
        try:
            results(self.theirs.to(self.dtype), self.x, self.mode)
        except Exception:
            return True
        return False

    def judge(self, outcome, definition):
        """What is wrong with the results, or None."""
        if definition is None:
            return None  # nothing to hold it against
        exact, plain = definition
        if self.wrong:
            return None if outcome["output"].shape == exact["output"].shape else "another shape"
        missing = [what for what in exact if what not in outcome and exact[what].any()]
        if missing:
            return f"{missing} did not come back"
        gradients = [t for what, t in exact.items() if what != "output" and not t.is_meta]
        floor = 0.05 * max((t.abs().max().item() for t in gradients if t.numel()), default=0)
        for what, ours in outcome.items():
            if what not in exact:
                continue  # of what the original leaves out, as it multiplies by nothing
            if ours.shape != exact[what].shape:
                return f"{what} has shape {tuple(ours.shape)}, not {tuple(exact[what].shape)}"
            if self.mode == "meta" or not ours.numel():
                continue
            e, p, eps = exact[what], plain[what].to(F64), torch.finfo(ours.dtype).eps
            if self.mode == "autocast":
                eps = torch.finfo(torch.bfloat16).eps
            if getattr(self.theirs, "use_heinsen", False):  # logarithms in complex64, always
                eps = max(eps, torch.finfo(torch.float32).eps)
            largest = max(e.abs().max().item(), 0 if what == "output" else floor)
            most = torch.finfo(self.dtype).max
            if largest > most:
                continue  # beyond the dtype, whose infinities meet in the layers that follow
            off, theirs = (ours.to(F64) - e).abs().max().item(), (p - e).abs().max().item()
            if largest > most / 16 and not math.isfinite(off):
                continue  # on the way to it there may be more
            allowed = 4 * theirs + 128 * eps * largest
            if not off <= allowed and not off <= allowed + MOVES * (
                    self.moved()[what] - e).abs().max().item():
                return f"{what}: off by {off:.3g} of {largest:.3g}, the original by {theirs:.3g}"
        return None


def floating(x, dtype):
    return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def results(module, x, mode):
    """{what: tensor}: the output, the gradients of x and of the parameters."""
    if mode == "meta":
        module, x = copy.deepcopy(module).to("meta"), x.to("meta")
    if mode == "no_grad":
        with torch.no_grad():
            return {"output": module(x)}
    module = copy.deepcopy(module)
    if mode == "saved and loaded":
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        module.load_state_dict(torch.load(file))
    if x.is_floating_point():
        x = x.detach().requires_grad_()
    if mode == "hooks":
        for child in module.modules():
            if child is not module and not list(child.children()):
                child.register_forward_hook(lambda _, given, out: out / 2)
    parameters = dict(module.named_parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        if mode == "functional_call":
            out = torch.func.functional_call(module, parameters, (x,))
        elif mode == "checkpoint":
            out = checkpoint(module, x, use_reentrant=False)
        else:
            out = module(x)
    weight = (1.7 * torch.arange(out.numel(), dtype=F64)).sin().reshape(out.shape).to(out)
    out.backward(weight)  # a reversible original leaves gradients, and returns none
    leaves = parameters | ({"x": x} if x.is_floating_point() else {})
    return {"output": out.detach()} | {
        f"gradient of {name}": leaf.grad for name, leaf in leaves.items()
        if leaf.grad is not None}


def draw(operator, seed, index, most):
    random.seed(f"{seed}:{index}")
    torch.default_generator.manual_seed(random.getrandbits(62))
    file, make = random.choice(MODELS if operator == "model" else MODULES)
    dtype = random.choice(DTYPES[:2] if operator == "model" else DTYPES)
    ours, theirs = make(file), make(PUBLISHED[file])
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    theirs.to(dtype)
    ours.to(dtype).load_state_dict(theirs.state_dict())
    training = random.random() < 0.5
    ours.train(training), theirs.train(training)
    b, n = random.choice([1, 1, 2, 3]), min(size(5), 5)
    x = torch.randint(0, 5, (b, n)) if operator == "model" else restride(
        torch.randn(b, n, 6, dtype=dtype))
    call = ModuleCall(operator, ours, theirs, x, dtype, random.choice(MODES))
    if random.random() < 0.3:
        call.mode = "plain"
        call.wrong, call.x = random.choice(list(wrong_inputs(x).items()))
    return call


def wrong_inputs(x):
    """{what is wrong: the input}"""
    return {
        "type": random.choice([None, 1, "x", [1.0], x.tolist()]),
        "dtype": x.to(random.choice([torch.complex64, torch.bool, torch.float8_e5m2,
                                     torch.uint8, *DTYPES, torch.int64])),
        "shape": random.choice([x[0], x[..., None], x.flatten(), x[:, :0], x[..., :-1],
                                torch.cat([x, x], dim=-1), x.sum(), torch.cat(4 * [x], dim=1)]),
        "layout": random.choice([x.to_sparse(), torch.nested.nested_tensor([x, x]),
                                 x.to("meta"), x.float().to_mkldnn()]),
        "numbers": x - 9 if not x.is_floating_point() else x + float("nan"),
        "large numbers": x + 5 if not x.is_floating_point() else 1e30 * x.float()}
