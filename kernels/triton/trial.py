"""A trial of kernels that Triton may make wrong code of, before their first use on a GPU.

It has silently made wrong code of gated chunk kernels (3.4 to 3.7.0, on Hopper), and a scan of
tuples in reverse across warps is an open bug of its. So each configuration (device, direction,
dtypes, widths, optional tensors) of gate_loop with heads, of windowed_sgu and of linear_scan first
runs on a small input and is held against the fallback in float64. If one is wrong or does not
compile, the operator's kernels are not used on such devices in this process. bench/self_check.py
is stricter, and tries every operator.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastmix.dtypes import wide
from fastmix.ops._carries import CARRY_EVERY
from fastmix.ops._register import OPERATORS

# Of a result's root mean square. Wrong code is off by far more, TF32 (where allowed) by less.
TOLERANCE = 0.02

# A description, how to draw such arguments, and with what: `draw`, and the rest.
Configuration = tuple
Draw = Callable[..., Tensor]  # of a shape, and dtype=
Arguments = tuple  # of an operator's forward

failures: dict[tuple[str, str], str] = {}  # (operator, device type) → why its kernels are not used


def why_not(operator: str, direction: str, kernels: ModuleType, *args: Any) -> str | None:
    """Why the kernels for these arguments are not used, or None."""
    device = args[0].device
    key = operator, device.type
    if key not in failures and operator in CONFIGURATIONS and _possible(device):
        configuration = CONFIGURATIONS[operator](direction, *args)
        reason = configuration and _why_not_trusted(
            operator, direction, kernels, device, *configuration)
        if reason:
            import triton  # with the kernels, not before
            failures[key] = reason = f"{reason} (Triton {triton.__version__})"
            warnings.warn(f"{operator} does not run on its Triton kernels: {reason}",
                          RuntimeWarning, stacklevel=2)
    return failures.get(key)


def _possible(device: torch.device) -> bool:
    """The interpreter compiles nothing, and a CUDA graph cannot wait for results."""
    return device.type in ("cuda", "xpu") and not _captures(device)


def _captures(device: torch.device) -> bool:
    """Whether launches are recorded in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def no_compilation_in_capture(operator: str, device: torch.device) -> Iterator[None]:
    """Triton compiles and loads a kernel at its first launch, and so does the trial: neither can be
    part of a CUDA graph. Here such a launch raises while a graph is captured.
    """
    if not _captures(device):
        yield
        return
    import triton

    def refuse(*, fn: Any, **_: Any) -> None:
        raise RuntimeError(
            f"{operator}: its Triton kernel {fn.name} has not run on {device} with arguments like "
            "these, and cannot be compiled while a CUDA graph is captured; call the operator, and "
            "its backward, once with them before the capture")

    runtime = triton.knobs.runtime
    hook, runtime.jit_cache_hook = runtime.jit_cache_hook, refuse
    try:
        yield
    finally:
        runtime.jit_cache_hook = hook


# ---- what kernels are compiled for: a description, how to draw such arguments, and with what


def _of_gate_loop(_: str, q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None,
                  gate_logits: Tensor | None, initial_state: Tensor | None,
                  carry_every: int) -> Configuration | None:
    """None for a scan per channel, which multiplies no matrices."""
    dk, dv = q.shape[-1], v.shape[-1]
    if (dk, dv) == (1, 1):
        return None
    logits = None if gate_logits is None else gate_logits.dtype
    real = gates.dtype if gates is not None and not gates.is_complex() else None
    return (f"heads of {dk} and {dv} in {str(q.dtype)[6:]}{' with real gates' if real else ''}",
            _draw_gate_loop, q.dtype, dk, dv, logits, real, initial_state is not None)


def _draw_gate_loop(draw: Draw, dtype: torch.dtype, dk: int, dv: int, logits: torch.dtype | None,
                    real: torch.dtype | None, initial: bool) -> Arguments:
    """logits and real: the dtype of logits and of real gates, or None."""
    b, n, h = 1, 130, 8  # three chunks; strides of 16, which Triton compiles for apart
    z = draw(b, n, h, 2, dtype=logits or wide(dtype))
    gates: Any = None if logits else torch.view_as_complex(z / (1 + z.norm(dim=-1, keepdim=True)))
    state: Any = None
    if initial:
        state = torch.view_as_complex(draw(b, h, dk, dv, 2, dtype=wide(dtype)))
    if real:
        gates, state = gates.real.to(real), state.real if initial else None
    return (draw(b, n, h, dk, dtype=dtype), draw(b, n, h, dk, dtype=dtype),
            draw(b, n, h, dv, dtype=dtype), gates, z if logits else None, state, CARRY_EVERY)


def _of_windowed_sgu(_: str, x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor | None,
                     norm_bias: Tensor | None, eps: float, gate_residual: Tensor | None,
                     activation: str) -> Configuration | None:
    """None for few channels: the norm of one is 0 and that of two ±1, with gradients of nothing but
    rounding."""
    h, w = bias.shape
    if x.shape[-1] // 2 < 8:
        return None
    dtypes = tuple(None if t is None else t.dtype
                   for t in (weight, bias, norm_weight, norm_bias, gate_residual))
    return (f"{h} heads and windows of {w} in {str(x.dtype)[6:]}", _draw_windowed_sgu,
            x.dtype, x.shape[-1] // 2, h, w, dtypes, eps, activation)


def _draw_windowed_sgu(draw: Draw, dtype: torch.dtype, c: int, h: int, w: int,
                       dtypes: Sequence[torch.dtype | None], eps: float,
                       activation: str) -> Arguments:
    b, n = 1, 2 * w + 70  # the last window is short
    shapes = (h, w, 2 * w), (h, w), (c,), (c,), (b, n, c)
    weight, *others = (None if kind is None else draw(*shape, dtype=kind)
                       for kind, shape in zip(dtypes, shapes))
    bias, norm_weight, norm_bias, residual = others
    return (draw(b, n, 2 * c, dtype=dtype), weight / w ** 0.5, bias, norm_weight, norm_bias, eps,
            residual, activation)


def _of_linear_scan(direction: str, gates: Tensor, inputs: Tensor, initial_state: Tensor | None,
                    reverse: bool, carry_every: int) -> Configuration | None:
    from fastmix._triton import linear_scan  # with Triton

    if inputs.numel() == 0:  # nothing is launched
        return None
    dtype = torch.promote_types(gates.dtype, inputs.dtype)
    b, n = inputs.shape[:2]
    width, cut = linear_scan.cut(direction, b, n, inputs.shape[2:].numel(), dtype)
    sharing = linear_scan.shares(gates, inputs)
    if sharing > 1:  # whole blocks of channels share a gate, or parts of them do
        sharing = width if sharing % width == 0 else width // 2
    return (f"{'one gate' if sharing > 1 else 'gates'} in {str(gates.dtype)[6:]} and inputs in "
            f"{str(inputs.dtype)[6:]}{', reversed' if reverse else ''}", _draw_linear_scan,
            direction, gates.dtype, inputs.dtype, sharing, width, cut, initial_state is not None,
            reverse, carry_every)


def _draw_linear_scan(draw: Draw, direction: str, gates: torch.dtype, inputs: torch.dtype,
                      sharing: int, width: int, cut: bool, initial: bool, reverse: bool,
                      carry_every: int) -> Arguments:
    """gates and inputs: their dtypes. sharing: channels to a gate, of `width`. cut: whether time is
    to be cut into segments."""
    from fastmix._triton import linear_scan

    b, n = 1, 300  # two tiles, the last not whole
    common = torch.promote_types(gates, inputs)
    while linear_scan.cut(direction, b, n, width, common)[1] != cut:
        b, n = (b, 2 * n) if cut else (2 * b, n)
    heads = width // sharing
    z, dtype = draw(b, n, heads, 1, dtype=wide(gates)), wide(common)
    return ((z / (1 + z.abs())).to(gates), draw(b, n, heads, sharing, dtype=inputs),
            draw(b, heads, sharing, dtype=dtype) if initial else None, reverse, carry_every)


CONFIGURATIONS: dict[str, Callable[..., Configuration | None]] = {
    "gate_loop": _of_gate_loop, "windowed_sgu": _of_windowed_sgu, "linear_scan": _of_linear_scan}


@functools.cache
@torch.no_grad()
def _why_not_trusted(operator: str, direction: str, kernels: ModuleType, device: torch.device,
                     description: str, draw_arguments: Callable[..., Arguments],
                     *configuration: Any) -> str | None:
    """Runs the kernels on a small input and the fallback in float64 → what is wrong, or None."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=wide(dtype)).to(dtype)

    run = OPERATORS[operator].run_fallback
    args = draw_arguments(draw, *configuration)
    if direction == "backward":
        out = run(*args)
        out = out if isinstance(out, tuple) else (out,)
        count = OPERATORS[operator].differentiable
        grads, kept = out[:count], out[count:]
        args = [*(draw(*t.shape, dtype=t.dtype) for t in grads), *kept, *args]
        run = OPERATORS[operator].run_fallback_backward
    exact = run(*(_in_double(a) if isinstance(a, torch.Tensor) else a for a in args))
    which = f"its {direction} kernels for {description}"
    try:
        results = getattr(kernels, direction)(*args)
        _synchronize(device)  # a kernel's own error comes late, and is not to come elsewhere
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the compiler or a launch may raise
        reason = f"{which} fail: {type(error).__name__}: {str(error).strip()[:200]}"
        try:
            _synchronize(device)
        except Exception as lasting:  # of torch's or of Triton's types: the fallback would fail too
            raise RuntimeError(
                f"{operator}: {reason}; since then {device} fails at everything in this process: "
                "start it again, with FASTMIX_IMPLEMENTATION=fallback") from lasting
        return reason
    if not isinstance(exact, tuple):
        results, exact = [results], [exact]
    for result, truth in zip(results, exact, strict=True):
        if truth.numel():  # else there is no gradient
            off = ((result - truth).abs().square().mean() / truth.abs().square().mean()).sqrt()
            if not off <= TOLERANCE:  # NaN is wrong
                return f"{which} are wrong, off by {off:.0%}"
    return None


def _synchronize(device: torch.device) -> None:
    if device.type in ("cuda", "xpu"):
        getattr(torch, device.type).synchronize(device)


def _in_double(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)
