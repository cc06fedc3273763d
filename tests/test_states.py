"""States: a sequence in pieces of any length is the sequence at once."""

import itertools
import sys
import weakref

import pytest
import torch

import fastmix
from cases import (
    CASES,
    Case,
    check_errors,
    distance,
    implementations,
    leaves,
    squared_errors,
    weigh,
)
from fastmix import checks, ops, states
from refusal import check_refusal
from test_values import in_dtype

F64 = torch.float64
# The arguments that have a time axis
TIMED = {"linear_scan": ("gates", "inputs"), "gate_loop": ("q", "k", "v", "gates", "gate_logits"),
         "decay_conv": ("x",), "cumulative_mean": ("x",), "windowed_sgu": ("x", "gate_residual"),
         "causal_sgu": ("x", "gate_residual")}
STREAMED = {name: case for name, case in CASES.items() if case.operator in TIMED}
FIRST = {case.operator: case for case in reversed(STREAMED.values())}  # of each operator
every_case = pytest.mark.parametrize("case", STREAMED.values(), ids=STREAMED)
every_implementation = pytest.mark.parametrize(
    "case, implementation",
    [pytest.param(case, i, id=f"{name}-{i}") for name, case in STREAMED.items()
     for i in implementations(case.operator)])


def is_timed(case, name, t):
    """Decays, gates of one axis, have no time."""
    return name in TIMED[case.operator] and t.ndim > 1


def flat(state):
    """The numbers of a state, without its steps."""
    return [state] if isinstance(state, torch.Tensor) else [
        t for t in state if t.is_floating_point()]


def stream(case: Case, tensors, sizes, function=None, **options):
    """→ the output and the state of pieces of these sizes, in the direction of the scan."""
    function = function or getattr(ops, case.operator)
    timed = {name: t for name, t in tensors.items() if is_timed(case, name, t)}
    others = {name: t for name, t in tensors.items() if name not in timed}
    state = others.pop("initial_state", None)
    options = {**case.options, **options, "return_state": True}
    reverse = options.get("reverse", False)
    stop, outs = next(iter(timed.values())).shape[1], []
    ends = list(itertools.accumulate(sizes))
    assert ends[-1] == stop
    for size, end in zip(sizes, ends):
        at = slice(stop - end, stop - end + size) if reverse else slice(end - size, end)
        out, state = function(**{name: t[:, at] for name, t in timed.items()}, **others,
                              initial_state=state, **options)
        outs.append(out)
    return torch.cat(outs[::-1] if reverse else outs, dim=1), state


def cuts(n):
    """Single steps, all at once, and pieces of all kinds of lengths."""
    drawn = []
    while sum(drawn) < n:
        drawn.append(min(int(torch.randint(1, 8, ())), n - sum(drawn)))
    return [[1] * n, [n], [n - 1, 1], [1, n - 1], drawn]


def gradients(outputs, tensors, weights):
    return torch.autograd.grad(weigh(outputs, weights), tensors.values())


@every_implementation
def test_pieces_are_the_whole(case, implementation):
    """Outputs, last state and the gradients of both, in float64."""
    n = 23
    tensors = leaves(case.make(n, F64))
    with fastmix.force(implementation):
        alone = case.run(tensors)[0]
        out, state = stream(case, tensors, [n])
        assert torch.equal(out, alone)
        whole = [out, *flat(state)]
        weights = [torch.randn_like(o) for o in whole]
        expected = gradients(whole, tensors, weights)
        for sizes in cuts(n):
            out, last = stream(case, tensors, sizes)
            pieces = [out, *flat(last)]
            for p, e in zip(pieces, whole, strict=True):
                assert p.dtype == e.dtype and distance(p, e) < 1e-12, sizes
            if isinstance(last, tuple):
                assert torch.equal(last.steps, state.steps) and last.steps.tolist() == [n, n]
            for name, g, e in zip(tensors, gradients(pieces, tensors, weights), expected):
                assert distance(g, e) < 1e-11, (sizes, name)


@pytest.mark.costly
@every_case
def test_pieces_are_the_definition(case):
    """The output against reference.py, and what create_graph makes of pieces."""
    tensors = leaves(case.make(9, F64))
    defined = case.define(tensors)[:1]
    out, _ = stream(case, tensors, [4, 1, 4])
    weights = torch.randn_like(out.real)
    assert distance(out, defined[0]) < 1e-11
    firsts = [torch.autograd.grad((o.abs().square() * weights).sum(), tensors.values(),
                                  create_graph=True) for o in (out, *defined)]
    seconds = [torch.autograd.grad(sum(g.abs().square().sum() for g in first), tensors.values(),
                                   allow_unused=True) for first in firsts]
    for ours, theirs in (firsts, seconds):
        for g, e in zip(ours, theirs):
            if g is not None or e is not None:
                e = torch.zeros_like(g) if e is None else e
                assert distance(torch.zeros_like(e) if g is None else g, e) < 1e-9


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case, implementation", [
    (case, i) for case in FIRST.values() for i in implementations(case.operator)])
def test_rounding_of_pieces_is_at_most_twice_the_definitions(case, implementation, dtype):
    """As test_values holds the whole; outputs, and gradients through the states. Those of
    parameters, which autograd adds up in their dtype, are its own business."""
    sizes = [14, 1, 2, 14]

    def draw():
        drawn = {name: in_dtype(t, torch.float32 if name == "initial_state" else dtype)
                 for name, t in case.make(31, torch.float32).items()}
        compared = []
        for ours, d in ((True, dtype), (False, torch.float32), (False, F64)):
            tensors = {k: in_dtype(t, torch.float32 if ours and k == "initial_state" else d)
                       for k, t in drawn.items()}
            grad_leaves = leaves({k: t for k, t in tensors.items() if k in TIMED[case.operator]})
            if ours:
                with fastmix.force(implementation):
                    output = stream(case, {**tensors, **grad_leaves}, sizes)[0]
                    weights = torch.randn_like(output)
            else:
                output = case.define({**tensors, **grad_leaves})[0]
            compared.append([output, *gradients([output], grad_leaves, [in_dtype(weights, d)])])
        return squared_errors(*compared)

    check_errors(draw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_case
def test_states_are_wide(case, dtype):
    tensors = {name: in_dtype(t, torch.float32 if name == "initial_state" else dtype)
               for name, t in case.make(5, torch.float32).items()}
    for sizes in ([5], [3, 2], [4, 1]):
        out, state = stream(case, tensors, sizes)
        assert out.is_complex() or out.dtype == dtype
        for t in flat(state):
            assert t.dtype == (torch.complex64 if t.is_complex() else torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_case
def test_states_of_narrow_numbers_have_tangents(case, dtype):
    """Those of pieces are those of the whole, also where no gradient is asked for."""
    tensors = {name: in_dtype(t, torch.float32 if name == "initial_state" else dtype)
               for name, t in case.make(5, torch.float32).items()}

    def run(*values):
        out, state = stream(case, dict(zip(tensors, values)), [3, 1, 1])
        return out, flat(state)[0]

    def define(*values):
        return case.define(dict(zip(tensors, values)))[0]

    values = tuple(tensors.values())
    exact = tuple(in_dtype(t, F64) for t in values)
    _, expected = torch.func.jvp(define, exact, exact)
    with torch.no_grad():
        _, (actual, of_state) = torch.func.jvp(run, values, values)
    assert distance(actual.to(expected.dtype), expected) < 8 * torch.finfo(dtype).eps
    if case.operator == "linear_scan":
        last = expected[:, 0 if case.options.get("reverse") else -1]
        assert distance(of_state.to(last.dtype), last) < 8 * torch.finfo(dtype).eps


def per_row(state, row):
    return fastmix.select_rows(state, slice(row, row + 1))


def joined(first, second):
    if isinstance(first, torch.Tensor):
        return torch.cat([first, second])
    return type(first)(*(torch.cat(pair) for pair in zip(first, second)))


@pytest.mark.parametrize("name", ["windowed_sgu", "causal_sgu", "cumulative_mean"])
def test_rows_at_different_steps(name):
    """Prompts of different lengths go on in one batch, each as it would alone."""
    case = STREAMED[name]
    whole = case.make(16, F64)
    timed = TIMED[case.operator]

    def part(row, at):
        return {k: t[row : row + 1, at] if k in timed else t for k, t in whole.items()}

    alone = [stream(case, part(row, slice(None)), [16])[0] for row in range(2)]
    prompts = [stream(case, part(row, slice(end)), [end])[1] for row, end in enumerate((4, 9))]
    state = joined(*prompts)
    parts = [part(0, slice(4, 11)), part(1, slice(9, 16))]
    rest = {k: torch.cat([p[k] for p in parts]) if k in timed else t for k, t in whole.items()}
    for sizes in ([1] * 7, [7], [2, 4, 1]):
        out, last = stream(case, {**rest, "initial_state": state}, sizes)
        assert distance(out[:1], alone[0][:, 4:11]) < 1e-12
        assert distance(out[1:], alone[1][:, 9:]) < 1e-12
        assert last.steps.tolist() == [11, 16]


@every_case
def test_one_state_is_continued_twice(case):
    """Nothing that is handed in is changed, and what comes back is memory of its own."""
    tensors = case.make(11, F64)
    timed = [k for k, t in tensors.items() if is_timed(case, k, t)]
    others = {k: t for k, t in tensors.items() if k not in timed and k != "initial_state"}
    first = {k: t[:, :5] if k in timed else t for k, t in tensors.items()}
    rest = {k: t[:, 5:6] for k, t in tensors.items() if k in timed}
    out, state = stream(case, first, [5])
    kept = fastmix.select_rows(state, [0, 1])
    call = getattr(ops, case.operator)
    options = {**case.options, "return_state": True}
    one, after = call(**rest, **others, initial_state=state, **options)
    for t in after if isinstance(after, tuple) else [after]:
        t.zero_()
    two, _ = call(**rest, **others, initial_state=state, **options)
    assert torch.equal(one, two)
    for t, k in zip(flat(state), flat(kept)):
        assert torch.equal(t, k)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["windowed_sgu", "causal_sgu"])
def test_what_is_not_finite_spreads_no_further_from_a_state_on(name, value):
    """A piece has zeros in place of weights and of steps that it does not reach: gradients that
    are finite in the definition are so in pieces. "res" and "gate" are the halves of x."""
    case, n = CASES[name], 7
    for argument in (*case.make(n, F64), "res", "gate"):
        for activation, step in itertools.product((None, "tanh"), (1, 4)):
            tensors = case.make(n, F64)
            half = {"res": slice(None, 8), "gate": slice(8, None)}.get(argument)
            hit = tensors.get(argument, tensors["x"])
            row = step % hit.shape[1] if hit.ndim > 1 else step
            (hit[0, step, half] if half else hit[0, row] if hit.ndim > 1 else hit[row]).fill_(value)
            other = Case(name, case.make, {"activation": activation})
            grads = []
            for whole in (False, True):
                of = leaves(tensors)
                out = other.define(of)[0] if whole else stream(other, of, (2, 5))[0]
                grads.append(torch.autograd.grad(out.sum(), of.values()))
            for kind, ours, defined in zip(tensors, *grads, strict=True):
                assert (ours.isfinite() | ~defined.isfinite()).all(), (argument, step, kind)


@pytest.mark.parametrize("name", ["windowed_sgu", "causal_sgu"])
def test_in_place(name):
    """The same numbers, in the memory that was handed in."""
    case = STREAMED[name]
    tensors = case.make(11, F64)
    _, state = stream(case, {k: t[:, :4] if k in TIMED[name] else t for k, t in tensors.items()},
                      [4])
    rest = {k: t[:, 4:] if k in TIMED[name] else t for k, t in tensors.items()}
    for sizes in ([1] * 7, [7], [3, 1, 3]):
        handed = fastmix.select_rows(state, [0, 1])
        out, expected = stream(case, {**rest, "initial_state": state}, sizes)
        ours, after = stream(case, {**rest, "initial_state": handed}, sizes, in_place=True)
        assert distance(ours, out) < 1e-14
        for a, h, e in zip(after, handed, expected):
            assert a is h and distance(a.double(), e.double()) < 1e-14


def step_of(case, tensors):
    """A step, and the tensors that it takes: timed ones, then those of the state."""
    timed = {k: t[:, -1:] for k, t in tensors.items() if is_timed(case, k, t)}
    prompt = {k: t[:, :-1] if k in timed else t for k, t in tensors.items()}
    others = {k: t for k, t in tensors.items() if k not in timed and k != "initial_state"}
    options = {k: v for k, v in case.options.items() if k != "reverse"}
    _, state = stream(Case(case.operator, case.make, options), prompt, [4])
    kind = type(state)

    def step(*values):
        last = values[len(timed) :]
        out, after = getattr(ops, case.operator)(
            **dict(zip(timed, values)), **others, **{**options, "return_state": True},
            initial_state=last[0] if kind is torch.Tensor else kind(*last))
        return out, *([after] if kind is torch.Tensor else after)

    return step, [*timed.values(), *([state] if kind is torch.Tensor else state)]


@pytest.mark.costly
@every_case
def test_steps_compile_and_are_transformed(case):
    """fullgraph, vmap over everything, gradients by torch.func and tangents."""
    step, values = step_of(case, case.make(5, F64))
    expected = step(*values)
    for actual, e in zip(torch.compile(step, fullgraph=True, backend="aot_eager")(*values),
                        expected):
        assert distance(actual, e) < 1e-12
    for actual, e in zip(torch.vmap(step)(*(torch.stack([v, v]) for v in values)), expected):
        assert distance(actual[0], e) < 1e-12 and distance(actual[1], e) < 1e-12
    numbers = tuple(i for i, v in enumerate(values) if v.dtype != torch.int64)

    def loss(*chosen):
        given = list(values)
        for i, v in zip(numbers, chosen):
            given[i] = v
        return sum(o.abs().square().sum() for o in step(*given) if o.dtype != torch.int64)

    tracked = [values[i].clone().requires_grad_() for i in numbers]
    plain = torch.autograd.grad(loss(*tracked), tracked)
    transformed = torch.func.grad(loss, argnums=tuple(range(len(numbers))))(*tracked)
    _, tangent = torch.func.jvp(loss, tuple(t.detach() for t in tracked),
                                tuple(t.detach() for t in tracked))
    for t, p in zip(transformed, plain):
        assert distance(t, p) < 1e-12
    along = sum((p.conj() * t.detach()).real.sum() for p, t in zip(plain, tracked))
    assert distance(tangent, along) < 1e-10


@pytest.mark.long
@pytest.mark.parametrize("case", FIRST.values(), ids=FIRST)
def test_pieces_compile_with_any_length(case):
    """One program for pieces of 3, 5 and 8 steps."""
    tensors = case.make(16, F64)
    run = torch.compile(getattr(ops, case.operator), fullgraph=True, backend="aot_eager",
                        dynamic=True)
    out, state = stream(case, tensors, [3, 5, 8])
    actual, last = stream(case, tensors, [3, 5, 8], run)
    assert distance(actual, out) < 1e-12
    for a, b in zip(flat(last), flat(state)):
        assert distance(a, b) < 1e-12


@every_case
def test_a_step_reads_nothing_on_the_host(case):
    """On meta there are no values to read: CUDA graphs can capture what runs here."""
    made = case.make(5, torch.float32)
    step, values = step_of(case, made)
    expected = step(*values)
    step, values = step_of(case, {k: t.to("meta") for k, t in made.items()})
    for actual, e in zip(step(*values), expected):
        assert actual.is_meta and (actual.shape, actual.dtype) == (e.shape, e.dtype)


def test_select_rows():
    state = states.CumulativeMeanState(torch.arange(6.0).view(3, 2), torch.tensor([4, 5, 6]))
    cache = {"layers": [state, (state.sum, None)]}
    for rows in ([2, 0, 0], torch.tensor([2, 0, 0])):
        chosen = fastmix.select_rows(cache, rows)
        first, (second, nothing) = chosen["layers"]
        assert type(first) is states.CumulativeMeanState and nothing is None
        assert first.steps.tolist() == [6, 4, 4]
        assert torch.equal(first.sum, second) and second.tolist() == [[4, 5], [0, 1], [0, 1]]
    part = fastmix.select_rows(state, slice(1, None))
    part.sum.zero_()
    assert state.sum[1:].all() and part.steps.tolist() == [5, 6]
    for rows in (1, torch.tensor(1), [True, False, True], torch.ones(2)):
        with pytest.raises(TypeError, match="^select_rows: rows must be a slice or integers"):
            fastmix.select_rows(state, rows)
    with pytest.raises(TypeError, match="^select_rows: a state must be made of tensors.*str"):
        fastmix.select_rows({"a": "b"}, [0])
    with pytest.raises(IndexError):
        fastmix.select_rows(state, [3])


X = torch.randn(2, 3, 8)
MEANS = states.CumulativeMeanState(torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64))
WEIGHT, BIAS = torch.randn(2, 4, 8), torch.randn(2, 4)
WINDOWS = states.WindowedSGUState(torch.zeros(2, 8, 4), torch.zeros(2, dtype=torch.int64))
ROWS = states.CausalSGUState(torch.zeros(2, 4, 4), torch.full((2,), 2))


@pytest.mark.parametrize("name, args, options, error, message", [
    ("cumulative_mean", (X,), {"initial_state": WINDOWS}, TypeError,
     "initial_state must be a CumulativeMeanState, .* got WindowedSGUState"),
    ("cumulative_mean", (X,), {"initial_state": X}, TypeError,
     "initial_state must be a CumulativeMeanState, .* got Tensor"),
    ("cumulative_mean", (X[:1],), {"initial_state": MEANS}, ValueError,
     r"initial_state.sum must have shape \(b, c0\) = \(1, 8\), got \(2, 8\)"),
    ("cumulative_mean", (X.double(),), {"initial_state": MEANS}, TypeError,
     "initial_state.sum must be float64, got float32"),
    ("cumulative_mean", (X,), {"initial_state": MEANS._replace(steps=MEANS.steps.int())},
     TypeError, "initial_state.steps must be int64, got int32"),
    ("cumulative_mean", (X,), {"initial_state": MEANS._replace(steps=MEANS.steps[:1])},
     ValueError, r"initial_state.steps must have shape \(b\) = \(2\), got \(1,\)"),
    ("cumulative_mean", (X,), {"initial_state": MEANS._replace(sum=MEANS.sum.to("meta"))},
     ValueError, "initial_state.sum must be on cpu like x, got meta"),
    ("cumulative_mean", (X,), {"return_state": 1}, TypeError, "return_state must be True or"),
    ("decay_conv", (X[..., None], torch.ones(8)), {"return_state": 1}, TypeError,
     "return_state must be True or"),
    ("gate_loop", (X[..., None],) * 3, {"gates": torch.ones(8), "return_state": None}, TypeError,
     "return_state must be True or"),
    ("linear_scan", (X, X), {"initial_state": MEANS}, TypeError,
     "initial_state must be a tensor, got CumulativeMeanState"),
    ("linear_scan", (X, X), {"return_state": None}, TypeError, "return_state must be True or"),
    ("linear_scan", (X, X), {"initial_state": X[:, 0].double()}, TypeError,
     "initial_state must be float32 like gates, got float64"),
    ("decay_conv", (X[..., None], torch.ones(8)), {"initial_state": MEANS}, TypeError,
     "initial_state must be a tensor, got CumulativeMeanState"),
    ("windowed_sgu", (X, WEIGHT, BIAS), {"initial_state": ROWS}, TypeError,
     "initial_state must be a WindowedSGUState, .* got CausalSGUState"),
    ("windowed_sgu", (X, WEIGHT, BIAS),
     {"initial_state": WINDOWS._replace(rows=WINDOWS.rows[:, 2:])}, ValueError,
     r"initial_state.rows must have shape \(b, 8, c\) = \(2, 8, 4\), got \(2, 6, 4\)"),
    ("windowed_sgu", (X, WEIGHT, BIAS), {"in_place": 1}, TypeError, "in_place must be True or"),
    ("causal_sgu", (X, WEIGHT[..., :4], BIAS), {"initial_state": WINDOWS}, TypeError,
     "initial_state must be a CausalSGUState, .* got WindowedSGUState"),
], ids=lambda value: value if isinstance(value, str) and " " not in value else "")
def test_refusals(name, args, options, error, message):
    with pytest.raises(error, match=f"^{name}: {message}"):
        getattr(ops, name)(*args, **options)


def test_refusals_of_compiled_programs():
    check_refusal("compiled", ops.cumulative_mean, (X,), {"initial_state": WINDOWS}, TypeError,
                  "initial_state must be a CumulativeMeanState, .* got WindowedSGUState")


def test_no_steps_beyond_the_weight():
    """A count is read where that does not wait for a device: not in a compiled program."""
    args = X, WEIGHT[..., :4], BIAS
    message = (r"^causal_sgu: x must have at most 2 time steps after the 2 of initial_state, "
               r"because weight has 4, got n=3: begin a new")
    with pytest.raises(ValueError, match=message):
        ops.causal_sgu(*args, initial_state=ROWS)
    assert not ROWS.rows.any()
    out = ops.causal_sgu(X[:, :2], *args[1:], initial_state=ROWS)
    assert out.shape == (2, 2, 4)


def _others(t):
    """Tensors of which most may not stand in the place of t."""
    others = [t.to_sparse(), t.to("meta"), t[None], t[:0], torch.cat((t, t), dim=-1),
              torch.cat((t, t)), t.detach().numpy(), None]
    return others if t.is_complex() else [*others, *map(t.to, (torch.int8, torch.bool, torch.half))]


def _verdict(case, tensors, **options):
    """What a call says: the error, or the shapes of what it returns."""
    try:
        out = Case(case.operator, case.make, {**case.options, **options}).run(tensors)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return [t.shape for t in out]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_call_that_passed_lets_no_other_pass(case, monkeypatch):
    good, refused = case.make(5, F64), 0
    for name, t in good.items():
        for other in [] if t is None else _others(t):
            given = {**good, name: other}
            with monkeypatch.context() as patch:
                patch.setattr(checks.Passed, "has", lambda *_: False)
                expected = _verdict(case, given)
            _verdict(case, good)
            assert _verdict(case, given) == expected, (name, other)
            refused += isinstance(expected, str)
    assert refused > 3
    case.run(good)
    assert "return_state must be True or False" in _verdict(case, good, return_state=1)


@pytest.mark.parametrize("name", [*FIRST, "fft_conv"])
def test_a_call_like_one_that_passed_is_not_checked_again(name, monkeypatch):
    case = FIRST.get(name) or next(c for c in CASES.values() if c.operator == "fft_conv")
    good = case.make(5, torch.float32)
    expected = case.run(good)[0]
    module = sys.modules["fastmix.ops._sgu" if "sgu" in name else f"fastmix.ops.{name}"]
    monkeypatch.setattr(module, "_check", None)  # to call it would raise
    assert torch.equal(case.run(good)[0], expected)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        with torch.autocast("cpu", torch.bfloat16):  # which may choose other dtypes
            case.run(good)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        case.run(case.make(6, torch.float32))


def test_what_passed_holds_no_tensors_and_is_bounded():
    passed = checks.Passed(most=3)
    tensor = torch.ones(2, 5)
    alive = weakref.ref(tensor)
    passed.add(passed.key(tensor, None))
    assert passed.has(passed.key(torch.zeros(2, 5), None))
    assert not passed.has(passed.key(torch.zeros(2, 5)))
    del tensor
    assert alive() is None
    for n in range(9):
        passed.add(passed.key(torch.ones(n)))
        assert passed.has(passed.key(torch.ones(n))) and len(passed.keys) <= 3
    assert passed.key(torch.ones(2).to_sparse()) is None and passed.key("text") is None
    assert not passed.has(None)
