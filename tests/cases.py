"""Every operator with random arguments of every kind: what the generic tests run over."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

import fastmix
from fastmix import ops, reference

F64 = torch.float64


@dataclass
class Case:
    """`make(n, dtype, b)` draws the tensor arguments; `options` are the others."""

    operator: str
    make: Callable
    options: dict

    def run(self, tensors):
        return as_tuple(getattr(ops, self.operator)(**tensors, **self.options))

    def define(self, tensors):
        return as_tuple(getattr(reference, self.operator)(**tensors, **self.options))


@contextlib.contextmanager
def unwritten_is_nan():
    """New memory that nobody has written holds NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def implementations(operator):
    return [name for name, reason in fastmix.implementations(operator, "cpu").items()
            if reason is None]


def as_tuple(out):
    return out if isinstance(out, tuple) else (out,)


def randn(*shape, dtype):
    return torch.randn(*shape, dtype=dtype)


def state_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def complex_dtype(dtype):
    return torch.complex128 if dtype == torch.float64 else torch.complex64


def random_gates(*shape, dtype):
    """Complex, every size in [0, 1] with many close to 1, some exactly 0."""
    size = 1 - torch.rand(*shape, dtype=torch.float64) ** 3
    size = torch.where(torch.rand(*shape) < 0.05, 0, size)
    return torch.polar(size, 6.3 * torch.rand(*shape, dtype=torch.float64)).to(complex_dtype(dtype))


def _linear_scan_real(n, dtype, b=2):
    return {"gates": torch.rand(b, n, 3).to(dtype), "inputs": randn(b, n, 3, 2, dtype=dtype),
            "initial_state": randn(b, 3, 2, dtype=dtype)}


def _linear_scan_complex(n, dtype, b=2):
    return {"gates": random_gates(b, n, 3, dtype=dtype),
            "inputs": randn(b, n, 3, dtype=complex_dtype(dtype))}


def _linear_scan_mixed(n, dtype, b=2):
    return {"gates": random_gates(b, n, dtype=dtype), "inputs": randn(b, n, 3, dtype=dtype),
            "initial_state": randn(b, 3, dtype=complex_dtype(dtype))}


def _linear_scan_reverse(n, dtype, b=2):
    return {"gates": torch.rand(b, n, 3).to(dtype),
            "inputs": randn(b, n, 3, 2, dtype=complex_dtype(dtype)),
            "initial_state": randn(b, 3, 2, dtype=complex_dtype(dtype))}


def random_decays(*shape, dtype):
    """Real, of every size in [0, 1] with many close to 1, some exactly 0, some negative."""
    size = 1 - torch.rand(*shape, dtype=torch.float64) ** 3
    sign = torch.where(torch.rand(*shape) < 0.2, -1, 1)
    return torch.where(torch.rand(*shape) < 0.05, 0, sign * size).to(dtype)


def _gate_loop_real(dk, dv, gates, state):
    """gates: "gates" (b, n, h), "decays" (h,) or "logits" (b, n, h)."""
    def make(n, dtype, b=2):
        h = 3 if dk * dv == 1 else 2
        made = {"q": randn(b, n, h, dk, dtype=dtype), "k": randn(b, n, h, dk, dtype=dtype),
                "v": randn(b, n, h, dv, dtype=dtype)}
        if gates == "logits":
            made["gate_logits"] = 3 * randn(b, n, h, dtype=dtype)
        else:
            made["gates"] = random_decays(*(b, n, h) if gates == "gates" else (h,), dtype=dtype)
        if state:
            made["initial_state"] = randn(b, h, dk, dv, dtype=state_dtype(dtype))
        return made

    return make


def _gate_loop(dk, dv, logits, state):
    def make(n, dtype, b=2):
        h = 3 if dk * dv == 1 else 2
        made = {"q": randn(b, n, h, dk, dtype=dtype), "k": randn(b, n, h, dk, dtype=dtype),
                "v": randn(b, n, h, dv, dtype=dtype)}
        if logits:
            # Not too near 0, where the gradient has a pole: its rounding would be all one sees.
            z = torch.polar(0.3 + 3 * torch.rand(b, n, h), 6.3 * torch.rand(b, n, h))
            made["gate_logits"] = torch.view_as_real(z).to(dtype)
        else:
            made["gates"] = random_gates(b, n, h, dtype=dtype)
        if state:
            made["initial_state"] = randn(b, h, dk, dv, dtype=complex_dtype(dtype))
        return made

    return make


def _decay_conv(n, dtype, b=2):
    h = 8
    return {"x": randn(b, n, h, 2, dtype=dtype), "decay": torch.rand(h).to(dtype),
            "gain": randn(h, dtype=dtype),
            "initial_state": randn(b, h, 2, dtype=state_dtype(dtype))}


def _decay_conv_plain(n, dtype, b=2):
    h = 8
    return {"x": randn(b, n, h, 2, dtype=dtype), "decay": 2 * torch.rand(h).to(dtype) - 1}


def _fft_conv(kernel_shape, skip=False):
    def make(n, dtype, b=2):
        made = {"x": randn(b, n, 3, 3, dtype=dtype),
                "kernel": randn(*kernel_shape(b, n), 3, dtype=dtype)}
        if skip:
            made["skip"] = randn(3, 3, dtype=dtype)
        return made

    return make


AFFINE = ("norm_weight", "norm_bias")


def _sgu(weight_shape, affine, residual):
    def make(n, dtype, b=2):
        h, c = 2, 8
        made = {"x": randn(b, n, 2 * c, dtype=dtype),
                "weight": randn(h, *weight_shape(n), dtype=dtype),
                "bias": randn(h, weight_shape(n)[0], dtype=dtype)}
        for name in affine:
            made[name] = randn(c, dtype=dtype)
        if residual:
            made["gate_residual"] = randn(b, n, c, dtype=dtype)
        return made

    return make


def _cumulative_mean(n, dtype, b=2):
    return {"x": randn(b, n, 3, dtype=dtype)}


CASES = {
    "linear_scan": Case("linear_scan", _linear_scan_real, {}),
    "linear_scan-complex-reverse": Case("linear_scan", _linear_scan_complex, {"reverse": True}),
    "linear_scan-reverse": Case("linear_scan", _linear_scan_reverse, {"reverse": True}),
    "linear_scan-mixed": Case("linear_scan", _linear_scan_mixed, {}),
    "gate_loop-diagonal-logits": Case("gate_loop", _gate_loop(1, 1, True, False), {}),
    "gate_loop-diagonal-gates": Case(
        "gate_loop", _gate_loop(1, 1, False, True), {"return_state": True}),
    "gate_loop-heads-logits": Case(
        "gate_loop", _gate_loop(3, 2, True, True), {"return_state": True}),
    "gate_loop-heads-gates": Case("gate_loop", _gate_loop(2, 3, False, False), {}),
    "gate_loop-diagonal-real": Case(
        "gate_loop", _gate_loop_real(1, 1, "logits", False), {"return_state": True}),
    "gate_loop-heads-real": Case(
        "gate_loop", _gate_loop_real(17, 3, "gates", True), {"return_state": True}),
    "gate_loop-heads-decays": Case("gate_loop", _gate_loop_real(2, 1, "decays", False), {}),
    "decay_conv": Case("decay_conv", _decay_conv, {"return_state": True}),
    "decay_conv-plain": Case("decay_conv", _decay_conv_plain, {}),
    "fft_conv-per-sample": Case("fft_conv", _fft_conv(lambda b, n: (b, n)), {}),
    "fft_conv-shared": Case("fft_conv", _fft_conv(lambda b, n: (n,)), {}),
    "fft_conv-skip": Case("fft_conv", _fft_conv(lambda b, n: (b, n), skip=True), {}),
    "fft_conv-short": Case("fft_conv", _fft_conv(lambda b, n: (b, n // 3 + 1)), {}),
    "fft_conv-long": Case("fft_conv", _fft_conv(lambda b, n: (n + 7,)), {}),
    "windowed_sgu": Case(
        "windowed_sgu", _sgu(lambda n: (3, 6), AFFINE, True), {"activation": "gelu"}),
    "windowed_sgu-plain": Case("windowed_sgu", _sgu(lambda n: (4, 8), (), False), {}),
    "causal_sgu": Case(
        "causal_sgu", _sgu(lambda n: (n + 3, n + 3), AFFINE, True), {"activation": "tanh"}),
    "causal_sgu-plain": Case(
        "causal_sgu", _sgu(lambda n: (n, n), (), False), {"activation": "silu"}),
    "causal_sgu-shift": Case(
        "causal_sgu", _sgu(lambda n: (n, n), AFFINE[1:], False), {"activation": "silu"}),
    "cumulative_mean": Case("cumulative_mean", _cumulative_mean, {}),
}


def leaves(tensors):
    """Fresh leaves that require a gradient."""
    return {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}


def weigh(outputs, weights):
    """A real number that depends on every part of every output."""
    return sum((torch.view_as_real(o) * torch.view_as_real(w)).sum() if o.is_complex()
               else (o * w).sum() for o, w in zip(outputs, weights))


def largest(t):
    return t.abs().max().item() if t.numel() else 0.0


def distance(a, b):
    """Largest difference relative to the largest of b."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return largest(a - b) / max(largest(b), 1e-30)


def squared_errors(ours, plain, exact, floor=1 / 8):
    """Mean squares of the errors of ours, of plain PyTorch rounded alike, and of `floor` ulps:
    (tensors, 3)."""
    return torch.tensor([
        [error.abs().square().mean().item() for error in (
            o.to(e.dtype) - e, p.to(o.dtype).to(e.dtype) - e, floor * torch.finfo(o.dtype).eps * e)]
        for o, p, e in zip(ours, plain, exact, strict=True)], dtype=F64)


def check_errors(draw, draws=(3, 12, 48), most=2):
    """Holds the sum of `draw()`, squared_errors, to at most `most` times plain PyTorch's.

    Extremes are luck: it is the root of the mean square over several draws. Where a few numbers
    outweigh all others that is luck too, so a failure is judged on more, the failed included.
    """
    total = 0
    for count in draws:
        total += sum(draw() for _ in range(count))
        ours, plain, floor = total.sqrt().unbind(1)
        if (ours <= most * plain + floor).all():
            return
    raise AssertionError(f"errors are {(ours / plain).tolist()} times plain PyTorch's")
