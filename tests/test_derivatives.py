"""What holds for every operator: its derivatives, and the transforms it composes with."""

import contextlib

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import fastmix
from cases import CASES, as_tuple, distance, largest, leaves, weigh
from fastmix import ops, reference
from fastmix.ops._register import OPERATORS

F64 = torch.float64
pytestmark = pytest.mark.costly
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def positional(case, tensors):
    """The operator as a function of its tensors alone, and those tensors."""
    names = list(tensors)

    def call(*values):
        out = case.run(dict(zip(names, values)))
        return out if len(out) > 1 else out[0]

    return call, tuple(tensors.values())


def scalar(call):
    """A smooth real function of the operator's outputs."""
    def loss(*values):
        outputs = as_tuple(call(*values))
        real = [torch.view_as_real(o) if o.is_complex() else o for o in outputs]
        return sum((o.square() + o.sin()).sum() for o in real)

    return loss


# The next two tests differentiate along random directions (fast_mode). Derivatives one by one are
# held to the definition's by test_values.py and by what follows here.
@every_case
def test_first_derivatives(case):
    call, values = positional(case, leaves(case.make(5, F64)))
    assert gradcheck(call, values, check_forward_ad=True, check_batched_grad=True,
                     check_batched_forward_grad=True, fast_mode=True)


def test_a_tangent_is_rounded_once():
    """What x and gain add to it is added up in float32: it was run once for each argument."""
    x, gain = torch.tensor([[[[0.787]]]]).half(), torch.tensor([-0.978]).half()
    move_x, move_gain = torch.tensor([[[[1.106]]]]).half(), torch.tensor([1.375]).half()
    _, tangent = torch.func.jvp(lambda x, gain: ops.decay_conv(x, torch.ones(1), gain),
                                (x, gain), (move_x, move_gain))
    exact = x.double() * move_gain.double() + gain.double() * move_x.double()
    assert 0 < abs(exact) < 1e-3 and abs(tangent - exact) <= 1e-3 * abs(exact)


def test_forward_mode_of_an_output_that_is_a_view():
    """Torch wants its tangent laid out alike, and said so in words about itself."""
    x, kernel = torch.randn(2, 2, 3, 1).half(), torch.randn(2, 3, 3).half()
    moves = torch.randn_like(x), torch.randn_like(kernel)
    with fastmix.force("fallback"), forward_ad.dual_level():
        out = ops.fft_conv(*map(forward_ad.make_dual, (x, kernel), moves))
        tangent = forward_ad.unpack_dual(out).tangent
    _, expected = torch.func.jvp(
        reference.fft_conv, (x.double(), kernel.double()), tuple(m.double() for m in moves))
    assert distance(tangent.double(), expected) < 2e-3


@every_case
def test_second_derivatives(case):
    call, values = positional(case, leaves(case.make(4, F64, b=1)))
    assert gradgradcheck(call, values, check_batched_grad=True, check_fwd_over_rev=True,
                         fast_mode=True)


@every_case
def test_third_derivatives(case):
    """The gradient of a Hessian-vector product, against the definition's."""
    made = case.make(4, F64, b=1)
    actual = []
    for run in (case.run, case.define):
        tensors = leaves(made)
        values = list(tensors.values())
        outputs = [torch.view_as_real(o) if o.is_complex() else o for o in run(tensors)]
        loss = sum((o.square() * o).sum() for o in outputs)
        for _ in range(2):
            grads = torch.autograd.grad(loss, values, create_graph=True)
            loss = sum((torch.view_as_real(g) if g.is_complex() else g).square().sum()
                       for g in grads)
        actual.append(torch.autograd.grad(loss, values))
    for ours, defined in zip(*actual):
        assert distance(ours, defined) < 1e-9


@every_case
def test_compiles_whole_with_dynamic_shapes(case):
    """One graph, forward and training, and no recompilation for another length."""
    names = list(case.make(8, F64))
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def loss(*values):
        return scalar(lambda *v: case.run(dict(zip(names, v))))(*values)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True,
                             backend=aot_autograd(fw_compiler=count))
    for n in (70, 20, 131):
        tensors = leaves(case.make(n, F64))
        expected = torch.autograd.grad(loss(*tensors.values()), tensors.values())
        actual = torch.autograd.grad(compiled(*tensors.values()), tensors.values())
        for name, f, e in zip(names, actual, expected):
            assert distance(f, e) < 1e-10, name
        with torch.no_grad():
            assert distance(compiled(*tensors.values()), loss(*tensors.values())) < 1e-12
    # Forward and backward of training, and inference: three graphs for every length.
    assert len(graphs) == 3


@pytest.mark.long
@pytest.mark.parametrize("name", ["linear_scan-complex-reverse", "gate_loop-heads-logits",
                                  "gate_loop-heads-decays", "decay_conv", "fft_conv-per-sample",
                                  "windowed_sgu"])
def test_compiles_with_inductor(name):
    case = CASES[name]
    call, values = positional(case, leaves(case.make(70, F64)))
    loss = scalar(call)
    compiled = torch.compile(loss, fullgraph=True)
    expected = torch.autograd.grad(loss(*values), values)
    for actual, e in zip(torch.autograd.grad(compiled(*values), values), expected):
        assert distance(actual, e) < 1e-10


@pytest.mark.parametrize("strict", [False, True])
@every_case
def test_exports_with_dynamic_length(case, strict):
    names = list(case.make(8, F64))

    class Mixer(torch.nn.Module):
        def forward(self, *values):
            return case.run(dict(zip(names, values)))

    made = case.make(20, F64)
    program = torch.export.export(Mixer(), tuple(made.values()), strict=strict,
                                  dynamic_shapes=(tuple(
                                      {i: torch.export.Dim.AUTO for i in range(t.ndim)}
                                      for t in made.values()),))
    for n in (20, 41, 131):
        tensors = case.make(n, F64)
        for actual, expected in zip(program.module()(*tensors.values()), case.run(tensors)):
            assert distance(actual, expected) < 1e-12


@every_case
def test_func_grad_and_hessian_vector(case):
    made = case.make(5, F64)
    call, values = positional(case, made)
    loss = scalar(call)
    everything = tuple(range(len(values)))
    tracked = tuple(v.clone().requires_grad_() for v in values)
    expected = torch.autograd.grad(loss(*tracked), tracked, create_graph=True)
    for actual, e in zip(torch.func.grad(loss, argnums=everything)(*values), expected):
        assert distance(actual, e) < 1e-12
    # Forward over reverse against reverse over reverse.
    tangents = tuple(torch.randn_like(v) for v in values)
    _, actual = torch.func.jvp(torch.func.grad(loss, argnums=everything), values, tangents)
    along = weigh(expected, tangents)
    for f, e in zip(actual, torch.autograd.grad(along, tracked)):
        assert distance(f, e) < 1e-10


@every_case
def test_vmap_over_each_argument(case):
    """Over all arguments, and over each alone; also the gradients per sample."""
    size = 3
    draws = [case.make(5, F64) for _ in range(size)]
    names = list(draws[0])
    call, _ = positional(case, draws[0])
    loss = scalar(call)
    everything = tuple(range(len(names)))
    for mapped in [names] + [[name] for name in names]:
        dims = tuple(0 if name in mapped else None for name in names)
        values = [torch.stack([d[name] for d in draws]) if name in mapped else draws[0][name]
                  for name in names]
        samples = [[v[i] if dim == 0 else v for v, dim in zip(values, dims)] for i in range(size)]
        actual = as_tuple(torch.vmap(call, in_dims=dims)(*values))
        expected = zip(*(as_tuple(call(*sample)) for sample in samples))
        for f, e in zip(actual, expected):
            assert distance(f, torch.stack(e)) < 1e-12
        per_sample = torch.vmap(torch.func.grad(loss, argnums=everything), in_dims=dims)
        expected = zip(*(torch.func.grad(loss, argnums=everything)(*s) for s in samples))
        for f, e in zip(per_sample(*values), expected):
            assert distance(f, torch.stack(e)) < 1e-10


@every_case
def test_definitions_take_any_mapped_axis(case):
    """Of every argument: campaigns hold operators under vmap against them."""
    draws = [case.make(3, F64, b=3) for _ in range(2)]
    for name, t in draws[0].items():
        for axis in range(t.ndim + 1):
            def define(t, name=name):
                return case.define(draws[0] | {name: t})

            mapped = torch.vmap(define, in_dims=axis)(torch.stack([d[name] for d in draws], axis))
            for f, e in zip(mapped, zip(*(define(d[name]) for d in draws))):
                assert distance(f, torch.stack(e)) < 1e-12, (name, axis)


def _nested(call):
    return lambda *stacked: torch.vmap(torch.vmap(call))(
        *(t[:, None] for t in stacked)).squeeze(1)


def _tangent(call):
    """A function whose value is a directional derivative."""
    return lambda *stacked: torch.func.jvp(torch.vmap(call), stacked,
                                           tuple(t.detach().cos() for t in stacked))[1]


def _primal(call):
    return lambda *stacked: torch.func.jvp(torch.vmap(call), stacked, stacked)[0]


def _inner_gradient(call):
    return lambda *stacked: torch.vmap(torch.func.grad(lambda *v: call(*v).sum()))(*stacked)


def _functional(call):
    class Member(torch.nn.Module):
        def __init__(self, values):
            super().__init__()
            self.values = torch.nn.ParameterList(values)

        def forward(self):
            return call(*self.values)

    def run(*stacked):
        base = Member([t[0].detach() for t in stacked])
        return torch.vmap(lambda *values: torch.func.functional_call(
            base, {f"values.{i}": v for i, v in enumerate(values)}, ()))(*stacked)

    return run


def _checkpointed(call):
    return lambda *stacked: checkpoint(torch.vmap(call), *stacked, use_reentrant=False)


def _saved_on_cpu(call):
    def run(*stacked):
        with torch.autograd.graph.save_on_cpu():
            return torch.vmap(call)(*stacked)

    return run


def _autocast(call):
    def run(*stacked):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.vmap(call)(*stacked)

    return run


@pytest.mark.parametrize("transform", [
    torch.vmap, _nested, _primal, _tangent, _inner_gradient, _functional, _checkpointed,
    _saved_on_cpu, _autocast], ids=lambda f: f.__name__.strip("_"))
@every_case
def test_plain_backward_outside_of_a_transform(case, transform):
    """An ensemble: leaves of plain autograd, a transform inside, loss.backward() outside."""
    draws = [case.make(5, F64, b=1) for _ in range(2)]
    actual = []
    for run in (case.run, case.define):
        def call(*values, run=run):
            outputs = run(dict(zip(draws[0], values)))
            return sum((o.real + o.imag if o.is_complex() else o).sin().sum() for o in outputs)

        stacked = [torch.stack([d[name] for d in draws]).requires_grad_() for name in draws[0]]
        if run == case.run or transform in (_tangent, _inner_gradient):
            out = transform(call)(*stacked)
        else:
            out = torch.stack([call(*(t[i] for t in stacked)) for i in range(2)])
        if out.is_complex():
            out = out.real + out.imag
        grads = torch.autograd.grad((out * out.detach().cos()).sum(), stacked, allow_unused=True)
        actual.append([torch.zeros_like(t) if g is None else g for g, t in zip(grads, stacked)])
    for ours, defined in zip(*actual):
        assert distance(ours, defined) < 1e-9


@every_case
def test_checkpointing(case):
    tensors = leaves(case.make(70, F64))
    call, values = positional(case, tensors)
    expected = torch.autograd.grad(scalar(call)(*values), values)
    loss = checkpoint(scalar(call), *values, use_reentrant=False)
    for actual, e in zip(torch.autograd.grad(loss, values), expected):
        assert distance(actual, e) < 1e-12


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_penalties_under_checkpointing_and_autocast(case, dtype):
    """A second derivative there has the bits of a plain one."""
    made = case.make(37, dtype)

    def penalty_gradients(checkpointed=False, autocast=False):
        values = list(leaves(made).values())

        def critic(*values):
            out = case.run(dict(zip(made, values)))[0]
            return (torch.view_as_real(out) if out.is_complex() else out).float().tanh().sum()

        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = (checkpoint(critic, *values, use_reentrant=False) if checkpointed
                     else critic(*values))
        grads = torch.autograd.grad(value, values, create_graph=True)
        penalty = sum((torch.linalg.vector_norm(g) - 1).square() for g in grads)
        return torch.autograd.grad(penalty, values, materialize_grads=True)

    plain = penalty_gradients()
    assert any(g.any() for g in plain)
    for how in ({"checkpointed": True}, {"autocast": True}):
        for ours, expected in zip(penalty_gradients(**how), plain, strict=True):
            assert torch.equal(ours, expected), how


@every_case
def test_only_the_gradients_asked_for(case):
    """Each argument alone may require one."""
    made = case.make(9, F64)
    tensors = leaves(made)
    expected = dict(zip(made, torch.autograd.grad(
        scalar(positional(case, tensors)[0])(*tensors.values()), tensors.values())))
    for name in made:
        alone = dict(made)
        alone[name] = made[name].clone().requires_grad_()
        loss = scalar(positional(case, alone)[0])(*alone.values())
        (actual,) = torch.autograd.grad(loss, alone[name])
        assert distance(actual, expected[name]) < 1e-12


@every_case
def test_torch_accepts_the_registration(case):
    """torch.library.opcheck on the operator and on its backward."""
    recorded = []
    operator = OPERATORS[case.operator]
    with torch.no_grad():
        tensors = case.make(5, F64, b=1)
    forward, backward = operator.forward, operator.backward

    def record(target):
        def call(*args):
            recorded.append((target, args))
            return target(*args)
        return call

    operator.forward, operator.backward = record(forward), record(backward)
    try:
        tensors = leaves(tensors)
        outputs = case.run(tensors)
        torch.autograd.grad(weigh(outputs, [torch.randn_like(o) for o in outputs]),
                            tensors.values())
    finally:
        operator.forward, operator.backward = forward, backward
    assert [target for target, _ in recorded] == [forward, backward]
    for target, args in recorded:
        args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        if target is forward:
            args = tuple(a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in args)
        actual = torch.library.opcheck(target, args)
        assert set(actual.values()) == {"SUCCESS"}, actual


@every_case
def test_autocast_changes_nothing_inside(case):
    """float32 tensors stay float32: an operator's sums are not autocast's business."""
    tensors = leaves(case.make(70, torch.float32))
    weights = [torch.randn_like(o) for o in case.run(tensors)]
    expected = torch.autograd.grad(weigh(case.run(tensors), weights), tensors.values())
    plain = case.run(tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = case.run(tensors)
        actual = torch.autograd.grad(weigh(outputs, weights), tensors.values())
    for o, p in zip(outputs, plain):
        assert torch.equal(o, p)
    for f, e in zip(actual, expected):
        assert torch.equal(f, e)


@every_case
def test_create_graph_and_plain_backward_agree(case):
    """The hand-written gradient against the one that autograd finds, past every block edge."""
    tensors = leaves(case.make(200, F64))
    outputs = case.run(tensors)
    weights = [torch.randn_like(o) for o in outputs]
    plain = torch.autograd.grad(weigh(outputs, weights), tensors.values(), retain_graph=True)
    graph = torch.autograd.grad(weigh(outputs, weights), tensors.values(), create_graph=True)
    for name, p, g in zip(tensors, plain, graph, strict=True):
        # A first gate of 0, which is drawn now and then, leaves none to the initial state.
        assert largest(p) > 0 or name == "initial_state" and (tensors["gates"][:, 0] == 0).all()
        assert distance(p, g.detach()) < 1e-11


@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake"])
@every_case
def test_shapes_alone(case, fake):
    """On meta and in FakeTensorMode: outputs and gradients of the right shapes and dtypes."""
    made = case.make(9, torch.float32)
    real = case.run(made)
    mode = FakeTensorMode() if fake else contextlib.nullcontext()
    with mode:
        tensors = {name: (mode.from_tensor(t) if fake else t.to("meta")).requires_grad_()
                   for name, t in made.items()}
        outputs = case.run(tensors)
        # The second gradient goes through the fallback's forward.
        grads = torch.autograd.grad(weigh(outputs, outputs), tensors.values(), create_graph=True)
        second = torch.autograd.grad(weigh(grads, grads), tensors.values(), allow_unused=True)
    for o, r in zip(outputs, real, strict=True):
        assert (o.shape, o.dtype, o.stride()) == (r.shape, r.dtype, r.stride())
    for g, s, t in zip(grads, second, made.values(), strict=True):
        assert (g.shape, g.dtype) == (t.shape, t.dtype)
        assert s is None or s.shape == t.shape
