"""Random calls of every operator, native against fallback: `python tests/fuzz_native.py COUNT`.

test_native.py runs this with a library under the address and undefined-behaviour sanitizers.
Shapes, strides, offsets, dtypes, instruction sets and thread counts are drawn at random.
"""

import random
import sys

import torch
from cases import as_tuple, complex_dtype, distance, randn, state_dtype

import fastmix
from fastmix import _native

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 4e-2, torch.float16: 2e-2}


def restride(t):
    """The same values with other strides: a slice, every second, axes in another order."""
    kind = random.randrange(4)
    if kind == 0 or t.ndim == 0:
        return t
    axis = random.randrange(t.ndim)
    if kind == 1:
        pad = torch.full_like(t.narrow(axis, 0, min(1, t.shape[axis])), float("nan"))
        return torch.cat([pad, t, pad], dim=axis).narrow(axis, pad.shape[axis], t.shape[axis])
    if kind == 2:
        return torch.stack([t, torch.full_like(t, float("nan"))], dim=-1)[..., 0]
    return t.transpose(0, axis).contiguous().transpose(0, axis)


def size(most):
    return random.choice([1, 2, 3, random.randint(1, most), random.randint(1, most)])


def maybe(make):
    return make() if random.random() < 0.5 else None


def scan_arguments(b, n, dtype):
    rest = [size(9) for _ in range(random.randrange(4))]
    gates_of = rest[: random.randint(0, len(rest))]
    real = [dtype] * 2 if random.random() < 0.5 else random.choice(
        [(dtype, complex_dtype(dtype)), (complex_dtype(dtype), dtype), (complex_dtype(dtype),) * 2])
    states = torch.promote_types(*real)
    return {"gates": 0.9 * randn(b, n, *gates_of, dtype=real[0]).sgn(),
            "inputs": randn(b, n, *rest, dtype=real[1]),
            "initial_state": maybe(lambda: randn(b, *rest, dtype=states))}, {
                "reverse": random.random() < 0.5}


def gate_loop_arguments(b, n, dtype):
    h = size(40)
    dk, dv = (1, 1) if random.random() < 0.4 else (size(40), size(40))
    if dk * dv > 1:
        h = min(h, 4)
    made = {"q": randn(b, n, h, dk, dtype=dtype), "k": randn(b, n, h, dk, dtype=dtype),
            "v": randn(b, n, h, dv, dtype=dtype),
            "initial_state": maybe(lambda: randn(b, h, dk, dv, dtype=complex_dtype(dtype)))}
    if random.random() < 0.5:
        made["gates"] = 0.9 * randn(b, n, h, dtype=complex_dtype(dtype)).sgn()
    else:
        made["gate_logits"] = 2 * randn(b, n, h, 2, dtype=dtype).sign() + randn(
            b, n, h, 2, dtype=dtype) / 2
    return made, {"return_state": True}


def decay_arguments(b, n, dtype):
    h, d = size(9), size(70)
    return {"x": randn(b, n, h, d, dtype=dtype), "decay": (2 * torch.rand(h) - 1).to(dtype),
            "gain": maybe(lambda: randn(h, dtype=dtype)),
            "initial_state": maybe(lambda: randn(b, h, d, dtype=state_dtype(dtype)))}, {
                "return_state": True}


def fft_arguments(b, n, dtype):
    h, d, m = size(5), size(70), size(2 * n)
    shape = (m, h) if random.random() < 0.5 else (b, m, h)
    return {"x": randn(b, n, h, d, dtype=dtype), "kernel": randn(*shape, dtype=dtype),
            "skip": maybe(lambda: randn(h, d, dtype=dtype))}, {}


def sgu_arguments(b, n, dtype, whole):
    h, d = size(4), 2 + size(40)  # a norm of two channels has no gradient but rounding
    c = h * d
    w = n + random.randrange(3) if whole else size(40)
    return {"x": randn(b, n, 2 * c, dtype=dtype),
            "weight": randn(h, w, w if whole else 2 * w, dtype=dtype) / w,
            "bias": randn(h, w, dtype=dtype),
            "norm_weight": maybe(lambda: randn(c, dtype=dtype)),
            "norm_bias": maybe(lambda: randn(c, dtype=dtype)),
            "gate_residual": maybe(lambda: randn(b, n, c, dtype=dtype))}, {
                "activation": random.choice([None, "tanh", "sigmoid", "gelu", "silu", torch.sin])}


ARGUMENTS = {
    "linear_scan": scan_arguments, "gate_loop": gate_loop_arguments,
    "decay_conv": decay_arguments, "fft_conv": fft_arguments,
    "windowed_sgu": lambda *a: sgu_arguments(*a, whole=False),
    "causal_sgu": lambda *a: sgu_arguments(*a, whole=True),
    "cumulative_mean": lambda b, n, dtype: (
        {"x": randn(b, n, *[size(20) for _ in range(random.randrange(4))], dtype=dtype)}, {})}


def run(operator, tensors, options, weights):
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if t is not None}
    out = as_tuple(getattr(fastmix.ops, operator)(**leaves, **options))
    weights = weights or [restride(torch.randn_like(o)) for o in out]
    grads = torch.autograd.grad(out, leaves.values(), weights)
    return (*out, *grads), weights


def draw():
    operator = random.choice(list(_native.KERNELS["cpu"]))
    dtype = random.choice(DTYPES)
    b, n = random.choice([0, 1, 1, 2, 3]), size(200)
    tensors, options = ARGUMENTS[operator](b, n, dtype)
    tensors = {name: t if t is None else restride(t) for name, t in tensors.items()}
    _native.choose_instruction_set(random.choice(
        _native.INSTRUCTION_SETS[: _native.best_instruction_set() + 1]))
    torch.set_num_threads(random.choice([1, 2, 3]))
    ours, weights = run(operator, tensors, options, None)
    with fastmix.force("fallback"):
        theirs, _ = run(operator, tensors, options, weights)
    for found, expected in zip(ours, theirs, strict=True):
        assert found.stride() == expected.stride() and found.dtype == expected.dtype
        off = distance(found.to(torch.complex128), expected.to(torch.complex128))
        assert off < TOLERANCE[dtype], (operator, dtype, b, n, options, off, {
            k: t if t is None else (t.shape, t.stride()) for k, t in tensors.items()})


if __name__ == "__main__":
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(2**32)
    random.seed(seed)
    torch.manual_seed(seed)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # fresh memory is filled with NaN
    print("seed", seed, flush=True)
    for _ in range(int(sys.argv[1])):
        draw()
    print("clean")
