"""Whether what a random call gave is right: against the definition in float64, and in words.

An element may be as far off as twice what plain PyTorch is in the same precision, or as far as the
definition itself moves when its inputs move by a rounding.
"""

import inspect
import re
from dataclasses import replace

import torch

from campaign_calls import (
    AS_PLAIN,
    F64,
    Call,
    drawn,
    evaluate,
    named,
    performed,
    settle,
    weights_of,
)
from cases import as_tuple
from fastmix import ops, reference

PERTURBED = 32  # how often the inputs are moved: of fewer, all are small by chance too often
MOVES = 16      # times the largest of those movements is still rounding
# Rounding in a transform spreads over all steps: its movements are judged by their largest.
SPREADING = ("fft_conv",)


def clear(error, operator):
    """Whether a refusal names the operator, an argument, what was expected and what came."""
    text, arguments = str(error), inspect.signature(getattr(ops, operator)).parameters
    if type(error) is TypeError and re.match(
            rf"{operator}\(\) (got an unexpected keyword|missing \d+ required)", text):
        return True
    return (type(error) in (TypeError, ValueError, RuntimeError) and text.startswith(operator)
            and any(re.search(rf"\b{name}\b", text) for name in arguments)
            and re.search(r"\b(must|expected)\b", text) is not None and "got" in text)


class OperatorCall(Call):
    def perform(self):
        return performed(self)

    def define(self):
        """Of the whole sequence, which has no state to reveal lags with or to write into."""
        return Definition(replace(self, options={
            name: value for name, value in self.options.items()
            if not (name in ("revealed", "in_place") and isinstance(value, bool))}))

    def clear(self, error):
        return clear(error, self.operator)

    def excused(self):
        """Whether a valid call may be refused: what is published cannot do it either."""
        return False

    def judge(self, results, definition):
        return wrong(self, results, definition)


def _tanh(x):
    e = (-2 * x.abs()).exp()
    return torch.where(x.abs() < 0.5, x.tanh(), x.sign() * (1 - e) / (1 + e))


def _sigmoid(x):
    e = torch.where(x < 0, x, -x).exp()
    return torch.where(x < 0, e, 1) / (1 + e)


# Torch's slopes, 1 - tanh² and σ (1 - σ), have no digits near 1, in float64 either.
EXACT = {"tanh": _tanh, "sigmoid": _sigmoid}


def _gate(logits):
    """reference.gate_from_logits, of the same derivatives with more digits: z / |z| by parts is a
    difference of the gradient and what of it is along z, a small part of which has few, in float64
    either. A gate turns by an angle, and grows by a factor: here both are 0 and 1, as numbers."""
    gate = reference.gate_from_logits(logits.detach())
    larger = logits.detach().abs().amax(-1, keepdim=True)
    moves = (larger != 0) & ~larger.isinf()
    re, im = torch.where(moves, logits / torch.where(moves, larger, 1), 1).unbind(-1)
    angle, sigmoid = torch.atan2(im, re), _sigmoid(larger[..., 0] * torch.hypot(re, im))
    factor = torch.where(moves[..., 0], sigmoid / sigmoid.detach(), 1)
    return gate * torch.polar(factor, angle - angle.detach())


def exact_gate_loop(q, k, v, gates=None, *, gate_logits=None, **options):
    if gate_logits is not None and gate_logits.ndim == 4:
        gates, gate_logits = _gate(gate_logits), None
    return reference.gate_loop(q, k, v, gates, gate_logits=gate_logits, **options)


def draw(operator, seed, index, most):
    return drawn(OperatorCall, operator, seed, index, most)


def definition_of(call, exact):
    if exact and call.operator == "gate_loop" and not call.wrong:
        return exact_gate_loop
    return getattr(reference, call.operator)


def defined(call, dtype, tensors=None, exact=True):
    """What the definition gives in the precision of dtype."""
    tensors = {name: settle(t, dtype) if isinstance(t, torch.Tensor) else t
               for name, t in (tensors or call.tensors).items()}
    mode = "plain" if call.mode in (*AS_PLAIN, "fake", "meta") else call.mode
    function = definition_of(call, exact)
    if call.wrong:
        return {f"output {i}": o for i, o in enumerate(as_tuple(function(
            **tensors, **call.options)))}
    return evaluate(function, call, tensors, mode)


class Definition:
    """The definition's results: exact, and those of plain PyTorch and of moved inputs, each
    computed when they are needed."""

    def __init__(self, call):
        self.call = replace(call, options=call.options | {"activation": EXACT[
            call.options["activation"]]}) if call.options.get("activation") in EXACT else call
        self.as_plain = call
        self.exact = defined(self.call, F64)
        self._plain = self._moved = self._transposed = None

    def plain(self):
        if self._plain is None:
            wide = F64 if self.call.dtype == F64 else torch.float32
            self._plain = defined(self.as_plain, wide, exact=False)
        return self._plain

    def transposed(self):
        """{what: whether torch finds the tangent finite as the derivative of a derivative}, which
        is how operators have tangents: its silu's overflows where the one of forward mode has
        none."""
        if self._transposed is None:
            call, dtype = self.call, F64 if self.call.dtype == F64 else torch.float32
            tensors = {name: t if t is None else settle(t, dtype)
                       for name, t in call.tensors.items()}

            def run(*values):
                return as_tuple(getattr(reference, call.operator)(
                    **tensors | dict(zip(call.wanted, values)), **call.options))

            values = [tensors[name] for name in call.wanted]
            outputs, pull = torch.func.vjp(run, *values)
            _, push = torch.func.vjp(lambda *grads: pull(grads), *map(torch.zeros_like, outputs))
            self._transposed = {f"tangent of {i}": whole(t) for i, t in enumerate(
                push(tuple(weights_of(call, values))))}
        return self._transposed

    def moved(self):
        """{what: how far each element moved at most; infinite where it stopped being finite}"""
        if self._moved is None:
            self._moved = {what: torch.zeros_like(real(t)) for what, t in self.exact.items()}
            info = torch.finfo(F64 if self.call.dtype == F64 else torch.float32)
            for results in self._perturbed(info):
                for what, t in results.items():
                    exact = real(self.exact[what])
                    far = (real(t) - exact).abs()
                    same = whole(t) == whole(self.exact[what])
                    far = torch.where(same, far.nan_to_num(0, 0, 0), torch.inf)
                    far = far if far.ndim == exact.ndim else far.amax(0)
                    self._moved[what] = torch.maximum(self._moved[what], far)
        return self._moved

    def spread(self, what):
        """How far the farthest element moved. NaN and infinity are taken out before a transform:
        the others spread as they do without them."""
        tensors = {name: t if t is None else settle(t, F64).nan_to_num(0, 0, 0)
                   for name, t in self.call.tensors.items()}
        return max(moved[what].nan_to_num(0, 0, 0).max() for moved in (
            self.moved(), Definition(replace(self.call, tensors=tensors)).moved()))

    def _perturbed(self, info):
        """The results for moved inputs; where that can be had at once, with an axis in front."""
        call = self.call
        drawn = [{name: move(settle(t, F64), info, k) for name, t in call.tensors.items()
                  if isinstance(t, torch.Tensor)} for k in range(PERTURBED)]
        if call.wrong or call.mode not in ("plain", "no_grad", "inference", *AS_PLAIN):
            for k, tensors in enumerate(drawn):
                yield defined(replace(call, move=lambda w, k=k: move(w, info, k)), F64, tensors)
            return
        values = [torch.stack([d[name] for d in drawn]).requires_grad_() for name in drawn[0]]
        outputs = torch.vmap(lambda *v: as_tuple(definition_of(call, True)(
            **dict(zip(drawn[0], v, strict=True)), **call.options)))(*values)
        if call.mode in ("no_grad", "inference"):
            yield named(outputs)
            return
        weights = [torch.stack([move(w, info, k) for k in range(PERTURBED)])
                   for w in weights_of(call, [o[0] for o in outputs])]
        wanted = {name: v for name, v in zip(drawn[0], values, strict=True) if name in call.wanted}
        grads = torch.autograd.grad(outputs, list(wanted.values()), weights)
        yield named(outputs, grads, wanted)


def real(t):
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def move(t, info, k):
    """t, every number by up to a rounding: for every k another. Drawn from their places, since
    inside a transform nothing else may be."""
    size = real(t).abs()
    if t.is_complex():
        size = size.amax(-1, keepdim=True).expand(size.shape)
    by = torch.arange(1, size.numel() + 1, dtype=F64, device=t.device).reshape(size.shape)
    drawn = 2 * ((12.9898 * by + 78.233 * (k + 1)).sin() * 43758.5453).frac().abs() - 1
    moved = real(t) + drawn * (info.eps * size + info.tiny * info.eps)
    return torch.view_as_complex(moved) if t.is_complex() else moved


def wrong(call, results, definition):
    """What is wrong with the results of a call, or None."""
    if results.keys() != definition.exact.keys():
        return f"{list(results)} came back, {list(definition.exact)} was expected"
    for what, ours in results.items():
        exact = definition.exact[what]
        if ours.shape != exact.shape:
            return f"{what} has shape {tuple(ours.shape)}, defined is {tuple(exact.shape)}"
        name = what.removeprefix("gradient of ")
        if name != what and ours.dtype != call.tensors[name].dtype:
            return f"{what} is {ours.dtype}, {name} is {call.tensors[name].dtype}"
        if ours.is_complex() != exact.is_complex():
            return f"{what} is {ours.dtype}, the definition's is {exact.dtype}"
        if call.mode not in ("fake", "meta") and not ours.is_meta:
            difference = differs(call, what, ours, definition)
            if difference:
                return f"{what}: {difference}"
    return None


def differs(call, what, ours, definition):
    """How one of the results is wrong, or None."""
    exact, info = definition.exact[what], torch.finfo(ours.dtype)
    if not exact.numel():
        return None
    if call.mode in ("jvp", "forward mode", "second") and not what.startswith("output") and not all(
            whole(t).all() for name, t in definition.exact.items() if name.startswith("output")):
        return None  # what is not finite has no derivatives, and zeros of the way may multiply it
    finite, ours_finite = whole(exact.to(ours.dtype)), whole(ours)
    ours, exact = real(ours).to(F64), real(exact)
    error = torch.where(finite & ours_finite, ours - exact, 0).abs()
    sizes = torch.where(finite, exact, 0).abs()
    if not call.uneven and (finite == ours_finite).all():
        plain = real(definition.plain()[what]).to(F64)
        rough = (plain - exact).abs().nan_to_num(0).max() + 4 * info.eps * sizes.max()
        if error.max() <= 4 * rough + info.tiny:
            return None
    plain_finite = whole(definition.plain()[what])
    plain, moved = real(definition.plain()[what]).to(F64), definition.moved()[what]
    if call.operator in SPREADING:
        moved = moved.where(~moved.isfinite(), definition.spread(what))
    sure = moved.isfinite()  # of whether it is finite
    wide = torch.finfo(definition.plain()[what].dtype)
    # roundings on the way, to that dtype
    steps = 8 if call.mode in ("jvp", "forward mode", "second") else 2
    allowed = (2 * (plain - exact).abs().nan_to_num(0) + MOVES * alike(call) * moved
               + steps * info.eps * sizes
               + 4 * wide.eps * (sizes.amax(-1, keepdim=True) if sizes.ndim > 1 else sizes)
               + 2 * info.tiny * info.eps + 8 * wide.tiny)
    if call.mode == "second" and call.pieces is not None and info.eps > wide.eps:
        # What comes back by way of a state, and what does not, is rounded before autograd adds it.
        allowed = allowed + 4 * info.eps * sizes.max()
    # What may be off by so much that it leaves the range is not lost.
    lost = sure & finite & plain_finite & ~ours_finite & (sizes + allowed <= info.max)
    if lost.any() and what.startswith("tangent"):
        lost &= definition.transposed()[what]
    for bad, word in ((lost,
                       "not finite where the definition is"),
                      (sure & ~whole(definition.exact[what]) & ~plain_finite & ours_finite,
                       "finite where the definition is not"),
                      (plain_finite & (error > allowed), "off")):
        if bad.any():
            at = tuple(bad.nonzero()[error[bad].argmax()].tolist())
            return (f"{word}, {int(bad.sum())} of {bad.numel()}, the worst at {at}: "
                    f"{ours[at].item():.8g}, defined {exact[at].item():.8g}, plain PyTorch "
                    f"{plain[at].item():.8g}, may be off by {allowed[at].item():.2g}")
    return None


def alike(call):
    """Terms that are equal, of axes without a stride, round alike: what adds up for them cancels
    for moves that are drawn."""
    equal = [size for t in call.tensors.values() if isinstance(t, torch.Tensor)
             and t.layout == torch.strided for size, stride in zip(t.shape, t.stride())
             if stride == 0]
    return max([1, *equal]) ** 0.5


def whole(t):
    """Where numbers are finite, of real(t): complex ones in both parts."""
    finite = real(t).isfinite()
    return finite.all(-1, keepdim=True).expand(finite.shape) if t.is_complex() else finite
