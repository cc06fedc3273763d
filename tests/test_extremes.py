"""C++, each instruction set, and pure PyTorch against definitions at the edges of the numbers."""

import ctypes
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastmix
from fastmix import ops, reference
from fastmix.fallback._scan import scan
from fastmix.native import build, library

INF, NAN = float("inf"), float("nan")
ROOT_HALF = 0.5 ** 0.5
REAL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["fallback", *library.INSTRUCTION_SETS])
def implementation(request):
    if request.param == "fallback":
        with fastmix.force("fallback"):
            yield
        return
    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    if request.param not in library.available_instruction_sets():
        pytest.skip(f"this machine, or the library, has no {request.param}")
    library.choose_instruction_set(request.param)
    with fastmix.force("native"):
        yield
    library.choose_instruction_set()


def gates_and_gradients(logits, size=1.0):
    """The gates of logits (…, 2), as gate_loop's states show them, and the gradients of the logits.

    The gates are 19 heads of one step, and heads of 2 x 3, which run different kernels."""
    for dk, dv in ((1, 1), (2, 3)):
        z = logits.clone().requires_grad_()
        h = z.shape[0]
        k, v = z.new_zeros(1, 1, h, dk), z.new_zeros(1, 1, h, dv)
        wide = torch.promote_types(z.dtype, torch.complex64)
        _, state = ops.gate_loop(k, k, v, gate_logits=z[None, None], return_state=True,
                                 initial_state=torch.ones(1, h, dk, dv, dtype=wide))
        weight = size * torch.complex(torch.tensor(1.0), torch.tensor(-2.0)).to(wide)
        grad, = torch.autograd.grad((state * weight).real.sum(), z)
        yield state[0, :, 0, 0].detach(), grad / (dk * dv)


# ---- logits


@pytest.mark.parametrize("dtype", REAL)
def test_a_gate_of_infinite_logits_is_their_direction(implementation, dtype):
    cases = {(INF, 0): 1, (-INF, 0): -1, (0, INF): 1j, (0, -INF): -1j, (INF, 5): 1, (-3, -INF): -1j,
             (INF, INF): (1 + 1j) * ROOT_HALF, (-INF, INF): (-1 + 1j) * ROOT_HALF,
             (INF, -INF): (1 - 1j) * ROOT_HALF, (0, 0): 0.5}
    cases |= {(float(i), 1.0): None for i in range(9)}  # ordinary neighbours of a vector
    logits = torch.tensor(list(cases), dtype=dtype)
    defined = reference.gate_from_logits(logits)
    for gates, grad in gates_and_gradients(logits):
        assert torch.allclose(gates, defined.to(gates.dtype), atol=1e-6)
        for gate, expected in zip(gates.tolist(), cases.values(), strict=True):
            assert expected is None or abs(gate - expected) < 1e-6
        assert grad.isfinite().all()
        assert (grad[logits.isinf().any(-1)] == 0).all()
        assert (grad[10:] != 0).any(-1).all()


@pytest.mark.parametrize("dtype", REAL)
def test_a_nan_in_a_logit_stays_one(implementation, dtype):
    logits = torch.tensor([(NAN, 0), (0, NAN), (NAN, INF), (INF, NAN), (NAN, 1e4), (1, 1)],
                          dtype=dtype)
    for gates, grad in gates_and_gradients(logits):
        assert gates[:-1].isnan().all() and gates[-1].isfinite()
        assert grad[:-1].isnan().all() and grad[-1].isfinite().all()


@pytest.mark.parametrize("dtype, size", [(torch.float64, 1.7e308), (torch.float32, 3.3e38)])
def test_logits_whose_length_is_beyond_all_numbers(implementation, dtype, size):
    logits = size * torch.tensor([(1, 1), (-1, 1), (1, 0), (0.6, -0.8), (1, -1)], dtype=dtype)
    direction = torch.nn.functional.normalize(logits / size, dim=-1)
    for gates, grad in gates_and_gradients(logits):
        assert torch.allclose(torch.view_as_real(gates), direction, atol=1e-6)
        assert grad.isfinite().all()


@pytest.mark.parametrize("size", [2.0 ** -k for k in (120, 126, 127, 128, 140)])
def test_gradients_of_logits_below_normal_numbers(implementation, size):
    """Across z the slope is ½ / |z|, while that is a number."""
    logits = size * torch.tensor([(0.6, 0.8), (-1, 0), (0, 1), (0.8, -0.6)] * 5)
    exact = logits.double().requires_grad_()
    gate = reference.gate_from_logits(exact)
    grad, = torch.autograd.grad(0.05 * (gate.real + 2 * gate.imag).sum(), exact)
    defined = grad.float()
    for _, ours in gates_and_gradients(logits, 0.05):
        assert ours.isfinite().all()
        if size >= 2.0 ** -128:
            assert ((ours - defined).abs() <= 1e-5 * defined.abs().amax(-1, keepdim=True)).all()


# ---- gate_loop far from 1


def step_by_step(q, k, v, gates, state, grad):
    """The definition in the tensors' own dtype: outputs, and all gradients by autograd."""
    tensors = [t.clone().requires_grad_() for t in (q, k, v, gates, state)]
    q, k, v, gates, state = tensors
    out, last = reference.gate_loop(q, k, v, gates, initial_state=state, return_state=True)
    return out, last, *torch.autograd.grad(out, tensors, grad)


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("dk, dv", [(1, 1), (3, 5), (24, 20)])
@pytest.mark.parametrize("query, key, value, grad_size", [
    (1e20, 1e20, 1e-10, 1e-20), (1e-25, 1e-25, 1e20, 1e20), (1e35, 1e8, 1e-15, 1e-20),
    (1e-10, 1e30, 1e-15, 1.0), (1e20, 1e-38, 1e20, 1e-10)])
def test_gate_loop_is_finite_where_its_steps_are(
        implementation, dk, dv, real, query, key, value, grad_size):
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    b, n, h = 2, 70, 2
    q, k = query * random(b, n, h, dk), key * random(b, n, h, dk)
    v, grad = value * random(b, n, h, dv), grad_size * random(b, n, h, dv)
    gates = 0.6 * torch.complex(random(b, n, h), random(b, n, h)).sgn()
    state = key * value * torch.complex(random(b, h, dk, dv), random(b, h, dk, dv))
    if real:
        gates, state = 0.6 * gates.real.sgn(), state.real
    k[:, 1::3] *= 1e-7  # sizes differ from step to step
    defined = step_by_step(q, k, v, gates, state, grad)
    tensors = [t.clone().requires_grad_() for t in (q, k, v, gates, state)]
    out, last = ops.gate_loop(*tensors[:4], initial_state=tensors[4], return_state=True)
    computed = out, last, *torch.autograd.grad(out, tensors, grad)
    for ours, theirs in zip(computed, defined, strict=True):
        assert theirs.isfinite().all() and ours.isfinite().all()
        scale = theirs.abs().max()
        assert (ours / scale - theirs / scale).abs().max() < 3e-5


@pytest.mark.parametrize("dk, dv", [(3, 5), (24, 20)])
@pytest.mark.parametrize("real", [False, True])
def test_a_gradient_of_large_keys_whose_product_with_them_overflows(implementation, dk, dv, real):
    """One step without a state, whose gates and so their gradients multiply nothing."""
    q, k, v, grad = (size * (1 + torch.rand(2, 1, 2, d)) for size, d in (
        (1e10, dk), (1e20, dk), (1e5, dv), (1e5, dv)))
    gates = torch.full((2, 1, 2), 0.5, dtype=torch.float32 if real else torch.complex64)
    results = []
    for function in (ops.gate_loop, reference.gate_loop):
        leaves = [t.clone().requires_grad_() for t in (q, k, v, gates)]
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for ours, defined in zip(*results, strict=True):
        assert defined.isfinite().all() and torch.allclose(ours, defined, rtol=1e-4)


# ---- products of gates beyond the range of numbers


def _zero_states(operator, gate=1e12):
    """Arguments whose states are 0 but for the last 2 of 60 steps."""
    late, zeros = torch.zeros(1, 60, 2, 3), torch.zeros(1, 2, 3)
    late[:, 58:] = torch.randn(1, 2, 2, 3)
    gates = torch.full((1, 60, 2), gate)
    if operator == "decay_conv":
        return {"x": late, "decay": gates[0, 0], "initial_state": zeros}
    if operator == "gate_loop":
        return {"q": torch.rand(1, 60, 2, 3), "k": late, "v": torch.rand(1, 60, 2, 1),
                "gates": gates, "initial_state": zeros[..., None]}
    if operator == "gate_loop-channels":
        return {"q": torch.rand(1, 60, 2, 1), "k": late[..., :1], "v": torch.rand(1, 60, 2, 1),
                "gates": gates, "initial_state": zeros[..., :1, None]}
    return {"gates": gates[..., None], "inputs": late, "initial_state": zeros}


@pytest.mark.parametrize("operator", ["linear_scan", "linear_scan-reverse", "decay_conv",
                                      "gate_loop", "gate_loop-channels"])
@pytest.mark.parametrize("state", [False, True])
def test_a_state_of_zero_stays_zero_whatever_the_products_of_gates(
        implementation, operator, state):
    """And the adjoint, which is 0 after the last gradient that arrives."""
    tensors, (operator, _, kind) = _zero_states(operator), operator.partition("-")
    options = {"reverse": True} if kind == "reverse" else {}
    if options:
        tensors = {name: t.flip(1) if t.shape[1] == 60 else t for name, t in tensors.items()}
    if not state:
        del tensors["initial_state"]
    results = []
    for function in (getattr(ops, operator), getattr(reference, operator)):
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        out = function(**leaves, **options)
        grad = torch.zeros_like(out)
        grad[:, slice(-2, None) if options else slice(2)] = 1
        results.append([out, *torch.autograd.grad(out, list(leaves.values()), grad)])
    for what, ours, defined in zip(["out", *tensors], *results, strict=True):
        assert defined.isfinite().all() and ours.isfinite().all(), what
        assert torch.allclose(ours, defined, rtol=1e-5), what


class DispatchCount(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **kwargs or {})


def test_what_is_not_finite_costs_a_scan_one_chunk():
    """Of pure PyTorch: its steps are taken one by one, and those of no other chunk."""
    n = 4096
    x, gates = torch.randn(1, n, 3), 0.5 + torch.rand(1, n, 3) / 2

    def count(*values):
        inputs = x.clone()
        inputs[0, 100:101] = torch.tensor(values)
        with DispatchCount() as counted:
            states = scan(gates, inputs, torch.zeros(1, 3))
        defined = reference.linear_scan(gates, inputs)
        assert torch.equal(states.isnan(), defined.isnan())
        assert torch.equal(states.isfinite(), defined.isfinite())
        return counted.calls

    clean = count(0.0, 0.0, 0.0)
    assert 4 * clean < n
    for values in ((NAN, 0, 0), (INF, 0, 0), (NAN, -INF, 1)):
        assert count(*values) < n / 4


def test_outputs_of_gate_loop_at_the_end_of_the_range(implementation):
    """Each chunk multiplies gates, keys and queries in an order of its own."""
    q, k, v = torch.ones(1, 7, 1, 2), torch.ones(1, 7, 1, 2), torch.full((1, 7, 1, 3), 0.1)
    gates = torch.tensor([1.0, 1e19, 1e19, 0.5, 0.5, 1, 1]).view(1, 7, 1)
    k[:, 0], k[:, 1:] = 15, 0
    results = []
    for function in (ops.gate_loop, reference.gate_loop):
        leaves = [t.clone().requires_grad_() for t in (q, k, v, gates)]
        out, state = function(*leaves, return_state=True)
        results.append([out, state, *torch.autograd.grad(out[:, 3:].sum() / 1e38, leaves)])
    for ours, defined in zip(*results, strict=True):
        assert defined.isfinite().all() and ours.isfinite().all()
        assert torch.allclose(ours, defined, rtol=1e-5)


@pytest.mark.parametrize("operator", ["gate_loop", "linear_scan", "decay_conv"])
def test_gradients_inside_vmap_of_what_is_not_finite(operator):
    n = 20
    tensors = not_finite(n)[operator]
    for name, value in itertools.product(tensors, (NAN, INF)):
        if tensors[name].shape[:2] != (2, n):
            continue
        leaves = {name: t.clone() for name, t in tensors.items()}
        leaves[name][0, 11, ..., 0] = value
        axes = tuple(0 if t.shape[:2] == (2, n) else None for t in tensors.values())
        results = []
        for function in (getattr(ops, operator), getattr(reference, operator)):
            def loss(*values, run=function, axes=axes):
                given = {name: v[None] if axis == 0 else v
                         for name, v, axis in zip(tensors, values, axes)}
                out = run(**given)
                return (torch.view_as_real(out) if out.is_complex() else out).sum()

            results.append(torch.vmap(torch.func.grad(loss, tuple(range(len(axes)))), axes)(
                *leaves.values()))
        for what, ours, defined in zip(tensors, *results, strict=True):
            assert torch.equal(ours.isfinite(), defined.isfinite()), (name, value, what)


# ---- what is not finite


def not_finite(n):
    """Arguments of n steps, by the name of the operator and their kind. Time is axis 1."""
    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    gates = 0.9 * torch.complex(random(2, n, 2), random(2, n, 2)).sgn()
    return {
        "linear_scan": {"gates": gates, "inputs": torch.complex(random(2, n, 2), random(2, n, 2))},
        "decay_conv": {"x": random(2, n, 2, 3), "decay": torch.tensor([0.5, 0.9]).double(),
                       "gain": random(2)},
        "fft_conv": {"x": random(2, n, 2, 3), "kernel": random(2, n, 2), "skip": random(2, 3)},
        "fft_conv-shared": {"x": random(2, n, 2, 3), "kernel": random(n, 2)},
        "cumulative_mean": {"x": random(2, n, 3)},
        "gate_loop": {"q": random(2, n, 2, 3), "k": random(2, n, 2, 3), "v": random(2, n, 2, 4),
                      "gates": gates},
        "gate_loop-real": {"q": random(2, n, 2, 3), "k": random(2, n, 2, 3),
                           "v": random(2, n, 2, 4), "gates": gates.real},
        "causal_sgu": {"x": random(2, n, 12), "weight": random(3, n + 1, n + 1),
                       "bias": random(3, n + 1), "gate_residual": random(2, n, 6)},
        "windowed_sgu": {"x": random(2, n, 12), "weight": random(3, 8, 16),
                         "bias": random(3, 8), "gate_residual": random(2, n, 6)}}


@pytest.mark.parametrize("operator", list(not_finite(1)))
def test_what_is_not_finite_reaches_what_depends_on_it_alone(implementation, operator):
    """NaN or infinity at a step of any argument, or of the gradient that arrives."""
    n = 20
    tensors, operator = not_finite(n)[operator], operator.partition("-")[0]
    names = [*(name for name, t in tensors.items() if t.shape[:2] == (2, n)), "grad"]
    for name, value in zip(names, itertools.cycle([NAN, INF])):
        results = []
        for function in (getattr(ops, operator), getattr(reference, operator)):
            leaves = {name: t.clone() for name, t in tensors.items()}
            if name != "grad":
                leaves[name][0, 11, ..., 0] = value
            out = function(**{name: t.requires_grad_() for name, t in leaves.items()})
            grad = torch.ones_like(out)
            if name == "grad":
                grad[0, 11, ..., 0] = value
            results.append([out, *torch.autograd.grad(out, list(leaves.values()), grad)])
        for what, ours, defined in zip(["out", *tensors], *results, strict=True):
            assert torch.equal(ours.isfinite(), defined.isfinite()), (name, what)
            finite = defined.isfinite()
            assert torch.allclose(ours[finite], defined[finite]), (name, what)


# ---- layer norms


@pytest.mark.parametrize("operator", ["windowed_sgu", "causal_sgu"])
def test_the_norm_of_equal_numbers_is_zero(implementation, operator):
    """Their mean is one of them, to the last digit: its rounding would grow by 1 / √eps."""
    for c in (3, 5, 23):
        x = torch.randn(4, 1, 1).expand(4, 8, 2 * c)
        weight = torch.ones(1, 8, 16 if operator == "windowed_sgu" else 8)
        out = getattr(ops, operator)(x, weight, torch.zeros(1, 8))
        assert (out == 0).all()
        doubles = [t.double() for t in (x, weight, torch.zeros(1, 8))]
        scale = torch.rand(c, dtype=torch.float64, requires_grad=True)
        out = getattr(ops, operator)(*doubles, norm_weight=scale, norm_bias=scale.detach(),
                                     gate_residual=torch.randn(4, 8, c).double())
        grad, = torch.autograd.grad(out.sum(), scale)
        assert (grad == 0).all()


@pytest.mark.parametrize("operator", ["windowed_sgu", "causal_sgu"])
@pytest.mark.parametrize("size", [1e20, 1e38])
def test_the_norm_of_numbers_whose_squares_overflow(implementation, operator, size):
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(2, 40, 12, generator=generator).clamp(-3, 3)
    x[:, :, :6] /= size  # res
    x[:, ::3] *= size / 3  # other steps are ordinary
    w = 16 if operator == "windowed_sgu" else 40
    weight = torch.randn(3, w, 2 * w if operator == "windowed_sgu" else w, generator=generator)
    norm_weight = torch.randn(6, generator=generator)
    results = []
    for function, dtype in ((getattr(ops, operator), torch.float32),
                            (getattr(reference, operator), torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, norm_weight)]
        out = function(*leaves[:2], torch.zeros(3, w, dtype=dtype), norm_weight=leaves[2],
                       norm_bias=leaves[2])
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for ours, exact in zip(*results, strict=True):
        largest = exact.abs().amax(-1, keepdim=True)  # steps and rows differ much in size
        assert ((ours - exact).abs() <= 2e-5 * largest).all()




@pytest.mark.parametrize("operator", ["windowed_sgu", "causal_sgu"])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("size", [1, 0.1, 1e-2, 1e-4, 1e-6])
def test_the_norm_of_one_or_two_channels(implementation, operator, channels, size):
    """The gradient of a small gate is as exact as the definition's in float32."""
    generator = torch.Generator().manual_seed(5)
    b, n, w = 64, 1, 64
    x = size * torch.randn(b, n, 2 * channels, generator=generator)
    columns = 2 * w if operator == "windowed_sgu" else w
    weight, bias = (torch.randn(*s, generator=generator) for s in ((1, w, columns), (1, w)))
    grad = torch.randn(b, n, channels, generator=generator)

    def gradient(run, dtype):
        leaf = x.to(dtype).requires_grad_()
        out = run(leaf, weight.to(dtype), bias.to(dtype))
        grad_x, = torch.autograd.grad(out, leaf, grad.to(dtype))
        return grad_x[..., channels:].double()  # of the gate

    exact = gradient(getattr(reference, operator), torch.float64)
    plain = (gradient(getattr(reference, operator), torch.float32) - exact).norm()
    ours = (gradient(getattr(ops, operator), torch.float32) - exact).norm()
    assert ours <= 2 * plain


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("operator", ["windowed_sgu", "causal_sgu"])
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_slopes_near_one_keep_their_digits(operator, activation):
    """1 - y² and 1 - y of an activation y near 1 have none: its exponential has. Of C++."""
    x = torch.ones(1, 16, 2)
    x[..., 1] = torch.arange(16)
    residual = torch.linspace(-12, 12, 16).view(1, 16, 1)
    tensors = [x, torch.zeros(1, 16, 32 if operator == "windowed_sgu" else 16), torch.zeros(1, 16)]
    grads = []
    for dtype, implementation in ((torch.float32, "native"), (torch.float64, "fallback")):
        leaf = residual.to(dtype).requires_grad_()
        with fastmix.force(implementation):
            out = getattr(ops, operator)(*(t.to(dtype) for t in tensors), gate_residual=leaf,
                                         activation=activation)
        grads.append(torch.autograd.grad(out.sum(), leaf)[0].double())
    assert torch.allclose(*grads, rtol=2e-6, atol=0)


# ---- many calls


class Allocated(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "in_maps", "usmblks", "fsmblks", "in_use",
        "fordblks", "keepcost")]


@pytest.mark.skipif(build.compiler() is None or not hasattr(ctypes.CDLL(None), "mallinfo2"),
                    reason="no C++ compiler, or not glibc 2.33")
@pytest.mark.parametrize("operator", list(not_finite(1)))
def test_calls_of_kernels_leave_no_memory_behind(operator):
    """Torch's own conversion of a string argument leaves 48 bytes."""
    memory = ctypes.CDLL(None)
    memory.mallinfo2.restype = Allocated
    tensors, operator = not_finite(3)[operator], operator.partition("-")[0]

    def grown(calls):
        before = memory.mallinfo2().in_use
        for _ in range(calls):
            getattr(ops, operator)(**tensors)
        return (memory.mallinfo2().in_use - before) / calls

    with fastmix.force("native"), torch.no_grad():
        grown(50)
        assert min(grown(200) for _ in range(3)) < 16


# ---- gating units and NaN


def _unit(operator):
    x = torch.randn(2, 9, 8)
    weight = torch.randn(2, 9, 9) if operator == "causal_sgu" else torch.randn(2, 5, 10)
    return x, weight, torch.randn(2, weight.shape[1])


@pytest.mark.parametrize("operator", ["windowed_sgu", "causal_sgu"])
def test_a_nan_that_enters_from_a_state_on_reaches_no_earlier_step(operator):
    x, weight, bias = _unit(operator)
    x[1, 6] = NAN
    run = getattr(ops, operator)
    first, state = run(x[:, :3], weight, bias, return_state=True)
    rest = run(x[:, 3:], weight, bias, initial_state=state)
    expected = getattr(reference, operator)(x, weight, bias)
    assert torch.equal(rest.isnan(), expected[:, 3:].isnan()) and rest[0].isfinite().all()
    assert torch.allclose(rest[:, :3], expected[:, 3:6], atol=1e-5)


@pytest.mark.parametrize("operator", ["windowed_sgu", "causal_sgu"])
def test_gradients_inside_vmap_keep_a_nan_and_large_gates_where_they_are(operator):
    x, weight, bias = _unit(operator)
    x[0, 6, 4:] = NAN
    x[1, :, 4:] *= 1e25  # whose squares overflow

    def gradients(function):
        def loss(x, weight):
            return function(x[None], weight, bias).sum()

        return torch.vmap(torch.func.grad(loss, (0, 1)), (0, None))(x, weight)

    for grad, e in zip(gradients(getattr(ops, operator)),
                       gradients(getattr(reference, operator)), strict=True):
        assert torch.equal(grad[0].isnan(), e[0].isnan()) and not grad[0].isnan().all()
    exact = torch.func.grad(lambda w: getattr(reference, operator)(
        x[1:].double(), w, bias.double()).sum())(weight.double())
    assert torch.allclose(grad[1].double(), exact, atol=1e-4)


@pytest.mark.parametrize("dtype, size", [(torch.float32, 1e30), (torch.float64, 1e200)])
def test_gelu_of_large_numbers_has_finite_gradients(implementation, dtype, size):
    """Their product with the gradient overflows where the slope, 0 or 1, does not."""
    values = size * torch.tensor([-1, 1, -0.5, 0.5], dtype=dtype)
    x, zeros = torch.full((1, 1, 8), size, dtype=dtype), torch.zeros(1, 1, 2, dtype=dtype)

    def run(values):
        return ops.windowed_sgu(x, zeros, zeros[0, :, :1], gate_residual=values[None, None],
                                activation="gelu")

    slope = values.sign().clamp(0) * size
    _, pull = torch.func.vjp(run, values)
    assert torch.equal(pull(torch.ones(1, 1, 4, dtype=dtype))[0], slope)
    leaf = values.clone().requires_grad_()
    grad, = torch.autograd.grad(run(leaf).sum(), leaf, create_graph=True)
    assert torch.equal(grad, slope)


@pytest.mark.parametrize("activation, inner", [("tanh", 2), ("sigmoid", 1)])
def test_slopes_keep_their_digits_where_they_are_small(implementation, activation, inner):
    """4 e / (1 + e)² and e / (1 + e)² with e = exp(-inner |x|), not 1 - tanh² and σ (1 - σ)."""
    values = torch.linspace(-40, 40, 4097).requires_grad_()
    ones, zeros = torch.ones(1, 1, 2 * 4097), torch.zeros(1, 1, 2)
    out = ops.windowed_sgu(ones, zeros, zeros[0, :, :1], gate_residual=values[None, None],
                           activation=activation)
    grad, = torch.autograd.grad(out.sum(), values)
    size = values.detach().double().abs()
    e = (-inner * size).exp()
    slope = inner**2 * e / (1 + e)**2
    rounding = 4 * torch.finfo(torch.float32).eps * (1 + size)
    assert ((grad - slope).abs() <= rounding * slope).all()


def test_gelu_keeps_its_digits_where_it_is_small(implementation):
    """½ x (1 + erf(x / √2)) loses them in float32: at -3.6 it may be off by one part in 1,000."""
    values = torch.linspace(-12, 6, 4097).requires_grad_()
    ones, zeros = torch.ones(1, 1, 2 * 4097), torch.zeros(1, 1, 2)

    def run(values):
        return ops.windowed_sgu(ones, zeros, zeros[0, :, :1], gate_residual=values[None, None],
                                activation="gelu")[0, 0]

    out, mapped = run(values), torch.vmap(run)(values.detach()[None])[0]
    grad, = torch.autograd.grad(out.sum(), values)
    x = values.detach().double()
    share, density = torch.erfc(-x * ROOT_HALF) / 2, (-x * x / 2).exp() * (2 * torch.pi) ** -0.5
    rounding = 2 * torch.finfo(torch.float32).eps * (1 + x * x)  # of x, which squares amplify
    for ours in (out, mapped):
        assert ((ours - x * share).abs() <= rounding * (x * share).abs()).all()
    assert ((grad - share - x * density).abs() <= rounding * (share + (x * density).abs())).all()


@pytest.mark.parametrize("operator", ["windowed_sgu", "causal_sgu"])
def test_an_infinite_gradient_inside_vmap_reaches_no_other_row(operator):
    """That of silu's argument is not finite where gate_residual is infinite."""
    x, weight, bias = _unit(operator)
    residual = torch.zeros(2, 9, 4)
    residual[0, 2] = INF

    def gradient(function):
        def loss(x, residual):
            return function(x[None], weight, bias, gate_residual=residual[None],
                            activation="gelu").sum()

        return torch.vmap(torch.func.grad(loss))(x, residual)

    ours, defined = (gradient(getattr(module, operator)) for module in (ops, reference))
    assert torch.equal(ours.isfinite(), defined.isfinite())


@pytest.mark.parametrize("operator", ["windowed_sgu", "causal_sgu"])
@pytest.mark.parametrize("name", ["residual", "weight", "res"])
def test_a_gradient_that_is_differentiated_again_keeps_a_nan_where_it_is(operator, name):
    """silu's argument is NaN or infinite there, and its derivative with it."""
    x, weight, bias = _unit(operator)
    residual = torch.randn(2, 9, 4)
    if name == "residual":
        residual[0, 2] = NAN
    elif name == "weight":
        weight[0, 2] = -INF
    else:
        x[0, 2, :4] = NAN

    def gradients(module):
        def loss(x, weight, residual):
            out = getattr(module, operator)(x, weight, bias, gate_residual=residual,
                                            activation="silu")
            return out.sum()

        return torch.func.grad(loss, (0, 1, 2))(x, weight, residual)

    for ours, defined in zip(gradients(ops), gradients(reference), strict=True):
        assert torch.equal(ours.isfinite(), defined.isfinite())


def test_a_weight_that_is_not_finite_reaches_no_row_of_a_short_last_window(implementation):
    """Nor, from a state on, rows of any window that the steps do not reach."""
    x, weight, bias = torch.randn(1, 14, 8), torch.randn(2, 4, 8), torch.randn(2, 4)
    weight[:, 2] = NAN

    def pieces(x, weight, bias):
        out, state = ops.windowed_sgu(x[:, :3], weight, bias, return_state=True)
        return torch.cat([out, ops.windowed_sgu(x[:, 3:], weight, bias, initial_state=state)], 1)

    grads = []
    for function in (reference.windowed_sgu, ops.windowed_sgu, pieces):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        out = function(*leaves)
        grads.append(torch.autograd.grad(out, leaves, torch.ones_like(out)))
    for defined, *ours in zip(*grads, strict=True):
        for grad in ours:
            assert torch.equal(grad.isfinite(), defined.isfinite())


def test_an_infinite_gradient_inside_vmap_reaches_no_other_step_of_gate_loop():
    q, k, v = (torch.randn(2, 20, 2, d) for d in (3, 3, 4))
    gates, weight = torch.rand(2, 20, 2), torch.ones(2, 20, 2, 4)
    weight[0, 11, 0, 0] = INF

    def gradients(function):
        def loss(q, k, v, gates, weight):
            return (function(q[None], k[None], v[None], gates[None])[0] * weight).sum()

        return torch.vmap(torch.func.grad(loss, (0, 1, 2, 3)))(q, k, v, gates, weight)

    for ours, defined in zip(gradients(ops.gate_loop), gradients(reference.gate_loop), strict=True):
        assert torch.equal(ours.isfinite(), defined.isfinite())
