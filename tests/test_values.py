"""What every operator computes: against its definition, in every dtype and layout."""

import re

import pytest
import torch

import fastmix
from cases import (
    CASES,
    check_errors,
    complex_dtype,
    distance,
    implementations,
    largest,
    leaves,
    squared_errors,
    unwritten_is_nan,
    weigh,
)
from fastmix.checks import dtype_name
from fastmix.fallback import _segments, causal_sgu, fft_conv, windowed_sgu
from fastmix.native import build

F64 = torch.float64
LENGTHS = (1, 2, 3, 5, 15, 16, 17, 63, 64, 65, 127, 128, 129, 251, 300)
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


every_implementation = pytest.mark.parametrize(
    "case, implementation",
    [pytest.param(case, i, id=f"{name}-{i}") for name, case in CASES.items()
     for i in implementations(case.operator)])


def gradients(run, tensors, weights):
    outputs = run(tensors)
    return outputs, torch.autograd.grad(weigh(outputs, weights), tensors.values())


def check_definition(case, n, b=2):
    """Holds values and gradients in float64 to the definition's. Returns what was drawn, and
    the definition's gradients."""
    tensors = leaves(case.make(n, F64, b=b))
    weights = [torch.randn_like(o) for o in case.run(tensors)]
    outputs, grads = gradients(case.run, tensors, weights)
    defined, defined_grads = gradients(case.define, tensors, weights)
    for o, d in zip(outputs, defined, strict=True):
        assert distance(o, d) < 1e-11, n
    for name, g, d in zip(tensors, grads, defined_grads, strict=True):
        assert distance(g, d) < 1e-10, (n, name)
    return tensors, weights, defined_grads


@every_implementation
def test_definition_at_every_length(case, implementation):
    """Values and gradients in float64, over lengths around every block edge."""
    with fastmix.force(implementation):
        for n in LENGTHS:
            check_definition(case, n)


@pytest.mark.costly
@every_case
def test_fallbacks_in_many_pieces(case, monkeypatch):
    """What they take at a time made so small that three short sequences are many pieces."""
    for module, name in ((_segments, "SEGMENT"), (fft_conv, "SLAB"), (windowed_sgu, "SLAB"),
                         (causal_sgu, "SLAB")):
        monkeypatch.setattr(module, name, 1)
    with fastmix.force("fallback"):
        for n in (38, 531):
            tensors, weights, defined_grads = check_definition(case, n, b=3)
            total = weigh(case.run(tensors), weights)
            traced = torch.autograd.grad(total, tensors.values(), create_graph=True)
            for name, t, d in zip(tensors, traced, defined_grads, strict=True):
                assert distance(t, d) < 1e-10, (n, name)


def in_dtype(t, dtype):
    """A detached copy, rounded to dtype; complex numbers to the complex dtype of its width."""
    return t.detach().to(complex_dtype(dtype) if t.is_complex() else dtype)


@pytest.mark.costly
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_implementation
def test_rounding_is_at_most_twice_the_definitions(case, implementation, dtype):
    """Error against float64; plain PyTorch is the definition in float32 for the same inputs."""
    def draw():
        drawn = {name: in_dtype(t, torch.float32 if name == "initial_state"
                                and case.operator != "linear_scan" else dtype)
                 for name, t in case.make(131, torch.float32).items()}
        tensors = leaves(drawn)
        with fastmix.force(implementation):
            weights = [torch.randn_like(o) for o in case.run(tensors)]
            ours = gradients(case.run, tensors, weights)
        plain, exact = (
            gradients(case.define, leaves({k: in_dtype(t, d) for k, t in drawn.items()}),
                      [in_dtype(w, d) for w in weights])
            for d in (torch.float32, F64))
        return squared_errors(*([*outputs, *grads] for outputs, grads in (ours, plain, exact)))

    check_errors(draw, (16, 48, 192))


@every_case
def test_strided_views(case):
    """Slices of wider tensors, transposed and negated-stride-free views: the same bits."""
    tensors = case.make(70, F64)
    expected = case.run(tensors)
    wider = {name: torch.cat([torch.randn_like(t), t, torch.randn_like(t)], dim=-1)
             [..., t.shape[-1] : 2 * t.shape[-1]] for name, t in tensors.items()}
    for o, e in zip(case.run(wider), expected):
        assert distance(o, e) < 1e-14
    turned = {name: t.transpose(0, -1).contiguous().transpose(0, -1)
              for name, t in tensors.items()}
    assert any(not t.is_contiguous() for t in turned.values())
    for o, e in zip(case.run(turned), expected):
        assert distance(o, e) < 1e-14
    shifted = {name: torch.cat([t.new_ones(1), t.flatten()])[1:].view_as(t)
               for name, t in tensors.items()}
    for o, e in zip(case.define(shifted), case.define(tensors)):  # odd offsets, as of the logits
        assert distance(o, e) < 1e-14
    for implementation in implementations(case.operator):
        with fastmix.force(implementation):
            for o, e in zip(case.run(shifted), expected):
                assert distance(o, e) < 1e-14
    every_second = {name: torch.stack([t, t + 1], dim=-1)[..., 0] for name, t in tensors.items()}
    strided = leaves(every_second)
    weights = [torch.randn_like(o) for o in expected]
    for g, e in zip(gradients(case.run, strided, weights)[1],
                    gradients(case.run, leaves(tensors), weights)[1]):
        assert distance(g, e) < 1e-14


@every_case
def test_expanded_inputs_and_gradients(case):
    """Stride 0, forward and in what comes back: a sum sends one number to every output."""
    tensors = case.make(70, F64)
    one = {name: t[:1].expand_as(t) if t.ndim > 2 else t for name, t in tensors.items()}
    # torch's sigmoid of real logits has other last bits where its elements are not side by side.
    real_logits = case is CASES["gate_loop-diagonal-real"]
    for o, e in zip(case.run(one), case.run({k: t.contiguous() for k, t in one.items()})):
        assert torch.equal(o, e) or real_logits and distance(o, e) < 1e-14
    grad_leaves = leaves(tensors)
    outputs = case.run(grad_leaves)
    total = sum(o.real.sum() if o.is_complex() else o.sum() for o in outputs)
    actual = torch.autograd.grad(total, grad_leaves.values(), retain_graph=True)
    expected = torch.autograd.grad(outputs, grad_leaves.values(),
                                   [torch.ones_like(o) for o in outputs])
    for f, e in zip(actual, expected):
        assert distance(f, e) < 1e-14


@pytest.mark.costly
@every_case
def test_lazily_conjugated_and_negated_inputs(case):
    """Views whose conjugation or negation is still to come, eager and compiled."""
    tensors = case.make(20, F64)
    flipped = {name: t.conj() if t.is_complex() else (1j * t).conj().imag
               for name, t in tensors.items()}
    assert all(t.is_conj() or t.is_neg() for t in flipped.values())
    settled = {name: t.resolve_conj().resolve_neg() for name, t in flipped.items()}
    expected = case.run(settled)
    names = list(tensors)

    def lazily(*values):
        made = {}
        for name, t in zip(names, values):
            made[name] = t.conj() if t.is_complex() else (1j * t).conj().imag
        return case.run(made)

    compiled = torch.compile(lazily, fullgraph=True, backend="aot_eager")
    for actual in (case.run(flipped), lazily(*tensors.values()), compiled(*tensors.values())):
        for f, e in zip(actual, expected):
            assert distance(f, e) < 1e-14


@every_case
def test_unwritten_memory_never_shows(case):
    """Fresh buffers are filled with NaN: every output and gradient is still finite and equal."""
    tensors = leaves(case.make(131, F64))
    weights = [torch.randn_like(o) for o in case.run(tensors)]
    outputs, grads = gradients(case.run, tensors, weights)
    with unwritten_is_nan():
        assert torch.empty(3).isnan().all()
        poisoned, poisoned_grads = gradients(case.run, tensors, weights)
    for p, o in zip((*poisoned, *poisoned_grads), (*outputs, *grads)):
        assert torch.equal(p, o)


@every_case
def test_two_runs_give_the_same_bits_and_leave_the_inputs_alone(case):
    tensors = leaves(case.make(131, torch.float32))
    before = {name: t.detach().clone() for name, t in tensors.items()}
    weights = [torch.randn_like(o) for o in case.run(tensors)]
    first, first_grads = gradients(case.run, tensors, weights)
    second, second_grads = gradients(case.run, tensors, weights)
    for a, b in zip((*first, *first_grads), (*second, *second_grads)):
        assert torch.equal(a, b)
    for name, t in tensors.items():
        assert torch.equal(t, before[name])


@pytest.mark.skipif(build.compiler() is None, reason="C++ kernels promise it, torch does not")
@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_alone_has_the_bits_that_it_has_in_a_batch(case, dtype):
    b = 7  # no other axis has this size
    # Real logits go through torch's sigmoid, with other last bits behind the last whole vector.
    made = case.make(320, dtype, b)

    def run(tensors):
        tensors = leaves(tensors)
        outputs = case.run(tensors)
        shared = [name for name, t in tensors.items() if t.shape[0] not in (1, b)]
        loss = sum((torch.view_as_real(o) if o.is_complex() else o).float().square().sum()
                   for o in outputs)
        grads = dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values()))))
        return [*outputs, *(grads[name] for name in grads if name not in shared)]

    whole = run(made)
    for sample in (0, 3, b - 1):
        alone = run({name: t[sample : sample + 1] if t.shape[0] == b else t
                     for name, t in made.items()})
        for one, all_of_them in zip(alone, whole, strict=True):
            assert torch.equal(one[0], all_of_them[sample])


@every_case
def test_empty_batch(case):
    tensors = leaves(case.make(20, F64, b=0))
    outputs = case.run(tensors)
    one = case.run(case.make(20, F64, b=1))
    for o, e in zip(outputs, one):
        assert o.shape == (0, *e.shape[1:]) and o.dtype == e.dtype
    grads = torch.autograd.grad(weigh(outputs, outputs), tensors.values())
    for g, t in zip(grads, tensors.values()):
        assert g.shape == t.shape and largest(g) == 0


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("causal_sgu")])
def test_long_sequences(name):
    """30,011 steps, a prime, in float32: finite, and close to float64."""
    case = CASES[name]
    tensors = case.make(30_011, torch.float32, b=1)
    exact = case.run({name: in_dtype(t, F64) for name, t in tensors.items()})
    for o, e in zip(case.run(tensors), exact):
        assert o.isfinite().all()
        assert distance(o.to(e.dtype), e) < 3e-5


@pytest.mark.parametrize("make, layout", [
    (torch.Tensor.to_sparse, "sparse_coo"), (torch.Tensor.to_mkldnn, "_mkldnn"),
    (lambda t: torch.nested.nested_tensor([t, t]), "nested")], ids=["sparse", "mkldnn", "nested"])
@every_case
def test_tensors_that_are_not_dense_are_refused(case, make, layout):
    tensors = case.make(5, torch.float32)
    for name, t in tensors.items():
        if not t.is_complex():
            with pytest.raises(TypeError, match=f"^{case.operator}: {name} must be a dense tensor, "
                                                f"got one of layout {layout}"):
                case.run(tensors | {name: make(t)})


@pytest.mark.parametrize("operator, wrong", [
    ("gate_loop", "k"), ("gate_loop", "gate_logits"), ("decay_conv", "decay"),
    ("decay_conv", "gain"), ("fft_conv", "kernel"), ("fft_conv", "skip"),
    ("windowed_sgu", "weight"), ("causal_sgu", "norm_bias"), ("causal_sgu", "gate_residual")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_refused_dtype_is_told_those_that_will_be_taken(operator, wrong, dtype):
    """Converted to any dtype that the error names, the call runs."""
    case = next(c for c in CASES.values() if c.operator == operator and wrong in c.make(3, dtype))
    tensors = case.make(3, dtype)
    with pytest.raises(TypeError, match=f"{operator}: {wrong} must be .*, got int32") as refused:
        case.run({**tensors, wrong: tensors[wrong].int()})
    expected = re.search(r"must be (.*), got", str(refused.value))[1].split(" or ")
    assert dtype_name(dtype) in expected
    for name in expected:
        case.run({**tensors, wrong: tensors[wrong].to(getattr(torch, name))})
