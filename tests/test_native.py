"""The C++ library: its instruction sets, threads, odd numbers, memory safety, and its cache."""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

import fastmix
from cases import (
    CASES,
    complex_dtype,
    distance,
    leaves,
    randn,
    random_decays,
    random_gates,
    unwritten_is_nan,
    weigh,
)
from fastmix import native, ops
from fastmix.native import build, library

ROOT = Path(__file__).parent.parent
NATIVE = {name: case for name, case in CASES.items() if case.operator in native.KERNELS["cpu"]}
every_case = pytest.mark.parametrize("case", NATIVE.values(), ids=NATIVE)

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


def gradients(run, tensors, weights=None):
    tensors = leaves(tensors)
    outputs = run(tensors)
    weights = weights or [torch.ones_like(o) for o in outputs]
    return (*outputs, *torch.autograd.grad(weigh(outputs, weights), tensors.values()))


def python(*code, environment=None):
    return subprocess.run([sys.executable, *code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})})


# ---- what runs


def test_the_library_serves_cpu_tensors():
    x = torch.randn(2, 9, 4)
    assert set(native.KERNELS["cpu"]) <= set(fastmix.ops.__all__)
    with fastmix.force("native"):
        ops.cumulative_mean(x)
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fastmix::cumulative_mean", "CPU")
    for operator in fastmix.ops.__all__:
        actual = fastmix.implementations(operator, "cpu")
        assert (actual["native"] is None) == (operator in native.KERNELS["cpu"])
        if operator not in native.KERNELS["cuda"]:
            assert "no CUDA C++ kernel" in fastmix.implementations(operator, "cuda")["native"]


@pytest.mark.parametrize("name", library.INSTRUCTION_SETS[:-1])
@every_case
def test_every_instruction_set(case, name):
    """The lesser ones; the best one of this machine runs in all other tests."""
    if name not in library.available_instruction_sets()[:-1]:
        pytest.skip(f"{name} is the best of what this library has here, or not in it")
    library.choose_instruction_set(name)
    try:
        for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 3e-4)):
            for n in (1, 2, 17, 64, 65, 131):
                tensors = case.make(n, dtype)
                for actual, defined in zip(gradients(case.run, tensors),
                                          gradients(case.define, tensors), strict=True):
                    assert distance(actual, defined) < limit, n
    finally:
        library.choose_instruction_set()


@pytest.mark.skipif("avx512" not in library.INSTRUCTION_SETS, reason="another architecture")
def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch):
    path = library.load()
    monkeypatch.setattr(library.ctypes, "CDLL", lambda path: types.SimpleNamespace(
        fastmix_best_instruction_set=lambda: 0))
    with pytest.raises(RuntimeError, match="this machine has no avx512"):
        library.choose_instruction_set("avx512")
    monkeypatch.setenv("FASTMIX_INSTRUCTION_SETS", "avx512")  # not loaded for another one either
    monkeypatch.setattr(library, "existing", lambda device_type: path)
    monkeypatch.setattr(library, "_loaded", {"cuda": path})
    monkeypatch.setattr(library, "_failures", {})
    with pytest.raises(RuntimeError, match="built or loaded: .*avx512"):
        library.load()


@pytest.mark.skipif("amx" not in library.INSTRUCTION_SETS, reason="another architecture")
def test_a_matrix_unit_that_linux_refuses_is_not_chosen(monkeypatch):
    before = library.instruction_set()
    monkeypatch.setattr(library.ctypes, "CDLL", lambda path: types.SimpleNamespace(
        fastmix_best_instruction_set=lambda: 3, fastmix_least_instruction_set=lambda: 0,
        fastmix_choose_instruction_set=lambda index: int(index < 3)))
    with pytest.raises(RuntimeError, match="Linux lets this process use no amx: a signal stack"):
        library.choose_instruction_set("amx")
    monkeypatch.undo()
    assert library.instruction_set() == before


def test_an_instruction_set_of_other_processors_is_refused():
    name = "avx2" if "neon" in library.INSTRUCTION_SETS else "neon"
    with pytest.raises(RuntimeError, match=f"this machine has no {name}: choose one of "):
        library.choose_instruction_set(name)


@pytest.mark.parametrize("name", [library.INSTRUCTION_SETS[0], *(
    pytest.param(more, marks=pytest.mark.long) for more in library.INSTRUCTION_SETS[1:])])
def test_an_instruction_set_that_is_named_runs(name):
    """From a library of all of them, which has been compiled."""
    if name not in library.available_instruction_sets():
        pytest.skip(f"this machine, or the library, has no {name}")
    ran = python("-c", "import torch, fastmix; fastmix.ops.cumulative_mean(torch.ones(1, 2))\n"
                 "from fastmix.native import library\n"
                 "print(library.instruction_set(), library.status())\n"
                 "library.choose_instruction_set(library.available_instruction_sets()[0])\n"
                 "library.choose_instruction_set()\n"
                 "print(library.instruction_set())", environment={"FASTMIX_INSTRUCTION_SETS": name})
    assert ran.returncode == 0, ran.stderr
    first, then = ran.stdout.splitlines()
    assert first.startswith(f"{name} /") and first.endswith(f", {name} kernels") and then == name


WIDE = [*native.KERNELS["cpu"], "gate_loop-real", "gate_loop-heads-real"]


def wide(operator, dtype):
    """Arguments with channels and steps enough to be cut into units of work."""
    if operator == "gate_loop-real":
        q, k, v = randn(3, 1, 300, 700, 1, dtype=dtype)
        return {"q": q, "k": k, "v": v, "gates": random_decays(1, 300, 700, dtype=dtype)}
    if operator == "gate_loop-heads-real":
        q, k, v = randn(3, 2, 600, 5, 20, dtype=dtype)
        return {"q": q, "k": k, "v": v, "gates": random_decays(2, 600, 5, dtype=dtype)}
    if operator == "linear_scan":
        return {"gates": random_gates(1, 300, 700, dtype=dtype),
                "inputs": randn(1, 300, 700, dtype=complex_dtype(dtype))}
    if operator == "gate_loop":
        q, k, v = randn(3, 1, 300, 700, 1, dtype=dtype)
        return {"q": q, "k": k, "v": v, "gate_logits": randn(1, 300, 700, 2, dtype=dtype)}
    if operator == "decay_conv":
        return {"x": randn(1, 3000, 5, 67, dtype=dtype), "decay": torch.rand(5).to(dtype),
                "gain": randn(5, dtype=dtype)}
    if operator == "fft_conv":
        return {"x": randn(2, 1500, 3, 65, dtype=dtype), "kernel": randn(1500, 3, dtype=dtype),
                "skip": randn(3, 65, dtype=dtype)}
    if operator == "windowed_sgu":
        return {"x": randn(2, 1000, 128, dtype=dtype), "weight": randn(2, 16, 32, dtype=dtype),
                "bias": randn(2, 16, dtype=dtype), "norm_weight": randn(64, dtype=dtype)}
    if operator == "causal_sgu":
        return {"x": randn(2, 500, 128, dtype=dtype), "weight": randn(2, 500, 500, dtype=dtype),
                "bias": randn(2, 500, dtype=dtype), "norm_weight": randn(64, dtype=dtype)}
    return {"x": randn(1, 3000, 335, dtype=dtype)}


def check_bits(operator, tensors):
    """The same for 1, 2 and 5 threads."""
    def run(tensors):
        out = getattr(ops, operator.partition("-")[0])(**tensors)
        return out if isinstance(out, tuple) else (out,)

    threads = torch.get_num_threads()
    try:
        actual = []
        for count in (1, 2, 5, 2):
            torch.set_num_threads(count)
            actual.append(gradients(run, tensors))
    finally:
        torch.set_num_threads(threads)
    for other in actual[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, actual[0], strict=True))


@pytest.mark.parametrize("operator", WIDE)
def test_the_same_bits_for_any_number_of_threads(operator):
    for dtype in (torch.float32, torch.bfloat16):
        check_bits(operator, wide(operator, dtype))


@pytest.mark.parametrize("h, d", [(102, 3), (43, 5), (29, 12), (3, 170)])
def test_the_same_bits_where_heads_are_no_whole_vectors(h, d):
    """A unit's last channels, fewer than a vector, may be rounded in another way."""
    for dtype in (torch.complex64, torch.complex128):
        check_bits("linear_scan", {"gates": 0.9 * randn(1, 63, h, dtype=dtype).sgn(),
                                   "inputs": randn(1, 63, h, d, dtype=dtype)})


def test_the_same_bits_beside_a_logit_of_zero():
    """A gate's neighbours are not to be seen in its gradient."""
    tensors = wide("gate_loop", torch.float32)
    tensors["gate_logits"][0, :, 0] = 0
    check_bits("gate_loop", tensors)


@pytest.mark.parametrize("operator", WIDE)
def test_units_of_work_meet(operator):
    """Arguments that are cut into units, against the fallback."""
    def run(tensors):
        out = getattr(ops, operator.partition("-")[0])(**tensors)
        return out if isinstance(out, tuple) else (out,)

    tensors = wide(operator, torch.float64)
    actual = gradients(run, tensors)
    with fastmix.force("fallback"):
        expected = gradients(run, tensors)
    for f, e in zip(actual, expected, strict=True):
        assert distance(f, e) < 1e-10


# ---- numbers that are odd


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@every_case
def test_what_is_not_finite_goes_where_the_definition_sends_it(case, value):
    tensors = case.make(40, torch.float32)
    name = next(k for k in ("inputs", "k", "x") if k in tensors)
    tensors[name][1, 20] = value
    for actual, defined in zip(case.run(tensors), case.define(tensors), strict=True):
        assert torch.equal(actual.isfinite(), defined.isfinite())
        if case.operator in ("decay_conv", "cumulative_mean"):  # no complex products
            assert torch.equal(actual.isnan(), defined.isnan())
        there = defined.isfinite()
        torch.testing.assert_close(actual[there], defined[there], rtol=1e-4, atol=1e-4)


def test_infinities_outlast_the_powers_of_a_decay():
    """decay^steps of a chunk is 0 or beyond double's range, and its product with an infinity is
    NaN where the definition has none."""
    decay = torch.tensor([0, 1e-6, -1e-6, 0.5, 1, 1e6, -1e6, 1.5])
    x, weight = torch.randn(2, 1, 200, 8, 128).unbind(0)
    state = torch.randn(1, 8, 128)
    # Channels that grow begin with zeros.
    x[:, :150, 5:], state[:, 5:], weight[:, 40:, 5:] = 0, 0, 0
    x[0, 3, :, 5], x[0, 70, :, 5] = float("inf"), -float("inf")
    x[0, 30, :, 6], weight[0, 170, :, 7] = -float("inf"), float("inf")
    tensors = {"x": x, "decay": decay, "initial_state": state}

    def results(module, tensors, weight):
        given = leaves(tensors)
        out = module.decay_conv(**given)
        return out, *torch.autograd.grad(out, given.values(), weight)

    # What may be off is a share of the terms' sizes: those of a channel that grows may cancel.
    sizes = results(fastmix.reference, {name: t.abs() for name, t in tensors.items()}, weight.abs())
    actual = results(ops, tensors, weight)
    defined = results(fastmix.reference, tensors, weight)
    for a, d, size in zip(actual, defined, sizes, strict=True):
        scale = torch.where(size.isfinite(), size, 1).clamp(min=1)
        torch.testing.assert_close(a / scale, d / scale, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "gelu", "silu"])
def test_activations_far_from_zero(activation):
    sizes = torch.tensor([0, 1e-30, 1, 20, 87, 88, 100, 1e4, 1e30, 1e38, 3e38, float("inf")])
    values = torch.cat([sizes, -sizes])[None, None]
    ones, zeros = torch.ones(1, 1, 2 * values.shape[-1]), torch.zeros(1, 1, 2)

    def results(module, dtype):
        residual = values.to(dtype).requires_grad_()
        out = module.windowed_sgu(ones.to(dtype), zeros.to(dtype), zeros[0, :, :1].to(dtype),
                                  gate_residual=residual, activation=activation)
        return out.double(), torch.autograd.grad(out.sum(), residual)[0].double()

    defined = results(fastmix.reference, torch.float64)
    for dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(results(ops, dtype), defined, rtol=1e-5, atol=1e-6,
                                   equal_nan=True)


def test_gradients_of_what_meets_nothing_are_zero():
    for gates in ((1, 3, 2), (1, 3, 2, 0), (1, 3)):
        tensors = {"gates": torch.rand(gates), "inputs": torch.randn(1, 3, 2, 0)}
        with unwritten_is_nan():
            actual = gradients(lambda t: (ops.linear_scan(**t),), tensors)
        assert all(torch.equal(t, torch.zeros_like(t)) for t in actual)


def test_denormals_are_kept():
    tiny = torch.full((1, 70, 1, 20), 3e-42)
    half = torch.full((1,), 0.5)
    torch.testing.assert_close(ops.decay_conv(tiny, half)[0, :2, 0, 0].double(),
                               torch.tensor([3e-42, 4.5e-42]).double(), rtol=0, atol=2e-45)
    assert torch.equal(ops.cumulative_mean(tiny), tiny)
    gates = torch.zeros(1, 70, 20)
    assert torch.equal(ops.linear_scan(gates, tiny[:, :, 0]), tiny[:, :, 0])
    one = torch.ones(1, 70, 20, 1)
    out = ops.gate_loop(one, one, tiny.movedim(2, 3), gates=gates.to(torch.complex64))
    assert torch.equal(out, tiny.movedim(2, 3))


def test_gates_of_any_logits():
    """|z| from the smallest denormal to beyond what can be squared, and 0."""
    sizes = torch.tensor([0, 1e-45, 1e-40, 1e-30, 1e-15, 1e-3, 1, 90, 1e10, 1e15, 1e30, 3e38])
    z = torch.stack([0.6 * sizes, -0.8 * sizes], dim=-1)[None, :, None]
    n = len(sizes)
    one, state = torch.ones(1, n, 1, 1), torch.ones(1, 1, 1, 1, dtype=torch.complex64)
    for i in range(n):
        _, actual = ops.gate_loop(one[:, :1], 0 * one[:, :1], one[:, :1], initial_state=state,
                                 gate_logits=z[:, i : i + 1], return_state=True)
        _, exact = fastmix.reference.gate_loop(
            one[:, :1].double(), 0 * one[:, :1].double(), one[:, :1].double(),
            gate_logits=z[:, i : i + 1].double(), initial_state=state.to(torch.complex128),
            return_state=True)
        assert (actual - exact).abs().max() < 3e-7, sizes[i]


def test_offsets_beyond_two_to_the_31():
    """A batch stride of 2^31 elements: memory that is reserved, and touched in two places."""
    far = 2**31 + 64
    room = torch.empty(far + 4096, dtype=torch.bfloat16)
    rows = torch.randn(2, 3, 40, dtype=torch.bfloat16)
    room[:120], room[far : far + 120] = rows[0].flatten(), rows[1].flatten()
    x = room.as_strided((2, 3, 40), (far, 40, 1))
    assert torch.equal(ops.cumulative_mean(x), ops.cumulative_mean(rows))
    decay = torch.rand(5)
    assert torch.equal(ops.decay_conv(x.unflatten(2, (5, 8)), decay),
                       ops.decay_conv(rows.unflatten(2, (5, 8)), decay))
    assert torch.equal(ops.linear_scan(x, x), ops.linear_scan(rows, rows))
    heads, near = x.unflatten(2, (5, 8)), rows.unflatten(2, (5, 8))
    logits = torch.randn(2, 3, 5, 2, dtype=torch.bfloat16)
    assert torch.equal(ops.gate_loop(heads, heads, heads, gate_logits=logits),
                       ops.gate_loop(near, near, near, gate_logits=logits))
    kernel = torch.randn(3, 5, dtype=torch.bfloat16)
    assert torch.equal(ops.fft_conv(heads, kernel), ops.fft_conv(near, kernel))
    weight, bias = torch.randn(2, 2, 4), torch.randn(2, 2)
    assert torch.equal(ops.windowed_sgu(x, weight, bias), ops.windowed_sgu(rows, weight, bias))


@pytest.mark.long
@pytest.mark.parametrize("dtype, n, tolerance", [(torch.float32, 11_008, 2e-4),
                                                 (torch.bfloat16, 22_016, 1e-2)])
def test_rows_that_start_within_a_vector_of_a_large_output(dtype, n, tolerance):
    """Outputs beyond 8 MB go past the caches, which only whole vectors can."""
    q, k, v = torch.randn(3, 1, n, 8, 24, dtype=dtype).unbind(0)
    x = torch.randn(1, n, 7, 29, dtype=dtype)
    logits, gates = torch.randn(1, n, 8, 2, dtype=dtype), torch.rand(1, n, 64, dtype=dtype)
    weight, bias, decay = torch.randn(4, 16, 32) / 16, torch.randn(4, 16), torch.rand(7)
    runs = [(lambda q, k, v: ops.gate_loop(q, k, v, gate_logits=logits), (q, k, v)),
            (lambda x: ops.linear_scan(gates, x), (torch.randn(1, n, 64, 24, dtype=dtype),)),
            (lambda x: ops.fft_conv(x, gates[0, :, :8]), (q,)),
            (lambda x: ops.windowed_sgu(x, weight, bias), (x.new_empty(1, n, 8 * 21).normal_(),)),
            (lambda x: ops.decay_conv(x, decay), (x,)), (ops.cumulative_mean, (x,))]
    for run, tensors in runs:
        tensors = dict(enumerate(tensors))

        def call(tensors, run=run):
            return (run(*tensors.values()),)

        actual = gradients(call, tensors)
        with fastmix.force("fallback"):
            expected = gradients(call, tensors)
        for f, e in zip(actual, expected, strict=True):
            assert distance(f, e) < tolerance


@pytest.mark.long
def test_complex_rows_of_a_large_output_that_start_within_a_vector():
    gates, x = torch.randn(2, 1, 36_200, 29, dtype=torch.complex64).unbind(0)
    tensors = {"gates": gates / (1 + gates.abs()), "x": x}

    def call(tensors):
        return (ops.linear_scan(tensors["gates"], tensors["x"]),)

    actual = gradients(call, tensors)
    with fastmix.force("fallback"):
        expected = gradients(call, tensors)
    for f, e in zip(actual, expected, strict=True):
        assert distance(f, e) < 1e-5


# ---- the matrix unit


@pytest.fixture
def both_units():
    """Calls a function with the matrix unit and without: [its results, its results]."""
    if build.MATRIX_UNIT not in library.available_instruction_sets():
        pytest.skip("this machine has no matrix unit")
    try:
        library.choose_instruction_set(build.MATRIX_UNIT)
    except RuntimeError as error:
        pytest.skip(str(error))

    def run(function, *tensors):
        results = []
        for name in (build.MATRIX_UNIT, "avx512"):
            library.choose_instruction_set(name)
            results.append(function(*tensors))
        return results

    yield run
    library.choose_instruction_set()


def gating_unit(operator, n, heads, d, size):
    """Numbers of bfloat16 for a gating unit, whose weight is (heads, size, size or 2 · size)."""
    columns = 2 * size if operator == "windowed_sgu" else size
    shapes = {"x": (2, n, 2 * heads * d), "weight": (heads, size, columns), "bias": (heads, size),
              "norm_weight": (heads * d,), "norm_bias": (heads * d,), "grad": (2, n, heads * d)}
    return {name: randn(*shape, dtype=torch.bfloat16) for name, shape in shapes.items()}


def both_ways(operator, tensors, dtype, weight_dtype):
    """A gating unit's results and gradients. Its kernels, unlike ops, take a narrower weight: so
    results show what products were rounded to."""
    t = {name: tensor.to(weight_dtype if name == "weight" else dtype)
         for name, tensor in tensors.items()}
    arguments = (t["x"], t["weight"], t["bias"], t["norm_weight"], t["norm_bias"], 1e-5, None,
                 "tanh")
    unit = getattr(torch.ops.fastmix, operator)
    backward = getattr(torch.ops.fastmix, f"{operator}_backward")
    return [unit(*arguments), *backward(t["grad"], *arguments)[:5]]


@pytest.mark.parametrize("operator, size", [("causal_sgu", None), ("windowed_sgu", 128),
                                            ("windowed_sgu", 171)])
def test_products_of_the_matrix_unit_are_as_exact(both_units, operator, size):
    """Of every awkward length, beside float64: as those of floats."""
    differ = 0
    for n, heads, d in ((127, 1, 5), (128, 2, 16), (129, 3, 17), (144, 1, 33),
                        (145, 2, 70), (257, 1, 130), (500, 2, 64)):
        tensors = gating_unit(operator, n, heads, d, size or n + n % 3)
        exact = both_ways(operator, tensors, torch.float64, torch.float64)
        ours, floats = both_units(both_ways, operator, tensors, torch.float32, torch.bfloat16)
        differ += not torch.equal(ours[0], floats[0])
        for name, a, b, e in zip(("out", *tensors), ours, floats, exact, strict=False):
            assert distance(a, e) <= 2 * distance(b, e) + 1e-7, (name, n, heads, d)
    assert differ  # it ran


def mixture(weight, norm_weight, x):
    """The mixture of a causal gating unit alone: triangle(W) · normed gate."""
    bias = weight.new_zeros(weight.shape[:2], dtype=x.dtype)
    return torch.ops.fastmix.causal_sgu(x, weight, bias, norm_weight, torch.zeros_like(norm_weight),
                                        1e-5, None, "outside")


@pytest.mark.parametrize("smallest", [-4, -12, -25, -38])
def test_the_matrix_unit_keeps_small_numbers(both_units, smallest):
    """It takes those below 2⁻¹²⁶, and parts of larger ones, for zeros."""
    n, c = 150, 48
    x = torch.randn(1, n, 2 * c)
    weight = torch.randn(1, n, n) * 10 ** (torch.rand(1, n, 1) * smallest)
    weight = torch.where(torch.rand(1, n, n) < 0.1, 0, weight).bfloat16()
    norm_weight = torch.randn(c) * 10 ** (torch.rand(c) * smallest / 2)
    norm_weight[:5] = 0
    exact = mixture(weight.double(), norm_weight.double(), x.double())
    normed = mixture(torch.eye(n, dtype=torch.float64)[None], norm_weight.double(), x.double())
    sizes = weight.double().tril().abs() @ (normed.abs() + norm_weight.double().abs())
    for result in both_units(mixture, weight, norm_weight, x):
        assert ((result - exact).abs() <= 1e-6 * sizes + 1e-42).all()


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_the_matrix_unit_spreads_what_is_not_finite_as_floats_do(both_units, value):
    n, c = 200, 40
    x, weight = torch.randn(2, n, 2 * c), torch.randn(1, n, n).bfloat16()
    weight[0, 130, 70], weight[0, 60, 61] = value, value  # this one meets nothing
    x[1, 90] = value
    ours, floats = both_units(mixture, weight, torch.ones(c), x)
    assert 0 < ours.isfinite().float().mean() < 1
    assert ours[0, :130].isfinite().all() and ours[0, 131:].isfinite().all()
    torch.testing.assert_close(ours, floats, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operator", ["windowed_sgu", "causal_sgu"])
def test_the_same_bits_with_the_matrix_unit_for_any_number_of_threads(both_units, operator):
    tensors = gating_unit(operator, 700, 2, 72, 130 if operator == "windowed_sgu" else 700)
    del tensors["grad"]
    both_units(check_bits, operator, tensors)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux grants the matrix unit")
def test_a_matrix_unit_that_is_refused_is_left_alone(both_units):
    """Linux refuses it to a process whose signal stack cannot hold its registers."""
    ran = python("-c", """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(4096)
stack = Stack(ctypes.addressof(memory), 0, 4096)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
import torch, fastmix
x, weight, bias = torch.randn(1, 100, 8), torch.randn(1, 100, 100), torch.randn(1, 100)
fastmix.ops.causal_sgu(*(t.bfloat16() for t in (x, weight, bias)))
from fastmix.native import library
print(library.instruction_set())
try:
    library.choose_instruction_set("amx")
except RuntimeError as error:
    print(error)
""", environment={"FASTMIX_INSTRUCTION_SETS": ""})
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("avx512\nthis machine has no amx: choose one of portable")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux grants the matrix unit")
def test_the_first_kernel_that_would_use_the_matrix_unit_asks_for_it(both_units):
    """A process that has it needs larger signal stacks, so no other kernel asks, nor does who is
    asked what runs."""
    ran = python("-c", """
import ctypes, torch, fastmix
def granted():
    mask = ctypes.c_uint64()  # arch_prctl(ARCH_GET_XCOMP_PERM, …)
    assert ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(mask)) == 0
    return bool(mask.value >> 18 & 1)
x, weight, bias = torch.randn(1, 100, 8), torch.randn(1, 100, 100), torch.randn(1, 100)
fastmix.ops.cumulative_mean(x)
fastmix.ops.causal_sgu(x, weight, bias)
from fastmix.native import library
assert library.status().endswith(", amx kernels")
before = granted()
fastmix.ops.causal_sgu(*(t.bfloat16() for t in (x, weight, bias)))
print(before, granted())
""", environment={"FASTMIX_INSTRUCTION_SETS": ""})
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "False True\n"


# ---- calls of the registered operators themselves, with what fastmix.ops never gives them


class Recorded(TorchDispatchMode):
    """Runs operators of fastmix, and keeps their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "fastmix":
            self.calls.append((operator, [
                a.detach() if isinstance(a, torch.Tensor) else a for a in args]))
        return operator(*args, **(kwargs or {}))


def registered_calls(case):
    """(operator, its arguments) of a call and of its backward."""
    with Recorded() as record:
        gradients(case.run, case.make(5, torch.float32))
    assert len(record.calls) >= 2
    return record.calls


def misfits(operator, name, value):
    """What can stand in place of an argument, and does not fit."""
    if name == "carry_every":
        return [-64, -1, 1, 63, 100, 2**40, 2**63 - 1]
    of_any_rank = operator._schema.name.startswith("fastmix::cumulative_mean")
    if not isinstance(value, torch.Tensor) or of_any_rank and name == "x" and (
            operator._schema.name.endswith("_backward")):  # which does not read it
        return []
    made = [torch.ones(value.shape, dtype=dtype) for dtype in (torch.int64, torch.int8)]
    if value.ndim > 1:
        made.append(value.narrow(1, 0, 0))
    if not of_any_rank:
        made += [value[..., None], value.flatten() if value.ndim > 1 else value.sum()]
    return made


@every_case
def test_operators_refuse_what_kernels_would_read_wrongly(case):
    """Programs may call torch.ops.fastmix with anything: kernels do not read beyond tensors."""
    with fastmix.force("native"):
        for operator, args in registered_calls(case):
            name = operator._schema.name.removesuffix("_backward")
            for i, argument in enumerate(operator._schema.arguments):
                for value in misfits(operator, argument.name, args[i]):
                    with pytest.raises(RuntimeError, match=f"{name}: .* must .*, got "):
                        operator(*args[:i], value, *args[i + 1:])


def step_arguments(name):
    if name == "dss_step":
        power = torch.randn(5, dtype=torch.complex64)
        return [torch.zeros(2, 3, 5, dtype=torch.complex64), torch.randn(2, 1, 3), power, power,
                torch.randn(3, 5), torch.randn(3, 5), torch.randn(3)]
    if name == "fft_conv_step":
        first, lags = torch.randn(2, 4, 2, 3), torch.randn(2, 4, 2)
        return [torch.randn(2, 1, 2, 3), torch.randn(2, 1, 2), torch.randn(2, 3), first[:, :3],
                torch.randn(2, 4, 2, 3), lags[:, :3], first, lags]
    return [torch.zeros(2, 8, 6), torch.randn(2, 1, 12), torch.randn(2, 8, 8), torch.randn(2, 8),
            torch.randn(6), torch.randn(6), 1e-5, torch.randn(2, 1, 6), "tanh", 3]


@pytest.mark.parametrize("name", ["sgu_step", "dss_step", "fft_conv_step"])
def test_steps_refuse_what_kernels_would_read_wrongly(name):
    operator, args = getattr(torch.ops.fastmix, name).default, step_arguments(name)
    with fastmix.force("native"):
        out = operator(*args)
        assert all(o.isfinite().all() for o in (out if isinstance(out, tuple) else (out,)))
        for i, argument in enumerate(operator._schema.arguments):
            wrong = misfits(operator, argument.name, args[i])
            if argument.alias_info is not None:  # written in place
                wrong.append(args[0].mT.contiguous().mT)
            for value in [-1, 8, 2**40] if argument.name == "t" else wrong:
                with pytest.raises(RuntimeError, match=f"{name}: .* must .*, got "):
                    operator(*args[:i], value, *args[i + 1:])


@every_case
def test_operators_read_no_further_than_a_shorter_argument(case):
    """Of an axis too short by one: refused, or what fits that size is computed."""
    with fastmix.force("native"):
        for operator, args in registered_calls(case):
            for i, t in enumerate(args):
                for axis in range(t.ndim if isinstance(t, torch.Tensor) else 0):
                    shorter = t.narrow(axis, 0, t.shape[axis] - 1)
                    with unwritten_is_nan(), contextlib.suppress(RuntimeError):
                        out = operator(*args[:i], shorter, *args[i + 1:])
                        assert all(o.isfinite().all() for o in out), (operator, i, axis)


# ---- threads and processes


def test_eight_callers_at_once():
    tensors = [{name: wide(name, torch.float32) for name in native.KERNELS["cpu"]}
               for _ in range(8)]

    def run(drawn):
        return [o for name in native.KERNELS["cpu"]
                for o in [getattr(ops, name)(**drawn[name])] if isinstance(o, torch.Tensor)]

    expected = [run(drawn) for drawn in tensors]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for actual, e in zip(pool.map(run, tensors), expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(actual, e, strict=True))


class Means(Dataset):
    x = torch.randn(6, 1, 3000, 64)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return ops.cumulative_mean(self.x[i])[0]


def test_data_loader_workers():
    expected = ops.cumulative_mean(Means.x.flatten(0, 1))
    actual = torch.cat(list(DataLoader(Means(), batch_size=2, num_workers=2)))
    assert torch.equal(actual, expected)


def test_after_a_fork():
    """The child has no threads but its own; torch's own operators wait for ever there if they
    are given more than 32,768 numbers."""
    ran = python("-c", """
import os, signal, torch
from fastmix import ops
torch.set_num_threads(2)
r = torch.randn
calls = [
    ("decay_conv", dict(x=r(16, 100, 16, 256), decay=torch.rand(16))),
    ("gate_loop", dict(q=r(2, 90, 8, 64), k=r(2, 90, 8, 64), v=r(2, 90, 8, 64),
                       gate_logits=r(2, 90, 8, 2))),
    ("linear_scan", dict(gates=r(2, 300, 20, 30).sigmoid(),
                         inputs=r(2, 30, 300, 20).permute(0, 2, 3, 1))),
    ("fft_conv", dict(x=r(1, 300, 4, 64), kernel=r(300, 4))),
    ("windowed_sgu", dict(x=r(1, 400, 128), weight=r(2, 512, 1024), bias=r(2, 512))),
    ("windowed_sgu", dict(x=r(1, 600, 128).bfloat16(), weight=r(2, 256, 512).bfloat16(),
                          bias=r(2, 256).bfloat16())),
    ("causal_sgu", dict(x=r(1, 300, 128), weight=r(2, 300, 300).mT, bias=r(2, 300))),
    ("cumulative_mean", dict(x=r(1, 500, 4, 8, 5).transpose(2, 4)))]
for _, tensors in calls:
    for t in tensors.values():
        t.requires_grad_()

def run(name, tensors, weight):
    out = getattr(ops, name)(**tensors)
    return [t.detach() for t in (out, *torch.autograd.grad(out, tensors.values(), weight))]

for name, tensors in calls:
    weight = torch.ones_like(getattr(ops, name)(**tensors))
    expected = run(name, tensors, weight)
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        same = [bytes(a.view(torch.uint8).numpy()) == bytes(b.view(torch.uint8).numpy())
                for a, b in zip(run(name, tensors, weight), expected, strict=True)]
        os._exit(0 if all(same) else 1)
    assert os.waitpid(child, 0)[1] == 0, name
    assert all(torch.equal(a, b) for a, b in zip(run(name, tensors, weight), expected))
""")
    assert ran.returncode == 0, ran.stderr


# ---- the code


@pytest.mark.long
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_kernels_share_no_code_across_instruction_sets(tmp_path):
    """A linker merges weak functions, and could hand AVX-512 code to a machine without it."""
    for file in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        if "FASTMIX_CPU" not in file.read_text():
            continue
        made = tmp_path / f"{file.stem}.o"
        subprocess.run([*build.compiler(), *build.FLAGS, *build.KERNELS, "-O0",
                        f"-DFASTMIX_CPU={build.CHOICES[0]}", "-c", str(file), "-o", str(made)],
                       check=True)
        symbols = subprocess.run(["nm", "-C", made], capture_output=True, text=True).stdout
        weak = [line for line in symbols.splitlines() if line[17:18] in "WVu"]
        assert not weak, (file.name, weak)


def test_native_code_includes_stable_headers_only():
    for file in (ROOT / "csrc").rglob("*"):
        for line in file.read_text().splitlines() if file.is_file() else ():
            if line.startswith("#include") and any(
                    part in line for part in ("torch/", "ATen", "c10")):
                assert "torch/csrc/stable/" in line or "torch/headeronly/" in line, (file, line)


# ---- the cache


@pytest.fixture
def quick(quick_compiler, tmp_path):
    """An environment with an empty cache, as a user's: for this machine's instruction set."""
    return {"CXX": quick_compiler, "FASTMIX_CACHE": str(tmp_path / "cache"),
            "FASTMIX_INSTRUCTION_SETS": ""}


SETS = """
from fastmix.native import build, library
own, = build.own_instruction_sets()
assert library.available_instruction_sets() in [(own,), ("avx512", build.MATRIX_UNIT)]
library.choose_instruction_set(build.own_instruction_sets()[-1])
if own != build.CHOICES[0]:
    try:
        library.choose_instruction_set(build.CHOICES[0])
    except RuntimeError as error:
        assert "set FASTMIX_INSTRUCTION_SETS=all before" in str(error)
    else:
        raise AssertionError
"""

CALL = """
import sys, warnings, torch, fastmix
from fastmix.native import library
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        out = fastmix.ops.cumulative_mean(torch.tensor([[1.0, 3.0]]))
assert out.tolist() == [[1.0, 2.0]]
print(len(caught), *(str(w.message) for w in caught))
print(library._loaded.get("cpu"))
"""


@pytest.mark.long
def test_first_use_compiles_and_the_next_process_finds_it(quick):
    first = python("-c", CALL, environment=quick)
    assert first.returncode == 0, first.stderr
    assert "fastmix: compiling its kernels, 0 of" in first.stderr
    (library,) = Path(quick["FASTMIX_CACHE"]).glob("*.so")
    assert first.stdout.splitlines() == ["0", str(library)] and library.stat().st_mode & 0o77 == 0
    second = python("-c", CALL, environment=quick)
    sets = python("-c", SETS, environment=quick)
    assert sets.returncode == 0, sets.stderr
    assert second.stdout == first.stdout and second.stderr == ""

    # A read-only cache does, and so does no compiler; a library that others can write to does not.
    library.parent.chmod(0o500)
    assert python("-c", CALL, environment=quick).stdout == first.stdout
    without = python("-c", CALL, environment=quick | {"CXX": "no-such-compiler"})
    assert without.stdout == first.stdout
    library.parent.chmod(0o700)
    library.chmod(0o722)
    refused = python("-c", CALL, environment=quick)
    assert refused.stdout.startswith("1 ") and "written to by others" in refused.stdout
    assert refused.stdout.endswith("None\n")


@pytest.mark.long
@pytest.mark.skipif("avx2" not in build.CHOICES, reason="another architecture")
def test_a_library_for_tests_on_a_machine_without_avx512(quick, monkeypatch):
    if "avx2" not in library.available_instruction_sets():
        pytest.skip("this machine has no avx2")
    sets, folder = ("portable", "avx2"), Path(quick["FASTMIX_CACHE"])
    monkeypatch.setenv("CXX", quick["CXX"])
    folder.mkdir(mode=0o700)
    made = folder / build.compiled_name(sets=sets)
    build.build(made, Path(torch.__file__).parent, sets=sets)
    ran = python("-c", CALL + "print(library.available_instruction_sets())\n"
                 "library.choose_instruction_set('portable')\n"
                 "fastmix.ops.gate_loop(*torch.ones(3, 1, 9, 2, 4), torch.ones(1, 9, 2))",
                 environment=quick | {"FASTMIX_INSTRUCTION_SETS": "avx2"})
    assert ran.returncode == 0 and ran.stdout == f"0\n{made}\n{sets}\n", ran.stdout + ran.stderr


def test_a_cache_that_others_can_write_to_is_refused(quick):
    folder = Path(quick["FASTMIX_CACHE"])
    folder.mkdir()
    folder.chmod(0o777)
    ran = python("-c", CALL, environment=quick)
    assert ran.returncode == 0 and ran.stdout.startswith("1 fastmix runs its pure PyTorch fallback")
    assert f"{folder} can be written to by others" in ran.stdout and not any(folder.iterdir())
    forced = python("-c", "import fastmix",
                    environment=quick | {"FASTMIX_IMPLEMENTATION": "native"})
    assert forced.returncode != 0 and "can be written to by others" in forced.stderr


@pytest.mark.long
def test_a_cache_that_cannot_be_looked_at_is_no_error(quick, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    names = ["x" * 300] if os.access(closed, os.X_OK) else ["x" * 300, "closed/cache"]
    for name in names:
        ran = python("-c", CALL, environment=quick | {"FASTMIX_CACHE": str(tmp_path / name)})
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.startswith("1 fastmix runs its pure PyTorch fallback")
        assert name in ran.stdout and "(set FASTMIX_CACHE to another)" in ran.stdout


def test_the_cache_is_where_it_was_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTMIX_CACHE", "here")
    assert library.cache_folder() == tmp_path / "here"


def test_without_a_compiler_the_fallback_runs_and_says_so_once(quick):
    nothing = quick | {"CXX": "no-such-compiler"}
    ran = python("-c", CALL, environment=nothing)
    assert ran.returncode == 0 and ran.stdout.startswith("1 fastmix runs its pure PyTorch fallback")
    assert "no C++ compiler was found" in ran.stdout
    env = python("-m", "fastmix.env", "--quick", environment=nothing)
    assert "no C++ compiler was found" in env.stdout
    assert "decay_conv            fallback" in env.stdout


@pytest.mark.long
def test_a_compiler_that_fails_is_quoted(quick, tmp_path):
    failing = tmp_path / "c++"
    failing.write_text("#!/bin/sh\necho 'that will not do' >&2\nexit 1\n")
    failing.chmod(0o755)
    ran = python("-c", CALL, environment=quick | {"CXX": str(failing)})
    assert ran.returncode == 0 and "that will not do" in ran.stdout


@pytest.mark.long
def test_a_killed_build_is_forgotten_and_several_at_once_agree(quick):
    run = [sys.executable, "-c", CALL]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **quick}
    killed = subprocess.Popen(run, env=environment, stderr=subprocess.PIPE, text=True)
    killed.stderr.readline()  # it has begun
    killed.kill()
    killed.wait()
    killed.stderr.close()
    several = [subprocess.Popen(run, env=environment, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True) for _ in range(2)]
    actual, said = zip(*(process.communicate(timeout=300) for process in several), strict=True)
    assert actual[0] == actual[1] and actual[0].startswith("0\n")
    # One compiles, the other waits, and nothing is left of the one that was killed.
    assert sorted("this one waits" in text for text in said) == [False, True], said
    assert sorted("compiling its kernels" in text for text in said) == [False, True], said
    cache = Path(quick["FASTMIX_CACHE"])
    assert len(list(cache.glob("*.so"))) == 1 and not list(cache.glob(".building-*"))


def test_threads_that_come_at_once_compile_once(monkeypatch):
    """The lock around the first use."""
    built = []

    def slow_build(device_type):
        built.append(threading.get_ident())
        time.sleep(0.2)
        return loaded

    loaded = library.load()
    monkeypatch.setattr(library, "_loaded", {})
    monkeypatch.setattr(library, "existing", slow_build)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: library.load(), range(8))) == {loaded}
    assert len(built) == 1
    assert ctypes.CDLL(str(loaded)).fastmix_best_instruction_set() >= 0
