"""Formulas by which `torch.utils.flop_counter` counts an operator and its backward.

A multiplication and an addition count as one operation each, a complex multiplication as six and
a complex addition as two. Counted is what the definition needs, whichever implementation runs:
steps of recurrences, products of windows, transforms of the smallest sufficient power of two. Not
counted, as torch counts none for its own operators: norms, activations, what runs once per gate,
and what backward computes anew.

    linear_scan       2 per state; 4 with real gates for complex inputs, 8 if both are complex;
                      backward twice that: adjoints and the gates' gradients
    gate_loop         10 per number of the state and step: 6 to turn it by the gate, 2 to add k vᵀ,
                      2 for q · Re S; backward 22: the adjoint as forward (8), 2 each for q, k
                      and v, 8 for the gate. With real gates 6, of which 2 for the gate, and
                      backward 12: 4, 2 each for q, k and v, 2 for the gate
    decay_conv        3 per output; backward 7: adjoint 2, x 1, decay and gain 2 each
    cumulative_mean   2 per output, backward too
    fft_conv          2.5 N log₂ N per transform of N ≥ n + m - 1 real numbers, 3 N per product of
                      spectra, 2 per output for the skip. Forward two transforms and a product per
                      channel, one transform per kernel; backward three transforms, two products
                      and 4 per output; two transforms per kernel
    windowed_sgu,     2 per channel and weight under the causal mask, for the steps that there are;
    causal_sgu        backward twice that: x and the weights
    sgu_step          2 per channel and weight of the step
    fft_conv_step     2 per channel and product of a lag and a step, and for the skip
    dss_step          11 per number of the state, 6 to turn it, 1 to add the input and 4 for Re c z;
                      2 per output for the skip
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmix.ops._late import when_imported


def linear_scan(gates: Tensor, inputs: Tensor, *_: Any, **__: Any) -> int:
    states = max(gates.numel(), inputs.numel())
    if gates.is_complex():
        return 8 * states
    return (4 if inputs.is_complex() else 2) * states


def linear_scan_backward(grad: Tensor, carries: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * linear_scan(*args, **kwargs)


def _gate_loop_states(k: Tensor, v: Tensor) -> int:
    return k.numel() * v.shape[-1]


def _is_real(gates: Tensor | None) -> bool:
    return gates is not None and not gates.is_complex()


def gate_loop(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None = None, *_: Any, **__: Any
) -> int:
    return (6 if _is_real(gates) else 10) * _gate_loop_states(k, v)


def gate_loop_backward(
    grad: Tensor, grad_state: Tensor, carries: Tensor, q: Tensor, k: Tensor, v: Tensor,
    gates: Tensor | None = None, *_: Any, **__: Any
) -> int:
    return (12 if _is_real(gates) else 22) * _gate_loop_states(k, v)


def decay_conv(x: Tensor, *_: Any, **__: Any) -> int:
    return 3 * x.numel()


def decay_conv_backward(grad: Tensor, *_: Any, **__: Any) -> int:
    return 7 * grad.numel()


def cumulative_mean(x: Tensor, *_: Any, **__: Any) -> int:
    return 2 * x.numel()


def _transforms(x: Tensor, kernel: Tensor) -> tuple[int, int, int, int]:
    """Operations of a transform and of a product of spectra; channels and kernels."""
    b, n, h, d = x.shape
    length = 1 << (n + min(n, kernel.shape[-2]) - 2).bit_length()
    kernels = h if kernel.ndim == 2 else b * h
    return round(2.5 * length * math.log2(length)), 3 * length, b * h * d, kernels


def fft_conv(x: Tensor, kernel: Tensor, skip: Tensor | None = None, **_: Any) -> int:
    transform, product, channels, kernels = _transforms(x, kernel)
    skipped = 0 if skip is None else 2 * x.numel()
    return channels * (2 * transform + product) + kernels * transform + skipped


def fft_conv_backward(
    grad: Tensor, x: Tensor, kernel: Tensor, skip: Tensor | None = None, **_: Any
) -> int:
    transform, product, channels, kernels = _transforms(x, kernel)
    skipped = 0 if skip is None else 4 * x.numel()
    return channels * (3 * transform + 2 * product) + kernels * 2 * transform + skipped


def _visible(n: int, window: int, before: int) -> int:
    """Pairs of a step and one that its window lets it see, of n steps."""
    whole, rest = divmod(n, window)
    own = whole * window * (window + 1) // 2 + rest * (rest + 1) // 2
    return own + max(n - window, 0) * before


def windowed_sgu(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    b, n, width = x.shape
    return b * width * _visible(n, weight.shape[1], weight.shape[1])


def causal_sgu(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    b, n, width = x.shape
    return b * width * _visible(n, weight.shape[1], 0)


def windowed_sgu_backward(grad: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * windowed_sgu(*args, **kwargs)


def causal_sgu_backward(grad: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * causal_sgu(*args, **kwargs)


def sgu_step(rows: Tensor, x: Tensor, weight: Tensor, *args: Any, **_: Any) -> int:
    t, w = args[-1], weight.shape[1]
    return x.numel() * (t % w + 1 + (w if t >= w else 0))


def fft_conv_step(x: Tensor, kernel: Tensor, skip: Tensor | None, steps: Tensor, ahead: Tensor,
                  lags: Tensor | None, *_: Any, **__: Any) -> int:
    r = steps.shape[1] + 1
    products = min(r, kernel.shape[-2]) if lags is None else 2 * r
    return 2 * x.numel() * (products + (skip is not None))


def dss_step(state: Tensor, u: Tensor, *_: Any, **__: Any) -> int:
    return 11 * state.numel() + 2 * u.numel()


FORMULAS: dict[str, Callable[..., int]] = {
    "linear_scan": linear_scan, "linear_scan_backward": linear_scan_backward,
    "gate_loop": gate_loop, "gate_loop_backward": gate_loop_backward,
    "decay_conv": decay_conv, "decay_conv_backward": decay_conv_backward,
    "cumulative_mean": cumulative_mean, "cumulative_mean_backward": cumulative_mean,
    "fft_conv": fft_conv, "fft_conv_backward": fft_conv_backward,
    "windowed_sgu": windowed_sgu, "windowed_sgu_backward": windowed_sgu_backward,
    "causal_sgu": causal_sgu, "causal_sgu_backward": causal_sgu_backward,
    "sgu_step": sgu_step, "fft_conv_step": fft_conv_step, "dss_step": dss_step,
}


def _register(counter: Any) -> None:
    for name, formula in FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.fastmix, name), get_raw=True)(formula)


when_imported("torch.utils.flop_counter", _register)  # which imports triton
