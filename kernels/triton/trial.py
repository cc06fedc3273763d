"""A trial of gate_loop's kernels for heads before their first use on a GPU.

Triton has silently made wrong code of gated chunk kernels before (3.4 to 3.7.0, on Hopper).
So each configuration (device, direction, dtypes, head dims, optional tensors) first runs on
a small input and is held against the fallback in float64. If one is wrong or does not
compile, the operator's kernels are not used on such devices in this process.
bench/self_check.py is stricter, and tries every operator.
"""

import functools
import warnings

import torch

from fastmix.ops._register import CARRY_EVERY, OPERATORS

# Of a result's root mean square. Wrong code is off by far more, TF32 (where allowed) by less.
TOLERANCE = 0.02

failures = {}  # (operator, device type) → why its kernels are not used


def failure(operator, direction, kernels, q, k, v, gates, gate_logits, initial_state, *_):
    """Why the kernels for these arguments are not used, or None."""
    place = operator, q.device.type
    if place not in failures and (q.shape[-1], v.shape[-1]) != (1, 1) and _possible(q.device):
        logits = None if gate_logits is None else gate_logits.dtype
        wrong = _wrong(operator, direction, kernels, q.device, q.dtype, q.shape[-1], v.shape[-1],
                       logits, initial_state is not None)
        if wrong is not None:
            import triton  # with the kernels, not before
            failures[place] = wrong = f"{wrong} (Triton {triton.__version__})"
            warnings.warn(f"{operator} does not run on its Triton kernels: {wrong}",
                          RuntimeWarning, stacklevel=2)
    return failures.get(place)


def _possible(device):
    """The interpreter compiles nothing, and a CUDA graph cannot wait for results."""
    return device.type == "xpu" or (
        device.type == "cuda" and not torch.cuda.is_current_stream_capturing())


@functools.cache
@torch.no_grad()
def _wrong(operator, direction, kernels, device, dtype, dk, dv, logits, initial):
    b, n, h = 1, 130, 8  # three chunks; strides of 16, which Triton compiles for apart
    wide = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, device=device, dtype=wide).to(dtype)

    def draw_state():
        return torch.view_as_complex(draw(b, h, dk, dv, 2, dtype=wide))

    z = draw(b, n, h, 2, dtype=logits or wide)
    gates = None if logits else torch.view_as_complex(z / (1 + z.norm(dim=-1, keepdim=True)))
    args = [draw(b, n, h, dk), draw(b, n, h, dk), draw(b, n, h, dv), gates, z if logits else None,
            draw_state() if initial else None]
    run = OPERATORS[operator].run_fallback
    if direction == "backward":
        carries = run(*args, CARRY_EVERY)[2]
        args = [draw(b, n, h, dv), draw_state(), carries, *args]
        run = OPERATORS[operator].run_fallback_backward
    exact = run(*(None if t is None else
                  t.to(torch.complex128 if t.is_complex() else torch.float64) for t in args),
                CARRY_EVERY)
    which = f"its {direction} kernels for heads of {dk} and {dv} in {str(dtype)[6:]}"
    try:
        found = getattr(kernels, direction)(*args, CARRY_EVERY)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the compiler or a launch may raise
        return f"{which} fail: {type(error).__name__}: {str(error).strip()[:200]}"
    for ours, truth in zip(found, exact):
        if truth.numel():  # else there is no gradient
            off = ((ours - truth).abs().square().mean() / truth.abs().square().mean()).sqrt()
            if not off <= TOLERANCE:  # NaN is wrong
                return f"{which} are wrong, off by {off:.0%}"
    return None
