"""A trial of kernels that multiply matrices before their first use on a GPU.

Triton has silently made wrong code of gated chunk kernels before (3.4 to 3.7.0, on Hopper).
So each configuration (device, direction, dtypes, widths, optional tensors) of gate_loop with
heads and of windowed_sgu first runs on a small input and is held against the fallback in
float64. If one is wrong or does not compile, the operator's kernels are not used on such devices
in this process. bench/self_check.py is stricter, and tries every operator.
"""

import functools
import warnings

import torch

from fastmix.ops._register import CARRY_EVERY, OPERATORS

# Of a result's root mean square. Wrong code is off by far more, TF32 (where allowed) by less.
TOLERANCE = 0.02

failures = {}  # (operator, device type) → why its kernels are not used


def failure(operator, direction, kernels, *args):
    """Why the kernels for these arguments are not used, or None."""
    device = args[0].device
    place = operator, device.type
    if place not in failures and operator in CONFIGURATIONS and _possible(device):
        configuration = CONFIGURATIONS[operator](*args)
        wrong = configuration and _wrong(operator, direction, kernels, device, *configuration)
        if wrong:
            import triton  # with the kernels, not before
            failures[place] = wrong = f"{wrong} (Triton {triton.__version__})"
            warnings.warn(f"{operator} does not run on its Triton kernels: {wrong}",
                          RuntimeWarning, stacklevel=2)
    return failures.get(place)


def _possible(device):
    """The interpreter compiles nothing, and a CUDA graph cannot wait for results."""
    return device.type == "xpu" or (
        device.type == "cuda" and not torch.cuda.is_current_stream_capturing())


# ---- what kernels are compiled for: a description, how to draw such arguments, and with what


def _of_gate_loop(q, k, v, gates, gate_logits, initial_state, carry_every):
    """None for a scan per channel, which multiplies no matrices."""
    dk, dv = q.shape[-1], v.shape[-1]
    if (dk, dv) == (1, 1):
        return None
    logits = None if gate_logits is None else gate_logits.dtype
    return (f"heads of {dk} and {dv} in {str(q.dtype)[6:]}", _draw_gate_loop,
            q.dtype, dk, dv, logits, initial_state is not None)


def _draw_gate_loop(draw, dtype, dk, dv, logits, initial):
    b, n, h = 1, 130, 8  # three chunks; strides of 16, which Triton compiles for apart
    wide = torch.promote_types(dtype, torch.float32)
    z = draw(b, n, h, 2, dtype=logits or wide)
    gates = None if logits else torch.view_as_complex(z / (1 + z.norm(dim=-1, keepdim=True)))
    state = torch.view_as_complex(draw(b, h, dk, dv, 2, dtype=wide)) if initial else None
    return (draw(b, n, h, dk, dtype=dtype), draw(b, n, h, dk, dtype=dtype),
            draw(b, n, h, dv, dtype=dtype), gates, z if logits else None, state, CARRY_EVERY)


def _of_windowed_sgu(x, weight, bias, norm_weight, norm_bias, eps, gate_residual, activation):
    """None for few channels: the norm of one is 0 and that of two ±1, with gradients of nothing but
    rounding."""
    h, w = bias.shape
    if x.shape[-1] // 2 < 8:
        return None
    dtypes = tuple(None if t is None else t.dtype
                   for t in (weight, bias, norm_weight, norm_bias, gate_residual))
    return (f"{h} heads and windows of {w} in {str(x.dtype)[6:]}", _draw_windowed_sgu,
            x.dtype, x.shape[-1] // 2, h, w, dtypes, eps, activation)


def _draw_windowed_sgu(draw, dtype, c, h, w, dtypes, eps, activation):
    b, n = 1, 2 * w + 70  # the last window is short
    shapes = (h, w, 2 * w), (h, w), (c,), (c,), (b, n, c)
    weight, *others = (None if kind is None else draw(*shape, dtype=kind)
                       for kind, shape in zip(dtypes, shapes))
    bias, norm_weight, norm_bias, residual = others
    return (draw(b, n, 2 * c, dtype=dtype), weight / w ** 0.5, bias, norm_weight, norm_bias, eps,
            residual, activation)


CONFIGURATIONS = {"gate_loop": _of_gate_loop, "windowed_sgu": _of_windowed_sgu}


@functools.cache
@torch.no_grad()
def _wrong(operator, direction, kernels, device, description, draw_arguments, *configuration):
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape, dtype):
        wide = torch.promote_types(dtype, torch.float32)
        return torch.randn(shape, generator=generator, device=device, dtype=wide).to(dtype)

    run = OPERATORS[operator].run_fallback
    args = draw_arguments(draw, *configuration)
    if direction == "backward":
        out = run(*args)
        grads, kept = (out[:2], out[2:]) if isinstance(out, tuple) else ([out], ())
        args = [*(draw(*t.shape, dtype=t.dtype) for t in grads), *kept, *args]
        run = OPERATORS[operator].run_fallback_backward
    exact = run(*(_in_double(a) if isinstance(a, torch.Tensor) else a for a in args))
    which = f"its {direction} kernels for {description}"
    try:
        found = getattr(kernels, direction)(*args)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the compiler or a launch may raise
        return f"{which} fail: {type(error).__name__}: {str(error).strip()[:200]}"
    if not isinstance(exact, tuple):
        found, exact = [found], [exact]
    for ours, truth in zip(found, exact):
        if truth.numel():  # else there is no gradient
            off = ((ours - truth).abs().square().mean() / truth.abs().square().mean()).sqrt()
            if not off <= TOLERANCE:  # NaN is wrong
                return f"{which} are wrong, off by {off:.0%}"
    return None


def _in_double(x):
    return x.to(torch.complex128 if x.is_complex() else torch.float64)
