"""Single steps from a state on that have kernels of their own, beside the plain path."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastmix
from cases import check_errors, distance, squared_errors
from fastmix import ops
from fastmix.native import build, library
from fastmix.ops._dss_step import dss_step
from fastmix.states import CausalSGUState, FFTConvBlock, FFTConvState, WindowedSGUState

F64 = torch.float64
NAN = float("nan")
UNITS = {"windowed_sgu": WindowedSGUState, "causal_sgu": CausalSGUState}
every_unit = pytest.mark.parametrize("unit", UNITS)

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


@pytest.fixture(params=library.INSTRUCTION_SETS)
def instruction_set(request):
    """Its kernels run."""
    if request.param not in library.available_instruction_sets():
        pytest.skip(f"this machine, or the library, has no {request.param}")
    library.choose_instruction_set(request.param)
    yield request.param
    library.choose_instruction_set()


class Calls(TorchDispatchMode):
    """Which operators run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def step(unit, b, c, h, size, t, dtype=F64):
    """Arguments of step t, whose state has NaN where no step is to be looked for yet, as has the
    weight. `size` is w or s."""
    columns = 2 * size if unit == "windowed_sgu" else size
    weight = torch.randn(h, size, columns, dtype=dtype) / columns**0.5
    row, seen = t % size, t % size + columns - size
    weight[:, row, seen + 1 :] = NAN
    rows = torch.full((b, columns, c), NAN, dtype=dtype)
    for s in range(max(0, t // size * size - (columns - size)), t):
        rows[:, s % columns] = torch.randn(b, c, dtype=dtype)
    state = UNITS[unit](rows, torch.full((b,), t))
    return {"x": torch.randn(b, 1, 2 * c, dtype=dtype), "weight": weight,
            "bias": torch.randn(h, size, dtype=dtype), "norm_weight": torch.randn(c, dtype=dtype),
            "norm_bias": torch.randn(c, dtype=dtype),
            "gate_residual": torch.randn(b, 1, c, dtype=dtype), "initial_state": state}


def run(unit, arguments, **options):
    with torch.no_grad():
        return getattr(ops, unit)(**{**arguments, **options}, return_state=True)


def plain(unit, arguments, **options):
    with fastmix.force("fallback"):
        return run(unit, arguments, **options)


def without(arguments, *names):
    return {k: v for k, v in arguments.items() if k not in names}


@pytest.mark.parametrize("b, c, h, size", [(1, 12, 3, 5), (3, 40, 1, 9), (2, 35, 35, 4),
                                           (1, 1100, 2, 7), (2, 66, 6, 150)])
@every_unit
def test_values_of_a_step(unit, b, c, h, size, instruction_set):
    for t in {0, 1, size // 2, size - 1, *((size, 2 * size - 1, 2 * size, 3 * size + 1)
                                           if unit == "windowed_sgu" else ())}:
        arguments = step(unit, b, c, h, size, t)
        for activation in (None, "tanh", torch.sin):
            out, state = run(unit, arguments, activation=activation)
            expected, after = plain(unit, arguments, activation=activation)
            assert distance(out, expected) < 1e-12, t
            assert distance(state.rows.nan_to_num(7), after.rows.nan_to_num(7)) < 1e-12
            assert torch.equal(state.rows.isnan(), after.rows.isnan())
            assert state.steps.tolist() == [t + 1] * b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_unit
def test_rounding_of_a_step_is_at_most_twice_the_plain_ones(unit, dtype):
    def draw():
        t = int(torch.randint(300, ()))
        exact = {k: v.to(dtype) for k, v in without(
            step(unit, 2, 70, 2, 300, t, F64), "initial_state").items()}
        rows = torch.randn(2, 600 if unit == "windowed_sgu" else 300, 70)
        results = []
        for function, d in ((run, dtype), (plain, dtype), (plain, F64)):
            wide = torch.float64 if d == F64 else torch.float32
            state = UNITS[unit](rows.to(wide), torch.full((2,), t))
            arguments = {k: v.to(d) for k, v in exact.items()}
            results.append([function(unit, {**arguments, "initial_state": state},
                                     activation="gelu")[0]])
        return squared_errors(*results)

    check_errors(draw)


@every_unit
def test_a_step_takes_tensors_as_they_lie(unit):
    """Parameters wider than x, or none, any strides, numbers that are negated when read."""
    given = step(unit, 2, 24, 3, 6, 4)
    expected = run(unit, given)[0]
    turned = {k: v.transpose(0, -1).contiguous().transpose(0, -1) for k, v in without(
        given, "initial_state").items()}
    turned["x"] = torch.complex(torch.zeros_like(given["x"]), -given["x"]).conj().imag
    assert turned["x"].is_neg()
    rows = given["initial_state"].rows.mT.contiguous().mT
    state = given["initial_state"]._replace(rows=rows)
    for option in (turned, {"initial_state": state}):
        assert distance(run(unit, {**given, **option})[0], expected) < 1e-12
    out = run(unit, {**given, "initial_state": state}, in_place=True)[0]
    assert distance(out, expected) < 1e-12 and not rows[:, 4].isnan().any()
    given = step(unit, 2, 24, 3, 6, 4, torch.float32)
    halves = {k: given[k].bfloat16() for k in ("x", "gate_residual")}
    out = run(unit, {**given, **halves})[0]
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, plain(unit, {**given, **halves})[0])
    few = without(step(unit, 2, 24, 3, 6, 4), "norm_weight", "norm_bias", "gate_residual")
    assert distance(run(unit, few)[0], plain(unit, few)[0]) < 1e-12


@every_unit
def test_which_steps_have_a_kernel(unit):
    """Those of whole batches that no gradient is asked of, while native may run."""
    arguments = step(unit, 2, 8, 2, 5, 3)

    def called(function=run, arguments=arguments, **options):
        with Calls() as calls:
            function(unit, arguments, **options)
        return "fastmix::sgu_step" in calls.names

    assert called() and called(in_place=True)
    arguments = step(unit, 2, 8, 2, 5, 3)
    with fastmix.force("native"):
        assert called(arguments=arguments)
    apart = arguments["initial_state"]._replace(steps=torch.tensor([1, 3]))
    assert not called(arguments={**arguments, "initial_state": apart})
    arguments["bias"].requires_grad_()
    assert called(arguments=arguments)
    with Calls() as calls:
        out = getattr(ops, unit)(**arguments)
    assert "fastmix::sgu_step" not in calls.names and out.requires_grad


@every_unit
def test_a_step_in_place(unit):
    """In the memory that was handed in, which a backward that needs it notices; else a copy."""
    arguments = step(unit, 2, 8, 2, 6, 3)
    kept = fastmix.select_rows(arguments["initial_state"], [0, 1])
    expected, after = run(unit, arguments)
    assert torch.equal(arguments["initial_state"].rows.nan_to_num(7), kept.rows.nan_to_num(7))
    assert arguments["initial_state"].steps.tolist() == [3, 3]
    weight = arguments["weight"].nan_to_num().requires_grad_()
    lost = getattr(ops, unit)(**{**arguments, "weight": weight, "initial_state": kept})
    saved = (kept.rows.nan_to_num_() * weight.sum()).sum()
    out, state = run(unit, {**arguments, "initial_state": kept}, in_place=True)
    assert state.rows is kept.rows and state.steps is kept.steps
    assert torch.equal(out, expected)
    assert torch.equal(state.rows, after.rows.nan_to_num())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()
    assert lost.shape == out.shape
    with torch.inference_mode():
        made = fastmix.select_rows(after, [0, 1])
        run(unit, {**arguments, "initial_state": made}, in_place=True)
    before = made.rows.clone(), made.steps.clone()
    with pytest.raises(RuntimeError, match=f"^{unit}: initial_state was made in inference mode"):
        run(unit, {**arguments, "initial_state": made}, in_place=True)
    for now, then in zip(made, before):
        assert torch.equal(now.nan_to_num(7), then.nan_to_num(7))


@every_unit
def test_the_same_bits_of_a_step_for_any_number_of_threads(unit):
    threads, size = torch.get_num_threads(), 900
    try:
        for b, c, h, dtype in ((1, 1030, 5, torch.float32), (3, 400, 16, torch.bfloat16)):
            given = step(unit, b, c, h, size, size - 1, torch.float32)
            for k in ("x", "gate_residual"):
                given[k] = given[k].to(dtype)
            outs = []
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                outs.append(run(unit, given, activation="silu")[0])
            assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    finally:
        torch.set_num_threads(threads)


def test_operations_of_a_step_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    for unit, t, rows in (("windowed_sgu", 3, 4), ("windowed_sgu", 12, 3 + 5),
                          ("causal_sgu", 3, 4)):
        arguments = step(unit, 2, 8, 2, 5, t)
        with FlopCounterMode(display=False) as counter:
            run(unit, arguments)
        assert counter.get_total_flops() == 2 * 2 * 8 * rows
    with FlopCounterMode(display=False) as counter:
        space_step(state_space(2, 3, 5))
    assert counter.get_total_flops() == 11 * 2 * 3 * 5 + 2 * 2 * 3
    for kind, products in (("revealed", 2 * 8), ("shared", 8), ("short", 4)):
        with FlopCounterMode(display=False) as counter:
            conv_step(conv_arguments(kind, 2, 3, 5, 7))
        assert counter.get_total_flops() == 2 * (2 * 3 * 5) * (products + 1)


# ---- long convolutions


KINDS = ["revealed", "shared", "per sample", "short"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def conv_arguments(kind, b, h, d, r, dtype=F64, before=0):
    """Arguments of fft_conv's step r of a block, behind `before` steps of the epoch. There is NaN
    where the step has nothing to look for."""
    p, wide = 80, torch.promote_types(dtype, torch.float32)

    def draw(*shape, seen=None, dtype=wide):
        t = torch.randn(*shape, dtype=dtype)
        if seen is not None:
            t[:, seen + 1 :] = NAN
        return t

    ahead = draw(b, 79, h, d)
    ahead[:, :r] = ahead[:, r + 1 :] = NAN
    tail, blocks = (ahead, ()) if not before else (draw(b, 200, h, d, seen=-1), (FFTConvBlock(
        draw(b, before, h, d), draw(b, before, h) if kind == "revealed" else None, ahead),))
    revealed = kind == "revealed"
    block = FFTConvBlock(draw(b, r, h, d), draw(b, r, h) if revealed else None,
                         torch.empty(b, 0, h, d, dtype=wide))
    kernel = {"revealed": (b, 1, h), "shared": (1, 90, h), "per sample": (b, 90, h),
              "short": (b, 4, h)}[kind]
    kernel = draw(*kernel, seen=r, dtype=dtype)
    return {"x": draw(b, 1, h, d, dtype=dtype), "kernel": kernel[0] if kind == "shared" else kernel,
            "skip": draw(h, d, dtype=dtype), "revealed": revealed,
            "initial_state": FFTConvState(
                draw(b, p, h, d, seen=r), draw(b, p, h, seen=r) if revealed else None, tail,
                (*blocks, block))}


def conv_step(arguments, implementation="native", **options):
    with fastmix.force(implementation), torch.no_grad():
        return ops.fft_conv(**{**arguments, **options}, return_state=True)


@pytest.mark.parametrize("b, h, d", [(1, 3, 4), (2, 40, 1), (3, 1, 70), (2, 5, 37), (1, 1100, 1),
                                     (1, 2, 600)])
@every_kind
def test_values_of_a_convolutions_step(kind, b, h, d, instruction_set):
    for r, before in ((1, 0), (2, 64), (7, 0), (31, 192), (62, 64)):
        arguments = conv_arguments(kind, b, h, d, r, before=before)
        for options in ({}, {"skip": None}):
            out, state = conv_step(arguments, **options)
            expected, after = conv_step(arguments, "fallback", **options)
            assert distance(out, expected) < 1e-12, r
            block, wanted = state.blocks[-1], after.blocks[-1]
            assert torch.equal(block.x, wanted.x) and block.x.shape[1] == r + 1
            assert kind != "revealed" or torch.equal(block.kernel, wanted.kernel)
            assert len(state.blocks) == 1 + bool(before) and block.ahead.shape[1] == 0
            given = arguments["initial_state"]
            assert state.x is given.x and state.tail is given.tail
            assert state.kernel is given.kernel and state.blocks[:-1] == given.blocks[:-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_kind
def test_rounding_of_a_convolutions_step_is_at_most_twice_the_plain_ones(kind, dtype):
    def draw():
        exact = conv_arguments(kind, 2, 2, 35, int(torch.randint(1, 63, ())), dtype)
        wider = tree_map_only(torch.Tensor, torch.Tensor.double, exact)
        return squared_errors(*([conv_step(arguments, implementation)[0]]
                                for arguments, implementation in (
                                    (exact, "native"), (exact, "fallback"), (wider, "fallback"))))

    check_errors(draw)


@every_kind
def test_a_convolutions_step_takes_tensors_as_they_lie(kind):
    """Parameters wider than x, any strides, numbers that are negated when read."""
    given = conv_arguments(kind, 2, 3, 5, 9, before=64)
    expected = conv_step(given)[0]

    def turned(value):
        return tree_map_only(
            torch.Tensor, lambda t: t.transpose(0, -1).contiguous().transpose(0, -1), value)

    strided = turned(given)
    strided["x"] = torch.complex(torch.zeros_like(given["x"]), -given["x"]).conj().imag
    assert strided["x"].is_neg()
    state = given["initial_state"]
    negated = torch.complex(torch.zeros_like(state.x), -state.x).conj().imag
    for option in (strided, {**strided, "x": turned(given["x"])},
                   {"initial_state": state._replace(x=negated)}):
        out, after = conv_step(given, **option)
        assert distance(out, expected) < 1e-12
        assert after.blocks[-1].x.is_contiguous()
    given = conv_arguments(kind, 2, 3, 5, 9, torch.float32)
    half = {"x": given["x"].bfloat16()}
    out = conv_step(given, **half)[0]
    assert out.dtype == torch.bfloat16
    assert distance(out, conv_step(given, "fallback", **half)[0]) < 1e-2


@every_kind
def test_which_convolutions_steps_have_a_kernel(kind):
    """Those within a block that no gradient is asked of."""
    def called(wanted=False, **changed):
        with torch.set_grad_enabled(wanted), Calls() as calls:
            out, _ = ops.fft_conv(**{**arguments, **changed}, return_state=True)
        assert not ("fastmix::fft_conv_step" in calls.names and out.requires_grad)
        return "fastmix::fft_conv_step" in calls.names

    for r, kernel in ((1, True), (62, True), (63, False)):
        arguments = conv_arguments(kind, 2, 2, 4, r)
        assert called() == called(True) == kernel
    arguments = conv_arguments(kind, 2, 2, 4, 5)
    state = arguments["initial_state"]
    assert not called(initial_state=state._replace(tail=state.tail[:, :6]))
    assert not called(initial_state=state._replace(blocks=()))
    wanted = arguments["skip"].clone().requires_grad_()
    assert called(skip=wanted) and not called(True, skip=wanted)
    block = state.blocks[0]
    wanted = state._replace(blocks=(block._replace(x=block.x.clone().requires_grad_()),))
    assert called(initial_state=wanted) and not called(True, initial_state=wanted)


@every_kind
def test_a_convolutions_step_leaves_its_state_as_it_was(kind):
    arguments = conv_arguments(kind, 2, 2, 4, 5)
    kept = fastmix.select_rows(arguments["initial_state"], [0, 1])
    first, state = conv_step(arguments)
    for t in state.blocks[-1]:
        if t is not None:
            t.zero_()
    block, before = arguments["initial_state"].blocks[-1], kept.blocks[-1]
    assert torch.equal(block.x, before.x)
    assert kind != "revealed" or torch.equal(block.kernel, before.kernel)
    assert torch.equal(conv_step(arguments)[0], first)


@pytest.mark.parametrize("implementation", ["native", "fallback"])
def test_a_convolutions_step_refuses_states_in_words(implementation):
    """What the operator finds, by the checks of whole sequences."""
    arguments = conv_arguments("revealed", 2, 2, 4, 5)
    state = arguments["initial_state"]
    block = state.blocks[0]
    one = fastmix.select_rows(state, [0])
    for wrong, name in (
            (one, "x"), (state._replace(x=state.x[:, :, :1]), "x"),
            (state._replace(kernel=state.kernel[:1]), "kernel"),
            (state._replace(kernel=state.kernel.float()), "kernel"),
            (state._replace(tail=state.tail.to("meta")), "tail"),
            (state._replace(tail=state.tail[..., 0]), "tail"),
            (state._replace(tail=None), "tail"),
            (state._replace(x=state.x.to_sparse()), "x"),
            (state._replace(blocks=(block._replace(x=block.x[..., :1]),)), r"blocks\[0\].x"),
            (state._replace(blocks=(block._replace(x=block.x.sum()),)), r"blocks\[0\].x"),
            (state._replace(blocks=(block._replace(kernel=block.kernel[:1]),)),
             r"blocks\[0\].kernel")):
        with pytest.raises((TypeError, ValueError), match=f"^fft_conv: initial_state.{name} must"):
            conv_step(arguments, implementation, initial_state=wrong)


@pytest.mark.parametrize("kind, h, d", [("revealed", 5, 206), ("shared", 1030, 1),
                                        ("per sample", 16, 25)])
def test_the_same_bits_of_a_convolutions_step_for_any_number_of_threads(kind, h, d):
    threads, arguments = torch.get_num_threads(), conv_arguments(kind, 3, h, d, 62, torch.float32)
    try:
        outs = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            out, state = conv_step(arguments)
            outs.append([out, *(t for t in state.blocks[-1] if t is not None)])
        assert all(torch.equal(a, b) for other in outs[1:] for a, b in zip(other, outs[0]))
    finally:
        torch.set_num_threads(threads)


# ---- diagonal state spaces


def state_space(b, h, n, dtype=F64):
    """Arguments of ops._dss_step, the state first."""
    number = torch.complex128 if dtype == F64 else torch.complex64
    wide = torch.float64 if dtype == F64 else torch.float32
    power = torch.polar(torch.rand(n, dtype=wide), 6 * torch.rand(n, dtype=wide))
    return [torch.randn(b, h, n, dtype=number), torch.randn(b, 1, h, dtype=dtype), power,
            torch.randn(n, dtype=number), *torch.randn(2, h, n, dtype=dtype),
            torch.randn(h, dtype=dtype)]


def space_step(arguments, in_place=False, implementation="native"):
    with fastmix.force(implementation), torch.no_grad():
        return dss_step(*arguments, in_place)


@pytest.mark.parametrize("b, h, n", [(1, 3, 150), (2, 5, 1), (3, 1, 70), (2, 40, 37)])
def test_values_of_a_state_spaces_step(b, h, n, instruction_set):
    arguments = state_space(b, h, n)
    before = arguments[0].clone()
    state, u, power, factor, c_real, c_imag, skip = arguments
    after = state * power + u.mT
    exact = torch.einsum("bhn,hn->bh", after, torch.complex(c_real, c_imag) * factor).real
    exact = exact[:, None] + skip * u
    for implementation in ("native", "fallback"):
        out, ours = space_step(arguments, False, implementation)
        assert distance(out, exact) < 1e-12 and distance(ours, after) < 1e-12
        assert torch.equal(state, before)
    strided = [t.mT.contiguous().mT if t.ndim > 1 else t for t in arguments]
    conjugate = state.conj().resolve_conj().conj()  # the same, stored as its conjugate
    for other in (strided[0], conjugate):
        out, ours = space_step([other, *strided[1:]])
        assert distance(out, exact) < 1e-12 and distance(ours, after) < 1e-12
    out, ours = space_step(arguments, True)
    assert ours is state and distance(out, exact) < 1e-12 and distance(state, after) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_of_a_state_spaces_step_is_at_most_twice_the_plain_ones(dtype):
    def draw():
        exact = [t.real.to(dtype) if t.dtype == F64 else t.to(torch.complex64)
                 for t in state_space(2, 9, 300)]
        wider = [t.to(torch.complex128 if t.is_complex() else F64) for t in exact]
        return squared_errors(*(list(space_step(arguments, False, implementation))
                                for arguments, implementation in (
                                    (exact, "native"), (exact, "fallback"), (wider, "fallback"))))

    check_errors(draw)


def test_which_state_spaces_steps_have_a_kernel():
    arguments = state_space(2, 4, 5)
    for wanted, given, kernel in ((False, False, True), (True, False, True), (False, True, True),
                                  (True, True, False)):
        arguments[-1].requires_grad_(given)
        with torch.set_grad_enabled(wanted), Calls() as calls:
            out, _ = dss_step(*arguments, False)
        assert ("fastmix::dss_step" in calls.names) == kernel == (not out.requires_grad)


def test_the_same_bits_of_a_state_spaces_step_for_any_number_of_threads():
    threads, arguments = torch.get_num_threads(), state_space(3, 250, 300, torch.float32)
    try:
        outs = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            outs.append(space_step(arguments))
        assert all(torch.equal(a, b) for other in outs[1:] for a, b in zip(other, outs[0]))
    finally:
        torch.set_num_threads(threads)


def test_powers_too_small_for_products_are_zero():
    """Products with subnormal numbers take a processor some hundred times as long."""
    space = fastmix.nn.DSS(dim=4, kernel_N=3)
    with torch.no_grad():
        space.Lambda_real.copy_(torch.tensor([95.0, 0.5, 99.0]).log())
        _, state = space(torch.randn(2, 3, 4), return_cache=True)
        state.fill_(1)
        x = torch.randn(2, 1, 4)
        _, after = space(x, cache=state, return_cache=True)
    inputs = space.norm(x).mT.expand(2, 4, 3).to(torch.complex64)
    assert torch.equal(after[..., [0, 2]], inputs[..., [0, 2]])
    assert not torch.equal(after[..., 1], inputs[..., 1])
