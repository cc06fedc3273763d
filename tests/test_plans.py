"""Calls that are launched from plans, beside the same calls on the long way; nothing is compiled.

Tensors lie on the CPU, Triton takes it for a GPU, and in the place of launches their arguments are
noted (bench/host.py).
"""

import contextlib
import importlib
import importlib.util
import os
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from test_triton import LAUNCHES

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs Triton, and kernels that are not interpreted")

B, N = 2, 300


class Events(TorchDispatchMode):
    """What is done in a call: torch's operations, but for views and new memory, and launches. All
    tensors that are made are kept, so that each has memory of its own.
    """

    def __init__(self):
        super().__init__()
        self.made, self.seen, self.devices = [], [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not function.is_view:
            self.made.append(out)
            if "empty" not in function.__name__:
                self.seen.append((function.__name__, *described([args, out])))
        return out

    def launched(self, kernel, *args):
        from triton.runtime import driver
        self.devices.append(driver.active.get_current_device())
        grid, stream, hooks, rest = args[:3], args[3], args[7:9], args[9:]
        self.seen.append((kernel.name, kernel.key, grid, stream, args[6] is None, *hooks,
                          *described([rest])))


class Address(int):
    """Where a tensor lies, or a pointer that was given in its place."""


def described(value):
    """A list of all that is in it: of tensors their addresses, and sizes that are not their own."""
    if isinstance(value, torch.Tensor):
        return [Address(value.data_ptr())]
    if isinstance(value, int) and value >= 1 << 32:  # more than any size or stride here
        return [Address(value)]
    if isinstance(value, (list, tuple)):
        return [one for part in value for one in described(part)]
    return [value]


def blocks(tensors):
    """(first address, one beyond the last) of each tensor."""
    spans = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors
             if isinstance(t, torch.Tensor)]
    return [(first, first + size) for first, size in spans]


def assert_same(planned, long, tensors):
    """The same is done to the same places: each piece of memory of the long way is one of the plan
    too, or a part of one, and pieces do not overlap.
    """
    known = blocks(tensors)
    theirs, moved = blocks(long.made), {}
    assert len(planned.seen) == len(long.seen)
    for ours, other in zip(planned.seen, long.seen):
        assert len(ours) == len(other)
        for mine, its in zip(ours, other):
            assert isinstance(mine, Address) == isinstance(its, Address), (ours, other)
            if not isinstance(its, Address):
                assert mine == its and type(mine) is type(its), (ours, other)
            elif its == 0 or any(first <= its < end for first, end in known):
                assert mine == its
            else:
                block = next(at for at in theirs if at[0] <= its < at[1])
                assert moved.setdefault(block, mine - its) == mine - its
    at = sorted((first + by, end + by) for (first, end), by in moved.items())
    assert all(end <= first for (_, end), (first, _) in zip(at, at[1:]))
    assert all(any(lo <= first and end <= hi for lo, hi in blocks(planned.made))
               for first, end in at)
    return moved


@pytest.fixture
def machine(monkeypatch):
    """machine(operator, direction, args) → (results, Events), as on compute capability 9.0."""
    monkeypatch.syspath_prepend(os.path.join(os.path.dirname(__file__), os.pardir, "bench"))
    import host
    from fastmix import _triton

    now = types.SimpleNamespace(events=Events())

    def run(operator, direction, args):
        now.events = events = Events()
        with events:
            results = _triton._run(operator, direction, True, *args)
        return results if isinstance(results, tuple) else (results,), events

    with host.stand_ins(lambda *args: now.events.launched(*args)):
        run.long_way, run.driver = host.long_way, host.triton_static.driver
        yield run


def plans():
    from fastmix._triton import plans
    return plans


def on_cpu(args):
    """The same layouts with memory; each tensor its own."""
    return tuple(torch.empty_strided(a.shape, a.stride(), dtype=a.dtype)
                 if isinstance(a, torch.Tensor) else a for a in args)


def calls_of(name, b=B, n=N):
    """(operator, direction, a function that draws arguments) of a name in LAUNCHES."""
    operator, arguments = LAUNCHES[name]
    module = importlib.import_module(f"fastmix._triton.{operator}")
    yield operator, "forward", lambda: on_cpu(arguments(b, n))

    def of_backward():
        import triton_static
        active = triton_static.driver._active
        args = arguments(b, n)
        with triton_static.recording("sm90"):
            out = module.forward(*args)
        assert triton_static.driver._active is active
        return on_cpu((*(out if isinstance(out, tuple) else (out,)), *args))

    yield operator, "backward", of_backward


def compared(machine, operator, direction, args):
    """Runs a call, and again on the long way; (what each did, whether there was a plan for it)."""
    has_plan = plans().plans.get(plans().kind_of(operator, direction, args)) is not None
    results, planned = machine(operator, direction, args)
    with machine.long_way():
        long_results, long = machine(operator, direction, args)
    moved = assert_same(planned, long, args)
    for ours, theirs in zip(results, long_results, strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (
            theirs.shape, theirs.stride(), theirs.dtype)
        block, = blocks([theirs])
        if block in moved and ours.numel():
            assert ours.data_ptr() - theirs.data_ptr() == moved[block]
    return planned, has_plan


@pytest.mark.parametrize("long_sequence", [False, True], ids=["many", "long"])
@pytest.mark.parametrize("name", LAUNCHES)
def test_a_planned_call_launches_what_the_long_way_does(name, long_sequence, machine):
    b, n = (1, 5000) if long_sequence else (B, N)
    for operator, direction, draw in calls_of(name, b, n):
        args = draw()
        # The same tensor in several places, which says nothing of later calls.
        same = {(a.shape, a.dtype): a for a in args if isinstance(a, torch.Tensor)}
        args = [same[a.shape, a.dtype] if isinstance(a, torch.Tensor)
                and a.stride() == same[a.shape, a.dtype].stride() else a for a in args]
        for expected in (False, False, True):
            planned, has_plan = compared(machine, operator, direction, args)
            assert has_plan is expected and planned.seen
        planned, has_plan = compared(machine, operator, direction, draw())
        assert has_plan


def planned(machine, name="decay_conv", direction="forward"):
    """(operator, direction, a function that draws arguments), of which there is a plan."""
    operator, _, draw = next(call for call in calls_of(name) if call[1] == direction)
    for _ in range(2):
        machine(operator, direction, draw())
    assert compared(machine, operator, direction, draw())[1]
    return operator, direction, draw


def shifted(t, by):
    """A tensor like t that begins `by` numbers after a multiple of 16 bytes."""
    return t.new_empty(t.numel() + by)[by:].view(t.shape)


def of_wider(t):
    """A tensor like t whose steps lie further apart."""
    return t.new_empty(*t.shape[:2], 2 * t.shape[2], *t.shape[3:])[:, :, :t.shape[2]]


@pytest.mark.parametrize("change", [
    lambda x, *rest: (shifted(x, 1), *rest), lambda x, *rest: (shifted(x, 4), *rest),
    lambda x, *rest: (of_wider(x), *rest), lambda x, *rest: (x.half(), *rest),
    lambda x, *rest: (x[:, 1:], *rest), lambda x, *rest: (x.transpose(2, 3), *rest),
    lambda x, decay, gain, *rest: (x, decay, None, *rest),
    lambda x, decay, *rest: (x, decay.float(), *rest),
    lambda *args: (*args[:3], None, args[4]), lambda *args: (*args[:-1], 0)])
def test_another_kind_of_call_does_not_get_the_plan(change, machine):
    operator, direction, draw = planned(machine)
    args = change(*draw())
    for expected in (False, False, True):
        assert compared(machine, operator, direction, args)[1] is expected
    assert compared(machine, operator, direction, draw())[1]


def test_another_precision_of_products_does_not_get_the_plan(machine):
    operator, direction, draw = planned(machine, "windowed_sgu-walk")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert not compared(machine, operator, direction, draw())[1]
    finally:
        torch.set_float32_matmul_precision(before)
    assert compared(machine, operator, direction, draw())[1]


def test_a_plan_launches_on_the_stream_of_the_call_with_the_hooks_in_use(machine, monkeypatch):
    import triton
    operator, direction, draw = planned(machine)
    driver = machine.driver.active
    monkeypatch.setattr(driver, "get_current_stream", lambda device=None: 77)
    entered, left = object(), object()
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", entered)
    monkeypatch.setattr(triton.knobs.runtime, "launch_exit_hook", left)
    events, has_plan = compared(machine, operator, direction, draw())
    (_, _, grid, stream, no_metadata, *hooks, _), *_ = [
        (*event[:7], None) for event in events.seen]
    assert has_plan and stream == 77 and hooks == [entered, left] and not no_metadata


def test_a_plan_launches_on_its_device_while_another_is_current(machine, monkeypatch):
    operator, direction, draw = planned(machine)
    driver, current = machine.driver.active, ["other"]
    own = driver.target
    monkeypatch.setattr(driver, "get_current_device", lambda: current[-1])

    @contextlib.contextmanager
    def on(device):
        current.append(own)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", on)
    _, events = machine(operator, direction, draw())
    assert events.devices == [own] and current == ["other"]


def assert_long_way(machine, operator, direction, args):
    """The call is right, and Triton was asked for its kernels."""
    import triton
    asked, run = [], triton.runtime.jit.JITFunction.run

    def noted(kernel, *args, **options):
        asked.append(kernel)
        return run(kernel, *args, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(triton.runtime.jit.JITFunction, "run", noted)
        machine(operator, direction, args)
        assert asked


def test_no_notes_are_taken_while_a_graph_is_captured(machine, monkeypatch):
    from fastmix._triton import trial
    operator, direction, draw = planned(machine)
    other = [shifted(a, 1) if isinstance(a, torch.Tensor) and a.ndim == 4 else a for a in draw()]
    for _ in range(2):
        machine(operator, direction, other[:-1] + [0])
    monkeypatch.setattr(trial, "_captures", lambda device: True)
    assert compared(machine, operator, direction, draw())[1]
    assert compared(machine, operator, direction, other[:-1] + [0])[1]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trial, "no_compilation_in_capture",
                        lambda operator, device: contextlib.nullcontext())
        for _ in range(3):
            assert_long_way(machine, operator, direction, other)


@pytest.mark.parametrize("what", ["debug", "casts", "hook", "memory"])
def test_a_call_takes_the_long_way_where_a_plan_would_not_do(what, machine, monkeypatch):
    import triton

    from fastmix._triton import decay_conv
    operator, direction, draw = planned(machine)
    args = draw()
    if what == "debug":
        monkeypatch.setattr(triton.knobs.runtime, "debug", True)
    elif what == "casts":
        monkeypatch.setattr(triton.knobs.compilation, "fpsan_homomorphic_casts", True,
                            raising=False)
    elif what == "hook":
        decay_conv._forward.add_pre_run_hook(lambda *_, **__: None)
    else:
        empty = torch.empty_strided
        monkeypatch.setattr(torch, "empty_strided", lambda sizes, strides, **options: shifted(
            empty(sizes, strides, **options), 1))
    try:
        assert_long_way(machine, operator, direction, args)
    finally:
        decay_conv._forward.pre_run_hooks.clear()


def test_a_failed_trial_takes_plans_from_its_own_operator_only(machine, monkeypatch):
    from fastmix._triton import trial
    operator, direction, draw = planned(machine)
    monkeypatch.setattr(trial, "failures", {("gate_loop", "cpu"): "is wrong"})
    assert compared(machine, operator, direction, draw())[1]
    monkeypatch.setattr(trial, "failures", {(operator, "cpu"): "is wrong"})
    with pytest.raises(RuntimeError, match="is wrong"):
        machine(operator, direction, draw())


def test_a_version_of_triton_that_is_not_known_has_no_plans(machine, monkeypatch):
    import triton
    why_not = plans().why_not.__wrapped__
    monkeypatch.setattr(plans(), "why_not", why_not)
    assert why_not() is None
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    assert why_not().startswith("how Triton 4.0.0 launches kernels is not known")
    from fastmix import env
    assert env.triton_lines({"triton": None, "fallback": None}) == [f"  {why_not()}"]
    assert env.triton_lines({"triton": "no GPU"}) == env.triton_lines({"fallback": None}) == []
    operator, direction, draw = next(calls_of("cumulative_mean"))
    for _ in range(3):
        assert_long_way(machine, operator, direction, draw())
    assert not plans().plans


def test_plans_are_few_and_the_oldest_is_forgotten(machine, monkeypatch):
    monkeypatch.setattr(plans(), "MOST", 2)
    operator, _, draw = next(calls_of("cumulative_mean"))
    x, = draw()
    calls = [(x[:, i:],) for i in range(5)]
    for args in calls:
        for _ in range(3):
            machine(operator, "forward", args)
    kinds = [plans().kind_of(operator, "forward", args) for args in calls]
    assert list(plans().plans) == kinds[-2:] and len(plans()._seen) == 2


def test_a_call_that_asks_for_numbers_has_no_plan(machine, monkeypatch):
    from fastmix._triton import cumulative_mean
    forward = cumulative_mean.forward

    def asking(x):
        return forward(x) if x.new_zeros(1).item() == 0 else None

    monkeypatch.setattr(cumulative_mean, "forward", asking)
    operator, direction, draw = next(calls_of("cumulative_mean"))
    args = draw()
    for _ in range(3):
        machine(operator, direction, args)
    assert plans().plans == {plans().kind_of(operator, direction, args): None}
    assert_long_way(machine, operator, direction, args)


@pytest.mark.parametrize("name", [
    "decay_conv", "linear_scan", "gate_loop-heads", "windowed_sgu-walk"])
def test_a_planned_call_of_no_sequences_launches_nothing(name, machine):
    for operator, direction, draw in calls_of(name, b=0):
        for expected in (False, False, True):
            events, has_plan = compared(machine, operator, direction, draw())
            assert has_plan is expected and not events.devices
